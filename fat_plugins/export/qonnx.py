"""QONNX of a frozen model, for FINN and every other reader of ``Quant``, ``BipolarQuant`` and ``MultiThreshold``.

Weights are constants that hold the quantized values already, so a reader that quantizes them once more changes nothing.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from fat_plugins.errors import ExportError
from fat_plugins.export import _onnx
from fat_plugins.export._onnx import Entry, Grid, channel_view
from fat_plugins.export._onnx_file import ModelFile, Runner, load
from fat_plugins.export._onnx_file import execute as _execute
from fat_plugins.export._onnx_graph import Graph, need, onnx
from fat_plugins.export.common import ExportReport, first_line, reading, threshold_table
from fat_plugins.export.verify import VerifyReport, compare
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid

_DOMAIN = "qonnx.custom_op.general"
#: FINN takes neither of them in front of an unsigned quantizer
_CLIP = "a Clip stays in front of it, which FINN does not take"

#: a step of several levels repeats its threshold up to this many in all; FINN builds no more than 8 bits anyway
_MOST_THRESHOLDS = 255


def export(
    frozen_model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write ``path`` (``.onnx``).

    :param frozen_model: a model whose quantizers are :class:`~fat_plugins.frozen.FrozenWeight` and
        :class:`~fat_plugins.frozen.FrozenActivation`; it is put into evaluation mode.
    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :param dynamic_batch: leave the first dimension of every input open; FINN wants ``False`` and a batch of 1.
    :raises ExportError: onnx is missing, the path cannot be written, a quantizer is uncalibrated or unfit, or torch
        cannot export the model. No file is touched then.
    """
    return _onnx.write(_QONNX(), frozen_model, path, example_input, dynamic_batch)


def verify(frozen_model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4) -> VerifyReport:
    """Compare a frozen torch model with the file that :func:`export` wrote, executed by qonnx.

    :param inputs, tie_guard: as in :func:`fat_plugins.export.verify.verify`.
    :raises ExportError: qonnx is missing, unreadable file, a file of another model, or inputs that it refuses.
    """
    need("qonnx.core.onnx_exec")
    versions = {name: version(name) for name in ("qonnx", "onnxruntime")}
    with reading(path):
        target = ModelFile(path, "qonnx", versions, _runner, _integers)
        return compare(frozen_model, target, path, inputs, tie_guard)


