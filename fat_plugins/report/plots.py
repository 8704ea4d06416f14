"""Figures of a report as inline SVG: text stays text, nothing is fetched, the same data give the same bytes.

Colours are those of Okabe and Ito, which people with any colour vision tell apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from fat_plugins.report.data import Accuracy, Codes, Curve, Drawing, Histogram, Metric, OverTime, Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#1f2933", "#7b8794", "#cbd2d9"
#: two plots side by side without vertical labels
_TWO = {"left": 0.03, "right": 0.97, "bottom": 0.15, "top": 0.87, "wspace": 0.1}
_LONG = re.compile(r"-?\d+\.\d{3,}")
_OTHERS = (ORANGE, GREEN, PURPLE, RED, SKY)
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlepad": 4,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
}


class _Sheet:
    """One figure being drawn; :attr:`svg` afterwards."""

    def __init__(self, width: float, height: float, columns: int, margins: dict[str, float] | None) -> None:
        self.canvas = Canvas(figsize=(width, height), layout=None if margins else "constrained")
        if margins:
            self.canvas.subplots_adjust(**margins)
        self.canvas.patch.set_alpha(0)
        FigureCanvasSVG(self.canvas)
        axes = self.canvas.subplots(1, columns, squeeze=False)[0]
        self.axes: list[Axes] = list(axes)
        for axis in self.axes:
            axis.patch.set_alpha(0)
        self.svg = Markup("")


@contextmanager
def _sheet(
    name: str, width: float, height: float, columns: int = 1, margins: dict[str, float] | None = None
) -> Iterator[_Sheet]:
    """Draw one figure.

    :param name: tells the identifiers inside apart from those of other figures on the page.
    :param margins: where the axes stand, in parts of the figure; default: as labels need it, which takes as long as
        drawing.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        sheet = _Sheet(width, height, columns, margins)
        yield sheet
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        sheet.canvas.savefig(file, format="svg", metadata=nothing)
        sheet.svg = _inline(file.getvalue(), name)


