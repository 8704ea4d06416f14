"""Frozen model to an ONNX graph, as far as QONNX and standard ONNX are alike.

The custom operators of :mod:`fat_plugins.frozen` are first exported as placeholder nodes; then a :class:`Dialect`
writes each as nodes of its own kind. What follows the weight is the same for all: a transpose is folded into the codes,
a Gemm becomes MatMul and Add, every reader of a weight gets a constant of its own, and a sum of grids becomes a sum of
layers.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.export._onnx_file import KEY
from fat_plugins.export._onnx_graph import Graph, onnx
from fat_plugins.export.common import (
    ExportReport,
    LayerReport,
    as_inputs,
    check_model,
    check_path,
    first_line,
    on_device,
    unique,
    warn_of_notes,
)
from fat_plugins.forms import Codebook, Form, UniformGrid, form_kind, grids
from fat_plugins.frozen import FrozenActivation, FrozenWeight, frozen_modules

_DOMAIN = "fat_plugins"
LAYERS = ("Conv", "ConvTranspose", "MatMul")


@dataclass
class Grid:
    """One constant of a weight, in the layout that its reader has.

    :param integers: what the target computes with (int64).
    :param scale: float32, one element or one per channel along ``axis``.
    """

    form: UniformGrid | Codebook
    integers: np.ndarray
    scale: np.ndarray
    axis: int

    @property
    def view(self) -> np.ndarray:
        """The scale in a shape that broadcasts; a scalar where it has one element."""
        return channel_view(self.scale, self.integers.ndim, self.axis)


class Dialect(Protocol):
    """How one kind of file spells quantized tensors."""

    name: str
    opset: int
    domains: dict[str, int]

    def prepare(self, graph: Graph, entries: list[Entry]) -> None:
        """Change the graph while its quantizers are still placeholders."""

    def weight(self, graph: Graph, grid: Grid, name: str) -> str:
        """Add the nodes of a weight; ``name`` is the name of the layer's weight. Returns the tensor.

        :raises ExportError: the dialect cannot hold it.
        """

    def storage(self, form: UniformGrid | Codebook) -> tuple[str, int]:
        """Element type of a weight in the file and its bits."""

    def activation(self, graph: Graph, form: Form, source: str, out: str, entry: Entry) -> list[Any]:
        """Add the nodes of a quantizer that reads ``source`` and gives ``out``; returns those that read ``source``.

        :raises ExportError: the dialect cannot hold it.
        """

    def complete(self, graph: Graph, entries: list[Entry]) -> None:
        """Change the graph when all of it is written."""


@dataclass
class Entry:
    """One quantized tensor of the written graph, in execution order.

    :param uses: of a weight, one per reader; what :class:`fat_plugins.export._onnx_file.ModelFile` needs to find it.
    :param place: of an activation, the same.
    """

    kind: str  # "weight" or "activation"
    name: str
    module: Any
    node: Any
    uses: list[dict[str, Any]] = field(default_factory=list)
    place: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What is kept inside the file."""
        out = {"kind": self.kind, "name": self.name, "bits": self.module.form.bits, **self.place}
        return {**out, "readers": [u["layer"] for u in self.uses], "uses": self.uses} if self.kind == "weight" else out


def write(
    dialect: Dialect, model: nn.Module, path: str | os.PathLike, example_input: Any, dynamic_batch: bool
) -> ExportReport:
    """The body of every exporter of this family; see :func:`fat_plugins.export.qonnx.export`."""
    path = check_path(path, ".onnx", f"a model in {dialect.name}")
    check_model(model)
    onnx()
    inputs = on_device(model, as_inputs(example_input))
    proto = _trace(model.eval(), inputs, dialect.opset, dynamic_batch)
    graph = Graph(proto)
    graph.bypass_identities()
    entries = _entries(graph, model)
    dialect.prepare(graph, entries)
    _rewrite(graph, entries, dialect)
    dialect.complete(graph, entries)
    graph.finish({**dialect.domains})
    proto.producer_name = "fat-plugins"
    onnx().helper.set_model_props(proto, {KEY: json.dumps([e.describe() for e in entries])})
    size = _save(proto, path)
    layers = [_layer_report(e, dialect) for e in entries if not (e.kind == "weight" and e.name != e.module.name)]
    float_bytes = size + sum(4 * r.elements - r.bytes for r in layers)
    report = ExportReport(str(path), dialect.name, size, float_bytes, {"onnx": onnx().__version__}, layers)
    warn_of_notes(report, depth=4)
    return report


