"""The ``compression`` section of an NNCF JSON config, as pydantic models.

Keys are NNCF's own where NNCF has them; what an algorithm adds sits under ``params``. The JSON Schema that hosts
validate against is generated from these models (:func:`json_schema`). Hosts resolve one :class:`TensorSpec` per
quantizer with :meth:`CompressionConfig.resolve`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
)

from fat_plugins.errors import ConfigError, nearest, shown, unknown
from fat_plugins.explain import Expected, explain
from fat_plugins.files import parse_json, read_text
from fat_plugins.quantizer import Role, TensorSpec
from fat_plugins.registry import Algorithm, algorithms, get_algorithm
from fat_plugins.scopes import as_list

#: quantizes first and last layers, and activations that feed no weighted layer
PLAIN_ALGORITHM = "minmax"
DEFAULT_BITS = 4
PLAIN_BITS = 8
#: for calls that may leave the algorithm out
DEFAULT_ALGORITHM = "fat"
INITIALIZERS = ("range", "batchnorm_adaptation", "precision")


class Section(BaseModel):
    """Base of all configuration sections: unknown keys are errors, types are not guessed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Bits = Annotated[StrictInt, Expected("a bit width (an integer)")]
Scopes = list[str] | str | None


class OverrideSection(Section):
    """Settings of the layers that one scope matches."""

    algorithm: str | None = Field(None, description="Another algorithm for these tensors.")
    bits: Bits | None = Field(None, description="Bit width, sign included.")
    per_channel: StrictBool | None = Field(None, description="One scale per output channel instead of one per tensor.")
    signed: StrictBool | None = Field(None, description="Activations: force signed or unsigned codes.")
    mode: Literal["symmetric"] | None = Field(None, description="Only 'symmetric' exists below 8 bits.")
    params: dict[str, Any] | None = Field(None, description="Options of the algorithm.")


class TensorSection(OverrideSection):
    """The ``weights`` or ``activations`` section."""

    ignored_scopes: Scopes = Field(None, description="Scopes that are left out.")
    target_scopes: Scopes = Field(None, description="Only these scopes are quantized.")
    unified_scale_ops: list[list[str]] | None = Field(None, description="NNCF: groups that share one scale.")


class ScopeOverrides(Section):
    """NNCF's ``scope_overrides``: a scope (or ``{re}`` pattern) to its settings."""

    weights: dict[str, OverrideSection] = Field(default_factory=dict)
    activations: dict[str, OverrideSection] = Field(default_factory=dict)


EdgeLayer = Annotated[StrictInt, Expected("a bit width")] | Literal["float", "same"]


def _known_algorithm(name: str) -> str:
    if name not in algorithms():
        raise ValueError(unknown("algorithm", name, algorithms()))
    return name


#: a string that names a registered algorithm
AlgorithmName = Annotated[str, AfterValidator(_known_algorithm)]


