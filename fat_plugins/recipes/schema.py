"""The recipe as pydantic models. Unknown keys are errors and types are not guessed; see :mod:`loader` for files."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from fat_plugins.config import AlgorithmName, Section, is_plugin_section, split_sections
from fat_plugins.errors import ConfigError, unknown
from fat_plugins.explain import Expected, explain
from fat_plugins.mixed import joint_name, parse_sections, refuse_undeployable
from fat_plugins.recipes.data import DATASETS, Data
from fat_plugins.recipes.joint import JointSection, check_joint
from fat_plugins.recipes.models import MODELS, build_torchvision, check_model
from fat_plugins.recipes.optim import OPTIMIZERS, check_options
from fat_plugins.recipes.penalty import NamedPenalty
from fat_plugins.recipes.rewriting import RewriteSection, RewriteSections
from fat_plugins.recipes.targets import FORMATS, Target, targets_of
from fat_plugins.recipes.weights import is_file, load_weights, torchvision_weights
from fat_plugins.registry import algorithms, get_algorithm

#: limits on what a recipe may ask for (SECURITY.md lists them); no honest one comes near
MAX_EPOCHS, MAX_BATCH, MAX_SEED, MAX_LIST = 100_000, 65_536, 2**32 - 1, 1000
#: names that some file systems keep for themselves
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-4 (no point) as text; nobody means that."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_number)]


def _options(kind: str, registry: dict[str, tuple[type, Any]], name: str, params: dict[str, Any]) -> BaseModel:
    """Options of a registered dataset or model, validated."""
    model = registry[name][0]
    try:
        return model.model_validate(params)
    except ValidationError as error:
        raise ConfigError(explain(error, model, f"{kind}.params")) from None


class ModelSection(Section):
    """Which network."""

    name: str = Field(description="Name of a registered model, of torchvision's classifiers, or 'callable'.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="Options of the model; for torchvision's the arguments of its function."
    )
    weights: str | None = Field(
        None,
        description="Pretrained: the name of torchvision's weights, or a file: .safetensors, or one of torch.save, of "
        "which only tensors are read.",
    )
    new_head: bool = Field(False, description="Pretrained weights: the layer that gives the classes starts anew.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        check_model(value)
        return value

    @model_validator(mode="after")
    def _known_weights(self) -> ModelSection:
        if self.weights is not None and not is_file(self.weights):
            if self.name in MODELS:
                raise ValueError(f"weights: {self.weights!r} is no file, and '{self.name}' is not torchvision's")
            torchvision_weights(self.name, self.weights)
        return self

    def check(self) -> None:
        """Options of the model.

        :raises ConfigError: one line with the key.
        """
        if self.name in MODELS:
            _options("model", MODELS, self.name, self.params)

    def build(self, data: Data) -> nn.Module:
        """A fresh model for ``data``; its weights come from torch's global random generator."""
        if self.name not in MODELS:
            return build_torchvision(self.name, self.params, data.classes)
        return MODELS[self.name][1](_options("model", MODELS, self.name, self.params), data.sample_shape, data.classes)

    def pretrained(self, data: Data) -> nn.Module:
        """A model to begin with: as :meth:`build`, and with the weights that the recipe names, if any."""
        model = self.build(data)
        if self.weights is not None:
            load_weights(model, self.name, self.weights, self.new_head)
        return model


