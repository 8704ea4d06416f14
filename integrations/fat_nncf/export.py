"""From a model compressed with NNCF, either generation, to a file and back to the proof that both are equal.

The exporters are those of the core; here a model is frozen for them. Only OpenVINO IRs need OpenVINO.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

import fat_nncf
from fat_plugins.export import onnx, openvino, qonnx
from fat_plugins.export.common import ExportReport
from fat_plugins.export.verify import VerifyReport, verify


def export_openvino(
    model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write an OpenVINO IR with packed integer codes: ``path`` (``.xml``) and the ``.bin`` beside it.

    :param model: what ``create_compressed_model`` or ``quantize`` gave; it is left untouched.
    :param example_input: a float tensor, or a tuple of tensors, one per input.
    :param dynamic_batch: leave the first dimension of every input open.
    :raises ExportError: see :func:`fat_plugins.export.openvino.export`; no file is touched then.
    :raises HostError: the model was not compressed by this package.
    """
    return openvino.export(fat_nncf.freeze(model), path, example_input, dynamic_batch=dynamic_batch)


def verify_openvino(
    model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4, device: str = "CPU"
) -> VerifyReport:
    """Compare the integer codes of ``model`` with those of an IR that :func:`export_openvino` wrote from it.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: see :func:`fat_plugins.export.verify.verify`.
    """
    return verify(fat_nncf.freeze(model), path, inputs, tie_guard=tie_guard, device=device)


def export_qonnx(
    model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write QONNX, for FINN and others: ``path`` (``.onnx``). Parameters as in :func:`export_openvino`.

    :param dynamic_batch: FINN wants ``False`` and an example of one sample.
    :raises ExportError: see :func:`fat_plugins.export.qonnx.export`; no file is touched then.
    :raises HostError: the model was not compressed by this package.
    """
    return qonnx.export(fat_nncf.freeze(model), path, example_input, dynamic_batch=dynamic_batch)


def verify_qonnx(model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4) -> VerifyReport:
    """Compare the integer codes of ``model`` with those of a file that :func:`export_qonnx` wrote, executed by qonnx.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: see :func:`fat_plugins.export.qonnx.verify`.
    """
    return qonnx.verify(fat_nncf.freeze(model), path, inputs, tie_guard=tie_guard)


def export_onnx(
    model: nn.Module, path: str | os.PathLike, example_input: Any, *, dynamic_batch: bool = True
) -> ExportReport:
    """Write standard ONNX with 8-bit integers: ``path`` (``.onnx``). Parameters as in :func:`export_openvino`.

    :raises ExportError: see :func:`fat_plugins.export.onnx.export`; no file is touched then.
    :raises HostError: the model was not compressed by this package.
    """
    return onnx.export(fat_nncf.freeze(model), path, example_input, dynamic_batch=dynamic_batch)


def verify_onnx(model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4) -> VerifyReport:
    """Compare the integer codes of ``model`` with those of a file that :func:`export_onnx` wrote, in ONNX Runtime.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: see :func:`fat_plugins.export.onnx.verify`.
    """
    return onnx.verify(fat_nncf.freeze(model), path, inputs, tie_guard=tie_guard)
