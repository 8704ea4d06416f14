"""Algorithms by name, found through the entry-point group ``fat_plugins.algorithms``."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar

from pydantic import ValidationError

from fat_plugins.errors import ConfigError, unknown
from fat_plugins.quantizer import ActivationQuantizer, Coordinator, LayerQuantizers, Params, TensorSpec, WeightQuantizer

GROUP = "fat_plugins.algorithms"


class Algorithm:
    """What one paper brings. Subclass it in one file and name it in one entry point; nothing else is needed.

    Class attributes describe the algorithm for tables, docs and validation; :attr:`weight_quantizer` and
    :attr:`activation_quantizer` are the classes that an adapter instantiates.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    #: arXiv number, or "" when there is none
    arxiv: ClassVar[str] = ""
    #: the grade and what it means for this algorithm, as the spec words it
    fidelity: ClassVar[str]
    Params: ClassVar[type[Params]] = Params
    weight_quantizer: ClassVar[type[WeightQuantizer] | None] = None
    activation_quantizer: ClassVar[type[ActivationQuantizer] | None] = None
    weight_bits: ClassVar[tuple[int, int]] = (2, 8)
    activation_bits: ClassVar[tuple[int, int]] = (2, 8)
    #: why widths outside are refused, said in the error
    bits_reason: ClassVar[str] = ""
    #: whether ``per_channel: true`` is allowed for weights and for activations
    per_channel_weights: ClassVar[bool] = False
    per_channel_activations: ClassVar[bool] = False
    coordinator: ClassVar[type[Coordinator] | None] = None

    @classmethod
    def parse_params(cls, params: dict[str, Any] | None, where: str = "params") -> Params:
        """Validate the section ``params``.

        :raises ConfigError: unknown key or bad value, with the key's path.
        """
        from fat_plugins.config import explain

        try:
            return cls.Params.model_validate(params or {})
        except ValidationError as error:
            raise ConfigError(explain(error, cls.Params, where)) from None

    @classmethod
    def check(cls, spec: TensorSpec) -> None:
        """Refuse, in one line, a tensor that the algorithm cannot quantize.

        :raises ConfigError: bit width or granularity outside what the algorithm defines.
        """
        where = spec.name or spec.role
        kind = cls.weight_quantizer if spec.role == "weight" else cls.activation_quantizer
        if kind is None:
            raise ConfigError(f"{where}: algorithm '{cls.name}' does not quantize {spec.role}s")
        low, high = cls.weight_bits if spec.role == "weight" else cls.activation_bits
        if type(spec.bits) is not int or not low <= spec.bits <= high:
            reason = f" ({cls.bits_reason})" if cls.bits_reason else ""
            raise ConfigError(
                f"{where}: algorithm '{cls.name}' has no {spec.bits!r}-bit {spec.role}s; "
                f"allowed: {low} to {high}{reason}"
            )
        allowed = cls.per_channel_weights if spec.role == "weight" else cls.per_channel_activations
        if spec.per_channel and not allowed:
            raise ConfigError(
                f"{where}: algorithm '{cls.name}' has one scale per {spec.role} tensor; per_channel must be false"
            )

    @classmethod
    def make_weight(cls, spec: TensorSpec, params: Params | dict | None = None) -> WeightQuantizer:
        """A weight quantizer for ``spec``."""
        cls.check(spec)
        return cls.weight_quantizer(spec, params if isinstance(params, Params) else cls.parse_params(params))

    @classmethod
    def make_activation(cls, spec: TensorSpec, params: Params | dict | None = None) -> ActivationQuantizer:
        """An activation quantizer for ``spec``."""
        cls.check(spec)
        return cls.activation_quantizer(spec, params if isinstance(params, Params) else cls.parse_params(params))

    @classmethod
    def make(cls, spec: TensorSpec, params: Params | dict | None = None) -> WeightQuantizer | ActivationQuantizer:
        """A quantizer of the role that ``spec`` names."""
        return cls.make_weight(spec, params) if spec.role == "weight" else cls.make_activation(spec, params)

    @classmethod
    def make_coordinator(cls, layers: list[LayerQuantizers]) -> Coordinator | None:
        """The coordinator over ``layers`` in execution order, if the algorithm has one."""
        return cls.coordinator(layers) if cls.coordinator else None


@lru_cache(maxsize=1)
def _load() -> dict[str, type[Algorithm]]:
    found: dict[str, type[Algorithm]] = {}
    for point in entry_points(group=GROUP):
        algorithm = point.load()
        if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
            raise ConfigError(f"entry point {point.name} = {point.value} is not a fat_plugins Algorithm")
        if algorithm.name != point.name:
            raise ConfigError(f"entry point {point.name} = {point.value} calls itself '{algorithm.name}'")
        found[point.name] = algorithm
    if not found:
        raise ConfigError("no algorithms found: install the package (pip install -e .) so that its entry points exist")
    return dict(sorted(found.items()))


def algorithms() -> dict[str, type[Algorithm]]:
    """All registered algorithms by name."""
    return dict(_load())


def get_algorithm(name: str) -> type[Algorithm]:
    """The algorithm called ``name``.

    :raises ConfigError: unknown name, with the nearest valid one.
    """
    known = _load()
    if name not in known:
        raise ConfigError(unknown("algorithm", name, known))
    return known[name]


def make_quantizer(algorithm: str, spec: TensorSpec, params: dict | None = None):
    """A quantizer by algorithm name (used by adapters when they rebuild a model from its saved description)."""
    return get_algorithm(algorithm).make(spec, params)