class DataSection(Section):
    """Which images."""

    name: str = Field(description="Name of a registered dataset.")
    batch_size: int = Field(64, ge=2, le=MAX_BATCH, description="Images per optimizer step.")
    params: dict[str, Any] = Field(default_factory=dict, description="Options of the dataset.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DATASETS:
            raise ValueError(unknown("dataset", value, DATASETS))
        return value

    def build(self) -> Data:
        """The dataset, read and split."""
        return DATASETS[self.name][1](_options("data", DATASETS, self.name, self.params))


class OptimizerSection(Section):
    """Optimizer by name."""

    name: Literal[tuple(OPTIMIZERS)] = "sgd"
    lr: Number = Field(gt=0, description="Learning rate of the weights; algorithms derive their own from it.")
    weight_decay: Number = Field(0.0, ge=0)
    momentum: Number | None = Field(None, ge=0, lt=1, description="sgd only; 0.9 unless given.")
    nesterov: bool = Field(False, description="sgd only.")
    options: dict[str, Number | bool | list[Number]] = Field(
        default_factory=dict, description="Further arguments of torch's class, such as betas, eps, alpha."
    )

    @model_validator(mode="after")
    def _sgd_only(self) -> OptimizerSection:
        check_options(self.name, self.options)
        if self.name != "sgd" and (self.momentum is not None or self.nesterov):
            raise ValueError(f"momentum and nesterov belong to 'sgd', not to '{self.name}'")
        return self


class ScheduleSection(Section):
    """Course of the learning rate over one phase of training."""

    name: Literal["cosine", "multistep", "step", "linear", "polynomial", "exponential", "onecycle", "constant"] = (
        "cosine"
    )
    warmup_epochs: Number = Field(
        0.0, ge=0, description="Linear rise at the beginning; not of onecycle, which has one."
    )
    hold_epochs: Number = Field(
        0.0, ge=0, description="cosine, linear, polynomial: epochs at the full rate before it falls."
    )
    final: Number = Field(
        0.0, ge=0, le=1, description="cosine, linear, polynomial: what is left of the rate at the end."
    )
    milestones: list[int] = Field(
        default_factory=list, max_length=MAX_LIST, description="multistep: epochs at which the rate drops."
    )
    step_epochs: int | None = Field(None, ge=1, description="step: epochs between two drops.")
    gamma: Number = Field(
        0.1, gt=0, le=1, description="multistep, step: factor of each drop; exponential: every epoch."
    )
    power: Number = Field(2.0, gt=0, description="polynomial: the rate falls as (1 - done) to this power.")

    @model_validator(mode="after")
    def _milestones(self) -> ScheduleSection:
        if (self.name == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to 'multistep', which needs at least one")
        if (self.name == "step") != (self.step_epochs is not None):
            raise ValueError("step_epochs belongs to 'step', which needs it")
        falling = ("cosine", "linear", "polynomial")
        if self.name not in falling and (self.hold_epochs or self.final):
            raise ValueError(f"hold_epochs and final belong to {', '.join(falling)}, not to '{self.name}'")
        return self


class EmaSection(Section):
    """Exponential moving average of the weights."""

    decay: Number = Field(0.9999, gt=0, lt=1, description="What a step keeps of the average; less in the first steps.")


class DistillationSection(Section):
    """The float model of the recipe as a teacher."""

    alpha: Number = Field(0.5, gt=0, le=1, description="Share of the teacher; the labels have the rest.")
    temperature: Number = Field(1.0, gt=0, description="Both logits are divided by it.")


class TrainSection(Section):
    """One phase of training."""

    epochs: int = Field(ge=0, le=MAX_EPOCHS)
    optimizer: OptimizerSection
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    label_smoothing: Number = Field(0.0, ge=0, lt=1)
    clip_norm: Number | None = Field(None, gt=0, description="Largest norm of all gradients together.")
    accumulate: int = Field(
        1,
        ge=1,
        le=MAX_BATCH,
        description="Parts in which a batch goes through the network, one after the other, to save memory.",
    )
    amp: Literal["bf16", "fp16"] | None = Field(None, description="Mixed precision of the forward pass.")
    ema: EmaSection | None = Field(
        None, description="Average the weights; it is the averages that are evaluated, saved and exported."
    )
    reestimate_norms: bool | Literal["auto"] = Field(
        "auto",
        description="Renew the statistics of batch norms before each evaluation; 'auto': where quantizers train with "
        "noise, so that the statistics of training are those of another network.",
    )
    norm_batches: int = Field(32, ge=1, le=MAX_BATCH, description="Training batches that do so.")
    penalty: NamedPenalty | None = Field(None, description="What joins the loss to prepare for quantization.")


class StageTensor(Section):
    """Bit width of one stage."""

    bits: int = Field(description="Replaces the width that the compression section gives.")


class Stage(Section):
    """One step of a bit progression such as 32 -> 5 -> 4 -> 3; each starts from the state that the last one left."""

    weights: StageTensor | None = None
    activations: StageTensor | None = None
    epochs: int | None = Field(
        None, ge=1, le=MAX_EPOCHS, description="Epochs of this stage; those of training unless given."
    )
    lr: Number | None = Field(None, gt=0, description="Learning rate of this stage; that of training unless given.")
    carry: Literal["all", "weights"] = Field(
        "all",
        description="What is taken from the stage before: everything that fits in shape, or all but the quantizers' "
        "own state, which is then calibrated anew.",
    )


class FineTuneSection(TrainSection):
    """Training with quantizers."""

    stages: list[Stage] = Field(default_factory=lambda: [Stage()], min_length=1, max_length=100)
    distillation: DistillationSection | None = Field(None, description="Learn from the float model too.")
    joint: JointSection | None = Field(
        None, description="Train all bit widths of one model in every step; baselines of one width train as ever."
    )

    @model_validator(mode="after")
    def _labels_count(self) -> FineTuneSection:
        if self.distillation is not None and self.joint is not None and self.distillation.alpha + self.joint.alpha > 1:
            raise ValueError("distillation.alpha and joint.alpha are shares of one loss; together they are at most 1")
        return self


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ExportSection(Section):
    """What is deployed."""

    format: Annotated[list[str], BeforeValidator(_several), Expected("a format or a list of formats")] = Field(
        default_factory=lambda: ["openvino"], min_length=1, description="What is written: one format, or a list."
    )
    checkpoint: Literal["last", "best"] = Field("last", description="'best' is chosen on the validation images.")
    verify: bool = Field(True, description="Compare integer codes of the exported file with torch.")
    verify_samples: int = Field(64, ge=1, le=MAX_BATCH, description="Test images used for that.")

    @field_validator("format")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in FORMATS:
                raise ValueError(unknown("format", name, FORMATS))
        if len(set(value)) != len(value):
            raise ValueError(f"{value} repeat each other")
        return value

    @property
    def targets(self) -> list[Target]:
        """What is written and run."""
        return targets_of(self.format)


class BaselineSection(Section):
    """Another algorithm with the same bits, epochs and float weights."""

    algorithm: AlgorithmName
    params: dict[str, Any] = Field(default_factory=dict)
    rewrites: RewriteSections | None = Field(None, max_length=100, description="In the place of those of the recipe.")


def _baseline(value: Any) -> Any:
    return {"algorithm": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    """A whole run. ``compression`` is a complete NNCF config once the recipe is loaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="Name of the run's directory."
    )
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(
        default_factory=lambda: [0], min_length=1, max_length=MAX_LIST
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch; a fixed number gives the same numbers on every machine of a kind.",
    )
    backend: Literal["auto", "eager", "compile"] | None = Field(
        None,
        description="How the quantizers' kernels run: 'compile' takes torch.compile where there is a compiler, 'auto' "
        "does so on a GPU only; null leaves it to FAT_PLUGINS_BACKEND, else 'auto'.",
    )
    model: ModelSection
    data: DataSection
    host: str = "nncf"
    compression: Any = Field(description="An NNCF compression section, a list of them, or a config with both.")
    pretrain: TrainSection
    rewrites: RewriteSections = Field(
        default_factory=list,
        max_length=100,
        description="Changes to the trained float network before quantizers are placed, in their order.",
    )
    training: FineTuneSection
    export: ExportSection | None = Field(default_factory=ExportSection)
    baselines: list[Annotated[BaselineSection, BeforeValidator(_baseline)]] = Field(
        default_factory=list, max_length=100
    )

    @field_validator("name")
    @classmethod
    def _free_name(cls, value: str) -> str:
        if _RESERVED.fullmatch(value):
            raise ValueError(f"{value!r} is a name that Windows keeps for itself; choose another")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("seeds must differ from each other")
        return value

    def check(self) -> None:
        """Everything that the models above cannot see alone: options, the compression section at every stage.

        :raises ConfigError: one line with the key's path.
        """
        self.model.check()
        _options("data", DATASETS, self.data.name, self.data.params)
        self.compression = complete_config(self.compression)
        names = [plugin_section(self.compression)["algorithm"], *(b.algorithm for b in self.baselines)]
        if len(set(names)) != len(names):
            raise ConfigError(f"baselines: {names[1:]} repeat each other or the recipe's own algorithm '{names[0]}'")
        named = {f"{key}.penalty": getattr(self, key).penalty for key in ("pretrain", "training")}
        named |= {f"rewrites.{i}": section for i, section in enumerate(self.rewrites)}
        for i, baseline in enumerate(self.baselines):
            get_algorithm(baseline.algorithm).parse_params(baseline.params, f"baselines.{i}.params")
            named |= {f"baselines.{i}.rewrites.{j}": section for j, section in enumerate(baseline.rewrites or [])}
        for where, section in named.items():
            if section is not None:
                section.check(where)
        for variant in (None, *self.baselines):
            for i, stage in enumerate(self.training.stages):
                config = self.config_for(variant, stage)
                parsed = parse_sections([(f"{w} (training.stages.{i})", s) for w, s in plugin_sections(config)])
                if self.export is not None:
                    refuse_undeployable(parsed)
                if variant is None and self.training.joint is not None:
                    check_joint(parsed)

    @property
    def algorithm(self) -> str:
        """Name of the recipe's own algorithm; of several sections their names, such as ``fat+lsq``."""
        return joint_name(section["algorithm"] for _, section in plugin_sections(self.compression))

    def config_for(self, baseline: BaselineSection | None, stage: Stage) -> dict[str, Any]:
        """The NNCF config of one stage, for the recipe's own algorithm or a baseline in its place.

        Of several sections of this package it is the first that stages and baselines change.
        """
        config = deepcopy(self.compression)
        section = plugin_section(config)
        if baseline is not None:
            section["algorithm"] = baseline.algorithm
            section["params"] = dict(baseline.params)
        for group in ("weights", "activations"):
            tensor: StageTensor | None = getattr(stage, group)
            if tensor is not None:
                section[group] = {**section.get(group, {}), "bits": tensor.bits}
        return config

    def rewrites_for(self, baseline: BaselineSection | None) -> list[RewriteSection]:
        """What changes the float model of the recipe's own algorithm or of a baseline."""
        return self.rewrites if baseline is None or baseline.rewrites is None else baseline.rewrites

    def phase(self, stage: Stage) -> FineTuneSection:
        """Training settings of one stage."""
        t = self.training
        optimizer = t.optimizer if stage.lr is None else t.optimizer.model_copy(update={"lr": float(stage.lr)})
        epochs = t.epochs if stage.epochs is None else stage.epochs
        return t.model_copy(update={"epochs": epochs, "optimizer": optimizer, "stages": [stage]})


def complete_config(compression: Any) -> dict[str, Any]:
    """A section, a list of sections or a config as a config; the sections of this package in it are validated.

    :raises ConfigError: no section names an algorithm of this package, or one is wrong.
    """
    whole = isinstance(compression, dict) and "compression" in compression
    config = deepcopy(compression) if whole else {"compression": deepcopy(compression)}
    parse_sections(plugin_sections(config))
    return config


def plugin_sections(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Place (``"compression[1]"``, for error messages) and content of every section of this package, at least one.

    :raises ConfigError: there is none.
    """
    sections = split_sections(config["compression"])
    if not sections:
        raise ConfigError("compression: an empty list, expected a section with the key 'algorithm'")
    many = isinstance(config["compression"], list)
    ours = [(f"compression[{i}]" if many else "compression", s) for i, s in enumerate(sections) if is_plugin_section(s)]
    if not ours:
        raise ConfigError(f"compression.algorithm: {unknown('algorithm', sections[-1]['algorithm'], algorithms())}")
    return ours


def plugin_section(config: dict[str, Any]) -> dict[str, Any]:
    """The first section of ``config`` that names an algorithm of this package: what stages and baselines change."""
    return plugin_sections(config)[0][1]