def channel_view(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Values per channel in a shape that broadcasts; a scalar where there is one."""
    if values.size == 1:
        return values.reshape(())
    view = [1] * rank
    view[axis] = values.size
    return values.reshape(view)


def _layer_report(entry: Entry, dialect: Dialect) -> LayerReport:
    form = entry.module.form
    report = LayerReport(entry.name, entry.kind, form_kind(form), form.bits, note="; ".join(entry.notes))
    if entry.kind == "weight":
        stored = [dialect.storage(grid) for grid, _ in grids(form, entry.module.codes[:0].cpu())]
        report.elements, report.storage = entry.module.codes.numel(), "+".join(name for name, _ in stored)
        report.bytes = len(entry.uses) * sum(report.elements * bits // 8 for _, bits in stored)
    return report


def _save(proto: Any, path: Path) -> int:
    """Write the file under a temporary name, then move it; gives its size."""
    temporary = path.parent / f".{path.stem}.{uuid.uuid4().hex[:8]}.onnx"
    try:
        onnx().checker.check_model(proto)
        onnx().save_model(proto, str(temporary))
        os.replace(temporary, path)
    except Exception as error:
        raise ExportError(f"{path}: cannot be written: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


# --------------------------------------------------------------------------------------------------------------------
# trace
# --------------------------------------------------------------------------------------------------------------------
def _trace(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, dynamic_batch: bool) -> Any:
    """The exported graph with placeholders."""
    names = ["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]
    options: dict[str, Any] = {"input_names": names, "opset_version": opset, "custom_opsets": {_DOMAIN: 1}}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    if dynamic_batch:
        options["dynamic_axes"] = {name: {0: "batch"} for name in names}
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings(), _symbolics(opset), _call_names(model):
            warnings.simplefilter("ignore")  # the tracer's remarks on shapes are no business of the user
            torch.onnx.export(_Plain(model) if hasattr(model, "graph") else model, inputs, buffer, **options)
        proto = onnx().load_model_from_string(buffer.getvalue())
    except Exception as error:
        raise ExportError(f"torch cannot export the model to ONNX: {first_line(error)}") from error
    return proto


class _Plain(nn.Module):
    """Around a torch.fx module, whose ``graph`` torch's exporter would take for one of TorchScript."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


@contextmanager
def _symbolics(opset: int) -> Iterator[None]:
    """The placeholders, known to the exporter for as long as it runs."""
    from torch.onnx import symbolic_helper

    serial = 0

    def placeholder(g: Any, kind: str, like: Any, name: str, dtype: torch.dtype | None = None) -> Any:
        nonlocal serial
        serial += 1
        out = g.op(f"{_DOMAIN}::{kind}", like, name_s=name, serial_i=serial)
        out.setType(like.type() if dtype is None else like.type().with_dtype(dtype))
        return out

    @symbolic_helper.parse_args("v", "v", "v", "i", "i", "i", "s")
    def weight(g, codes, scale, levels, bits, low, axis, name):
        return placeholder(g, "weight", codes, name, torch.float32)

    @symbolic_helper.parse_args("v", "v", "v", "s", "i", "s")
    def total(g, codes, scale, levels, layout, axis, name):
        return placeholder(g, "weight", codes, name, torch.float32)

    @symbolic_helper.parse_args("v", "v", "v", "v", "i", "i", "i", "s")
    def activation(g, x, scale, levels, thresholds, low, high, axis, name):
        return placeholder(g, "activation", x, name)

    functions = {"decode_weight": weight, "decode_sum": total, "quantize_activation": activation}
    for name, function in functions.items():
        torch.onnx.register_custom_op_symbolic(f"{_DOMAIN}::{name}", function, opset)
    try:
        yield
    finally:
        for name in functions:
            torch.onnx.unregister_custom_op_symbolic(f"{_DOMAIN}::{name}", opset)


@contextmanager
def _call_names(model: nn.Module) -> Iterator[None]:
    """Give each call of a quantizer a name of its own, or the exporter would merge calls that look alike."""
    modules = {m: m.name for m in frozen_modules(model)}
    taken: set[tuple[str, str]] = set()

    def before(module: nn.Module, args: Any) -> None:
        kind = "weight" if isinstance(module, FrozenWeight) else "activation"
        module.name = unique(modules[module], kind, taken)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        module.name = modules[module]

    handles = [model.register_forward_pre_hook(lambda module, args: taken.clear())]
    handles += [m.register_forward_pre_hook(before) for m in modules] + [
        m.register_forward_hook(after) for m in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name in modules.items():
            module.name = name


def _entries(graph: Graph, model: nn.Module) -> list[Entry]:
    """The placeholders in execution order."""
    modules = {(type(m), m.name): m for m in frozen_modules(model)}
    found = []
    for node in graph.nodes:
        if node.domain == _DOMAIN:
            how = graph.attributes(node)
            name = how["name"].decode()
            cls = FrozenWeight if node.op_type == "weight" else FrozenActivation
            module = modules.get((cls, name)) or modules[cls, name.rpartition("#")[0]]
            found.append((how["serial"], Entry(node.op_type, name, module, node)))
    if not found:
        raise ExportError("no frozen quantizer is reached by the model's forward")
    return [entry for _, entry in sorted(found, key=lambda f: f[0])]


# --------------------------------------------------------------------------------------------------------------------
# rewriting
# --------------------------------------------------------------------------------------------------------------------
def _rewrite(graph: Graph, entries: list[Entry], dialect: Dialect) -> None:
    graph.name_outputs()
    taken: set[tuple[str, str]] = set()
    for entry in entries:
        if entry.kind == "weight":
            graph.remove(entry.node)
            for node, index, perm in list(_readers(graph, entry.node.output[0])):
                layer = unique(entry.module.name, "layer", taken)
                entry.uses.append(_rewrite_use(graph, entry, node, index, perm, layer, dialect))
        else:
            _rewrite_activation(graph, entry, dialect)


def _readers(graph: Graph, tensor: str, perm: tuple[int, ...] | None = None) -> Iterator[tuple[Any, int, Any]]:
    """Nodes that read a weight, the index of that input, and how it is transposed on the way."""
    for node, index in graph.readers(tensor):
        if node.op_type == "Transpose":
            order = tuple(graph.attributes(node)["perm"])
            yield from _readers(graph, node.output[0], order if perm is None else tuple(perm[i] for i in order))
        else:
            yield node, index, perm


def _rewrite_use(
    graph: Graph, entry: Entry, node: Any, index: int, perm: Any, layer: str, dialect: Dialect
) -> dict[str, Any]:
    """Give one reader of a weight its constants; returns where they are."""
    is_layer = index == 1 and node.op_type in (*LAYERS, "Gemm")
    own = graph.fresh(layer)
    if is_layer and node.op_type == "Gemm":
        node, perm = _matmul(graph, node, perm, own)
    parts = grids(entry.module.form, entry.module.codes.detach().cpu())
    names = [f"{layer}.weight"] if len(parts) == 1 else [f"{layer}.weight.{i}" for i in range(len(parts))]
    tensors = []
    for (form, codes), name in zip(parts, names, strict=True):
        integers = form.integers(codes).numpy().astype(np.int64)
        axis = form.channel_axis if perm is None else perm.index(form.channel_axis % integers.ndim)
        integers = integers if perm is None else integers.transpose(perm)
        scale = form.scale.detach().cpu().float().numpy()
        tensors.append(dialect.weight(graph, Grid(form, integers, scale, axis), name))
    nodes = [own]
    if len(parts) == 1:
        node.input[index] = tensors[0]
        node.name = own if is_layer else node.name
    elif is_layer:
        nodes += _sum_of_layers(graph, node, tensors, own)
    else:
        node.input[index] = graph.sum(tensors, f"{layer}.weight", graph.info(entry.node.output[0]))
    if not is_layer:
        entry.notes.append(f"read by {node.op_type}, not by a convolution or matmul")
    elif len(parts) > 1:
        entry.notes.append(f"a sum of {len(parts)} grids: as many layers, whose outputs are added")
    return {"layer": layer, "nodes": nodes, "tensors": tensors, "perm": None if perm is None else list(perm)}


def _matmul(graph: Graph, node: Any, perm: Any, layer: str) -> tuple[Any, Any]:
    """Write a Gemm as MatMul and Add."""
    how = graph.attributes(node)
    if how.get("alpha", 1) != 1 or how.get("beta", 1) != 1 or how.get("transA", 0):
        raise ExportError(f"{layer}: the Gemm that reads this weight scales or transposes its other inputs")
    out = node.output[0]
    product = out
    if len(node.input) > 2:
        product = graph.fresh(f"{layer}.product")
        graph.add("Add", [product, node.input[2]], out, f"{layer}.bias", like=out)
    matmul = graph.add("MatMul", list(node.input[:2]), product, layer, like=out)
    graph.remove(node)
    if how.get("transB", 0):
        perm = (1, 0) if perm is None else (perm[1], perm[0])
    return matmul, perm


def _sum_of_layers(graph: Graph, node: Any, weights: list[str], layer: str) -> list[str]:
    """Put one copy of ``node`` per weight in its place and add their outputs; the first one keeps the bias."""
    out, partial = node.output[0], []
    for i, weight in enumerate(weights):
        copy = onnx().NodeProto()
        copy.CopyFrom(node)
        copy.name, copy.input[1], copy.output[0] = f"{layer}.{i}", weight, graph.fresh(f"{layer}.{i}")
        if i and len(copy.input) > 2:
            del copy.input[2:]
        graph.nodes.append(copy)
        graph.describe(copy.output[0], out)
        partial.append(copy.output[0])
    graph.remove(node)
    graph.sum(partial, layer, graph.info(out), out)
    return [f"{layer}.{i}" for i in range(len(weights))]


def _rewrite_activation(graph: Graph, entry: Entry, dialect: Dialect) -> None:
    source, out = entry.node.input[0], entry.node.output[0]
    if out not in graph.output_names:
        out = graph.rename(out, graph.fresh(entry.name))
    graph.remove(entry.node)
    first = dialect.activation(graph, entry.module.form, source, out, entry)
    entry.place = {"input": source, "output": out, "nodes": [n.name for n in first]}
