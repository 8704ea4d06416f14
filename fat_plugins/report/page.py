"""The HTML page of a report."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from itertools import count
from statistics import mean
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fat_plugins.measure import scale_text, sqnr_text
from fat_plugins.report import plots
from fat_plugins.report.data import Check, OverTime, ReportData, Tensor
from fat_plugins.report.headline import between, change, shown, si

#: what quantizers say over time, in the order of the page; others follow by name
_FIRST = ("expected bits", "bits", "scale", "zeros")
#: layers beyond this many are drawn in a part of the page that is closed at first
_OPEN = 24
_DASH = "\N{EN DASH}"


def render(data: ReportData) -> str:
    """The page as text: one file, no script, nothing from the network. Every name in it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "shown": partial(shown, metric=data.metric),
        "change": partial(change, metric=data.metric),
        "si": si,
        "dash": _dash,
        "mean": mean,
        "between": partial(between, metric=data.metric),
    }
    source = files("fat_plugins.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    weights = [t for t in data.tensors if t.kind == "weight"]
    activations = [t for t in data.tensors if t.kind == "activation"]
    kinds = [(a.name, a.kind) for a in data.accuracy] + [(c.name, c.kind) for c in data.curves]
    return environment.from_string(source).render(
        r=data,
        float_row=next((a for a in data.accuracy if a.kind == "float"), None),
        runtimes=list(dict.fromkeys(name for a in data.accuracy for name in a.deployed)),
        colours=plots.colours(kinds),
        dots=plots.accuracy_dots(data.accuracy, data.metric) if any(len(a.torch) > 1 for a in data.accuracy) else "",
        curves=plots.training_curves(data.curves, data.metric) if data.curves else "",
        weights=[_layer(t, weights) for t in weights],
        activations=[_layer(t, activations) for t in activations],
        kernels=any(t.kernel for t in weights),
        plots_open=len(data.tensors) <= _OPEN,
        figures=_figures(data),
        history=list(_history(data.over_time)),
        checks=[(c, _sums(c)) for c in data.checks],
        legend=[(name, plots.colours(kinds)[name]) for name in dict.fromkeys(c.name for c in data.curves)],
    )


def _dash(value: Any) -> str:
    """A dash for what is not known."""
    return _DASH if value is None or value == "" else f"{value:,}" if isinstance(value, int) else str(value)


def _decibels(value: float | None) -> str:
    return _DASH if value is None else sqnr_text(value).replace("-", "\N{MINUS SIGN}")


def _share(value: int | None, rows: list[Tensor], key: str) -> float:
    """Percent of the largest of a column, for bars in a table."""
    largest = max((getattr(r, key) or 0 for r in rows), default=0)
    return 100 * (value or 0) / largest if largest else 0.0


def _layer(tensor: Tensor, rows: list[Tensor]) -> dict[str, Any]:
    """What the page shows of one tensor."""
    import torch

    used = None if tensor.codes_used is None else f"{tensor.codes_used} of {tensor.codes}"
    return {
        "t": tensor,
        "shape": "\N{MULTIPLICATION SIGN}".join(map(str, tensor.shape)),
        "scale": scale_text(torch.tensor(tensor.scale)).replace(" to ", _DASH),
        "zeros": None if tensor.zeros is None else f"{100 * tensor.zeros:.1f} %",
        "used": used,
        "sqnr": _decibels(tensor.sqnr_db),
        "mse": None if tensor.relative_mse is None else f"{tensor.relative_mse:.1e}",
        "float_sqnr": _decibels(tensor.float_sqnr_db),
        "clipped": None if tensor.clipped is None else f"{100 * tensor.clipped:.2f} %",
        "bytes_share": _share(tensor.bytes, rows, "bytes"),
        "bops_share": _share(tensor.bops, rows, "bops"),
        "plot": plots.tensor_plot(tensor),
    }


def _figures(data: ReportData) -> list[tuple[str, list[Markup]]]:
    """Figures of the algorithms by title."""
    numbers, groups = count(), {}
    for figure in data.figures:
        groups.setdefault((figure.title, figure.kind), []).append(figure)
    drawn = []
    for (title, kind), figures in groups.items():
        limits = plots.common_limits(figures) if kind == "image" else None
        drawn.append((title, [plots.drawing(figure, next(numbers), limits) for figure in figures]))
    return drawn


def _history(rows: list[OverTime]):
    """Title and plot of everything that changed while training ran."""
    for kind, title in (("network", "network"), ("weight", "weights"), ("activation", "activations")):
        of_kind = [row for row in rows if row.kind == kind]
        keys = list(dict.fromkeys(key for row in of_kind for key in row.values))
        for key in sorted(keys, key=lambda k: (_FIRST.index(k) if k in _FIRST else len(_FIRST), k)):
            own = [row for row in of_kind if key in row.values]
            if not any(_changes(row.values[key]) for row in own):
                continue
            name = f"{key}, {title}"
            factor = 1.0
            if key == "scale":
                own, name = [_relative(row, key) for row in own], f"scale / that of epoch 1, {title}"
            elif key == "zeros":
                name, factor = f"zeros, %, {title}", 100.0
            yield plots.over_time(name, own, key, factor)


def _changes(values: list[float | None]) -> bool:
    known = [v for v in values if v is not None]
    return len(known) > 1 and max(known) - min(known) > 1e-6 * max(abs(v) for v in known)


def _relative(row: OverTime, key: str) -> OverTime:
    """Over the first value, since scales of layers are of all magnitudes."""
    values = row.values[key]
    first = next((v for v in values if v), None)
    return row.model_copy(update={"values": {key: [v / first if v is not None and first else None for v in values]}})


def _sums(check: Check) -> dict[str, int]:
    keys = ("compared", "differences", "ties")
    return {key: sum(getattr(row, key) or 0 for row in check.rows) for key in keys}


__all__ = ["render"]
