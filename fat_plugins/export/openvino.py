"""OpenVINO IR of a frozen model: standard operations only, codes at their true width, integer kernels on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.export import _ov
from fat_plugins.export.common import (
    ExportReport,
    LayerReport,
    as_inputs,
    check_model,
    check_path,
    first_line,
    on_device,
    warn_of_notes,
)
from fat_plugins.export.ir import Converter, Entry, rewrite
from fat_plugins.forms import form_kind

_RT_INFO = ["fat_plugins", "layers"]


def export(
    frozen_model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write ``path`` (``.xml``) and the ``.bin`` beside it.

    :param frozen_model: a model whose quantizers are :class:`~fat_plugins.frozen.FrozenWeight` and
        :class:`~fat_plugins.frozen.FrozenActivation`; it is put into evaluation mode.
    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :param dynamic_batch: leave the first dimension of every input open.
    :raises ExportError: OpenVINO is missing, the path cannot be written, a quantizer is uncalibrated or unfit, or
        OpenVINO cannot convert the model. No file is touched then.
    """
    path = check_path(path, ".xml", "an OpenVINO model", also=(".bin",))
    check_model(frozen_model)
    _ov.openvino()
    inputs = on_device(frozen_model, as_inputs(example_input))
    model, entries = _convert(frozen_model.eval(), inputs, dynamic_batch)
    layers = [_layer_report(e) for e in entries if not e.repeated]
    model.set_rt_info(json.dumps(_description(entries)), _RT_INFO)
    # else the CPU plugin quantizes the inputs of float matrix products with packed weights, by rules of its own
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    _save(model, path)
    size = path.with_suffix(".bin").stat().st_size
    float_bytes = size + sum(4 * r.elements - r.bytes for r in layers)
    versions = {"openvino": _ov.openvino().__version__}
    report = ExportReport(str(path), "OpenVINO IR", size, float_bytes, versions, layers)
    warn_of_notes(report)
    return report


def _convert(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool) -> tuple[Any, list[Entry]]:
    ov, converter = _ov.openvino(), Converter(model)
    shapes = [ov.PartialShape([-1 if dynamic_batch and i == 0 else n for i, n in enumerate(x.shape)]) for x in inputs]
    example = inputs[0] if len(inputs) == 1 else inputs
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on shapes are no business of the user
            result = ov.convert_model(model, example_input=example, input=shapes, extension=converter.extensions())
    except Exception as error:
        raise ExportError(f"OpenVINO {ov.__version__} cannot convert the model: {first_line(error)}") from error
    if not converter.entries:
        raise ExportError("no frozen quantizer is reached by the model's forward")
    rewrite(result, converter.entries)
    result.validate_nodes_and_infer_types()
    _number_names(result)
    return result, converter.entries


def _number_names(model: Any) -> None:
    """Number anew what OpenVINO has named itself: it goes on counting within a process, and the same model is to give
    the same file."""
    model.set_friendly_name("Model0")
    nodes = model.get_ordered_ops()
    own = [re.fullmatch(rf"{re.escape(n.get_type_name())}_\d+", n.get_friendly_name()) is not None for n in nodes]
    given = {n.get_friendly_name() for n, made_up in zip(nodes, own, strict=True) if not made_up}
    for i, (node, made_up) in enumerate(zip(nodes, own, strict=True)):
        name = f"{node.get_type_name()}_{i}"
        if made_up and name not in given:
            node.set_friendly_name(name)