def _inline(svg: str, label: str) -> Markup:
    """The ``<svg>`` element without what only a file needs: declarations, namespaces, a fixed size.

    Every text in it was escaped by matplotlib, every label is by us.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    # a hundredth of a point is enough on paper; the numbers between the tags are labels
    rest = re.sub(r"<[^>]*>", lambda tag: _LONG.sub(_short, tag[0]), rest)
    return Markup(head) + Markup(' role="img" aria-label="{}">').format(label) + Markup(rest)


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _quiet(axis: Axes) -> None:
    """An axis of which only the horizontal positions matter."""
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


# --------------------------------------------------------------------------------------------------------------------
# the run
# --------------------------------------------------------------------------------------------------------------------
def colours(names: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A colour for every variant, given as name and kind."""
    others = iter(_OTHERS * (len(names) // len(_OTHERS) + 1))
    fixed = {"own": BLUE, "float": GREY}
    return {name: fixed.get(kind) or next(others) for name, kind in dict.fromkeys(names)}


def accuracy_dots(rows: Sequence[Accuracy], metric: Metric) -> Markup:
    """One line per variant: a dot for every seed, a bar at their mean."""
    colour = colours([(row.name, row.kind) for row in rows])
    with _sheet(f"{metric.name} by seed", 5.2, 0.55 + 0.27 * len(rows)) as sheet:
        (axis,) = sheet.axes
        for y, row in enumerate(rows):
            values = [metric.factor * v for v in row.torch]
            axis.plot(values, [y] * len(values), "o", color=colour[row.name], ms=5.5, alpha=0.75, mec="none")
            axis.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=colour[row.name], lw=2)
        axis.set_yticks(range(len(rows)), [_text(row.name) for row in rows])
        axis.tick_params(axis="y", labelcolor=INK, length=0)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.grid(axis="x", color=PALE, lw=0.5, alpha=0.6)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(f"{metric.name}, {metric.unit}")
    return sheet.svg


def training_curves(curves: Sequence[Curve], metric: Metric) -> Markup:
    """Loss, metric and learning rate over all epochs: float training first, then every variant from there on."""
    colour = colours([(c.name, c.kind) for c in curves])
    begin = max((len(c.epochs) for c in curves if c.kind == "float"), default=0)
    judged = (("train_accuracy", "-", metric.factor), ("validation_accuracy", ":", metric.factor))
    panels = (
        ("Loss", "epoch", (("train_loss", "-", 1.0), ("validation_loss", ":", 1.0))),
        (f"{metric.title}, {metric.unit}", "epoch", judged),
        ("Learning rate", "epoch", (("lr", "-", 1.0),)),
    )
    with _sheet("training curves", 10.2, 2.6, 3) as sheet:
        for axis, (title, label, lines) in zip(sheet.axes, panels, strict=True):
            done: dict[tuple[str, int], int] = {}
            for curve in curves:
                start = 0 if curve.kind == "float" else done.setdefault((curve.name, curve.seed), begin)
                x = np.arange(1, len(curve.epochs) + 1) + start
                if curve.kind != "float":
                    done[curve.name, curve.seed] = start + len(curve.epochs)
                for key, style, factor in lines:
                    y = [np.nan if (v := getattr(e, key)) is None else factor * v for e in curve.epochs]
                    one = {"marker": "o", "ms": 3} if len(y) == 1 else {}
                    axis.plot(x, y, style, color=colour[curve.name], lw=1.3, alpha=0.85, **one)
                    first = None if curve.before is None else getattr(curve.before, key)
                    if first is not None:
                        axis.plot(start + 0.5, factor * first, "o", mfc="white", mec=colour[curve.name], ms=3.5, mew=1)
            if begin and any(c.kind != "float" for c in curves):
                axis.axvline(begin + 0.5, color=PALE, lw=0.8, zorder=0)
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axis.grid(axis="y", color=PALE, lw=0.5, alpha=0.6)
        sheet.axes[0].set_ylim(bottom=0)
    return sheet.svg


# --------------------------------------------------------------------------------------------------------------------
# layers
# --------------------------------------------------------------------------------------------------------------------
def tensor_plot(tensor: Tensor) -> Markup:
    """Left: values, with levels and thresholds. Right: how often every code occurs."""
    colour = BLUE if tensor.kind == "weight" else GREEN
    with _sheet(f"{tensor.kind} {tensor.name}", 3.75, 1.5, 2, _TWO) as sheet:
        _values(sheet.axes[0], tensor.histogram, colour)
        _code_bars(sheet.axes[1], tensor.code_histogram, colour)
    return sheet.svg


def _values(axis: Axes, histogram: Histogram, colour: str) -> None:
    _quiet(axis)
    if histogram.edges:
        heights = np.sqrt(np.asarray(histogram.counts, dtype=float))  # so that tails are seen beside a peak
        axis.stairs(heights, histogram.edges, fill=True, color=colour, alpha=0.35, lw=0)
        axis.set_ylim(0, max(heights.max(), 1) * 1.12)
    top = axis.get_ylim()[1]
    if histogram.thresholds:
        axis.vlines(histogram.thresholds, 0, top * 0.9, color=INK, lw=0.5, ls=(0, (2, 2)), alpha=0.55)
    if histogram.levels:
        axis.plot(histogram.levels, np.zeros(len(histogram.levels)), "^", color=RED, ms=4, mec="none", clip_on=False)
    axis.set_title("Values" if histogram.unit == "value" else "Values, in steps")
    axis.xaxis.set_major_locator(MaxNLocator(5))


def _code_bars(axis: Axes, codes: Codes, colour: str) -> None:
    _quiet(axis)
    axis.set_title("Codes")
    if not codes.codes:  # of an activation that the samples did not reach
        axis.set_xticks([])
        return
    total = max(sum(codes.counts), 1)
    shares = [100 * n / total for n in codes.counts]
    positions = np.asarray(codes.codes)
    ascending = bool((np.diff(positions) > 0).all())
    if not ascending:  # packed codes, in the order of their levels
        positions = np.arange(len(codes.codes))
    if ascending and np.ptp(positions) > 40:  # an outline of so many bars says the same
        heights = np.zeros(np.ptp(positions) + 1)
        heights[positions - positions[0]] = shares
        axis.stairs(heights, np.arange(heights.size + 1) + positions[0] - 0.5, fill=True, color=colour, lw=0)
    else:
        axis.bar(positions, shares, color=colour, alpha=0.85, width=0.8)
    if ascending:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    else:
        shown = sorted({0, len(positions) // 2, len(positions) - 1})
        axis.set_xticks(shown, [str(codes.codes[i]) for i in shown])
    axis.set_title(f"peak {max(shares):.0f} %", loc="right", color=GREY, fontsize=8, fontweight="normal")


def over_time(title: str, rows: Sequence[OverTime], key: str, factor: float = 1.0) -> Markup:
    """One line per layer over the epochs, from dark (first layer) to light (last); values times ``factor``."""
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(rows), 2)))
    with _sheet(f"{title} {key}", 2.9, 1.8) as sheet:
        (axis,) = sheet.axes
        for row, shade in zip(rows, shades, strict=False):
            y = [np.nan if v is None else factor * v for v in row.values[key]]
            axis.plot(
                np.arange(1, len(y) + 1), y, color=shade, lw=1.3, **({"marker": "o", "ms": 3} if len(y) < 3 else {})
            )
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(axis="y", color=PALE, lw=0.5, alpha=0.6)
    return sheet.svg


