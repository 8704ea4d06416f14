"""Exported ONNX files: running them, and taking them apart for verification."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fat_plugins.errors import ExportError
from fat_plugins.export._onnx_graph import Graph, onnx, tensors_read
from fat_plugins.export.common import first_line
from fat_plugins.export.verify import Run

#: key of the exporter's description in the file's metadata
KEY = "fat_plugins"
#: executes one model: named inputs to named outputs
Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def load(path: str | os.PathLike) -> Any:
    """Read a file.

    :raises ExportError: missing or unreadable.
    """
    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    try:
        proto = onnx().load_model(str(path), load_external_data=False)
        if any(t.data_location == onnx().TensorProto.EXTERNAL for t in proto.graph.initializer):
            raise ExportError(f"{path}: reads tensors from other files, which no export of fat-plugins does")
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
        return self._layers_before(self._places[name]["input"])

    def output_producers(self, index: int) -> list[str]:
        """Quantized layers between the last quantizers and an output of the model."""
        return self._layers_before(self.output_names[index])

    def quantizers(self, name: str) -> set[str]:
        """Quantizers that the input of quantizer ``name`` depends on."""
        return self._quantizers_before(self._places[name]["input"])

    def output_quantizers(self, index: int) -> set[str]:
        """Quantizers that an output of the model depends on."""
        return self._quantizers_before(self.output_names[index])

    def _layers_before(self, tensor: str) -> list[str]:
        nodes = (self._maker[t].name for t in self._upstream(tensor))
        return sorted({self._layers[name] for name in nodes if name in self._layers})

    def _quantizers_before(self, tensor: str) -> set[str]:
        found = self._upstream(tensor)
        return {name for name in self.names if self._places[name]["output"] in found}

    def _upstream(self, tensor: str) -> set[str]:
        """First outputs of all nodes that a tensor depends on."""
        stack, seen = [tensor], set()
        while stack:
            node = self._maker.get(stack.pop())
            if node is None or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            stack += tensors_read(node)
        return seen

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
