"""ONNX graphs and how to edit them. Imports onnx on first use only."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fat_plugins.errors import ExportError


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

    def name_outputs(self) -> None:
        """Call the model's outputs ``output``, or ``output0``, ``output1``...; a tensor that is two is copied."""
        places, own = list(self.proto.graph.output), {}
        inputs = {i.name for i in self.proto.graph.input}
        for i, place in enumerate(places):
            name, tensor = self.fresh("output" if len(places) == 1 else f"output{i}"), place.name
            if tensor in own or tensor in inputs:
                self.add("Identity", [own.get(tensor, tensor)], name, name)
            else:
                self._infos[tensor] = place
                own[tensor] = self.rename(tensor, name)
            place.name = name

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
            before = [maker[name] for name in dict.fromkeys(tensors_read(node)) if name in maker]
            stack += [(n, False) for n in sorted(before, key=lambda n: -place[id(n)])]
    return out


def tensors_read(node: Any) -> list[str]:
    """Tensors that a node reads, also inside its branches."""
    names = list(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += tensors_read(inner)
    return names
