"""Brevitas quantizers (injector classes) for every algorithm of the registry, made by one factory."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fat_brevitas.build import ACTIVATION, WEIGHT
from fat_brevitas.compat import ExtendedInjector
from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy
from fat_plugins.errors import ConfigError, unknown
from fat_plugins.registry import Algorithm, algorithms, get_algorithm

_SCHEME = re.compile(
    r"(?P<sign>Int|Uint)(?P<bits>\d+)(?P<role>Weight|Act)Per(?P<per>Tensor|Channel)Float(?P<method>\w+)"
)
_ROLES = {"weight": (PluginWeightQuantProxy, WEIGHT, "Weight"), "activation": (PluginActQuantProxy, ACTIVATION, "Act")}


def weight_quant(algorithm: str, **attributes: Any) -> type:
    """A Brevitas weight quantizer: ``qnn.QuantConv2d(..., weight_quant=weight_quant("fat", bit_width=4))``.

    Attributes may be given here, in a subclass, or by the layer's keywords with the prefix ``weight_``.

    :param algorithm: any name of the registry, third-party entry points included.
    :param attributes: ``bit_width``, ``scaling_per_output_channel``, ``quant_type``, ``quant_delay_steps``,
        ``keep_zeros``, ``followed_by_norm``, ``name`` and the algorithm's own options.
    :raises ConfigError: unknown algorithm or attribute. Values are checked when a layer is built with it.
    """
    return _quantizer(algorithm, "weight", attributes)


def act_quant(algorithm: str, **attributes: Any) -> type:
    """A Brevitas activation quantizer: ``qnn.QuantReLU(act_quant=act_quant("fat", bit_width=4))``.

    :param algorithm: any name of the registry, third-party entry points included.
    :param attributes: ``bit_width``, ``signed`` (``None``: calibration decides; never below zero after ReLU),
        ``collect_stats_steps`` (training batches that calibrate), ``calibration_max``, ``quant_type``,
        ``quant_delay_steps``, ``name`` and the algorithm's own options.
    :raises ConfigError: unknown algorithm or attribute. Values are checked when a layer is built with it.
    """
    return _quantizer(algorithm, "activation", attributes)


def _quantizer(name: str, role: str, attributes: dict[str, Any], class_name: str | None = None) -> type:
    base = _base(get_algorithm(name), role)
    for key in attributes:
        if key not in base.__dependencies__:
            allowed = [k for k in base.__dependencies__ if k not in ("proxy_class", "algorithm")]
            raise ConfigError(unknown(f"attribute of the '{name}' {role} quantizer", key, allowed))
    if not attributes:
        return base
    return type(base)(class_name or base.__name__, (base,), {"__module__": __name__, **attributes})


@cache
def _base(algorithm: type[Algorithm], role: str) -> type:
    proxy, defaults, word = _ROLES[role]
    kind = algorithm.weight_quantizer if role == "weight" else algorithm.activation_quantizer
    if kind is None:
        raise ConfigError(f"algorithm '{algorithm.name}' does not quantize {role}s")
    options = {k: f.get_default(call_default_factory=True) for k, f in algorithm.Params.model_fields.items()}
    taken = sorted(set(options) & set(defaults))
    if taken:
        raise ConfigError(f"algorithm '{algorithm.name}': its option {taken[0]!r} is an attribute of every quantizer")
    doc = f"{algorithm.title}: {role} quantizer for Brevitas. {algorithm.paper}. Fidelity {algorithm.fidelity}."
    own = {"__module__": __name__, "__doc__": doc, "proxy_class": proxy, "algorithm": algorithm.name}
    return type(ExtendedInjector)(
        f"{algorithm.__name__}{word}Quant", (ExtendedInjector,), {**own, **defaults, **options}
    )


def by_class_name(name: str) -> type | None:
    """The quantizer that a class name means: ``FATWeightQuant``, ``LSQActQuant``, ``Int4WeightPerTensorFloatFAT``.

    :return: ``None`` for a name of another kind.
    :raises ConfigError: the scheme names an unknown algorithm, or what the algorithm does not have.
    """
    for algorithm in algorithms().values():
        for role, (_, _, word) in _ROLES.items():
            if name == f"{algorithm.__name__}{word}Quant":
                return _base(algorithm, role)
    found = _SCHEME.fullmatch(name)
    if found is None:
        return None
    by_method = {a.__name__: a for a in algorithms().values()}
    if found["method"] not in by_method:
        return None  # may be Brevitas's own
    algorithm = by_method[found["method"]]
    role = "weight" if found["role"] == "Weight" else "activation"
    signed, per_channel = found["sign"] == "Int", found["per"] == "Channel"
    if role == "weight" and not signed:
        raise ConfigError(f"{name}: weights are always signed; Int{found['bits']}... instead")
    attributes = {"bit_width": int(found["bits"]), "signed": signed, "scaling_per_output_channel": per_channel}
    _check(algorithm, role, name, attributes)
    return _quantizer(algorithm.name, role, attributes, name)


def _check(algorithm: type[Algorithm], role: str, name: str, attributes: dict[str, Any]) -> None:
    from fat_plugins.quantizer import TensorSpec

    per_channel = attributes["scaling_per_output_channel"]
    algorithm.check(TensorSpec(role, attributes["bit_width"], name=name, per_channel=per_channel))


def class_names() -> list[str]:
    """``FATWeightQuant``, ``FATActQuant``, ... of every algorithm."""
    found = []
    for algorithm in algorithms().values():
        found += [f"{algorithm.__name__}WeightQuant"] if algorithm.weight_quantizer else []
        found += [f"{algorithm.__name__}ActQuant"] if algorithm.activation_quantizer else []
    return found
