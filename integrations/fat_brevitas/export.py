"""From a Brevitas model to files: thin functions over the core's exporters, which read :func:`frozen` models."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from fat_brevitas.deployed import frozen


def export_openvino(
    model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> Any:
    """Write an OpenVINO IR with packed integer codes: ``path`` (``.xml``) and the ``.bin`` beside it.

    :param model: a Brevitas model; it is left untouched.
    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :param dynamic_batch: leave the first dimension of every input open.
    :return: :class:`fat_plugins.export.openvino.ExportReport`.
    :raises ExportError: a layer or form that cannot be exported; no file is touched then.
    """
    from fat_plugins.export.openvino import export

    return export(frozen(model, example_input), path, example_input, dynamic_batch=dynamic_batch)


def verify_openvino(
    model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4, device: str = "CPU"
) -> Any:
    """Compare the integer codes of ``model`` with those of an IR that :func:`export_openvino` wrote from it.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :return: :class:`fat_plugins.export.verify.VerifyReport`.
    :raises ExportError: see :func:`fat_plugins.export.verify.verify`.
    """
    from fat_plugins.export.verify import verify

    return verify(frozen(model, inputs), path, inputs, tie_guard=tie_guard, device=device)


def export_qonnx(model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True) -> Any:
    """Write QONNX (``Quant``, ``BipolarQuant``, ``MultiThreshold``) from deployed forms, by the core's exporter.

    Brevitas's own ``export_qonnx`` works on these models as well.

    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :raises ExportError: a layer or form that cannot be exported; no file is touched then.
    """
    from fat_plugins.export.qonnx import export

    return export(frozen(model, example_input), path, example_input, dynamic_batch=dynamic_batch)


def verify_qonnx(model: nn.Module, path: str | os.PathLike, inputs: Any) -> Any:
    """Compare the integer codes of ``model`` with those of a file that :func:`export_qonnx` wrote from it.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: they differ, or the file is another model's.
    """
    from fat_plugins.export.qonnx import verify

    return verify(frozen(model, inputs), path, inputs)


def export_onnx(model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True) -> Any:
    """Write ONNX with standard operators (``QuantizeLinear``, ``DequantizeLinear``) from deployed forms.

    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :raises ExportError: a layer or form that cannot be exported; no file is touched then.
    """
    from fat_plugins.export.onnx import export

    return export(frozen(model, example_input), path, example_input, dynamic_batch=dynamic_batch)


def verify_onnx(model: nn.Module, path: str | os.PathLike, inputs: Any) -> Any:
    """Compare the integer codes of ``model`` with those of a file that :func:`export_onnx` wrote from it.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: they differ, or the file is another model's.
    """
    from fat_plugins.export.onnx import verify

    return verify(frozen(model, inputs), path, inputs)