class CompressionConfig(Section):
    """One algorithm's section of ``compression``."""

    algorithm: AlgorithmName = Field(description="Name of the algorithm.")
    weights: TensorSection = Field(default_factory=TensorSection)
    activations: TensorSection = Field(default_factory=TensorSection)
    params: dict[str, Any] = Field(default_factory=dict, description="Options of the algorithm.")
    first_layer: EdgeLayer = Field(
        PLAIN_BITS,
        description="Layers that read the network's input, weights and input activations: a bit width (quantized by "
        f"'{PLAIN_ALGORITHM}'), 'float', or 'same' as the rest.",
    )
    last_layer: EdgeLayer = Field(PLAIN_BITS, description="Layers that no other weighted layer reads: as first_layer.")
    ignored_scopes: Scopes = Field(None, description="Scopes that are left out.")
    target_scopes: Scopes = Field(None, description="Only these scopes are quantized.")
    scope_overrides: ScopeOverrides = Field(default_factory=ScopeOverrides)
    initializer: dict[str, Any] = Field(default_factory=dict, description="NNCF's range and batchnorm_adaptation.")
    compression_lr_multiplier: float | None = Field(
        None, ge=0, description="Factor on the gradients of the quantizers' own parameters."
    )
    validate_scopes: StrictBool | None = Field(None, description="NNCF: false lets scopes match nothing.")
    preset: Literal["performance", "mixed"] | None = Field(None, description="NNCF's placement preset.")
    quantize_inputs: StrictBool = Field(True, description="Quantize the network's input.")
    quantize_outputs: StrictBool = Field(False, description="Quantize the network's output.")
    overflow_fix: Literal["disable", "enable", "first_layer_only"] | None = Field(
        None, description="NNCF's 7-bit weights for old processors; 8-bit layers only."
    )
    export_to_onnx_standard_ops: StrictBool | None = Field(None, description="NNCF's QuantizeLinear export; 8-bit.")

    _where: str = PrivateAttr("compression")

    @property
    def where(self) -> str:
        """Place of the section in its file, for error messages."""
        return self._where

    @property
    def parts(self) -> tuple[CompressionConfig, ...]:
        """The sections that it consists of: itself."""
        return (self,)

    @field_validator("initializer")
    @classmethod
    def _known_initializers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key not in INITIALIZERS:
                raise ValueError(unknown("initializer", key, INITIALIZERS))
        return value

    @classmethod
    def parse(cls, section: dict[str, Any], where: str = "compression") -> CompressionConfig:
        """Validate one section, its params and every bit width in it.

        :raises ConfigError: one line with the key's path, the value, what is allowed and the nearest valid name.
        """
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: expected an object with the key 'algorithm', got {type(section).__name__}")
        try:
            config = cls.model_validate(section)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None
        config._check(where)
        config._where = where
        return config

    def _check(self, where: str) -> None:
        get_algorithm(self.algorithm).parse_params(self.params, f"{where}.params")
        for role, group in (("weight", "weights"), ("activation", "activations")):
            section: TensorSection = getattr(self, group)
            overrides = getattr(self.scope_overrides, group)
            entries = [(f"{where}.{group}", section)]
            entries += [(f"{where}.scope_overrides.{group}[{scope!r}]", o) for scope, o in overrides.items()]
            if role == "weight" and section.unified_scale_ops is not None:
                raise ConfigError(f"{where}.weights.unified_scale_ops: only activations share scales")
            for place, entry in entries:
                if role == "weight" and entry.signed is not None:
                    raise ConfigError(f"{place}.signed: weights are always signed; only activations have this key")
                algorithm, bits, per_channel, _, params = self._merge(section, [entry])
                if algorithm not in algorithms():
                    raise ConfigError(f"{place}.algorithm: {unknown('algorithm', algorithm, algorithms())}")
                kind = get_algorithm(algorithm)
                parsed = kind.parse_params(params, f"{place}.params")
                kind.check(TensorSpec(role, bits, name=place, per_channel=per_channel), parsed)
        for key in ("first_layer", "last_layer"):
            bits = getattr(self, key)
            if isinstance(bits, int):
                for role in ("weight", "activation"):
                    get_algorithm(PLAIN_ALGORITHM).check(TensorSpec(role, bits, name=f"{where}.{key}"))

    def _merge(self, section: TensorSection, overrides: list[OverrideSection]):
        """Effective (algorithm, bits, per_channel, signed, params) of a group section and the overrides that match.

        A later override wins over an earlier one, key by key, as in NNCF.
        """
        layers = [section, *overrides]

        def pick(name, default=None):
            return next((v for layer in reversed(layers) if (v := getattr(layer, name)) is not None), default)

        algorithm = pick("algorithm", self.algorithm)
        params = dict(self.params) if algorithm == self.algorithm else {}
        current = self.algorithm
        for layer in layers:  # params belong to the algorithm that is in force where they stand
            current = layer.algorithm or current
            if current == algorithm:
                params.update(layer.params or {})
        return algorithm, pick("bits", DEFAULT_BITS), pick("per_channel"), pick("signed"), params

    def leaves_out(self, role: Role, matches: Callable[[str], bool]) -> bool:
        """Whether the scopes of ``weights`` or ``activations`` leave a tensor float.

        :param matches: as for :meth:`resolve`.
        """
        return _left_out(self.weights if role == "weight" else self.activations, matches)

    def claims(self, role: Role, matches: Callable[[str], bool]) -> bool:
        """Whether all scopes of the section let it quantize a tensor; for a list of sections."""
        return not (_left_out(self, matches) or self.leaves_out(role, matches))

    def resolve(
        self, spec: TensorSpec, matches: Callable[[str], bool], edge: Literal["first", "last", "plain"] | None = None
    ) -> tuple[str, TensorSpec, dict[str, Any]] | None:
        """What quantizes one tensor.

        :param spec: what the host knows about the tensor; its ``bits`` are ignored.
        :param matches: whether a scope of ``scope_overrides`` names this tensor, by the host's own rules.
        :param edge: ``"first"``/``"last"`` for the network's edge layers, ``"plain"`` for activations that feed no
            weighted layer (8 bits unless an override names them), else ``None``.
        :return: algorithm name, completed spec and params, or ``None`` for a tensor that stays float.
        """
        group = "weights" if spec.role == "weight" else "activations"
        section: TensorSection = getattr(self, group)
        overrides = getattr(self.scope_overrides, group)
        matching = [o for scope, o in overrides.items() if matches(scope)]
        algorithm, bits, per_channel, signed, params = self._merge(section, matching)
        if not matching and edge is not None:
            policy: int | str = PLAIN_BITS if edge == "plain" else getattr(self, f"{edge}_layer")
            if policy == "float":
                return None
            if policy != "same":
                algorithm, bits, per_channel, params = PLAIN_ALGORITHM, int(policy), None, {}
        values = {**vars(spec), "bits": bits, "per_channel": per_channel}
        if spec.role == "activation" and signed is not None:
            values["signed"] = signed
        done = TensorSpec(**values)
        kind = get_algorithm(algorithm)
        kind.check(done, kind.parse_params(params, f"{spec.name or group}: params"))
        return algorithm, done, params