def _layer_report(entry: Entry) -> LayerReport:
    module = entry.module
    report = LayerReport(entry.name, entry.kind, form_kind(module.form), module.form.bits, note="; ".join(entry.notes))
    if entry.kind == "weight":
        report.elements, report.storage = module.codes.numel(), "+".join(s.element for s in entry.storage)
        report.bytes = sum(-(-report.elements * s.bits // 8) for s in entry.storage)
    return report


def _description(entries: list[Entry]) -> list[dict[str, Any]]:
    """What is kept inside the IR, in the order of the trace, so that it can be read without the torch model."""
    out = []
    for e in entries:
        out.append({"kind": e.kind, "name": e.name, "bits": e.module.form.bits})
        if e.kind == "weight":
            out[-1] |= {"readers": e.readers, "operations": e.operations, "parts": e.parts}
    return out


def description(model: Any) -> list[dict[str, Any]]:
    """What :func:`export` noted inside an IR.

    :raises ExportError: the model was not written by it.
    """
    try:
        return json.loads(str(_ov.any_value(model.get_rt_info(_RT_INFO))))
    except Exception:
        raise ExportError("the IR was not written by fat-plugins' export") from None


def read_model(path: str | os.PathLike) -> Any:
    """Read an IR.

    :raises ExportError: missing or unreadable file.
    """
    path = Path(path)
    for part in (path, path.with_suffix(".bin")):
        if not part.is_file():
            raise ExportError(f"{part}: no such file")
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if not head.startswith(b"<?xml"):  # OpenVINO tries it in other formats, whose readers print what they think of it
        raise ExportError(f"{path}: not an OpenVINO IR")
    try:
        return _ov.openvino().Core().read_model(str(path))
    except Exception as error:
        raise ExportError(f"{path}: OpenVINO cannot read it: {first_line(error)}") from None


def _save(model: Any, path: Path) -> None:
    temporary = path.parent / f".{path.stem}.{uuid.uuid4().hex[:8]}.xml"
    try:
        _ov.openvino().save_model(model, str(temporary), compress_to_fp16=False)
        os.replace(temporary.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(temporary, path)
    except Exception as error:
        raise ExportError(f"{path}: cannot be written: {first_line(error)}") from error
    finally:
        for left in (temporary, temporary.with_suffix(".bin")):
            left.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# kernels
# --------------------------------------------------------------------------------------------------------------------
class Kernel(NamedTuple):
    """What ran one quantized layer.

    :param name: the layer's name.
    :param operation: the plugin's operation.
    :param kernel: the plugin's name of the kernel.
    :param precision: precision it ran at.
    :param speed: ``"int8"`` or ``"float"``.
    """

    name: str
    operation: str
    kernel: str
    precision: str
    speed: str


def _length(dimension: Any) -> int:
    return 1 if dimension.is_dynamic else dimension.get_length()


_KERNEL_TYPES = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGER = ("i8", "u8")


def kernels(path_or_model: Any, device: str = "CPU") -> list[Kernel]:
    """The kernels that the quantized layers run on this machine, in execution order.

    :param path_or_model: path of an exported IR, or an ``openvino.Model`` read from one.
    :raises ExportError: no exported model, or a layer is not found in the compiled one.
    """
    model = read_model(path_or_model) if isinstance(path_or_model, (str, os.PathLike)) else path_or_model.clone()
    layers = [layer for entry in description(model) for layer in entry.get("operations", ())]
    if model.is_dynamic():  # with open dimensions the plugin picks a kernel at the first inference only
        shape = _ov.openvino().PartialShape
        with contextlib.suppress(RuntimeError):  # a model that works for other sizes only keeps its open ones
            model.reshape({i: shape([_length(d) for d in i.get_partial_shape()]) for i in model.inputs})
    runtime = _ov.openvino().Core().compile_model(model, device).get_runtime_model()
    found: dict[str, Kernel] = {}
    for node in runtime.get_ordered_ops():
        info = {k: str(_ov.any_value(v)) for k, v in node.get_rt_info().items()}
        if info.get("layerType") not in _KERNEL_TYPES:
            continue
        # a product whose input's scale moved behind it keeps only its own name
        origin = [node.get_friendly_name(), *info.get("originalLayersNames", "").split(",")]
        for layer in layers:
            # the plugin may append its own word to a name when it moves a scale behind the operation
            if layer not in found and any(o == layer or o.startswith(f"{layer}/") for o in origin):
                kernel, precision = info["primitiveType"], info.get("runtimePrecision", "")
                integer = "_i8" in kernel.lower() or precision.lower() in _INTEGER
                found[layer] = Kernel(layer, info["layerType"], kernel, precision, "int8" if integer else "float")
                break
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ExportError(f"{missing[0]}: not found among the kernels of the compiled model")
    return list(found.values())


def execute(path: str | os.PathLike, inputs: list[Any]) -> list[Any]:
    """Outputs of an IR for one batch, on the CPU in float32.

    :param inputs: numpy arrays, one per input.
    :raises ExportError: unreadable file, or inputs that the model refuses.
    """
    compiled = _ov.openvino().Core().compile_model(read_model(path), "CPU", _ov.exact("CPU"))
    try:
        values = compiled(dict(enumerate(inputs)))
    except Exception as error:
        raise ExportError(f"OpenVINO refuses the inputs: {first_line(error)}") from error
    return [values[i] for i in range(len(compiled.outputs))]
