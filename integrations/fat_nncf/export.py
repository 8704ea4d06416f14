"""From a model compressed with NNCF, either generation, to OpenVINO and back to the proof that both are equal."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

import fat_nncf
from fat_plugins.export.openvino import ExportReport, export
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
    return export(fat_nncf.freeze(model), path, example_input, dynamic_batch=dynamic_batch)


def verify_openvino(
    model: nn.Module, path: str | os.PathLike, inputs: Any, *, tie_guard: float = 1e-4, device: str = "CPU"
) -> VerifyReport:
    """Compare the integer codes of ``model`` with those of an IR that :func:`export_openvino` wrote from it.

    :param inputs: one batch: a tensor, or a tuple of tensors.
    :raises ExportError: see :func:`fat_plugins.export.verify.verify`.
    """
    return verify(fat_nncf.freeze(model), path, inputs, tie_guard=tie_guard, device=device)