def _left_out(section: CompressionConfig | TensorSection, matches: Callable[[str], bool]) -> bool:
    targets = as_list(section.target_scopes)
    return any(map(matches, as_list(section.ignored_scopes))) or bool(targets and not any(map(matches, targets)))


def read_config(path: str | Path) -> Any:
    """What a JSON file holds; comments (``//``, ``/* */``) and trailing commas are allowed, as NNCF 2 allowed them.

    :raises ConfigError: the file cannot be read, is larger than a megabyte or not JSON; a key stands in it twice.
    """
    where = f"config {shown(str(path), 300)}"
    return parse_json(_TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, read_text(Path(path), where))), where)


#: what is not closed ends with the text, so that nothing is looked at twice
_STRING = r'"(?:\\.|[^"\\])*(?:"|\\?\Z)'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?(?:\*/|\Z)", re.S)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[\]}}])", re.S)


def _blank(match: re.Match[str]) -> str:
    """A comment or comma without anything but its line breaks, so that line numbers stay; a string as it is."""
    return match[0] if match[0].startswith('"') else "\n" * match[0].count("\n")


def json_schema(algorithm: type[Algorithm]) -> dict[str, Any]:
    """JSON Schema (self-contained, no ``$ref``) of ``compression`` for one algorithm, for hosts that validate."""
    schema = CompressionConfig.model_json_schema()
    params = algorithm.Params.model_json_schema()
    definitions = {**schema.pop("$defs", {}), **params.pop("$defs", {})}

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {k: inline(v) for k, v in node.items()}
        return [inline(v) for v in node] if isinstance(node, list) else node

    schema = inline(schema)
    schema["properties"]["algorithm"] = {"const": algorithm.name, "description": algorithm.title}
    schema["properties"]["params"] = inline(params)
    return schema


def split_sections(compression: Any) -> list[dict[str, Any]]:
    """``compression`` of an NNCF config as a list of sections (NNCF allows one object or a list).

    :raises ConfigError: anything else, or a section without ``algorithm``.
    """
    sections = compression if isinstance(compression, list) else [compression]
    for i, section in enumerate(sections):
        if not isinstance(section, dict) or not isinstance(section.get("algorithm"), str):
            where = f"compression[{i}]" if isinstance(compression, list) else "compression"
            keys = section if isinstance(section, dict) and "algorithm" not in section else ()
            misspelt = next((k for k in keys if nearest(k, ["algorithm"])), None)
            got = f"{shown(misspelt)}{nearest(misspelt, ['algorithm'])}" if misspelt else shown(section)
            raise ConfigError(f"{where}: expected an object with the key 'algorithm', got {got}")
    return sections


def is_plugin_section(section: dict[str, Any]) -> bool:
    """Whether a section names an algorithm of this package's registry."""
    return section.get("algorithm") in algorithms()


__all__ = [
    "DEFAULT_ALGORITHM",
    "DEFAULT_BITS",
    "PLAIN_ALGORITHM",
    "PLAIN_BITS",
    "AlgorithmName",
    "CompressionConfig",
    "OverrideSection",
    "Role",
    "ScopeOverrides",
    "Section",
    "TensorSection",
    "explain",
    "is_plugin_section",
    "json_schema",
    "read_config",
    "split_sections",
]
