"""Standard ONNX of a frozen model, for ONNX Runtime: integers between QuantizeLinear and DequantizeLinear.

ONNX has no packed type that every runtime of the last years reads, so weights of 1 to 8 bits take 8 bits each.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import nn

from fat_plugins.errors import ExportError
from fat_plugins.export import _onnx
from fat_plugins.export._onnx import Entry, Grid, channel_view
from fat_plugins.export._onnx_file import ModelFile, Runner, load
from fat_plugins.export._onnx_file import execute as _execute
from fat_plugins.export._onnx_graph import Graph, need, tensors_read
from fat_plugins.export.common import ExportReport, first_line, reading, threshold_table
from fat_plugins.export.verify import VerifyReport, compare
from fat_plugins.forms import Codebook, Form, UniformGrid


def export(
    frozen_model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write ``path`` (``.onnx``): operator set 17, no operators but standard ones.

    :param frozen_model: a model whose quantizers are :class:`~fat_plugins.frozen.FrozenWeight` and
        :class:`~fat_plugins.frozen.FrozenActivation`; it is put into evaluation mode.
    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :param dynamic_batch: leave the first dimension of every input open.
    :raises ExportError: onnx is missing, the path cannot be written, a quantizer is uncalibrated, or torch cannot
        export the model. No file is touched then.
    """
    return _onnx.write(_QDQ(), frozen_model, path, example_input, dynamic_batch)


def verify(frozen_model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4) -> VerifyReport:
    """Compare a frozen torch model with the file that :func:`export` wrote, executed by ONNX Runtime on the CPU.

    The comparison layer by layer runs the graph as it was written; end to end it runs with the default optimisations,
    which may fuse integer layers and then round a value close to a tie differently.

    :param inputs, tie_guard: as in :func:`fat_plugins.export.verify.verify`.
    :raises ExportError: onnxruntime is missing, unreadable file, a file of another model, or inputs that it refuses.
    """
    versions = {"onnxruntime": need("onnxruntime").__version__}
    with reading(path):
        target = ModelFile(path, "ONNX Runtime", versions, _runner, _integers, _optimised)
        return compare(frozen_model, target, path, inputs, tie_guard)


