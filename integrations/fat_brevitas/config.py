"""The JSON config on Brevitas: reading, checking, and what is refused there."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from fat_plugins.config import CompressionConfig, is_plugin_section, read_config, split_sections
from fat_plugins.errors import ConfigError, unknown
from fat_plugins.mixed import parse_sections
from fat_plugins.registry import algorithms

_ROOT_KEYS = ("input_info", "compression", "target_device", "compression_lr_multiplier", "disable_shape_matching",
              "log_dir")  # fmt: skip
#: keys of NNCF's own rules, with what to do instead
_NNCF_ONLY = {
    "preset": "remove it, every quantizer here is symmetric",
    "export_to_onnx_standard_ops": "use export_onnx",
}
_NNCF_SECTIONS = ("quantization", "experimental_quantization", "binarization", "magnitude_sparsity", "rb_sparsity",
                  "const_sparsity", "filter_pruning", "movement_sparsity", "knowledge_distillation")  # fmt: skip
_RANGES = ("min_max", "mixed_min_max")


@dataclass(frozen=True)
class Plan:
    """A checked config.

    :param section: ``compression`` as it was given, in JSON types: a section, or a list of them.
    :param range_samples, bn_samples: how many samples calibrate activations and adapt batch norms.
    """

    config: CompressionConfig
    section: dict[str, Any] | list[dict[str, Any]]
    range_samples: int
    bn_samples: int
    lr_multiplier: float | None

    def range_batches(self, batch_size: int) -> int:
        """Batches that hold :attr:`range_samples`; at least one."""
        return max(1, ceil(self.range_samples / max(batch_size, 1)))

    def bn_batches(self, batch_size: int) -> int:
        """Batches that hold :attr:`bn_samples`."""
        return ceil(self.bn_samples / max(batch_size, 1))


def parse_config(config: Mapping[str, Any] | str | Path) -> Plan:
    """Check a config: a ``compression`` section, a whole NNCF config with one, or the path of a JSON file with either.

    :raises ConfigError: one line with the key's path, the value, what is allowed and the nearest valid name; also for
        what belongs to NNCF alone.
    """
    if isinstance(config, (str, Path)):
        config = read_config(config)
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected an object or the path of a JSON file, got {type(config).__name__}")
    root: Mapping[str, Any] = {}
    own = [("compression", config)]
    if "compression" in config:
        root = config
        own = _own_sections(config)
    elif "algorithm" not in config:
        raise ConfigError("config: expected the key 'compression' (NNCF config) or 'algorithm' (its section)")
    elif config["algorithm"] in _NNCF_SECTIONS:
        raise ConfigError(_foreign("compression", config["algorithm"]))
    sections = [copy.deepcopy(dict(section)) for _, section in own]
    parsed = parse_sections([(where, section) for (where, _), section in zip(own, sections, strict=True)])
    for part in parsed.parts:
        _refuse(part, part.where)
        _initializer(part.initializer, f"{part.where}.initializer")
    range_samples, bn_samples = _initializer(parsed.initializer, "compression.initializer")
    multiplier = parsed.compression_lr_multiplier
    if multiplier is None and "compression_lr_multiplier" in root:
        multiplier = root["compression_lr_multiplier"]
        if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)) or multiplier < 0:
            raise ConfigError(f"compression_lr_multiplier: expected a number from 0 on, got {multiplier!r}")
        sections[0]["compression_lr_multiplier"] = multiplier
    return Plan(parsed, sections[0] if len(sections) == 1 else sections, range_samples, bn_samples, multiplier)


def _foreign(where: str, name: str) -> str:
    hint = "; prune with torch.nn.utils.prune, zeros are kept" if "sparsity" in name else ""
    return f"{where}.algorithm: {name!r} is NNCF's and cannot run on Brevitas{hint}"


def _own_sections(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    for key in config:
        close = difflib.get_close_matches(str(key), _ROOT_KEYS, n=1, cutoff=0.8)
        if key not in _ROOT_KEYS and close:  # other keys belong to the application, as with NNCF
            raise ConfigError(f"unknown key {key!r}; did you mean '{close[0]}'?")
    if "accuracy_aware_training" in config:
        raise ConfigError("accuracy_aware_training: NNCF's loop cannot run on Brevitas; train in your own loop")
    sections = split_sections(config["compression"])
    many, ours = isinstance(config["compression"], list), []
    for i, section in enumerate(sections):
        where = f"compression[{i}]" if many else "compression"
        if is_plugin_section(section):
            ours.append((where, section))
        elif section["algorithm"] in _NNCF_SECTIONS:
            raise ConfigError(_foreign(where, section["algorithm"]))
        else:
            raise ConfigError(f"{where}.algorithm: {unknown('algorithm', section['algorithm'], algorithms())}")
    if not ours:
        raise ConfigError(f"compression: expected a section with an algorithm of {', '.join(algorithms())}, got none")
    return ours


def _refuse(config: CompressionConfig, where: str) -> None:
    for key, instead in _NNCF_ONLY.items():
        if getattr(config, key) is not None:
            raise ConfigError(f"{where}.{key}: only NNCF has it; {instead}")
    if config.overflow_fix not in (None, "disable"):
        raise ConfigError(f"{where}.overflow_fix: only NNCF has it, got {config.overflow_fix!r}; allowed: 'disable'")
    if config.activations.unified_scale_ops:
        raise ConfigError(f"{where}.activations.unified_scale_ops: only NNCF 2 unifies scales by lists; remove it")


def _initializer(initializer: Mapping[str, Any], where: str) -> tuple[int, int]:
    if "precision" in initializer:
        raise ConfigError(f"{where}.precision: only NNCF has precision initializers; give the bits")
    adaptation = _object(initializer.get("batchnorm_adaptation", {}), ("num_bn_adaptation_samples",),
                         f"{where}.batchnorm_adaptation")  # fmt: skip
    bn_samples = _count(adaptation, "num_bn_adaptation_samples", 2000, f"{where}.batchnorm_adaptation")
    entries, where = initializer.get("range", {}), f"{where}.range"
    samples = 256
    for entry in entries if isinstance(entries, list) else [entries]:
        _object(entry, ("num_init_samples", "type", "target_quantizer_group"), where)
        group, kind = entry.get("target_quantizer_group", "activations"), entry.get("type", "mixed_min_max")
        if group not in ("weights", "activations"):
            raise ConfigError(f"{where}: {unknown('quantizer group', group, ('weights', 'activations'))}")
        if kind not in _RANGES:
            raise ConfigError(
                f"{where}.type: {kind!r} cannot run on Brevitas, where quantizers see whole batches; "
                f"allowed: {', '.join(_RANGES)}"
            )
        if group == "activations":  # the algorithm initialises weights by its own rule
            samples = _count(entry, "num_init_samples", 256, where)
    return samples, bn_samples


def _object(value: Any, allowed: Iterable[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected an object, got {value!r}")
    for key in value:
        if key not in allowed:
            raise ConfigError(f"{where}: {unknown('key', key, allowed)}")
    return value


def _count(section: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = section.get(key, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{where}.{key}: expected a number of samples, got {value!r}")
    return value
