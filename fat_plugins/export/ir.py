"""Frozen model to OpenVINO graph: standard operations that keep codes packed and kernels integer.

The two custom operators of :mod:`fat_plugins.frozen` are first converted to placeholders that the frontend's own
passes leave alone; then each is replaced by its final sub-graph, in the layout that the consuming convolution or matmul
has after those passes, with a following batch norm folded into the scale. The spellings below were chosen because the
CPU plugin runs integer kernels for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

from fat_plugins.errors import ExportError
from fat_plugins.export import _ov
from fat_plugins.export.common import threshold_table, unique
from fat_plugins.export.fold import (
    average_in_float,
    constant_of,
    fold_affine,
    plain_max_pools,
    static_shape,
    sums_at_one_position,
    take_place,
    unsafe_in_integers,
)
from fat_plugins.export.packing import Storage, choose_storage, collapse
from fat_plugins.forms import Codebook, Form, UniformGrid, grids
from fat_plugins.frozen import FrozenActivation, FrozenWeight, frozen_modules

#: friendly names: a quantized layer has the layer's own name, its weight and the activation quantizers these prefixes;
#: what belongs to them inside is named ``<that>|<part>``
WEIGHT, QUANTIZE = "weight:", "quantize:"
_SHAPE_ONLY = ("Reshape", "Unsqueeze", "Squeeze")
LAYER_TYPES = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


@dataclass
class Entry:
    """One quantized tensor of the written graph, in the order of the trace."""

    kind: str  # "weight" or "activation"
    name: str
    module: Any
    tag: str
    storage: list[Storage] = field(default_factory=list)  # of every grid
    parts: int = 1
    readers: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)  # those readers that are a convolution or matmul
    notes: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> bool:
        """A further call of a weight that was reported before."""
        return self.kind == "weight" and self.name != self.module.name


class Converter:
    """Conversion extensions that write placeholders and remember what they stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {(type(m), m.name): m for m in frozen_modules(model)}
        self.entries: list[Entry] = []
        self._names: set[tuple[str, str]] = set()

    def extensions(self) -> list[Any]:
        """For ``openvino.convert_model(extension=...)``."""
        from openvino.frontend.pytorch import ConversionExtension

        return [
            ConversionExtension("fat_plugins::decode_weight", lambda context: self._weight(context, 6)),
            ConversionExtension("fat_plugins::decode_sum", lambda context: self._weight(context, 5)),
            ConversionExtension("fat_plugins::quantize_activation", self._activation),
        ]

    def _entry(self, kind: str, cls: type, name: str) -> tuple[Entry, int]:
        serial = len(self.entries) + 1
        entry = Entry(kind, unique(name, kind, self._names), self.modules[cls, name], f"fat_plugins:{serial}")
        self.entries.append(entry)
        return entry, serial

    def _weight(self, context: Any, name: int) -> Any:
        entry, serial = self._entry("weight", FrozenWeight, context.get_values_from_const_input(name))
        op = _ov.opset()
        # constant folding leaves 8-bit constants alone; the serial number keeps equal layers from being merged
        ones = op.convert(op.constant(np.ones(tuple(entry.module.codes.shape), np.int8)), "f32")
        node = op.multiply(ones, _ov.scalar(serial))
        node.set_friendly_name(entry.tag)
        return node.outputs()

    def _activation(self, context: Any) -> Any:
        entry, serial = self._entry("activation", FrozenActivation, context.get_values_from_const_input(7))
        # any elementwise operation with a parameter of its own that no pass of the frontend rewrites
        node = _ov.opset().selu(context.get_input(0), _ov.scalar(serial), _ov.scalar(1))
        node.set_friendly_name(entry.tag)
        return node.outputs()


