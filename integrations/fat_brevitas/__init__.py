"""fat-plugins for Brevitas: every algorithm of the registry as a Brevitas quantizer and as ready layers.

``FATWeightQuant``, ``FATActQuant``, ``FATConv2d``, ``Int4WeightPerTensorFloatFAT`` and their like of every other
algorithm, third-party ones included, are attributes of this module, made when they are asked for.

:raises HostError: Brevitas is absent or its version is unsupported.
"""

from __future__ import annotations

from typing import Any

from fat_brevitas import injectors, layers
from fat_brevitas.compat import VERSION as BREVITAS_VERSION
from fat_brevitas.controller import Controller
from fat_brevitas.deployed import frozen
from fat_brevitas.export import (
    export_onnx,
    export_openvino,
    export_qonnx,
    verify_onnx,
    verify_openvino,
    verify_qonnx,
)
from fat_brevitas.injectors import act_quant, weight_quant
from fat_brevitas.model import quantize, rebuild
from fat_brevitas.stock import freeze
from fat_brevitas.training import QuantizationCallback, regularization, set_progress
from fat_plugins.errors import nearest
from fat_plugins.network import param_groups

__all__ = [
    "BREVITAS_VERSION",
    "Controller",
    "QuantizationCallback",
    "act_quant",
    "export_onnx",
    "export_openvino",
    "export_qonnx",
    "freeze",
    "frozen",
    "param_groups",
    "quantize",
    "rebuild",
    "regularization",
    "set_progress",
    "verify_onnx",
    "verify_openvino",
    "verify_qonnx",
    "weight_quant",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for by_class_name in (injectors.by_class_name, layers.by_class_name):
            found = by_class_name(name)
            if found is not None:  # an injector class is false: it has length 0
                return found
    known = [*__all__, *injectors.class_names(), *layers.class_names()]
    raise AttributeError(f"module 'fat_brevitas' has no attribute {name!r}{nearest(name, known)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *injectors.class_names(), *layers.class_names()])
