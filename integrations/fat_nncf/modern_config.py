"""The NNCF JSON config on NNCF 3, which itself has none: reading, checking, and what is refused there."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from fat_nncf.modern_sparsity import SPARSITY_SECTIONS, SparsitySection, parse_sparsity
from fat_plugins.config import PLAIN_ALGORITHM, CompressionConfig, is_plugin_section, read_config, split_sections
from fat_plugins.errors import ConfigError, unknown
from fat_plugins.mixed import parse_sections
from fat_plugins.registry import algorithms

_NO_QUANTIZATION = f"NNCF 3 has no JSON quantization of its own; use '{PLAIN_ALGORITHM}' here, or nncf.quantize"
#: what NNCF 2's JSON knows and NNCF 3 cannot do, with the reason that the user reads
_NO_COUNTERPART = {
    "filter_pruning": "NNCF 3 has no filter pruning; use NNCF 2, or 'magnitude_sparsity'",
    "movement_sparsity": "NNCF 3 has no movement sparsity; use NNCF 2, or 'magnitude_sparsity'",
    "knowledge_distillation": "NNCF 3 has no knowledge distillation; add the teacher's loss in the training loop",
    "quantization": _NO_QUANTIZATION,
    "binarization": "NNCF 3 has no binarization",
    "experimental_quantization": _NO_QUANTIZATION,
    "NoCompressionAlgorithm": "there is nothing to compress",
}
_ROOT_KEYS = ("input_info", "compression", "target_device", "compression_lr_multiplier", "disable_shape_matching",
              "log_dir", "accuracy_aware_training")  # fmt: skip
_RANGE_TYPES = ("mixed_min_max", "min_max", "mean_min_max", "percentile", "mean_percentile")
_DEVICES = ("ANY", "CPU", "GPU", "NPU", "VPU", "TRIAL")
_FILLERS: dict[str, Callable[..., torch.Tensor]] = {"random": torch.rand, "ones": torch.ones, "zeros": torch.zeros}
_TYPES = {"float": torch.float32, "long": torch.int64}


class NNCFConfig(dict):
    """The config of NNCF 2 as a dictionary, with the same constructors, so that a script changes only its import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._structs: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NNCFConfig:
        """Check a config and copy it.

        :raises ConfigError: one line with the key's path, the value, what is allowed and the nearest valid name.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"config: expected an object, got {type(config).__name__}")
        parse_config(config)
        return cls(copy.deepcopy(dict(config)))

    @classmethod
    def from_json(cls, path: str | Path) -> NNCFConfig:
        """Read a JSON file; comments after ``//`` on a line are allowed, as NNCF 2 allows them.

        :raises ConfigError: the file cannot be read, is not JSON, or is not a valid config.
        """
        return cls.from_dict(read_config(path))

    def register_extra_structs(self, structs: Iterable[Any]) -> None:
        """Keep objects beside the JSON, one of each type."""
        for struct in structs:
            self._structs[_struct_id(type(struct))] = struct

    def get_extra_struct(self, kind: type) -> Any:
        """The registered object of that type; ``KeyError`` when there is none."""
        return self._structs[_struct_id(kind)]

    def has_extra_struct(self, kind: type) -> bool:
        """Whether an object of that type is registered."""
        return _struct_id(kind) in self._structs

    def __deepcopy__(self, memo: dict[int, Any]) -> NNCFConfig:
        # loaders are not copied: a config is copied for its JSON
        clone = type(self)(copy.deepcopy(dict(self), memo))
        clone._structs = dict(self._structs)
        return clone


def _struct_id(kind: type) -> str:
    return kind.get_id() if hasattr(kind, "get_id") else kind.__qualname__


@dataclass
class DefaultInitArgs:
    """What :func:`register_default_init_args` keeps."""

    loader: Any
    criterion: Any = None
    device: str | torch.device | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def register_default_init_args(
    nncf_config: NNCFConfig,
    train_loader: Any,
    criterion: Any = None,
    criterion_fn: Any = None,
    train_steps_fn: Any = None,
    validate_fn: Any = None,
    val_loader: Any = None,
    autoq_eval_fn: Any = None,
    model_eval_fn: Any = None,
    distributed_callbacks: Any = None,
    execution_parameters: Any = None,
    legr_train_optimizer: Any = None,
    device: str | torch.device | None = None,
) -> NNCFConfig:
    """NNCF 2's function: gives the config the data that calibrates quantizers and adapts batch norms.

    Only the loader and the device matter on NNCF 3: the algorithms that read the other arguments do not exist there.

    :param train_loader: iterable of batches: tensors, ``(input, target)`` tuples or lists, or dictionaries of keyword
        arguments. An object with NNCF 2's ``get_inputs(batch) -> (args, kwargs)`` decides for itself.
    :return: the same config.
    """
    extra = {"criterion_fn": criterion_fn, "train_steps_fn": train_steps_fn, "validate_fn": validate_fn,
             "val_loader": val_loader, "autoq_eval_fn": autoq_eval_fn, "model_eval_fn": model_eval_fn,
             "distributed_callbacks": distributed_callbacks, "execution_parameters": execution_parameters,
             "legr_train_optimizer": legr_train_optimizer}  # fmt: skip
    if not isinstance(nncf_config, NNCFConfig):
        raise ConfigError("register_default_init_args needs an NNCFConfig: use fat_nncf.NNCFConfig.from_dict first")
    nncf_config.register_extra_structs([DefaultInitArgs(train_loader, criterion, device, extra)])
    return nncf_config


@dataclass(frozen=True)
class RangeInit:
    """``initializer.range`` for activations.

    :param samples: how many samples are looked at.
    :param kind: one of NNCF 2's names.
    :param low, high: percentiles, for the kinds that have them.
    :param explicit: written by the user, so that it is preferred to the algorithm's own initialisation from data.
    """

    samples: int = 256
    kind: str = "mixed_min_max"
    low: float = 0.1
    high: float = 99.9
    explicit: bool = False


@dataclass(frozen=True)
class InputInfo:
    """One entry of ``input_info``."""

    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    filler: str = "random"
    keyword: str | None = None

    def tensor(self, device: torch.device) -> torch.Tensor:
        """An example; drawn from its own generator, so that the user's random numbers stay as they are."""
        if self.filler == "random" and self.dtype == torch.float32:
            return torch.rand(self.size, generator=torch.Generator().manual_seed(0)).to(device)
        filler = "zeros" if self.filler == "random" else self.filler
        return _FILLERS[filler](self.size).to(device, self.dtype)