def rewrite(model: Any, entries: list[Entry]) -> None:
    """Replace every placeholder of ``model`` in place.

    :raises ExportError: a placeholder did not survive the conversion.
    """
    nodes = {n.get_friendly_name(): n for n in model.get_ops()}
    for entry in entries:
        if entry.tag not in nodes:
            raise ExportError(f"{entry.name}: OpenVINO's conversion dropped the quantizer of this {entry.kind}")
    shared: dict[tuple, list[tuple[Any, Storage]]] = {}
    names: set[tuple[str, str]] = set()
    for entry in entries:  # first, as what a weight becomes may depend on the sign of its layer's input
        if entry.kind == "activation":
            _rewrite_activation(nodes[entry.tag], entry)
    for entry in entries:
        if entry.kind == "weight":
            _rewrite_weight(nodes[entry.tag], entry, shared, names)
    plain_max_pools(model)
    average_in_float(model)
    sums_at_one_position(model)


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _Use:
    """One place where a weight ends, and what stands between: the shape that it takes and the factor on its scale."""

    target: Any  # input of the consuming node
    shape: tuple[int, ...]
    scales: list[np.ndarray]  # of every grid, float64, broadcastable to shape


def _uses(output: Any, shape: tuple[int, ...], scales: list[np.ndarray]) -> Iterator[_Use]:
    for target in list(output.get_target_inputs()):
        node = target.get_node()
        kind, end = node.get_type_name(), node.output(0) if node.get_output_size() else None
        if kind == "Multiply":
            factor = constant_of(node.input_value(1 - target.get_index()))
            if factor is not None and static_shape(end) == shape:
                yield from _uses(end, shape, [s * factor for s in scales])
                continue
        if kind in _SHAPE_ONLY and target.get_index() == 0 and static_shape(end) is not None:
            new = static_shape(end)
            yield from _uses(end, new, [_reshaped(s, shape, new) for s in scales])
            continue
        yield _Use(target, shape, scales)