def common_limits(figures: Sequence[Drawing]) -> tuple[float, float] | None:
    """One range of colours for images of one kind: the part of their limits that is in use, in tenths of it."""
    limits = figures[0].limits
    values = [v for figure in figures for row in figure.rows for v in row]
    if limits is None or not values:
        return limits
    low, high = limits
    tenth = (high - low) / 10
    first = low + tenth * np.floor(min(max((min(values) - low) / tenth, 0), 9))
    last = high - tenth * np.floor(min(max((high - max(values)) / tenth, 0), 9))
    return (first, last) if first < last else limits


def drawing(figure: Drawing, number: int, limits: tuple[float, float] | None = None) -> Markup:
    """A figure of an algorithm. ``number`` tells it apart from others of the same name; ``limits`` of its colours."""
    figure = figure if limits is None else figure.model_copy(update={"limits": limits})
    with _sheet(f"{figure.title}: {figure.layer} ({number})", 2.9, 1.9) as sheet:
        (axis,) = sheet.axes
        {"image": _image, "curve": _curve, "bars": _bars}[figure.kind](axis, figure, sheet)
        axis.set_title(_text(figure.layer))
        axis.set_xlabel(_text(figure.x_label))
        axis.set_ylabel(_text(figure.y_label))
    return sheet.svg


def _image(axis: Axes, figure: Drawing, sheet: _Sheet) -> None:
    low, high = figure.limits or (None, None)
    shown = axis.imshow(
        np.asarray(figure.rows), cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    sheet.canvas.colorbar(shown, ax=axis, fraction=0.05, pad=0.02).outline.set_visible(False)


def _curve(axis: Axes, figure: Drawing, _sheet: _Sheet) -> None:
    for (name, y), colour in zip(figure.series.items(), (ORANGE, BLUE, *_OTHERS[1:]), strict=False):
        axis.plot(figure.x, y, color=colour, label=_text(name))
    _finish(axis, figure)


def _bars(axis: Axes, figure: Drawing, _sheet: _Sheet) -> None:
    count = max(len(figure.series), 1)
    for i, ((name, y), colour) in enumerate(zip(figure.series.items(), (BLUE, *_OTHERS), strict=False)):
        axis.bar(
            np.arange(len(y)) + (i - (count - 1) / 2) * 0.8 / count, y, 0.8 / count, color=colour, label=_text(name)
        )
    wide = sum(len(str(n)) for n in figure.x) > 36
    axis.set_xticks(range(len(figure.x)), [_text(str(n)) for n in figure.x], rotation=60 if wide else 0)
    axis.tick_params(axis="x", length=0)
    _finish(axis, figure)


def _finish(axis: Axes, figure: Drawing) -> None:
    if figure.limits is not None:
        low, high = figure.limits
        axis.set_ylim(low, high + 0.04 * (high - low))
    if len(figure.series) > 1:
        axis.legend(loc="best", fontsize=7.5, handlelength=1.2)
    axis.grid(axis="y", color=PALE, lw=0.5, alpha=0.6)


def _text(text: str) -> str:
    """Names as they are: a dollar would begin a formula."""
    return text.replace("$", r"\$")


__all__ = ["accuracy_dots", "colours", "common_limits", "drawing", "over_time", "tensor_plot", "training_curves"]
