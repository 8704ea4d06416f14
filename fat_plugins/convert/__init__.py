"""``fat-plugins convert``: an NNCF 2 quantization config, rewritten for an algorithm of this package.

Every key of the old file gives one :class:`Line`: carried over, changed, added, or dropped with the reason. Nothing is
left out in silence, and the new section is validated like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fat_plugins.config import DEFAULT_ALGORITHM, CompressionConfig, split_sections
from fat_plugins.convert.quantization import QUANTIZING, Quantization
from fat_plugins.convert.report import Conversion, Line, Log
from fat_plugins.errors import ConfigError, nearest, unknown
from fat_plugins.registry import Algorithm, algorithms, get_algorithm

#: NNCF 2's other algorithms: None, or why NNCF 3 cannot run them
_OTHERS = {
    "magnitude_sparsity": None,
    "rb_sparsity": None,
    "const_sparsity": None,
    "filter_pruning": "NNCF 3 has no filter pruning",
    "movement_sparsity": "NNCF 3 has no movement sparsity",
    "knowledge_distillation": "NNCF 3 has no knowledge distillation: add the teacher's loss in the training loop",
    "bootstrapNAS": "NNCF 3 has no architecture search",
    "progressive_shrinking": "NNCF 3 has no architecture search",
}
_DEVICES = ("ANY", "CPU", "GPU", "NPU", "TRIAL", "CPU_SPR", "VPU")


def convert(
    config: Mapping[str, Any],
    algorithm: str = DEFAULT_ALGORITHM,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    nncf: int | None = None,
) -> Conversion:
    """Rewrite the quantization section of an NNCF 2 config.

    :param config: the old config; it is not changed.
    :param algorithm: name of the algorithm that takes the place of NNCF's own quantization.
    :param weight_bits, activation_bits: new widths; ``None`` keeps those of the old config (8 where it names none).
    :param nncf: 3 leaves out what NNCF 3 refuses; otherwise it is kept, and its line says so.
    :raises ConfigError: one line for a config that NNCF 2 would refuse, has nothing to convert, or asks for what the
        algorithm cannot do.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected an object, got {type(config).__name__}")
    if nncf not in (None, 2, 3):
        raise ConfigError(f"nncf: unknown generation {nncf!r}; allowed: 2, 3")
    kind = get_algorithm(algorithm)
    if "compression" not in config:
        raise ConfigError(f"compression: missing; expected an object with the key 'algorithm', or a list of them"
                          f"{nearest('compression', config)}")  # fmt: skip
    _find_section(config["compression"], kind)
    result = Conversion({})
    log = Log(result.lines, nncf)
    for key, value in config.items():
        value = copy.deepcopy(value)
        if key == "compression":
            result.config[key] = _compression(value, kind, (weight_bits, activation_bits), log)
        elif key == "target_device":
            result.config[key] = _device(value, log)
        elif key == "accuracy_aware_training":
            if log.keeps(key, "NNCF 3 has no accuracy-aware loop"):
                result.config[key] = value
        else:
            misplaced = key in ("weights", "activations", "scope_overrides", "ignored_scopes", "target_scopes")
            log("carried", key, f"stands outside of 'compression', where NNCF reads no {key!r}" if misplaced else "")
            result.config[key] = value
    return result


def _find_section(compression: Any, kind: type[Algorithm]) -> None:
    """Check the names of all sections.

    :raises ConfigError: no section, or more than one, that quantizes; or a name that NNCF 2 does not know.
    """
    sections = split_sections(compression)
    names = [section["algorithm"] for section in sections]
    for i, name in enumerate(names):
        if name in QUANTIZING or name in _OTHERS:
            continue
        where = f"compression[{i}].algorithm" if isinstance(compression, list) else "compression.algorithm"
        if name in algorithms():
            raise ConfigError(f"{where}: {name!r} is an algorithm of this package already: nothing to convert")
        raise ConfigError(f"{where}: {unknown('algorithm', name, [*QUANTIZING, *_OTHERS])}")
    quantizing = [name for name in names if name in QUANTIZING]
    if len(quantizing) != 1:
        raise ConfigError(
            f"compression: expected one section with an algorithm of {', '.join(QUANTIZING)}, got {len(quantizing)}"
        )
    zeroing = [name for name in names if "sparsity" in name or "pruning" in name]
    if zeroing and kind.weight_quantizer is not None and not kind.weight_quantizer.has_zero:
        raise ConfigError(
            f"compression: {zeroing[0]!r} sets weights to zero, and the grid of '{kind.name}' has no zero; "
            "choose another --algorithm"
        )


def _compression(value: Any, kind: type[Algorithm], bits: tuple[int | None, int | None], log: Log) -> Any:
    many, out = isinstance(value, list), []
    for i, section in enumerate(split_sections(value)):
        where = f"compression[{i}]" if many else "compression"
        name = section["algorithm"]
        if name in QUANTIZING:
            out.append(new := Quantization(kind, bits, where, log).convert(section))
            CompressionConfig.parse(new, where)
        elif reason := _OTHERS[name] or _schedule_reason(section):
            if log.keeps(where, f"{name}: {reason}"):
                out.append(section)
        else:
            log("carried", where, f"{name}, as it is")
            out.append(section)
    return out if many else out[0]


def _schedule_reason(section: dict[str, Any]) -> str | None:
    params = section.get("params", {})
    if isinstance(params, dict):
        if params.get("schedule") == "adaptive" or "patience" in params:
            return "NNCF 3 has no adaptive schedule"
        if params.get("update_per_optimizer_step"):
            return "NNCF 3 changes sparsity once per epoch"
    return None


def _device(value: Any, log: Log) -> Any:
    if value not in _DEVICES:
        raise ConfigError(f"target_device: {unknown('device', value, _DEVICES)}")
    if value == "VPU":
        log("changed", "target_device", "'VPU' -> 'NPU', its name in later versions")
        return "NPU"
    if value == "CPU_SPR" and log.for_nncf3:
        log("changed", "target_device", "'CPU_SPR' -> 'CPU': NNCF 3 has one description of CPUs")
        return "CPU"
    text = {"TRIAL": "not needed any more for narrow widths", "CPU_SPR": "for NNCF 2 only"}.get(value, "")
    log("carried", "target_device", f"{value!r}{': ' if text else ''}{text}")
    return value


__all__ = ["Conversion", "Line", "convert"]