def _reshaped(scale: np.ndarray, shape: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    """A scale follows its weight through a reshape; one of one element fits any shape."""
    if scale.size == 1:
        return np.ones([1] * len(new)) * scale.reshape(-1)[0]
    return collapse(np.broadcast_to(scale, shape).reshape(new))


def _rewrite_weight(root: Any, entry: Entry, shared: dict, names: set) -> None:
    module: FrozenWeight = entry.module
    shape = tuple(module.codes.shape)
    parts = grids(module.form, module.codes.detach().cpu())
    entry.parts = len(parts)
    for use in list(_uses(root.output(0), shape, [_weight_scale(form, len(shape)) for form, _ in parts])):
        node = use.target.get_node()
        layer = unique(module.name, "layer", names)
        is_layer = node.get_type_name() in LAYER_TYPES and use.target.get_index() == 1
        factors = fold_affine(node, use.shape) if is_layer else None
        if factors is not None:
            use.scales = [s * factors for s in use.scales]
        floats = is_layer and unsafe_in_integers(node)
        key = (module.name, use.shape, floats)
        if key not in shared:
            shared[key] = [
                _integers(f, c, use.shape, n, floats)
                for (f, c), n in zip(parts, _names(module.name, len(parts)), strict=True)
            ]
        entry.storage = [storage for _, storage in shared[key]]
        terms = []
        for (values, _), scale, name in zip(shared[key], use.scales, weight_names(layer, len(parts)), strict=True):
            terms.append(_scaled(values, scale, name))
        if len(terms) > 1 and is_layer:
            entry.operations += _sum_of_layers(node, terms, layer)
        else:
            total = reduce(_ov.opset().add, terms)
            use.target.replace_source_output(total.output(0))
            if is_layer:
                node.set_friendly_name(layer)
                entry.operations.append(layer)
        if not is_layer:
            entry.notes.append(f"read by {node.get_type_name()}, not by a convolution or matmul")
        if floats:
            entry.notes.append(
                "a transposed convolution with a stride on signed inputs, where OpenVINO's integer kernel is not safe: "
                "runs in float"
            )
        entry.readers.append(layer)
    entry.notes += dict.fromkeys(s.note for s in entry.storage if s.note)
    if len(parts) > 1:
        entry.notes.append(f"a sum of {len(parts)} grids: as many layers, whose outputs are added")
    if module.levels.numel() and not _fits(module.levels, -128, 127):
        least, most = int(module.levels.min()), int(module.levels.max())
        entry.notes.append(f"levels {least} .. {most} do not fit 8 bits: runs in float")


def weight_names(layer: str, parts: int) -> list[str]:
    """Friendly names of a layer's decoded weight, one per grid."""
    return [f"{WEIGHT}{name}" for name in _names(layer, parts)]


def _names(layer: str, parts: int) -> list[str]:
    return [layer] if parts == 1 else [f"{layer}|{i}" for i in range(parts)]


def _weight_scale(form: Form, rank: int) -> np.ndarray:
    view = [1] * rank
    if form.scale.numel() > 1:
        view[form.channel_axis] = form.scale.numel()
    return form.scale.detach().cpu().double().numpy().reshape(view)


def _scaled(values: Any, scale: np.ndarray, name: str) -> Any:
    op = _ov.opset()
    real = values if values.get_element_type().to_string() == "f32" else op.convert(values, "f32").output(0)
    # a scale of one element is written as a scalar
    final = scale.astype(np.float32)
    weight = op.multiply(real, op.constant(final.reshape(()) if final.size == 1 else final))
    weight.set_friendly_name(name)
    return weight


def _sum_of_layers(node: Any, weights: list[Any], layer: str) -> list[str]:
    """Put one copy of ``node`` per weight in its place, outputs added: each keeps an integer kernel."""
    copies = [_ov.copy_with(node, [node.input_value(0), w.output(0)]) for w in weights]
    names = _names(layer, len(copies))
    for copy, name in zip(copies, names, strict=True):
        copy.set_friendly_name(name)
    total = reduce(_ov.opset().add, copies)
    total.set_friendly_name(layer)
    take_place(node.output(0), total.output(0))
    return names


def _fits(levels: Any, low: int, high: int) -> bool:
    return bool(low <= int(levels.min()) and int(levels.max()) <= high)


def _integers(
    form: UniformGrid | Codebook, codes: Any, shape: tuple[int, ...], name: str, floats: bool
) -> tuple[Any, Storage]:
    """Output with the integers of a grid, and how they are stored: i8, or f32 where 8 bits cannot hold them and with
    ``floats``."""
    if floats and isinstance(form, UniformGrid):  # what is looked up in a table of floats is no integer weight
        levels = torch.arange(form.low, form.high + 1)
        form, codes = Codebook(form.bits, levels, form.scale, form.channel_axis), codes - form.low
    op, codes = _ov.opset(), codes.numpy().reshape(shape)
    low, high = (form.low, form.high) if isinstance(form, UniformGrid) else (0, int(form.levels.numel()) - 1)
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ExportError(f"{name}: codes {codes.min()} .. {codes.max()} lie outside the form's {low} .. {high}")
    storage = choose_storage(low, high, _ov.storage_types())
    stored = _ov.packed_constant(codes + storage.zero_point, storage)
    stored.set_friendly_name(f"{WEIGHT}{name}|codes")
    if not isinstance(form, UniformGrid):
        levels = form.levels.numpy()
        table = levels.astype(np.int8 if _fits(levels, -128, 127) and not floats else np.float32)
        out = op.gather(op.constant(table), op.convert(stored, "i32"), _ov.scalar(0, np.int32))
    elif low < -128 or high > 127:
        out = op.convert(stored, "f32")
    else:
        # unpacking in 8 bits is what lets the plugin see an integer weight
        out = stored if storage.element == "i8" else op.convert(stored, "i8")
        if storage.zero_point:
            out = op.subtract(out, _ov.scalar(storage.zero_point, np.int8))
    out.set_friendly_name(f"{WEIGHT}{name}|integers")
    return out.output(0), storage


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
def _rewrite_activation(placeholder: Any, entry: Entry) -> None:
    source, form = placeholder.input_value(0), entry.module.form
    if isinstance(form, UniformGrid):
        out = _uniform(source, form, entry)
    else:
        out = _staircase(source, form, entry)
    out.set_friendly_name(f"{QUANTIZE}{entry.name}")
    take_place(placeholder.output(0), out.output(0))


def _scale(source: Any, form: Form) -> np.ndarray:
    """Scale as float64: a scalar, or a vector in a shape that broadcasts along the channel axis."""
    return _view(source, form, form.scale.detach().cpu().double().numpy())


def _view(source: Any, form: Form, values: np.ndarray) -> np.ndarray:
    """One value as a scalar, several in a shape that broadcasts along the channel axis."""
    if values.size == 1:
        return values.reshape(())
    view = [1] * source.get_partial_shape().rank.get_length()
    view[form.channel_axis] = values.size
    return values.reshape(view)


def _carrier(low: int, high: int) -> tuple[int, int]:
    """The 8-bit grid that holds integers ``low .. high`` (or their own grid when 8 bits do not reach)."""
    if low >= 0 and high <= 255:
        return 0, 255
    return (-128, 127) if low >= -128 and high <= 127 else (low, high)


def _fake_quantize(value: Any, scale: np.ndarray, low: int, high: int) -> Any:
    op = _ov.opset()
    least, most = op.constant((low * scale).astype(np.float32)), op.constant((high * scale).astype(np.float32))
    return op.fake_quantize(value, least, most, least, most, high - low + 1)


def _uniform(source: Any, form: UniformGrid, entry: Entry) -> Any:
    """Clamp to the codes' own range, then round on the 8-bit grid of the same step."""
    op, scale = _ov.opset(), _scale(source, form)
    low, high = _carrier(form.low, form.high)
    value = source
    if (low, high) != (form.low, form.high):
        if scale.ndim == 0:
            value = op.clamp(source, float(np.float32(form.low * scale)), float(np.float32(form.high * scale)))
        else:
            bounded = op.maximum(source, op.constant((form.low * scale).astype(np.float32)))
            bounded.set_friendly_name(f"{QUANTIZE}{entry.name}|low")
            value = op.minimum(bounded, op.constant((form.high * scale).astype(np.float32)))
        value.set_friendly_name(f"{QUANTIZE}{entry.name}|clamp")
    if scale.ndim:
        entry.notes.append("one scale per channel: its readers run in float")
    if high - low > 255:
        entry.notes.append("codes beyond 8 bits: its readers run in float")
    return _fake_quantize(value, scale, low, high)


def _staircase(source: Any, form: Any, entry: Entry) -> Any:
    """A sum of comparisons, exact, then the 8-bit grid as a carrier that changes nothing."""
    op, scale = _ov.opset(), _scale(source, form)
    levels, prefix = form.levels.detach().cpu().numpy(), f"{QUANTIZE}{entry.name}"
    thresholds = [_view(source, form, t) for t in threshold_table(form).T]
    if len(thresholds) > 8 and _ov.version() < (2025, 1) and form.channels == 1:
        total = _looked_up(source, thresholds, levels, prefix)
    else:
        total = _compared(source, thresholds, levels, prefix)
    value = op.multiply(total, op.constant(scale.astype(np.float32)))
    value.set_friendly_name(f"{prefix}|value")
    low, high = _carrier(int(levels[0]), int(levels[-1]))
    # a range of 256 integers or less that is not that of u8 or i8 would be stretched to one of them
    if high - low != 255 or scale.ndim:
        why = "one scale per channel" if scale.ndim else f"levels {levels[0]} .. {levels[-1]} do not fit 8 bits"
        entry.notes.append(f"{why}: its readers run in float")
        return value
    return _fake_quantize(value, scale, low, high)


def _compared(source: Any, thresholds: list[np.ndarray], levels: np.ndarray, prefix: str) -> Any:
    op, total = _ov.opset(), _ov.scalar(float(levels[0]))
    for i, (threshold, gap) in enumerate(zip(thresholds, np.diff(levels), strict=True)):
        above = op.greater(source, op.constant(threshold))
        one = op.convert(above, "f32")
        term = op.multiply(one, _ov.scalar(float(gap)))
        total = op.add(total, term)
        for node, part in ((above, "above"), (one, "one"), (term, "term"), (total, "sum")):
            node.set_friendly_name(f"{prefix}|{part}{i}")
    return total


def _looked_up(source: Any, thresholds: list[np.ndarray], levels: np.ndarray, prefix: str) -> Any:
    """The same as a binary search. Slower (2.1 against 0.5 ms on 200,000 elements with 15 levels), but OpenVINO 2024.6
    cannot compile more than about ten comparisons in a row."""
    op = _ov.opset()
    index = op.bucketize(source, op.constant(np.stack(thresholds)), output_type="i32")
    index.set_friendly_name(f"{prefix}|index")
    level = op.gather(op.constant(levels.astype(np.float32)), index, _ov.scalar(0, np.int32))
    level.set_friendly_name(f"{prefix}|level")
    return level
