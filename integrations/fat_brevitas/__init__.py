"""fat-plugins for Brevitas: every algorithm of the registry as a Brevitas quantizer and as ready layers.

``FATWeightQuant``, ``FATActQuant``, ``FATConv2d``, ``Int4WeightPerTensorFloatFAT`` and their like of every other
algorithm, third-party ones included, are attributes of this module, made when they are asked for.

:raises HostError: Brevitas is absent or its version is unsupported.
"""

from __future__ import annotations

from typing import Any

from fat_brevitas import injectors, layers
from fat_brevitas.compat import VERSION as BREVITAS_VERSION
from fat_brevitas.injectors import act_quant, weight_quant
from fat_plugins.errors import nearest
from fat_plugins.quantizer import param_groups

__all__ = ["BREVITAS_VERSION", "act_quant", "param_groups", "weight_quant"]


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