@dataclass(frozen=True)
class Plan:
    """A checked config."""

    config: CompressionConfig
    sparsity: SparsitySection | None
    inputs: tuple[InputInfo, ...]
    range: RangeInit
    bn_samples: int
    target_device: str
    lr_multiplier: float | None


def load_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """A config given as a path, a dictionary, or an NNCFConfig."""
    return NNCFConfig.from_json(config) if isinstance(config, (str, Path)) else config


def parse_config(config: Mapping[str, Any]) -> Plan:
    """Check a whole config.

    :raises ConfigError: one line; also for what NNCF 3 cannot do.
    """
    for key in config:
        close = difflib.get_close_matches(str(key), _ROOT_KEYS, n=1, cutoff=0.8)
        if key not in _ROOT_KEYS and close:  # other keys belong to the application, as in NNCF 2
            raise ConfigError(f"unknown key {key!r}; did you mean '{close[0]}'?")
    if "accuracy_aware_training" in config:
        raise ConfigError("accuracy_aware_training: NNCF 3 has no accuracy-aware loop; train in your own loop")
    if "compression" not in config:
        raise ConfigError("compression: missing; expected an object with the key 'algorithm', or a list of them")
    sections = split_sections(config["compression"])
    many = isinstance(config["compression"], list)
    ours: list[tuple[str, dict[str, Any]]] = []
    sparsity: list[SparsitySection] = []
    for i, section in enumerate(sections):
        where = f"compression[{i}]" if many else "compression"
        name = section["algorithm"]
        if is_plugin_section(section):
            ours.append((where, section))
        elif name in SPARSITY_SECTIONS:
            sparsity.append(parse_sparsity(section, where))
        elif name in _NO_COUNTERPART:
            raise ConfigError(f"{where}.algorithm: {name!r} cannot run here: {_NO_COUNTERPART[name]}")
        else:
            raise ConfigError(f"{where}.algorithm: {unknown('algorithm', name, [*algorithms(), *SPARSITY_SECTIONS])}")
    if not ours:
        raise ConfigError(f"compression: expected a section with an algorithm of {', '.join(algorithms())}, got none")
    if len(sparsity) > 1:
        raise ConfigError("compression: NNCF 3 runs one sparsity algorithm at a time, got "
                          + ", ".join(s.algorithm for s in sparsity))  # fmt: skip
    parsed = parse_sections(ours)
    for part in parsed.parts:
        range_init, bn_samples = _parse_initializer(part.initializer, f"{part.where}.initializer")
        if part.activations.unified_scale_ops:
            raise ConfigError(
                f"{part.where}.activations.unified_scale_ops: NNCF 3 unifies scales by its own rules only"
            )
    range_init, bn_samples = _parse_initializer(parsed.initializer, "compression.initializer")
    device = config.get("target_device", "ANY")
    if device not in _DEVICES:
        raise ConfigError(f"target_device: {unknown('device', device, _DEVICES)}")
    multiplier = parsed.compression_lr_multiplier
    if multiplier is None:
        multiplier = _number(config, "compression_lr_multiplier")
    return Plan(parsed, sparsity[0] if sparsity else None, _parse_inputs(config.get("input_info")), range_init,
                bn_samples, {"TRIAL": "ANY", "VPU": "NPU"}.get(device, device), multiplier)  # fmt: skip


