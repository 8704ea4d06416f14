"""An exported IR taken apart for verification: codes of its weights, what its quantizers read and give."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

from fat_plugins.errors import ExportError
from fat_plugins.export import _ov
from fat_plugins.export.common import first_line
from fat_plugins.export.ir import QUANTIZE, weight_names
from fat_plugins.export.openvino import description, read_model
from fat_plugins.export.verify import Run


def _node(model: Any, name: str) -> Any:
    for node in model.get_ops():
        if node.get_friendly_name() == name:
            return node
    raise ExportError(f"the IR has no node {name!r}; was it exported from another model?")


class IR:
    """An exported IR for :func:`fat_plugins.export.verify.compare`."""

    file, runtime = "IR", "OpenVINO"

    def __init__(self, path: str | os.PathLike, device: str) -> None:
        self.device, self.versions = device, {"openvino": _ov.openvino().__version__}
        self._model = read_model(path)
        self.entries = description(self._model)
        self._parts = {layer: e.get("parts", 1) for e in self.entries for layer in e.get("readers", ())}

    def integers(self, layer: str) -> list[np.ndarray]:
        """Integers of one layer's weight as the CPU plugin unpacks them, in the layout that the layer reads."""
        return [_integers(self._model, name) for name in weight_names(layer, self._parts[layer])]

    def values(self, layer: str) -> None:
        """Nothing: the scales hold the batch norms too."""

    def graph(self, names: list[str], layers: list[str], cut: bool) -> CutGraph:
        """The IR compiled with its quantizers laid open."""
        return CutGraph(self._model.clone(), names, layers, self.device, cut)

    def fixed_batch(self) -> int | None:
        """Size of the first dimension of the first input, where that is not open."""
        first = self._model.inputs[0].get_partial_shape()[0]
        return first.get_length() if first.is_static else None


def _integers(model: Any, name: str) -> np.ndarray:
    op = _ov.opset()
    value = _node(model, name).input_value(0)
    if value.get_node().get_type_name() == "Convert" and not value.get_node().get_friendly_name().endswith("|integers"):
        value = value.get_node().input_value(0)
    probe = _ov.openvino().Model([op.result(op.convert(value, "i32"))], [])
    return _ov.openvino().Core().compile_model(probe, "CPU")([])[0].astype(np.int64)


class CutGraph:
    """An IR with its quantizers laid open.

    :param model: is changed in place.
    :param names: names of the activation quantizers.
    :param layers: names of the quantized layers.
    :param cut: feed every quantizer from outside; otherwise the model runs as it stands and only gets more outputs.
    """

    def __init__(self, model: Any, names: list[str], layers: list[str], device: str, cut: bool = False) -> None:
        op, self.names, self.cut = _ov.opset(), names, cut
        self._layers, self._sources = set(layers), {}
        by_name = {n.get_friendly_name(): n for n in model.get_ops()}
        self.output_names = [_output_name(o, i) for i, o in enumerate(model.outputs)]
        self._ends = [r.input_value(0) for r in model.get_results()]
        parameters, extra = [], []
        for name in names:
            final = by_name.get(f"{QUANTIZE}{name}")
            if final is None:
                raise ExportError(f"{name}: the IR has no such activation quantizer")
            source, readers = _source(final, f"{QUANTIZE}{name}")
            self._sources[name] = source
            if cut:
                parameter = op.parameter(source.get_partial_shape(), np.float32, name=f"cut:{name}")
                for reader in readers:
                    reader.replace_source_output(parameter.output(0))
                parameters.append(parameter)
                extra.append(op.result(source))
            extra.append(op.result(final.output(0)))
        results = [*model.get_results(), *extra]
        self._model = _ov.openvino().Model(results, [*model.get_parameters(), *parameters])
        self._inputs = len(model.get_parameters())
        self._compiled = _ov.openvino().Core().compile_model(self._model, device, _ov.exact(device))

    def producers(self, name: str) -> list[str]:
        """Quantized layers between the quantizers before and the input of quantizer ``name``."""
        return sorted(self._upstream(self._sources[name]) & self._layers)

    def output_producers(self, index: int) -> list[str]:
        """Quantized layers between the last quantizers and an output of the model."""
        return sorted(self._upstream(self._ends[index]) & self._layers)

    def quantizers(self, name: str) -> set[str]:
        """Quantizers that the input of quantizer ``name`` depends on."""
        return self._before(self._sources[name])

    def output_quantizers(self, index: int) -> set[str]:
        """Quantizers that an output of the model depends on."""
        return self._before(self._ends[index])

    def _before(self, output: Any) -> set[str]:
        found = self._upstream(output)
        return {name for name in self.names if f"{QUANTIZE}{name}" in found}

    def _upstream(self, output: Any) -> set[str]:
        """Friendly names of all that an output depends on."""
        stack, seen = [output.get_node()], set()
        while stack:
            node = stack.pop()
            name = node.get_friendly_name()
            if name in seen:
                continue
            seen.add(name)
            stack += [value.get_node() for value in node.input_values()]
        return seen

    def run(self, inputs: list[np.ndarray], feed: dict[str, Tensor]) -> Run:
        """One inference. ``feed``: input of every quantizer when the graph is cut."""
        arrays = [*inputs, *(feed[n].numpy() for n in self.names)] if self.cut else inputs
        try:
            values = self._compiled(dict(enumerate(arrays)))
        except Exception as error:
            raise ExportError(f"OpenVINO refuses the inputs: {first_line(error)}") from error
        values = [values[i] for i in range(len(self._compiled.outputs))]
        own = len(self.output_names)
        run, rest = Run(outputs=values[:own]), values[own:]
        if self.cut:
            run.computed = dict(zip(self.names, rest[0::2], strict=True))
            run.quantized = dict(zip(self.names, rest[1::2], strict=True))
        else:
            run.quantized = dict(zip(self.names, rest, strict=True))
        return run


def _output_name(output: Any, index: int) -> str:
    names = output.get_names()
    return min(names) if names else f"output{index}"


def _source(final: Any, base: str) -> tuple[Any, list[Any]]:
    """What a quantizer reads, and those inputs of its nodes that read it."""
    source, readers, stack, seen = None, [], [final], set()
    while stack:
        node = stack.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        for port in node.inputs():
            before = port.get_source_output()
            name, kind = before.get_node().get_friendly_name(), before.get_node().get_type_name()
            if name.startswith(f"{base}|"):
                stack.append(before.get_node())
            elif kind != "Constant":
                source = before
                readers.append(port)
    if source is None:
        raise ExportError(f"{base.removeprefix(QUANTIZE)}: this activation quantizer of the IR reads nothing")
    return source, readers
