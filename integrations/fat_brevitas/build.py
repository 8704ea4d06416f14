"""From the attributes of a Brevitas quantizer to a core quantizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from fat_brevitas.compat import QuantType
from fat_brevitas.modules import ActTensorQuant, WeightTensorQuant
from fat_plugins.errors import ConfigError, nearest
from fat_plugins.quantizer import Params, TensorSpec, module_geometry
from fat_plugins.registry import Algorithm, get_algorithm

#: attributes of our quantizers beside the algorithm's options, with their defaults
COMMON: dict[str, Any] = {
    "bit_width": 4,
    "signed": None,
    "quant_type": "INT",
    "quant_delay_steps": None,
    "scaling_per_output_channel": None,
    "name": "",
}
WEIGHT: dict[str, Any] = {**COMMON, "signed": True, "keep_zeros": False, "followed_by_norm": False}
ACTIVATION: dict[str, Any] = {**COMMON, "collect_stats_steps": 1, "calibration_max": None}
#: attributes that Brevitas sets by itself
_FRAMEWORK = {
    "proxy_class", "tensor_quant", "algorithm", "module", "proxy_module", "tracked_parameter_list", "act_impl",
    "passthrough_act", "dtype", "device", "cache_inference_quant_act",
}  # fmt: skip
#: bounds of QuantHardTanh, whose clamp the quantizer takes over
_BOUNDS = ("min_val", "max_val")
#: keywords of a layer that reach the quantizer of its activation, which has no prefix of its own
_LAYER_PREFIXES = ("input_", "output_", "weight_", "bias_", "act_")
#: activation functions that give nothing negative
_NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax, nn.Hardsigmoid, nn.Softplus)


def layer_name(proxy: Any, role: str) -> str:
    """How errors call a tensor whose layer has no path yet: ``QuantConv2d(8, 3, 3, 3) weight``."""
    module = proxy.tracked_module_list[0]
    weight = getattr(module, "weight", None) if role == "weight" else None
    shape = f"({', '.join(map(str, weight.shape))})" if weight is not None else ""
    return f"{type(module).__name__}{shape} {role}"


def _read(injector: Any, defaults: dict[str, Any], where: str) -> tuple[type[Algorithm], Params, dict[str, Any]]:
    """Algorithm, its parsed options and our other attributes.

    :raises ConfigError: an attribute that nothing reads, or a value that the algorithm refuses.
    """
    algorithm = get_algorithm(injector.algorithm)
    options = algorithm.Params.model_fields
    for key in injector.__dependencies__:
        if key in defaults or key in options or key in _FRAMEWORK or key.startswith("__"):
            continue
        if defaults is ACTIVATION and (key.startswith(_LAYER_PREFIXES) or (key in _BOUNDS and _is_hardtanh(injector))):
            continue
        known = sorted({*defaults, *options})
        raise ConfigError(
            f"{where}: the quantizer of '{algorithm.name}' has no attribute {key!r}; allowed: {', '.join(known)}"
            f"{nearest(key, known)}"
        )
    given = {key: getattr(injector, key) for key in options if key in injector}
    params = algorithm.parse_params(given, f"{where}: attributes")
    values = {key: getattr(injector, key) if key in injector else value for key, value in defaults.items()}
    return algorithm, params, values


def _is_hardtanh(injector: Any) -> bool:
    return "act_impl" in injector and isinstance(injector.act_impl, nn.Hardtanh)


def _enabled(values: dict[str, Any], where: str) -> bool:
    kind = values["quant_type"]
    text = kind.value if isinstance(kind, QuantType) else kind
    if text is None or str(text).upper() == "FP":
        return False
    if str(text).upper() != "INT":
        raise ConfigError(f"{where}: quant_type {text!r}; allowed: INT, FP (the width is said by bit_width)")
    return True


def _delay(steps: int | None) -> nn.Module | None:
    if not steps or steps < 0:
        return None
    from brevitas.core.quant.delay import DelayWrapper

    return DelayWrapper(steps)


def weight_spec(proxy: Any, injector: Any) -> TensorSpec | None:
    """What the weight of a proxy is; ``None`` for ``quant_type='FP'``.

    :raises ConfigError: weights of different shapes share the quantizer, or an attribute is wrong.
    """
    where = (injector.name if "name" in injector else "") or layer_name(proxy, "weight")
    values = _read(injector, WEIGHT, where)[2]
    if not _enabled(values, where):
        return None
    modules = proxy.tracked_module_list
    shapes = list(dict.fromkeys(tuple(m.weight.shape) for m in modules if m.weight is not None))
    axes = {getattr(m, "output_channel_dim", 0) for m in modules}
    if len(shapes) > 1 or len(axes) > 1:
        raise ConfigError(
            f"{where}: one quantizer is shared by weights of shapes {', '.join(map(str, shapes))}; allowed: weights of "
            "one shape in layers of one kind"
        )
    if values["signed"] is not True:
        raise ConfigError(f"{where}: signed={values['signed']!r}; weights are always signed")
    return TensorSpec(
        "weight",
        values["bit_width"],
        name=where,
        shape=shapes[0],
        channel_axis=axes.pop() % len(shapes[0]),
        per_channel=values["scaling_per_output_channel"],
        signed=None,
        followed_by_norm=bool(values["followed_by_norm"]),
        keep_zeros=bool(values["keep_zeros"]),
        **(module_geometry(modules[0]) if len(modules) == 1 else {}),
    )


def build_weight(proxy: Any, injector: Any) -> WeightTensorQuant | None:
    """The quantizing module of a weight proxy, ``None`` for ``quant_type='FP'``.

    :raises ConfigError: wrong attribute, option, bit width or granularity; shared by unequal weights.
    """
    spec = weight_spec(proxy, injector)
    if spec is None:
        return None
    algorithm, params, values = _read(injector, WEIGHT, spec.name)
    return WeightTensorQuant(algorithm.make_weight(spec, params), _delay(values["quant_delay_steps"]))


def build_activation(proxy: Any, injector: Any) -> ActTensorQuant | None:
    """The quantizing module of an activation proxy, ``None`` for ``quant_type='FP'``.

    :raises ConfigError: wrong attribute, option, bit width or granularity.
    """
    where = (injector.name if "name" in injector else "") or layer_name(proxy, "activation")
    algorithm, params, values = _read(injector, ACTIVATION, where)
    if not _enabled(values, where):
        return None
    steps, ceiling = values["collect_stats_steps"], values["calibration_max"]
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"{where}: collect_stats_steps must be a positive integer, got {steps!r}")
    if ceiling is not None and not (isinstance(ceiling, (int, float)) and ceiling > 0):
        raise ConfigError(f"{where}: calibration_max must be a positive number, got {ceiling!r}")
    signed = values["signed"]
    if signed is None and "act_impl" in injector and isinstance(injector.act_impl, _NON_NEGATIVE):
        signed = False
    spec = TensorSpec(
        "activation",
        values["bit_width"],
        name=where,
        channel_axis=1,
        per_channel=values["scaling_per_output_channel"],
        signed=signed,
    )
    quantizer = algorithm.make_activation(spec, params)
    bounds = (injector.min_val, injector.max_val) if _is_hardtanh(injector) else (None, ceiling)
    return ActTensorQuant(quantizer, _delay(values["quant_delay_steps"]), steps, bounds)