def execute(path: str | os.PathLike, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a file for one batch, executed by ONNX Runtime on the CPU with its default optimisations.

    :param inputs: float32 arrays, one per input.
    :raises ExportError: onnxruntime is missing, unreadable file, or inputs that it refuses.
    """
    need("onnxruntime")
    return _execute(load(path), inputs, _optimised, "ONNX Runtime")


# --------------------------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------------------------
def _carrier(low: int, high: int) -> type | None:
    """The 8-bit type that holds ``low .. high``, ``None`` when neither does."""
    if low >= 0 and high <= 255:
        return np.uint8
    return np.int8 if low >= -128 and high <= 127 else None


def _ends(form: Form) -> tuple[int, int]:
    """Lowest and highest integer of a form."""
    return (form.low, form.high) if isinstance(form, UniformGrid) else (int(form.levels[0]), int(form.levels[-1]))


class _QDQ:
    """See :class:`fat_plugins.export._onnx.Dialect`."""

    name, opset = "ONNX", 17
    domains: dict[str, int] = {}

    def prepare(self, graph: Graph, entries: list[Entry]) -> None:
        """Nothing."""

    def complete(self, graph: Graph, entries: list[Entry]) -> None:
        """Keep ONNX Runtime from rounding more than the model does.

        Between two quantizers its default optimisations make an integer layer of whatever they find: a float bias
        becomes integers in steps of the two scales' product, a float weight becomes 8 bits, and so does the float input
        of a product with an integer weight. A Clip that clips nothing leaves them as they are: in front of such a
        layer, between a product and its bias, or behind the weight.
        """
        makers = {out: node for node in graph.nodes for out in node.output}
        layers = {name for e in entries for use in e.uses for name in use["nodes"]}
        for node in [n for n in graph.nodes if n.name in layers and n.op_type in _onnx.LAYERS]:
            exact = node.input[1] in makers and makers[node.input[1]].op_type == "DequantizeLinear"
            if not _dequantized(makers, node.input[0]):
                if exact and node.op_type == "MatMul":
                    node.input[1] = _barrier(graph, node.input[1], f"{node.name}.exact").output[0]
                continue
            biased = [n for n, _ in graph.readers(node.output[0]) if n.op_type == "Add"]
            if not exact or len(node.input) > 2:
                node.input[0] = _barrier(graph, node.input[0], f"{node.name}.input").output[0]
            elif node.op_type == "MatMul" and biased:
                product = _barrier(graph, node.output[0], f"{node.name}.exact").output[0]
                for add in biased:
                    add.input[:] = [product if name == node.output[0] else name for name in add.input]

    def storage(self, form: UniformGrid | Codebook) -> tuple[str, int]:
        """8 bits, or 32 where these do not hold the integers."""
        low, high = _ends(form)
        return ("i8", 8) if low >= -128 and high <= 127 else ("i32", 32)

    def weight(self, graph: Graph, grid: Grid, name: str) -> str:
        """An integer constant and DequantizeLinear; beyond 8 bits Cast and Mul, as ONNX Runtime makes a layer of
        integers of every layer with DequantizeLinear, and then has none for wider ones."""
        out = graph.fresh(name)
        if self.storage(grid.form)[0] == "i8":
            integers = graph.constant(f"{name}.integers", grid.integers, np.int8)
            _dequantize(graph, integers, grid.scale, grid.axis, np.int8, out, name)
        else:
            integers = graph.constant(f"{name}.integers", grid.integers, np.int32)
            real = graph.fresh(f"{name}.real")
            graph.add("Cast", [integers], real, real, to=1)
            graph.add("Mul", [real, graph.constant(f"{name}.scale", grid.view)], out, graph.fresh(f"{name}.scaled"))
        graph.describe(out, shape=grid.integers.shape)
        return out

    def activation(self, graph: Graph, form: Form, source: str, out: str, entry: Entry) -> list[Any]:
        """QuantizeLinear, a Clip where the codes are narrower than 8 bits, DequantizeLinear; comparisons for steps."""
        scale = form.scale.detach().cpu().float().numpy()
        rank = graph.rank(out)
        if scale.size > 1 and rank is None:
            raise ExportError(f"{entry.name}: one scale per channel of a tensor whose rank is unknown")
        low, high = _ends(form)
        kind = _carrier(low, high)
        if kind is None:
            entry.notes.append(f"integers {low} .. {high} do not fit 8 bits: runs in float")
        axis = form.channel_axis % rank if rank else 0
        if not isinstance(form, UniformGrid):
            return [_steps(graph, form, scale, rank or 1, axis, kind, source, out, entry.name)]
        if kind is None:
            return [_float_grid(graph, channel_view(scale, rank or 1, axis), low, high, source, out, entry.name)]
        return [_integer_grid(graph, scale, axis, kind, low, high, source, out, entry.name)]


def _barrier(graph: Graph, tensor: str, name: str, out: str | None = None) -> Any:
    """The same numbers, behind a Clip.

    :param out: the tensor behind it; by default a new one.
    :return: the node.
    """
    out, least = out or graph.fresh(name), graph.constant(f"{name}.least", np.finfo(np.float32).min)
    return graph.add("Clip", [tensor, least], out, graph.fresh(f"{name}.clip"), like=tensor)


def _dequantized(makers: dict[str, Any], tensor: str) -> bool:
    """Whether a tensor is quantized, as far as a layer's input is without other layers in between."""
    stack = [tensor]
    while stack:
        node = makers.get(stack.pop())
        if node is not None and node.op_type == "DequantizeLinear":
            return True
        if node is not None and node.op_type not in _onnx.LAYERS:
            stack += tensors_read(node)
    return False


def _dequantize(graph: Graph, source: str, scale: np.ndarray, axis: int, kind: type, out: str, name: str) -> None:
    inputs = [source, graph.constant(f"{name}.scale", scale if scale.size > 1 else scale.reshape(()))]
    inputs.append(graph.constant(f"{name}.zero_point", np.zeros_like(scale) if scale.size > 1 else 0, kind))
    how = {"axis": axis} if scale.size > 1 else {}
    graph.add("DequantizeLinear", inputs, out, graph.fresh(f"{name}.dequantize"), **how)


def _activation(graph: Graph, codes: str, scale: np.ndarray, axis: int, kind: type, out: str, name: str) -> None:
    """What reads codes. With a scale per channel it gets a Clip, as has QuantizeLinear then: ONNX Runtime makes integer
    operations of sums, averages and functions between two quantizers, which refuse such scales or, like Softmax, take
    the first one for all channels."""
    real = graph.fresh(f"{name}.real") if scale.size > 1 else out
    _dequantize(graph, codes, scale, axis, kind, real, name)
    if scale.size > 1:
        _barrier(graph, real, f"{name}.out", out)


def _integer_grid(
    graph: Graph, scale: np.ndarray, axis: int, kind: type, low: int, high: int, source: str, out: str, name: str
) -> Any:
    vector = scale if scale.size > 1 else scale.reshape(())
    barrier = _barrier(graph, source, f"{name}.in") if scale.size > 1 else None
    inputs = [barrier.output[0] if barrier else source, graph.constant(f"{name}.scale", vector)]
    inputs.append(graph.constant(f"{name}.zero_point", np.zeros_like(vector), kind))
    how = {"axis": axis} if scale.size > 1 else {}
    codes = graph.fresh(f"{name}.codes")
    first = graph.add("QuantizeLinear", inputs, codes, graph.fresh(f"{name}.quantize"), **how)
    limits = np.iinfo(kind)
    if (low, high) != (limits.min, limits.max):
        wide, codes = codes, graph.fresh(f"{name}.clipped")
        ends = [graph.constant(f"{name}.low", low, kind), graph.constant(f"{name}.high", high, kind)]
        graph.add("Clip", [wide, *ends], codes, graph.fresh(f"{name}.clip"))
    _activation(graph, codes, scale, axis, kind, out, name)
    return barrier or first


def _float_grid(graph: Graph, view: np.ndarray, low: int, high: int, source: str, out: str, name: str) -> Any:
    scale = graph.constant(f"{name}.scale", view)
    ends = [graph.constant(f"{name}.low", low), graph.constant(f"{name}.high", high)]
    steps, clipped, codes = (graph.fresh(f"{name}.{part}") for part in ("steps", "clipped", "codes"))
    first = graph.add("Div", [source, scale], steps, steps)
    graph.add("Clip", [steps, *ends], clipped, clipped)
    graph.add("Round", [clipped], codes, codes)  # ties to even
    graph.add("Mul", [codes, scale], out, graph.fresh(f"{name}.scaled"))
    return first


def _steps(
    graph: Graph, form: Any, scale: np.ndarray, rank: int, axis: int, kind: Any, source: str, out: str, name: str
) -> Any:
    """Compare with every threshold at once, along a new last axis, and add up the gaps between the levels."""
    levels = form.levels.detach().cpu().numpy()
    below = threshold_table(form)
    table = below.reshape(-1) if len(below) == 1 else below.reshape(*channel_view(below[:, 0], rank, axis).shape, -1)
    last = graph.constant(f"{name}.axis", [-1], np.int64)
    column, above, ones, count = (graph.fresh(f"{name}.{part}") for part in ("column", "above", "ones", "count"))
    first = graph.add("Unsqueeze", [source, last], column, column)
    graph.add("Greater", [column, graph.constant(f"{name}.thresholds", table)], above, above)
    graph.add("Cast", [above], ones, ones, to=1)
    total, gaps = ones, np.diff(levels)
    if bool((gaps != 1).any()):
        total = graph.fresh(f"{name}.gaps")
        graph.add("Mul", [ones, graph.constant(f"{name}.gap", gaps)], total, total)
    graph.add("ReduceSum", [total, last], count, count, keepdims=0)
    if levels[0] != 0:
        total, count = count, graph.fresh(f"{name}.level")
        graph.add("Add", [total, graph.constant(f"{name}.lowest", levels[0])], count, count)
    if kind is None:
        view = graph.constant(f"{name}.scale", channel_view(scale, rank, axis))
        graph.add("Mul", [count, view], out, graph.fresh(f"{name}.scaled"))
    else:
        codes = graph.fresh(f"{name}.codes")
        graph.add("Cast", [count], codes, codes, to={np.uint8: 2, np.int8: 3}[kind])
        _activation(graph, codes, scale, axis, kind, out, name)
    return first


# --------------------------------------------------------------------------------------------------------------------
# execution
# --------------------------------------------------------------------------------------------------------------------
def _session(proto: Any, optimise: bool) -> Runner:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # ONNX Runtime 1.31 takes the Identity of a further output away together with what its input needs
    without = ["EliminateIdentity"] if optimise else None
    try:
        session = runtime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
        )
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
    names = [o.name for o in session.get_outputs()]

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:
            raise ExportError(f"ONNX Runtime refuses the inputs: {first_line(error)}") from error

    return run


def _optimised(proto: Any) -> Runner:
    return _session(proto, True)


def _runner(proto: Any) -> Runner:
    return _session(proto, False)


def _integers(graph: Graph, tensor: str, values: np.ndarray) -> np.ndarray:
    """The integers that stand in the file."""
    makers = {n.output[0]: n for n in graph.nodes}
    source = makers[tensor].input[0]
    if source in makers:  # behind a Cast
        source = makers[source].input[0]
    return graph.value(source).astype(np.int64)
