"""Every quantized tensor of a trained model in numbers: grid, codes, error, cost. No host and no file is known here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fat_plugins.forms import Form, Staircase, SumOfGrids, UniformGrid, form_kind
from fat_plugins.frozen import FrozenActivation, FrozenWeight, frozen_modules
from fat_plugins.functional import per_channel_view
from fat_plugins.measure import code_count, error_of, packed_bytes
from fat_plugins.network import named_quantizers
from fat_plugins.placed import float_weights
from fat_plugins.quantizer import Quantizer, WeightQuantizer
from fat_plugins.report.data import Codes, Histogram, Totals
from fat_plugins.report.data import Tensor as Row
from fat_plugins.report.trace import Costs, trace

#: bins of a histogram
_BINS = 80
#: grids of more levels are shown without single levels and thresholds
_MOST_LEVELS = 64
#: elements of an activation that its histogram looks at
_MOST_VALUES = 2**18
_FLOAT_BITS = 32


@torch.no_grad()
def tensor_rows(
    model: nn.Module, frozen: nn.Module, samples: Tensor, floats: Mapping[str, Tensor] | None = None
) -> tuple[list[Row], Totals]:
    """Rows of all tensors, weights in the order in which they run, and the cost of one forward.

    :param model: the trained model, and ``frozen``, the host's frozen copy of it.
    :param samples: inputs that the activations are looked at with.
    :param floats: state dict of the float network that training began with.
    """
    weights = float_weights(model)
    quantizers = {(q.spec.role, q.spec.name or path): q for path, q in named_quantizers(model)}
    seen = _Activations(frozen)
    with seen:
        costs = trace(frozen, samples)
    modules = list(frozen_modules(frozen))
    bits = {m.name: m.form.bits for m in modules if isinstance(m, FrozenActivation) and m.form is not None}
    rows = {}
    for module in modules:
        if module.form is None:
            continue
        kind = "weight" if isinstance(module, FrozenWeight) else "activation"
        quantizer = quantizers.get((kind, module.name))
        if isinstance(module, FrozenWeight):
            row = _weight_row(module, quantizer, weights.get(quantizer))
            _against_float(row, module, floats or {})
        else:
            row = seen.row(module)
        row.algorithm = quantizer.algorithm if quantizer is not None else ""
        rows[kind, module.name] = row
    for layer in costs.layers:
        row = rows["weight", layer.name]
        row.macs, row.input = layer.macs, layer.input
        row.input_bits = bits.get(layer.input, _FLOAT_BITS)
        row.bops = layer.macs * row.bits * row.input_bits
    order = {layer.name: i for i, layer in enumerate(costs.layers)}
    readers = {layer.input: i - 0.5 for i, layer in reversed(list(enumerate(costs.layers)))}
    place = {"weight": order, "activation": readers}
    found = sorted(rows.items(), key=lambda item: place[item[0][0]].get(item[0][1], len(order)))
    return [row for _, row in found], _totals([row for _, row in found], costs)


def _totals(rows: list[Row], costs: Costs) -> Totals:
    macs = sum(row.macs or 0 for row in rows)
    square = _FLOAT_BITS**2
    bops = sum(row.bops or 0 for row in rows) + costs.float_macs * square
    return Totals(macs=macs, float_macs=costs.float_macs, bops=bops, float_bops=(macs + costs.float_macs) * square)


def _row(name: str, kind: str, form: Form) -> Row:
    return Row(
        name=name,
        kind=kind,
        bits=form.bits,
        form=form_kind(form),
        scale=(float(form.scale.min()), float(form.scale.max())),
        channels=form.scale.numel(),
        codes=code_count(form),
    )


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
def _weight_row(module: FrozenWeight, quantizer: Quantizer | None, weight: Tensor | None) -> Row:
    form, codes = module.form, module.codes.cpu()
    value = form.decode(codes)
    row = _row(module.name, "weight", form)
    used = codes.unique()
    row.bits = quantizer.bits if quantizer is not None else form.bits
    row.shape = list(codes.shape)
    row.zeros = float((value == 0).double().mean())
    row.code_range, row.codes_used = (int(used[0]), int(used[-1])), used.numel()
    row.bytes = packed_bytes(codes.numel(), form)
    row.code_histogram = _codes(codes, value, isinstance(form, SumOfGrids))
    rounded = value
    if isinstance(quantizer, WeightQuantizer) and weight is not None and not quantizer.owns_weight:
        rounded = quantizer.rounded(weight).detach().float().cpu()
        error = error_of(rounded, value, fit=True)
        if error is not None:
            row.sqnr_db, row.relative_mse = error.sqnr_db, error.relative_mse
    row.histogram = _weight_histogram(rounded, value, codes, form)
    return row


def _against_float(row: Row, module: FrozenWeight, floats: Mapping[str, Tensor]) -> None:
    start = floats.get(f"{module.name}.weight")
    if start is None or tuple(start.shape) != tuple(module.codes.shape):
        return
    error = error_of(start, module.form.decode(module.codes), fit=True)
    if error is not None:
        row.float_sqnr_db, row.float_relative_mse = error.sqnr_db, error.relative_mse
        row.float_gain = error.gain


def _codes(codes: Tensor, value: Tensor, packed: bool) -> Codes:
    """Counts of codes in the order of their levels: of packed codes of sums that of their mean values."""
    found, index, counts = codes.flatten().unique(return_inverse=True, return_counts=True)
    if not packed:
        return Codes(codes=found.tolist(), counts=counts.tolist())
    mean = torch.zeros(found.numel(), dtype=torch.float64)
    mean.index_add_(0, index, value.detach().double().flatten().cpu())
    order = (mean / counts).argsort()
    return Codes(codes=found[order].tolist(), counts=counts[order].tolist())


def _weight_histogram(rounded: Tensor, value: Tensor, codes: Tensor, form: Form) -> Histogram:
    several = form.scale.numel() > 1
    unit = form.scale.detach().cpu().double()
    if isinstance(form, SumOfGrids):
        unit = torch.stack([p.scale.detach().cpu().double().expand(unit.numel()) for p in form.parts]).sum(0)
    view = per_channel_view(unit, value.ndim, form.channel_axis) if several else torch.ones((), dtype=torch.float64)
    x, levels = (rounded.double() / view).flatten(), (value.double() / view).flatten()
    edges, counts = _bins(torch.cat([x, levels[:1]]) if x.numel() else levels)
    histogram = Histogram(unit="step" if several else "value", edges=edges, counts=counts)
    distinct = levels.float().unique().double()  # rounding of the division aside
    if distinct.numel() <= _MOST_LEVELS and not (several and isinstance(form, SumOfGrids)):
        histogram.levels = _digits(distinct)
        histogram.thresholds = _thresholds(x, levels.float().double(), distinct)
    return histogram


def _thresholds(x: Tensor, levels: Tensor, distinct: Tensor) -> list[float]:
    """Where the values of one level end and those of the next begin: half-way between the levels where the data allow
    it, else between the data; empty where values of two levels overlap, so that the value alone does not decide."""
    index = torch.searchsorted(distinct, levels)
    low = torch.full_like(distinct, torch.inf).scatter_reduce(0, index, x, "amin")
    high = torch.full_like(distinct, -torch.inf).scatter_reduce(0, index, x, "amax")
    slack = 1e-5 * (distinct[-1] - distinct[0])  # of float32 divisions
    if bool((high[:-1] > low[1:] + slack).any()):
        return []
    middle = (distinct[:-1] + distinct[1:]) / 2
    fits = (middle >= high[:-1] - slack) & (middle <= low[1:] + slack)
    return _digits(torch.where(fits, middle, (high[:-1] + low[1:]) / 2))


def _bins(x: Tensor) -> tuple[list[float], list[int]]:
    low, high = float(x.min()), float(x.max())
    if not low < high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(x.float(), _BINS, low, high).long()
    return _digits(torch.linspace(low, high, _BINS + 1, dtype=torch.float64)), counts.tolist()


def _digits(x: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in x.tolist()]


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class _Activations:
    """Keeps what passes through the frozen activations of a model while it is entered."""

    def __init__(self, frozen: nn.Module) -> None:
        self._modules = [m for m in frozen_modules(frozen) if isinstance(m, FrozenActivation) and m.form is not None]
        self._inputs: dict[str, Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> _Activations:
        for module in self._modules:
            self._hooks.append(module.register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: FrozenActivation, args: tuple, _out: Tensor) -> None:
        self._inputs.setdefault(module.name, args[0].detach())

    def row(self, module: FrozenActivation) -> Row:
        """Numbers of one activation; those of the data are missing where the forward did not pass there."""
        row, x = _row(module.name, "activation", module.form), self._inputs.get(module.name)
        if x is None or not x.numel():
            return row
        form = module.form
        x = x.cpu().float()
        codes = form.encode(x)
        value = form.decode(codes)
        error = error_of(x, value, fit=True)
        if error is not None:
            row.sqnr_db, row.relative_mse = error.sqnr_db, error.relative_mse
        row.zeros = float((value == 0).double().mean())
        used = codes.unique()
        row.code_range, row.codes_used = (int(used[0]), int(used[-1])), used.numel()
        row.code_histogram = _codes(codes, value, False)
        levels, thresholds = _activation_grid(form)
        row.histogram = Histogram(levels=levels, thresholds=thresholds)
        flat = x.flatten()
        flat = flat[:: max(1, flat.numel() // _MOST_VALUES)]
        row.histogram.edges, row.histogram.counts = _bins(flat)
        row.clipped = _clipped(x, form)
        return row


def _integers(form: Form) -> Tensor:
    if isinstance(form, UniformGrid):
        return torch.arange(form.low, form.high + 1)
    return form.levels.cpu()


def _clipped(x: Tensor, form: Form) -> float:
    """Share of values so far outside that one more level would have taken them."""
    ends = _integers(form).double()
    margin = (ends[1] - ends[0]) / 2, (ends[-1] - ends[-2]) / 2
    r = x.double() / per_channel_view(form.scale.detach().cpu().double(), x.ndim, form.channel_axis)
    return float(((r < ends[0] - margin[0]) | (r > ends[-1] + margin[1])).double().mean())


def _activation_grid(form: Form) -> tuple[list[float], list[float]]:
    """Levels and thresholds of a form with one scale, where there are few enough to show."""
    integers = _integers(form).double()
    if form.scale.numel() > 1 or integers.numel() > _MOST_LEVELS:
        return [], []
    scale = form.scale.detach().cpu().double()
    thresholds = form.thresholds.cpu().double() if isinstance(form, Staircase) else (integers[1:] + integers[:-1]) / 2
    if thresholds.ndim > 1:  # every channel has its own
        return _digits(integers * scale), []
    return _digits(integers * scale), _digits(thresholds * scale)


__all__ = ["tensor_rows"]
