"""Ready layers for those who subclass: ``FATConv2d`` is Brevitas's ``QuantConv2d`` with FAT's weight quantizer."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import brevitas.nn as qnn

from fat_brevitas.injectors import weight_quant
from fat_plugins.registry import algorithms

#: last part of a layer's name and Brevitas's class
KINDS: dict[str, type] = {
    kind: getattr(qnn, f"Quant{kind}")
    for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
    if hasattr(qnn, f"Quant{kind}")
}


@cache
def layer_class(algorithm: str, kind: str) -> type:
    """Brevitas's layer of a ``kind`` whose weights the algorithm quantizes unless ``weight_quant`` says otherwise.

    :param kind: ``"Conv2d"``, ``"ConvTranspose2d"``, ``"Linear"``, ...
    """
    base, default = KINDS[kind], weight_quant(algorithm)
    signature = inspect.signature(base.__init__)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "weight_quant" not in signature.bind_partial(self, *args, **kwargs).arguments:
            kwargs["weight_quant"] = default
        base.__init__(self, *args, **kwargs)

    title = algorithms()[algorithm].title
    name = f"{algorithms()[algorithm].__name__}{kind}"
    doc = f"``brevitas.nn.{base.__name__}`` with the weights quantized by {title}; takes all its arguments."
    namespace = {"__init__": __init__, "__doc__": doc, "__module__": __name__, "brevitas_class": base}
    made = type(name, (base,), namespace)
    made.__init__.__signature__ = signature
    return made


def by_class_name(name: str) -> type | None:
    """The layer that ``FATConv2d`` and the like mean; ``None`` for a name of another kind."""
    for algorithm in algorithms().values():
        kind = name.removeprefix(algorithm.__name__)
        if kind != name and kind in KINDS and algorithm.weight_quantizer is not None:
            return layer_class(algorithm.name, kind)
    return None


def class_names() -> list[str]:
    """Names of all layers."""
    return [f"{a.__name__}{kind}" for a in algorithms().values() if a.weight_quantizer for kind in KINDS]
