"""ONNX graphs: editing them, and taking an exported file apart for verification. Imports onnx on first use only."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fat_plugins.errors import ExportError
from fat_plugins.export.common import first_line
from fat_plugins.export.verify import Run

#: key of the exporter's description in the file's metadata
KEY = "fat_plugins"


def need(package: str) -> Any:
    """An optional package of the ONNX family.

    :raises ExportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ExportError(f"{package.partition('.')[0]} is not installed: pip install 'fat-plugins[qonnx]'") from None


def onnx() -> Any:
    """The ``onnx`` module with what is used of it."""
    for part in ("checker", "helper", "numpy_helper"):
        need(f"onnx.{part}")
    return need("onnx")


# --------------------------------------------------------------------------------------------------------------------
# editing
# --------------------------------------------------------------------------------------------------------------------
class Graph:
    """A graph being edited: nodes in any order until :meth:`finish`.

    :param proto: the model; its graph is changed in place.
    """

    def __init__(self, proto: Any) -> None:
        self.proto, self.nodes = proto, list(proto.graph.node)
        self._infos = {v.name: v for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
        self._constants = {t.name: t for t in proto.graph.initializer}
        tensors = {name for n in self.nodes for name in (*n.input, *n.output)}
        self._taken = {*tensors, *self._infos, *self._constants, *(n.name for n in self.nodes)}

    @property
    def output_names(self) -> list[str]:
        """Names of the model's outputs."""
        return [o.name for o in self.proto.graph.output]

    def fresh(self, name: str) -> str:
        """``name``, or the like of it where a tensor or node has that already."""
        candidate, n = name, 1
        while candidate in self._taken:
            n += 1
            candidate = f"{name}_{n}"
        self._taken.add(candidate)
        return candidate

    def attributes(self, node: Any) -> dict[str, Any]:
        """Attributes of a node by name."""
        return {a.name: onnx().helper.get_attribute_value(a) for a in node.attribute}

    def readers(self, tensor: str) -> list[tuple[Any, int]]:
        """Nodes that read a tensor, with the index of the input."""
        return [(n, i) for n in self.nodes for i, name in enumerate(n.input) if name == tensor]

    def value(self, tensor: str) -> np.ndarray | None:
        """Value of a constant tensor, ``None`` for others."""
        if tensor in self._constants:
            return onnx().numpy_helper.to_array(self._constants[tensor])
        for node in self.nodes:
            if node.op_type == "Constant" and node.output[0] == tensor:
                return onnx().numpy_helper.to_array(self.attributes(node)["value"])
        return None

    def info(self, tensor: str) -> Any:
        """Type and shape of a tensor, ``None`` when unknown."""
        return self._infos.get(tensor)

    def rank(self, tensor: str) -> int | None:
        """Number of dimensions, ``None`` when unknown."""
        kind = self._infos[tensor].type.tensor_type if tensor in self._infos else None
        return len(kind.shape.dim) if kind is not None and kind.HasField("shape") else None

    def describe(self, tensor: str, like: str | None = None, shape: tuple[int, ...] | None = None) -> None:
        """Note type and shape of a new tensor: float32 of ``shape``, or those of ``like``."""
        if shape is not None:
            self._infos[tensor] = onnx().helper.make_tensor_value_info(tensor, onnx().TensorProto.FLOAT, shape)
        elif like in self._infos and tensor not in self._infos:
            copy = onnx().ValueInfoProto()
            copy.CopyFrom(self._infos[like])
            copy.name = tensor
            self._infos[tensor] = copy

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Add an initializer; returns its name."""
        name = self.fresh(name)
        self._constants[name] = onnx().numpy_helper.from_array(np.ascontiguousarray(np.asarray(value, dtype)), name)
        if np.ndim(value) == 0:  # ascontiguousarray makes a vector of a scalar
            self._constants[name] = onnx().numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def add(
        self,
        op: str,
        inputs: list[str],
        out: str,
        name: str,
        like: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node with one output; ``like`` is a tensor of the same type and shape."""
        node = onnx().helper.make_node(op, inputs, [out], name=name, domain=domain, **attributes)
        self.nodes.append(node)
        self._taken |= {out, name}
        if like is not None:
            self.describe(out, like)
        return node

    def sum(self, tensors: list[str], name: str, info: Any, out: str | None = None) -> str:
        """Add tensors of one shape, from the first to the last."""
        total = tensors[0]
        for i, tensor in enumerate(tensors[1:], 1):
            last = i == len(tensors) - 1
            target = (out or self.fresh(f"{name}.sum")) if last else self.fresh(f"{name}.sum{i}")
            self.add("Add", [total, tensor], target, name if last else f"{name}.sum{i}", info.name if info else None)
            total = target
        return total

    def bypass_identities(self) -> None:
        """Let the readers of an Identity read its input (the exporter writes one where two parameters are equal)."""
        for node in [n for n in self.nodes if n.op_type == "Identity" and n.output[0] not in self.output_names]:
            for reader, index in self.readers(node.output[0]):
                reader.input[index] = node.input[0]
            self.remove(node)

    def remove(self, node: Any) -> None:
        """Remove a node."""
        self.nodes = [n for n in self.nodes if n is not node]

    def rename(self, tensor: str, new: str) -> str:
        """Rename a tensor everywhere."""
        if tensor != new:
            for node in self.nodes:
                for names in (node.input, node.output):
                    for i, name in enumerate(names):
                        if name == tensor:
                            names[i] = new
            if tensor in self._infos:
                self._infos[new] = self._infos.pop(tensor)
                self._infos[new].name = new
        self._taken.add(new)
        return new

    def finish(self, domains: dict[str, int]) -> None:
        """Write everything back: only what the outputs need, in execution order.

        :param domains: versions of the operator sets beside the standard one, which stays first.
        """
        graph, make = self.proto.graph, onnx().helper.make_opsetid
        standard = next(o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx"))
        del self.proto.opset_import[:]
        self.proto.opset_import.extend([make("", standard), *(make(k, v) for k, v in domains.items())])
        nodes = _in_order(self.nodes, self.output_names)
        used = {name for n in nodes for name in (*n.input, *n.output)}
        fixed = {v.name for v in (*graph.input, *graph.output)}
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(t for name, t in self._constants.items() if name in used)
        graph.value_info.extend(v for name, v in self._infos.items() if name in used - fixed)


def _in_order(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """The nodes that ``outputs`` need, each behind those that it reads."""
    maker = {name: node for node in nodes for name in node.output}
    place = {id(node): i for i, node in enumerate(nodes)}
    out: list[Any] = []
    state: dict[int, bool] = {}
    stack = [(maker[name], False) for name in reversed(outputs) if name in maker]
    while stack:
        node, ready = stack.pop()
        if ready:
            out.append(node)
        elif id(node) not in state:
            state[id(node)] = True
            stack.append((node, True))
            before = [maker[name] for name in dict.fromkeys(_reads(node)) if name in maker]
            stack += [(n, False) for n in sorted(before, key=lambda n: -place[id(n)])]
    return out


def _reads(node: Any) -> list[str]:
    """Tensors that a node reads, also inside its branches."""
    names = list(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += _reads(inner)
    return names


# --------------------------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------------------------
#: executes one model: named inputs to named outputs
Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def load(path: str | os.PathLike) -> Any:
    """Read a file.

    :raises ExportError: missing or unreadable.
    """
    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    try:
        proto = onnx().load_model(str(path))
        onnx().checker.check_model(proto)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path}: onnx cannot read it: {first_line(error)}") from None
    return proto


def fixed_batch(proto: Any) -> int | None:
    """Size of the first dimension of the first input, ``None`` where that is open."""
    shape = proto.graph.input[0].type.tensor_type.shape
    return (shape.dim[0].dim_value or None) if shape.dim else None


class ModelFile:
    """An exported file for :func:`fat_plugins.export.verify.compare`.

    :param runner: makes a model executable, as the file says.
    :param deployed: makes it executable as users will run it (the runtime may rewrite it); by default the same.
    :param integers: integers of a weight from the model, the name of its tensor and its real values.
    """

    file, device = "ONNX file", "CPU"

    def __init__(
        self,
        path: str | os.PathLike,
        runtime: str,
        versions: dict[str, str],
        runner: Callable[[Any], Runner],
        integers: Callable[[Any, str, np.ndarray], np.ndarray],
        deployed: Callable[[Any], Runner] | None = None,
    ) -> None:
        self.runtime, self.versions, self._runner, self._integers = runtime, versions, runner, integers
        self._deployed = deployed or runner
        self._proto = load(path)
        text = {p.key: p.value for p in self._proto.metadata_props}.get(KEY)
        if text is None:
            raise ExportError(f"{path}: was not written by fat-plugins' export")
        self.entries = json.loads(text)
        self._read: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._uses = {use["layer"]: use for e in self.entries for use in e.get("uses", ())}
        written = {name for node in self._proto.graph.node for name in (node.name, *node.output)}
        for name in self._names():
            if name not in written:
                raise ExportError(f"{path}: has no {name!r}; verify the file as it was exported, before other tools")

    def _names(self) -> list[str]:
        found = [name for use in self._uses.values() for name in use["tensors"]]
        for entry in self.entries:
            if entry["kind"] == "activation":
                found += [entry["output"], *entry["nodes"]]
        return found

    def _weights(self, layer: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Integers and values of every grid of a layer's weight, in torch's layout."""
        if layer in self._read:
            return self._read[layer]
        use = self._uses[layer]
        proto = onnx().ModelProto()
        proto.CopyFrom(self._proto)
        del proto.graph.output[:], proto.graph.input[:]
        graph = Graph(proto)
        for tensor in use["tensors"]:
            proto.graph.output.append(graph.info(tensor) or _open_info(tensor))
        graph.finish({o.domain: o.version for o in proto.opset_import if o.domain not in ("", "ai.onnx")})
        values = self._runner(proto)({})
        out = []
        for tensor in use["tensors"]:
            pair = (self._integers(graph, tensor, values[tensor]), values[tensor])
            out.append(tuple(a.transpose(np.argsort(use["perm"])) if use["perm"] else a for a in pair))
        self._read[layer] = out
        return out

    def integers(self, layer: str) -> list[np.ndarray]:
        """Integers of a layer's weight, one array per grid."""
        return [integers for integers, _ in self._weights(layer)]

    def values(self, layer: str) -> list[np.ndarray]:
        """Real values of the same."""
        return [values for _, values in self._weights(layer)]

    def graph(self, names: list[str], layers: list[str], cut: bool) -> CutModel:
        """The file made ready to run with its quantizers laid open."""
        return CutModel(self._proto, self.entries, names, cut, self._runner if cut else self._deployed, self.runtime)

    def fixed_batch(self) -> int | None:
        """Size of the first dimension of the first input, ``None`` where that is open."""
        return fixed_batch(self._proto)


class CutModel:
    """A model with what its quantizers read and give laid open.

    :param names: names of the activation quantizers.
    :param cut: feed every quantizer from outside; otherwise the model only gets more outputs.
    """

    def __init__(
        self,
        model: Any,
        entries: list[dict[str, Any]],
        names: list[str],
        cut: bool,
        runner: Callable[[Any], Runner],
        runtime: str,
    ) -> None:
        proto = onnx().ModelProto()
        proto.CopyFrom(model)
        self.names, self.cut, self._runtime = names, cut, runtime
        self._places = {e["name"]: e for e in entries if e["kind"] == "activation"}
        self._layers = {n: use["layer"] for e in entries for use in e.get("uses", ()) for n in use["nodes"]}
        self._inputs = [i.name for i in proto.graph.input]
        self.output_names = [o.name for o in proto.graph.output]
        for name in names:
            self._open(proto, name, cut)
        self._maker = {out: node for node in proto.graph.node for out in node.output}
        self._run = runner(proto)

    def _open(self, proto: Any, name: str, cut: bool) -> None:
        place, graph = self._places[name], proto.graph
        probes = {f"quantized:{name}": place["output"]}
        if cut:
            for node in graph.node:
                if node.name in place["nodes"]:
                    for i, tensor in enumerate(node.input):
                        if tensor == place["input"]:
                            node.input[i] = f"cut:{name}"
            graph.input.append(_open_info(f"cut:{name}"))
            probes[f"computed:{name}"] = place["input"]
        for probe, tensor in probes.items():
            graph.node.append(onnx().helper.make_node("Identity", [tensor], [probe], name=probe))
            graph.output.append(_open_info(probe))

    def producers(self, name: str) -> list[str]:
        """Quantized layers between the quantizers before and the input of quantizer ``name``."""
        return self._upstream(self._places[name]["input"])

    def output_producers(self, index: int) -> list[str]:
        """Quantized layers between the last quantizers and an output of the model."""
        return self._upstream(self.output_names[index])

    def _upstream(self, tensor: str) -> list[str]:
        found, stack, seen = set(), [tensor], set()
        while stack:
            node = self._maker.get(stack.pop())
            if node is None or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            if node.name in self._layers:
                found.add(self._layers[node.name])
            stack += _reads(node)
        return sorted(found)

    def run(self, inputs: list[np.ndarray], feed: dict[str, Tensor]) -> Run:
        """One inference. ``feed``: input of every quantizer when the graph is cut."""
        feeds = named(self._inputs, inputs, self._runtime)
        if self.cut:
            feeds |= {f"cut:{n}": feed[n].numpy() for n in self.names}
        values = self._run(feeds)
        computed = {n: values[f"computed:{n}"] for n in self.names} if self.cut else {}
        return Run(computed, {n: values[f"quantized:{n}"] for n in self.names}, [values[n] for n in self.output_names])


def named(names: list[str], inputs: list[np.ndarray], runtime: str) -> dict[str, np.ndarray]:
    """Inputs by name.

    :raises ExportError: another number of inputs.
    """
    if len(names) != len(inputs):
        raise ExportError(f"{runtime} refuses the inputs: the model has {len(names)}, got {len(inputs)}")
    return dict(zip(names, inputs, strict=True))


def _open_info(name: str) -> Any:
    """A float32 tensor of any shape."""
    return onnx().helper.make_tensor_value_info(name, onnx().TensorProto.FLOAT, None)


def execute(proto: Any, inputs: list[np.ndarray], runner: Callable[[Any], Runner], runtime: str) -> list[np.ndarray]:
    """Outputs of a model for one batch; a file with a fixed batch runs several times.

    :raises ExportError: inputs that the model refuses.
    """
    run, names = runner(proto), [i.name for i in proto.graph.input]
    feeds, size = named(names, inputs, runtime), fixed_batch(proto)
    batch = inputs[0].shape[0]
    if size is None or batch == size or batch % size:
        values = [run(feeds)]
    else:
        values = [run({k: v[i : i + size] for k, v in feeds.items()}) for i in range(0, batch, size)]
    return [np.concatenate([v[o.name] for v in values]) for o in proto.graph.output]
