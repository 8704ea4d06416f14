"""Several sections of this package in one ``compression`` list: each layer belongs to the section whose scopes name it.

Adapters see one config (:class:`MixedConfig` is a :class:`~fat_plugins.config.CompressionConfig`); what says how a
tensor is quantized comes from its section, what holds for the whole model must be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from pydantic import PrivateAttr

from fat_plugins.config import PLAIN_BITS, CompressionConfig
from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Role, TensorSpec
from fat_plugins.registry import get_algorithm
from fat_plugins.scopes import as_list

#: keys that hold for the whole model
_SHARED = (
    "initializer", "compression_lr_multiplier", "validate_scopes", "preset", "quantize_inputs", "quantize_outputs",
    "overflow_fix", "export_to_onnx_standard_ops",
)  # fmt: skip

_JOINT = "+"


def _overlap(one: CompressionConfig, other: CompressionConfig, what: str) -> str:
    first, second = sorted((one, other), key=lambda part: part.where)
    return (
        f"{first.where} ('{first.algorithm}') and {second.where} ('{second.algorithm}') both quantize {what}; give "
        "them target_scopes or ignored_scopes that do not overlap"
    )


class MixedConfig(CompressionConfig):
    """Several sections as one. ``algorithm`` is that of the first."""

    _parts: tuple[CompressionConfig, ...] = PrivateAttr(())

    @property
    def parts(self) -> tuple[CompressionConfig, ...]:
        """The sections, in the order of the list."""
        return self._parts

    @classmethod
    def of(cls, parts: Sequence[CompressionConfig]) -> MixedConfig:
        """Join checked sections.

        :raises ConfigError: they disagree on what holds for the whole model, or one of them takes all layers.
        """
        for part in parts:
            if not any(as_list(s.ignored_scopes) + as_list(s.target_scopes) for s in (part, part.weights)):
                raise ConfigError(_overlap(part, next(p for p in parts if p is not part), "every layer"))
        shared: dict[str, Any] = {"algorithm": parts[0].algorithm}
        for key in _SHARED:
            given = [part for part in parts if key in part.model_fields_set]
            for part in given[1:]:
                if getattr(part, key) != getattr(given[0], key):
                    raise ConfigError(
                        f"{part.where}.{key}: {getattr(part, key)!r} differs from {given[0].where}'s "
                        f"{getattr(given[0], key)!r}; it holds for the whole model, give it once"
                    )
            if given:
                shared[key] = getattr(given[0], key)
        unified = next((u for part in parts if (u := part.activations.unified_scale_ops)), None)
        if unified is not None:
            shared["activations"] = {"unified_scale_ops": unified}
        joined = cls.model_validate(shared)
        joined._parts = tuple(parts)
        return joined

    def leaves_out(self, role: Role, matches: Callable[[str], bool]) -> bool:
        return not any(part.claims(role, matches) for part in self.parts)

    def resolve(
        self, spec: TensorSpec, matches: Callable[[str], bool], edge: Literal["first", "last", "plain"] | None = None
    ) -> tuple[str, TensorSpec, dict[str, Any]] | None:
        """As of one section, by the one that claims the tensor. An activation that layers of several sections read is
        quantized once, by the first of these.

        :raises ConfigError: two sections claim a weight.
        """
        claiming = [part for part in self.parts if part.claims(spec.role, matches)]
        if not claiming:
            return None
        if spec.role == "weight" and len(claiming) > 1:
            raise ConfigError(_overlap(claiming[0], claiming[1], f"layer '{spec.name}'"))
        return claiming[0].resolve(spec, matches, edge)


def joint_name(algorithms: Iterable[str]) -> str:
    """One name for a model in which several algorithms take part: ``fat+lsq``."""
    return _JOINT.join(dict.fromkeys(algorithms))


def algorithms_of(name: str) -> list[str]:
    """The names that :func:`joint_name` was made of."""
    return name.split(_JOINT) if name else []


def parse_sections(sections: Sequence[tuple[str, dict[str, Any]]]) -> CompressionConfig:
    """One config from the sections of this package in a ``compression`` list.

    :param sections: place (``"compression[1]"``, for error messages) and content of each; at least one.
    :raises ConfigError: a bad section, or sections that contradict each other.
    """
    parts = [CompressionConfig.parse(section, where) for where, section in sections]
    return parts[0] if len(parts) == 1 else MixedConfig.of(parts)


def refuse_undeployable(config: CompressionConfig) -> None:
    """Refuse what trains but cannot be exported, before it is trained.

    :raises ConfigError: one line with the section's place.
    """
    for section in config.parts:
        for role in ("weight", "activation"):
            name, _, params = section.resolve(TensorSpec(role, PLAIN_BITS), lambda scope: False)
            algorithm = get_algorithm(name)
            if why := algorithm.not_deployable(algorithm.parse_params(params)):
                raise ConfigError(f"{section.where}: {why}, or leave 'export' null")


__all__ = ["MixedConfig", "algorithms_of", "joint_name", "parse_sections", "refuse_undeployable"]