def execute(path: str | os.PathLike, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a file for one batch, executed by qonnx.

    :param inputs: float32 arrays, one per input.
    :raises ExportError: qonnx is missing, unreadable file, or inputs that it refuses.
    """
    need("qonnx.core.onnx_exec")
    return _execute(load(path), inputs, _runner, "qonnx")


# --------------------------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------------------------
class _QONNX:
    """See :class:`fat_plugins.export._onnx.Dialect`."""

    name, opset = "QONNX", 13
    domains = {_DOMAIN: 1}

    def prepare(self, graph: Graph, entries: list[Entry]) -> None:
        """A Clip whose upper end no quantizer behind it can see becomes the ReLU that FINN takes."""
        by_tensor = {e.node.output[0]: e for e in entries if e.kind == "activation"}
        for node in [n for n in graph.nodes if n.op_type == "Clip" and len(n.input) == 3]:
            low, high = (graph.value(name) for name in node.input[1:])
            out = node.output[0]
            behind = [by_tensor.get(n.output[0]) for n, _ in graph.readers(out)]
            if low is None or high is None or float(low) != 0 or not any(behind):
                continue
            unseen = all(e and _saturates(e.module.form, float(high)) for e in behind)
            if unseen and out not in graph.output_names:
                node.op_type = "Relu"
                del node.input[1:], node.attribute[:]
            else:
                for entry in filter(None, behind):
                    entry.notes.append(_CLIP)

    def complete(self, graph: Graph, entries: list[Entry]) -> None:
        """Nothing."""

    def storage(self, form: UniformGrid | Codebook) -> tuple[str, int]:
        """QONNX has floats only; the width of the integers is an input of the node."""
        return "f32", 32

    def weight(self, graph: Graph, grid: Grid, name: str) -> str:
        """``Quant`` on quantized values, ``BipolarQuant`` where these are plus and minus one scale."""
        if not bool((grid.scale > 0).all()):
            raise ExportError(f"{name}: the scale of a weight must be positive in QONNX, got {grid.scale.min():.3g}")
        form, view = grid.form, grid.view
        out = graph.fresh(name)
        constant = graph.constant(f"{name}.values", grid.integers.astype(np.float32) * view)
        scale = graph.constant(f"{name}.scale", view)
        graph.describe(out, shape=grid.integers.shape)
        if isinstance(form, Codebook) and form.levels.tolist() == [-1, 1]:
            graph.add("BipolarQuant", [constant, scale], out, out, domain=_DOMAIN)
            return out
        if isinstance(form, UniformGrid):
            container = _container(form.low, form.high, form.bits, form.narrow)
        else:
            container = _container(int(form.levels[0]), int(form.levels[-1]), 1, True)
        _quant(graph, constant, scale, out, name, container)
        return out

    def activation(self, graph: Graph, form: Form, source: str, out: str, entry: Entry) -> list[Any]:
        """``Quant`` for a uniform grid; ``MultiThreshold``, Add and Mul for any other steps."""
        rank = graph.rank(out)
        if isinstance(form, UniformGrid) and form.signed and form.bits == 1:
            form = _two_codes(form)
        if form.scale.numel() > 1:
            entry.notes.append("one scale per channel, which FINN does not take behind an activation")
        if not isinstance(form, UniformGrid) and form.channels > 1 and rank not in (2, 4):
            raise ExportError(f"{entry.name}: thresholds per channel of a tensor of rank {rank}; allowed: 2, 4")
        view = channel_view(form.scale.detach().cpu().float().numpy(), rank or 1, form.channel_axis)
        if not isinstance(form, UniformGrid):
            return _steps(graph, form, view, source, out, entry)
        scale = graph.constant(f"{entry.name}.scale", view)
        container = _container(form.low, form.high, form.bits, form.narrow)
        return [_quant(graph, source, scale, out, entry.name, container)]


def _saturates(form: Form, value: float) -> bool:
    """Whether ``value`` has the last code, so that nothing above it can have another one."""
    probe = torch.full((1,) * max(2, form.channel_axis + 1), value)
    lowest = form.low if isinstance(form, UniformGrid) else int(form.levels[0])
    last = form.high if isinstance(form, UniformGrid) else form.levels.numel() - 1
    return form.scale.numel() == 1 and lowest == 0 and int(form.encode(probe)) == last


def _container(low: int, high: int, bits: int, narrow: bool) -> tuple[int, bool, bool]:
    """Bits, sign and narrow range of the smallest integer that has ``low .. high``, at least ``bits`` wide.

    A signed integer of one bit means -1 and +1 to QONNX, so a grid of -1 and 0 takes two bits.
    """
    if low >= 0:
        bits = max(bits, high.bit_length(), 1)
        return bits, False, narrow and high == 2**bits - 2
    while -(2 ** (bits - 1)) > low or 2 ** (bits - 1) - 1 < high or bits < 2:
        bits += 1
    return bits, True, narrow and low > -(2 ** (bits - 1))


def _two_codes(form: UniformGrid) -> Staircase:
    """A grid of the codes -1 and 0, which no Quant node has. Its tie, -0.5, is rounded to the upper code."""
    tie = torch.nextafter(torch.tensor([-0.5]), torch.tensor([-1.0]))
    return Staircase(1, torch.tensor([-1, 0]), tie.double(), form.scale, form.channel_axis)


def _quant(graph: Graph, source: str, scale: str, out: str, name: str, container: tuple[int, bool, bool]) -> Any:
    bits, signed, narrow = container
    inputs = [source, scale, graph.constant(f"{name}.zero_point", 0.0), graph.constant(f"{name}.bits", float(bits))]
    how = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
    return graph.add("Quant", inputs, out, graph.fresh(f"{name}.quant"), domain=_DOMAIN, **how)


def _signs(graph: Graph, form: Any, reached: np.ndarray, source: str, out: str, name: str) -> Any:
    """``BipolarQuant`` (x >= 0 gives +1) behind a shift, which FINN folds into its thresholds."""
    shift = graph.constant(f"{name}.shift", channel_view(-reached, graph.rank(out) or 1, form.channel_axis))
    shifted = graph.fresh(f"{name}.shifted")
    first = graph.add("Add", [source, shift], shifted, shifted, like=out)
    one = graph.constant(f"{name}.scale", 1.0)
    graph.add("BipolarQuant", [shifted, one], out, graph.fresh(f"{name}.sign"), domain=_DOMAIN)
    return first


def _steps(graph: Graph, form: Any, view: np.ndarray, source: str, out: str, entry: Entry) -> list[Any]:
    """Count thresholds, add the lowest level, multiply by the scale. A step of several levels repeats its threshold."""
    name, levels = entry.name, form.levels.detach().cpu().numpy()
    # the smallest number above the threshold, since MultiThreshold counts those that are equal as well
    table, gaps = np.nextafter(threshold_table(form), np.float32(np.inf)), np.diff(levels)
    if levels.tolist() == [-1, 1] and form.scale.tolist() == [1]:
        return [_signs(graph, form, table[:, 0], source, out, name)]
    if gaps.sum() <= _MOST_THRESHOLDS:
        counted, first = _count(graph, np.repeat(table, gaps, axis=1), source, out, name)
        nodes = [first]
    else:
        span = f"levels {levels[0]} .. {levels[-1]} take more than {_MOST_THRESHOLDS} thresholds"
        entry.notes.append(f"{span}: one MultiThreshold per height of a step, which FINN does not take")
        counted, nodes = _count_by_height(graph, table, gaps, source, out, name)
    if levels[0] != 0:
        shifted = graph.fresh(f"{name}.level")
        graph.add("Add", [counted, graph.constant(f"{name}.lowest", float(levels[0]))], shifted, shifted, like=out)
        counted = shifted
    graph.add("Mul", [counted, graph.constant(f"{name}.scale", view)], out, graph.fresh(f"{name}.scaled"))
    return nodes


def _count(graph: Graph, table: np.ndarray, source: str, like: str, name: str) -> tuple[str, Any]:
    """How many thresholds lie at or below each element: the tensor and its node."""
    out, most = graph.fresh(f"{name}.count"), table.shape[1]
    how = {"out_dtype": "BINARY" if most == 1 else f"UINT{most.bit_length()}", "out_scale": 1.0, "out_bias": 0.0}
    inputs = [source, graph.constant(f"{name}.thresholds", table)]
    node = graph.add("MultiThreshold", inputs, out, graph.fresh(f"{name}.threshold"), like=like, domain=_DOMAIN, **how)
    return out, node


def _count_by_height(
    graph: Graph, table: np.ndarray, gaps: np.ndarray, source: str, like: str, name: str
) -> tuple[str, list[Any]]:
    """The same sum with every threshold once: counted apart for each height of a step, times that height."""
    terms, nodes = [], []
    for height in np.unique(gaps):
        counted, node = _count(graph, table[:, gaps == height], source, like, f"{name}.{height}")
        term = graph.fresh(f"{name}.{height}.height")
        graph.add("Mul", [counted, graph.constant(f"{term}.value", float(height))], term, term, like=like)
        terms, nodes = [*terms, term], [*nodes, node]
    return graph.sum(terms, name, graph.info(like)), nodes


# --------------------------------------------------------------------------------------------------------------------
# execution
# --------------------------------------------------------------------------------------------------------------------
def _runner(proto: Any) -> Runner:
    """qonnx wants every shape: the graph is completed for each new shape of its inputs."""
    need("qonnx.core.onnx_exec")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    ready: dict[tuple, Any] = {}

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = tuple((name, value.shape) for name, value in feeds.items())
        try:
            if key not in ready:
                ready.clear()
                # no cleanup: qonnx 0.4 drops nodes that stand alone between an input and an output
                ready[key] = ModelWrapper(_with_shapes(proto, feeds)).transform(InferShapes(), cleanup=False)
            # a huge number by a small scale is infinite in torch as well, and gets the last code
            with warnings.catch_warnings(), np.errstate(over="ignore"):
                # said where a shape is computed in the graph and so unknown before the run; the real one is then used
                warnings.filterwarnings("ignore", message="Output shapes disagree")
                return execute_onnx(ready[key], feeds)
        except Exception as error:
            raise ExportError(f"qonnx refuses the inputs: {first_line(error)}") from error

    return run


def _with_shapes(proto: Any, feeds: dict[str, np.ndarray]) -> Any:
    """A copy whose inputs have the shapes of ``feeds`` and that says nothing about any other tensor."""
    copy, helper = onnx().ModelProto(), onnx().helper
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    for place in copy.graph.input:
        kind = place.type.tensor_type.elem_type
        expected = [d.dim_value for d in place.type.tensor_type.shape.dim]
        given = feeds[place.name].shape
        if expected and (
            len(expected) != len(given) or any(e and e != g for e, g in zip(expected, given, strict=False))
        ):
            raise ExportError(f"input {place.name!r} has the shape {list(given)}; allowed: {expected} (0 is any)")
        place.CopyFrom(helper.make_tensor_value_info(place.name, kind, given))
    for place in copy.graph.output:
        place.type.tensor_type.ClearField("shape")
    return copy


def _integers(graph: Graph, tensor: str, values: np.ndarray) -> np.ndarray:
    """Integers of a weight: its executed values by the scale that stands in the file."""
    node = next(n for n in graph.nodes if tensor in n.output)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.rint(values / graph.value(node.input[1]))
