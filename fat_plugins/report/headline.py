"""The few numbers on top of a report."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from fat_plugins.report.data import Accuracy, Metric, ReportData, Tile


def tiles(data: ReportData) -> list[Tile]:
    """What a reader looks for first; what is not known is left out."""
    return [*_accuracy(data), *_size(data), *_cost(data), *_kernels(data), *_codes(data)]


def shown(value: float, metric: Metric) -> str:
    """``98.64 %`` or ``31.20 dB``."""
    return f"{metric.factor * value:.2f} {metric.unit}"


def change(value: float, metric: Metric) -> str:
    """A difference: of two accuracies in percentage points, ``+0.12 pp``, with a real minus sign."""
    text = f"{metric.factor * value:+.2f} {metric.difference}"
    if text[1:5] == "0.00":
        return f"\N{PLUS-MINUS SIGN}{text[1:]}"
    return text.replace("-", "\N{MINUS SIGN}")


def spread(values: list[float], metric: Metric) -> str:
    """Lowest and highest of several seeds, empty for one."""
    if len(values) < 2:
        return ""
    return f"{metric.factor * min(values):.2f} to {shown(max(values), metric)} over {len(values)} seeds"


def between(values: list[float], metric: Metric) -> str:
    """Lowest and highest of several seeds without their number."""
    return spread(values, metric).partition(" over")[0]


def _of(data: ReportData, kind: str) -> list[Accuracy]:
    return [a for a in data.accuracy if a.kind == kind]


def _accuracy(data: ReportData) -> Iterator[Tile]:
    own, metric = (_of(data, "own") or _of(data, "baseline"))[:1], data.metric
    for row in own:
        yield Tile(title=metric.title, value=shown(mean(row.torch), metric), note=spread(row.torch, metric))
        for other in [*_of(data, "float"), *(b for b in _of(data, "baseline") if b is not row)]:
            gain = mean(row.torch) - mean(other.torch)
            note = f"{other.name}: {shown(mean(other.torch), metric)}"
            yield Tile(title=f"Against {other.name}", value=change(gain, metric), note=note)


def _size(data: ReportData) -> Iterator[Tile]:
    for row in _of(data, "own"):
        if row.weights_bytes:
            ratio = (row.float_bytes or 0) / row.weights_bytes
            yield Tile(title="Smaller weights", value=f"{ratio:.2f}\N{MULTIPLICATION SIGN}", note=bytes_text(row))
            return
    stored = sum(t.bytes or 0 for t in data.tensors)
    if stored:
        floats = sum(4 * count(t.shape) for t in data.tensors if t.kind == "weight")
        text = f"{stored:,} B of codes and scales, float32: {floats:,} B"
        yield Tile(title="Smaller weights", value=f"{floats / stored:.2f}\N{MULTIPLICATION SIGN}", note=text)


def bytes_text(row: Accuracy) -> str:
    """Sizes of one variant in words."""
    return f"{row.weights_bytes:,} B, float32: {row.float_bytes:,} B"


def count(shape: list[int]) -> int:
    """Elements of a tensor."""
    total = 1
    for n in shape:
        total *= n
    return total


def _cost(data: ReportData) -> Iterator[Tile]:
    if data.totals is not None and data.totals.bops:
        ratio = data.totals.float_bops / data.totals.bops
        text = f"{si(data.totals.bops)} BOPs for {si(data.totals.macs + data.totals.float_macs)} MACs"
        yield Tile(title="Fewer bit operations", value=f"{ratio:.0f}\N{MULTIPLICATION SIGN}", note=text)


def si(value: float) -> str:
    """``1.57 M``."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what three digits round up to it
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _kernels(data: ReportData) -> Iterator[Tile]:
    layers = [t for t in data.tensors if t.kind == "weight"]
    known = [t for t in layers if t.speed]
    if known:
        fast = sum(t.speed == "int8" for t in known)
        runtime = data.checks[0].runtime if data.checks else ""
        text = f"layers run on int8 kernels, {runtime}"
        yield Tile(title="Integer kernels", value=f"{fast} of {len(layers)}", note=text, good=fast == len(layers))


def _codes(data: ReportData) -> Iterator[Tile]:
    for check in data.checks:
        compared = sum(r.compared or 0 for r in check.rows)
        if check.verified is None or not compared:
            continue
        differing = sum(r.differences or 0 for r in check.rows)
        value = "all equal" if check.verified and not differing else f"{differing:,} differ"
        ties = sum(r.ties or 0 for r in check.rows)
        note = f"of {compared:,} codes, torch and {check.runtime}"
        if ties:
            note += f"; {ties:,} on a rounding threshold"
        yield Tile(title="Codes", value=value, note=note, good=check.verified)


__all__ = ["between", "change", "shown", "si", "spread", "tiles"]
