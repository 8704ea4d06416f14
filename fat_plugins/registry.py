"""Algorithms by name, found through the entry-point group ``fat_plugins.algorithms``."""

from __future__ import annotations

from typing import ClassVar

from fat_plugins.errors import ConfigError
from fat_plugins.plugins import Plugin, load_group, named
from fat_plugins.quantizer import (
    ActivationQuantizer,
    Coordinator,
    FrozenTensor,
    LayerQuantizers,
    Params,
    TensorSpec,
    WeightQuantizer,
)

GROUP = "fat_plugins.algorithms"


class Algorithm(Plugin):
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
    #: why widths below the lowest are refused, said in the error
    bits_reason: ClassVar[str] = ""
    #: whether ``per_channel: true`` is allowed for weights and for activations
    per_channel_weights: ClassVar[bool] = False
    per_channel_activations: ClassVar[bool] = False
    coordinator: ClassVar[type[Coordinator] | None] = None

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Refuse, in one line, a tensor that the algorithm cannot quantize.

        :param params: the parsed options, for algorithms whose limits depend on them.
        :raises ConfigError: bit width or granularity outside what the algorithm defines.
        """
        where = spec.name or spec.role
        kind = cls.weight_quantizer if spec.role == "weight" else cls.activation_quantizer
        if kind is None:
            raise ConfigError(f"{where}: algorithm '{cls.name}' does not quantize {spec.role}s")
        low, high = cls.weight_bits if spec.role == "weight" else cls.activation_bits
        if type(spec.bits) is not int or not low <= spec.bits <= high:
            too_low = type(spec.bits) is int and spec.bits < low
            reason = f" ({cls.bits_reason})" if cls.bits_reason and too_low else ""
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
    def not_deployable(cls, params: Params) -> str:
        """Why no file can hold what these options train; empty, the default, where one can. Recipes that export say it
        before they train."""
        return ""

    @classmethod
    def make_weight(cls, spec: TensorSpec, params: Params | dict | None = None) -> WeightQuantizer:
        """A weight quantizer for ``spec``."""
        params = params if isinstance(params, Params) else cls.parse_params(params)
        cls.check(spec, params)
        quantizer = cls.weight_quantizer(spec, params)
        quantizer.algorithm = cls.name
        return quantizer

    @classmethod
    def make_activation(cls, spec: TensorSpec, params: Params | dict | None = None) -> ActivationQuantizer:
        """An activation quantizer for ``spec``."""
        params = params if isinstance(params, Params) else cls.parse_params(params)
        cls.check(spec, params)
        quantizer = cls.activation_quantizer(spec, params)
        quantizer.algorithm = cls.name
        return quantizer

    @classmethod
    def make(cls, spec: TensorSpec, params: Params | dict | None = None) -> WeightQuantizer | ActivationQuantizer:
        """A quantizer of the role that ``spec`` names."""
        return cls.make_weight(spec, params) if spec.role == "weight" else cls.make_activation(spec, params)

    @classmethod
    def network_facts(cls, weights: list[tuple[WeightQuantizer, FrozenTensor]], others: int) -> dict[str, float]:
        """What the method's paper tells of a whole network beside accuracy, by name, for reports (default: nothing).

        :param weights: the algorithm's quantizers with what they deploy.
        :param others: how many other parameters the network has, its quantizers' own left out.
        """
        return {}

    @classmethod
    def make_coordinator(cls, layers: list[LayerQuantizers]) -> Coordinator | None:
        """The coordinator over ``layers`` in execution order, if the algorithm has one."""
        return cls.coordinator(layers) if cls.coordinator else None


def _load() -> tuple[dict[str, type[Algorithm]], dict[str, str]]:
    """Usable algorithms by name, and why the others are not."""
    found, broken = load_group(GROUP, Algorithm, "algorithm")
    if not found:
        raise ConfigError("no algorithms found: install the package (pip install -e .) so that its entry points exist")
    return found, broken


def refresh() -> None:
    """Look for entry points again (packages installed since the first use)."""
    load_group.cache_clear()


def algorithms() -> dict[str, type[Algorithm]]:
    """All registered algorithms by name. One that cannot be loaded is left out with a warning."""
    return dict(_load()[0])


def get_algorithm(name: str) -> type[Algorithm]:
    """The algorithm called ``name``.

    :raises ConfigError: unknown name, with the nearest valid one, or an algorithm that cannot be loaded.
    """
    return named(_load(), "algorithm", name)


def make_quantizer(algorithm: str, spec: TensorSpec, params: dict | None = None):
    """A quantizer by algorithm name (used by adapters when they rebuild a model from its saved description)."""
    return get_algorithm(algorithm).make(spec, params)