def _number(section: Mapping[str, Any], key: str) -> float | None:
    value = section.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{key}: expected a number, got {value!r}")
    return value


def _count(section: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = section.get(key, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{where}.{key}: expected a number of samples, got {value!r}")
    return value


def _only(section: Any, allowed: Iterable[str], where: str) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: expected an object, got {section!r}")
    for key in section:
        if key not in allowed:
            raise ConfigError(f"{where}: {unknown('key', key, allowed)}")


def _parse_initializer(initializer: Mapping[str, Any], where: str) -> tuple[RangeInit, int]:
    if "precision" in initializer:
        raise ConfigError(f"{where}.precision: NNCF 3 has no precision initializers (hawq, autoq); give the bits")
    _only(initializer, ("range", "batchnorm_adaptation"), where)
    adaptation = initializer.get("batchnorm_adaptation", {})
    _only(adaptation, ("num_bn_adaptation_samples",), f"{where}.batchnorm_adaptation")
    bn_samples = _count(adaptation, "num_bn_adaptation_samples", 2000, f"{where}.batchnorm_adaptation")
    if "range" not in initializer:
        return RangeInit(), bn_samples
    where += ".range"
    entries = initializer["range"] if isinstance(initializer["range"], list) else [initializer["range"]]
    chosen = None
    for entry in entries:
        _only(entry, ("num_init_samples", "type", "params", "target_scopes", "ignored_scopes",
                      "target_quantizer_group"), where)  # fmt: skip
        if entry.get("target_scopes") or entry.get("ignored_scopes"):
            raise ConfigError(f"{where}: NNCF 3 has one range estimator for all activations; remove its scopes")
        group = entry.get("target_quantizer_group", "activations")
        if group not in ("weights", "activations"):
            raise ConfigError(f"{where}: {unknown('quantizer group', group, ('weights', 'activations'))}")
        if group == "weights":  # the algorithm initialises weights by its own rule
            continue
        if chosen is not None:
            raise ConfigError(f"{where}: NNCF 3 has one range estimator for all activations, got several")
        kind = entry.get("type", "mixed_min_max")
        if kind == "threesigma":
            raise ConfigError(f"{where}.type: NNCF 3 has no 'threesigma'; allowed: {', '.join(_RANGE_TYPES)}")
        if kind not in _RANGE_TYPES:
            raise ConfigError(f"{where}.type: {unknown('range initializer', kind, _RANGE_TYPES)}")
        params = entry.get("params", {})
        _only(params, ("min_percentile", "max_percentile"), f"{where}.params")
        low, high = _number(params, "min_percentile"), _number(params, "max_percentile")
        low, high = 0.1 if low is None else low, 99.9 if high is None else high
        if not 0 <= low < high <= 100:
            raise ConfigError(f"{where}.params: percentiles must rise from 0 to 100, got {low} and {high}")
        chosen = RangeInit(_count(entry, "num_init_samples", 256, where), kind, low, high, True)
    return chosen or RangeInit(), bn_samples


def _parse_inputs(info: Any) -> tuple[InputInfo, ...]:
    entries = info if isinstance(info, list) else [] if info is None else [info]
    parsed = []
    for i, entry in enumerate(entries):
        where = f"input_info[{i}]" if isinstance(info, list) else "input_info"
        _only(entry, ("sample_size", "type", "filler", "keyword"), where)
        size = entry.get("sample_size")
        if not isinstance(size, list | tuple) or not size or any(type(s) is not int or s < 1 for s in size):
            raise ConfigError(f"{where}.sample_size: expected a list of positive integers, got {size!r}")
        kind, filler = entry.get("type", "float"), entry.get("filler", "random")
        if kind not in _TYPES:
            raise ConfigError(f"{where}.type: {unknown('type', kind, _TYPES)}")
        if filler not in _FILLERS:
            raise ConfigError(f"{where}.filler: {unknown('filler', filler, _FILLERS)}")
        parsed.append(InputInfo(tuple(size), _TYPES[kind], filler, entry.get("keyword")))
    if any(p.keyword for p in parsed) and not all(p.keyword for p in parsed):
        raise ConfigError("input_info: NNCF 3 takes positional or keyword inputs, not both")
    return tuple(parsed)


def steps(samples: int, batch_size: int) -> int:
    """How many batches hold ``samples``."""
    return ceil(samples / max(batch_size, 1))
