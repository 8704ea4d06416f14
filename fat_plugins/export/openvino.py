"""OpenVINO IR of a frozen model: standard operations only, codes at their true width, integer kernels on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.export import _ov
from fat_plugins.export.ir import Converter, Entry, rewrite
from fat_plugins.forms import form_kind
from fat_plugins.frozen import frozen_modules
from fat_plugins.quantizer import named_quantizers

_RT_INFO = ["fat_plugins", "layers"]


@dataclass
class LayerReport:
    """One quantized tensor of the written model.

    :param kind: ``"weight"`` or ``"activation"``.
    :param form: kind of the deployed form.
    :param bits: width of the codes; ``storage`` is the element type that holds them in the file (weights).
    :param elements, bytes: number of codes and their size in the file (0 for activations).
    :param note: what runs or is stored wider than asked, and why.
    """

    name: str
    kind: str
    form: str
    bits: int
    elements: int = 0
    bytes: int = 0
    storage: str = ""
    note: str = ""


@dataclass
class ExportReport:
    """What :func:`export` wrote. Sizes in bytes.

    :param weights_bytes: size of the ``.bin`` file.
    :param float_bytes: size that the same model would have with every weight in float32.
    """

    path: str
    openvino: str
    weights_bytes: int
    float_bytes: int
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Everything that is wider or slower than asked, one line per layer."""
        return [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


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
    path = check_path(path)
    _check_model(frozen_model)
    _ov.openvino()
    inputs = on_device(frozen_model, as_inputs(example_input))
    model, entries = _convert(frozen_model.eval(), inputs, dynamic_batch)
    layers = [_layer_report(e) for e in entries if not (e.kind == "weight" and "#" in e.name)]
    model.set_rt_info(json.dumps(_description(entries)), _RT_INFO)
    _save(model, path)
    size = path.with_suffix(".bin").stat().st_size
    float_bytes = size + sum(4 * r.elements - r.bytes for r in layers)
    report = ExportReport(str(path), _ov.openvino().__version__, size, float_bytes, layers)
    if report.notes:
        more = f" (and {len(report.notes) - 1} more, see the report's notes)" if len(report.notes) > 1 else ""
        warnings.warn(f"{report.notes[0]}{more}", stacklevel=2)
    return report


def check_path(path: str | os.PathLike) -> Path:
    """The path to write, checked before anything is converted.

    :raises ExportError: wrong suffix, no such directory, or no permission to write.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"{path}: an OpenVINO model is written to a path that ends in .xml")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the directory {path.parent} does not exist")
    if path.is_dir() or path.with_suffix(".bin").is_dir():
        raise ExportError(f"{path}: is a directory")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path}: the directory {path.parent} cannot be written to")
    return path


def as_inputs(example_input: Any) -> tuple[Tensor, ...]:
    """Inputs of a model as a tuple of tensors.

    :raises ExportError: anything but a tensor or a sequence of tensors.
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ExportError(f"example_input must be a tensor or a tuple of tensors, got {type(example_input).__name__}")
    return tuple(inputs)


def on_device(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``inputs`` where the frozen model is."""
    device = next(frozen_modules(model)).scale.device
    return tuple(x.to(device) for x in inputs)


def _check_model(model: nn.Module) -> None:
    live = [name for name, _ in named_quantizers(model)]
    if live:
        raise ExportError(f"{live[0]}: still a training quantizer ({len(live)} in the model): freeze the model first")
    for module in frozen_modules(model):
        if module.form is None:
            raise ExportError(f"{module.name}: the activation quantizer was never calibrated")
        if not bool(torch.isfinite(module.scale).all()):
            raise ExportError(f"{module.name}: the scale is not finite")
        # an activation range of zero width crashes some versions of the CPU plugin
        if not hasattr(module, "codes") and not bool((module.scale > 0).all()):
            raise ExportError(f"{module.name}: the scale of an activation must be positive")


def _convert(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool) -> tuple[Any, list[Entry]]:
    ov, converter = _ov.openvino(), Converter(model)
    shapes = [ov.PartialShape([-1 if dynamic_batch and i == 0 else n for i, n in enumerate(x.shape)]) for x in inputs]
    example = inputs[0] if len(inputs) == 1 else inputs
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on shapes are no business of the user
            result = ov.convert_model(model, example_input=example, input=shapes, extension=converter.extensions())
    except Exception as error:
        raise ExportError(f"OpenVINO {ov.__version__} cannot convert the model: {_ov.first_line(error)}") from error
    if not converter.entries:
        raise ExportError("no frozen quantizer is reached by the model's forward")
    rewrite(result, converter.entries)
    result.validate_nodes_and_infer_types()
    return result, converter.entries


def _layer_report(entry: Entry) -> LayerReport:
    module = entry.module
    report = LayerReport(entry.name, entry.kind, form_kind(module.form), module.form.bits, note="; ".join(entry.notes))
    if entry.kind == "weight":
        report.elements, report.storage = module.codes.numel(), entry.storage.element
        report.bytes = -(-report.elements * entry.storage.bits // 8)
    return report


def _description(entries: list[Entry]) -> list[dict[str, Any]]:
    """What is kept inside the IR, in the order of the trace, so that it can be read without the torch model."""
    out = []
    for e in entries:
        out.append({"kind": e.kind, "name": e.name, "bits": e.module.form.bits})
        if e.kind == "weight":
            out[-1] |= {"readers": e.readers, "operations": e.operations}
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
    try:
        return _ov.openvino().Core().read_model(str(path))
    except Exception as error:
        raise ExportError(f"{path}: OpenVINO cannot read it: {_ov.first_line(error)}") from None


def _save(model: Any, path: Path) -> None:
    temporary = path.parent / f".{path.stem}.{uuid.uuid4().hex[:8]}.xml"
    try:
        _ov.openvino().save_model(model, str(temporary), compress_to_fp16=False)
        os.replace(temporary.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(temporary, path)
    except Exception as error:
        raise ExportError(f"{path}: cannot be written: {_ov.first_line(error)}") from error
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
        origin = info.get("originalLayersNames", "").split(",")
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
