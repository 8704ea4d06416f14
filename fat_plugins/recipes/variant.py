"""One algorithm of a run on its way through the stages of its training, with its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat_plugins.network import named_quantizers
from fat_plugins.recipes.checkpoint import Checkpoint, cpu_state, load_fitting, save_checkpoint
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.directory import BEST, LAST, checkpoint_path
from fat_plugins.recipes.hooks import Part
from fat_plugins.recipes.hosts import Host
from fat_plugins.recipes.interrupt import Interrupts
from fat_plugins.recipes.monitor import QuantizerLog
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.progress import Reporter
from fat_plugins.recipes.resume import RunState
from fat_plugins.recipes.schema import BaselineSection, Recipe, TrainSection
from fat_plugins.recipes.state import Saving, seed_everything
from fat_plugins.recipes.trainer import EpochRecord, Trainer
from fat_plugins.recipes.world import World


@dataclass(frozen=True)
class Options:
    """How a run is executed. But for ``max_steps`` nothing here changes what comes out.

    :param resume: go on with the run in the directory.
    :param save_steps: save the state every so many optimizer steps, beside every epoch.
    :param save_seconds: and when that much time has passed.
    :param max_steps: optimizer steps of every phase at most.
    """

    resume: bool = False
    save_steps: int | None = None
    save_seconds: float | None = 300.0
    max_steps: int | None = None


@dataclass
class Context:
    """What all parts of one run share."""

    recipe: Recipe
    data: Data
    host: Host
    reporter: Reporter
    root: Path
    state: RunState
    options: Options
    world: World
    interrupts: Interrupts
    seed: int = 0

    def title(self, name: str) -> str:
        return f"{name}, seed {self.seed}" if len(self.recipe.seeds) > 1 else name

    def trainer(
        self,
        model: nn.Module,
        section: TrainSection,
        name: str,
        title: str,
        describe: Callable[[], dict[str, Any]],
        **settings: Any,
    ) -> Trainer:
        """A trainer that saves its state as that of the variant ``name``, together with what ``describe`` returns."""

        def write(state: dict[str, Any]) -> None:
            self.state.save(self.seed, name, {**describe(), "trainer": state})

        self.reporter.about = {"variant": name, "seed": self.seed}
        return Trainer(
            model,
            self.data,
            section,
            batch_size=self.recipe.data.batch_size,
            seed=self.seed,
            reporter=self.reporter,
            title=self.title(title),
            world=self.world,
            saving=Saving(write, self.options.save_steps, self.options.save_seconds),
            interrupts=self.interrupts,
            max_steps=self.options.max_steps,
            **settings,
        )


@dataclass
class Variant:
    """One algorithm on its way through the stages of a bit progression.

    :ivar done: metrics of the stages behind.
    :ivar rewrites: what changed the float model, as a checkpoint holds it.
    """

    context: Context
    name: str
    baseline: BaselineSection | None
    directory: Path
    done: list[dict[str, Any]] = field(default_factory=list)
    rewrites: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, number: int, float_model: nn.Module, before: dict[str, torch.Tensor] | None) -> nn.Module:
        """Train one stage, or what is left of it.

        :param before: state of the model after the stage before, on the CPU.
        """
        context, recipe, data = self.context, self.context.recipe, self.context.data
        stage = recipe.training.stages[number]
        saved = context.state.take(context.seed, self.name)
        config = recipe.config_for(self.baseline, stage)
        seed_everything(context.seed)
        controller, model = context.host.compress(
            deepcopy(float_model),
            config,
            # what one process with the batch of all would see
            data.calibration_loader(recipe.data.batch_size * context.world.size),
            data.example,
            compression_state=None if saved is None else saved["compression_state"],
        )
        context.world.same_quantizers(model)
        if before is not None and saved is None:
            load_fitting(model, carried(before, model, stage.carry))
        keeper = Keeper(self, config, controller, model, number)

        def describe() -> dict[str, Any]:
            return {"stage": number, "done": self.done, "compression_state": keeper.compression_state()}

        title = self.name if len(recipe.training.stages) == 1 else f"{self.name}, stage {number + 1}"
        section = recipe.phase(stage)
        parts = [*parts_of(section, model, float_model), keeper, QuantizerLog()]
        trainer = context.trainer(model, section, self.name, title, describe, controller=controller, parts=parts)
        context.reporter.about["stage"] = number
        if saved is not None:
            trainer.load_state_dict(saved["trainer"], str(context.state.path))
        records = trainer.run()
        if not records and context.world.main:
            keeper.save(LAST, {})
            keeper.save(BEST, {})
        epochs = [r.to_dict() for r in records]
        self.done.append({"stage": number, "before_training": trainer.before, "epochs": epochs})
        return model


def carried(state: dict[str, torch.Tensor], model: nn.Module, carry: str) -> dict[str, torch.Tensor]:
    """What the next stage of a bit progression takes: everything, or all but the quantizers' own state."""
    if carry == "all":
        return state
    own = tuple(f"{name}." for name, _ in named_quantizers(model))
    return {k: v for k, v in state.items() if not k.startswith(own)}


class Keeper(Part):
    """Writes ``last`` after every epoch and ``best`` when the validation loss is the lowest of the stage."""

    name = "keeper"

    def __init__(self, variant: Variant, config: dict[str, Any], controller: Any, model: nn.Module, stage: int) -> None:
        self.variant, self.config, self.controller, self.model, self.stage = variant, config, controller, model, stage
        self.lowest = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lowest = state["lowest"]

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        better = record.validation_loss < self.lowest
        if better:
            self.lowest = record.validation_loss
        if self.variant.context.world.main:
            self.save(LAST, record.to_dict())
            if better:
                self.save(BEST, record.to_dict())

    def compression_state(self) -> Any:
        """What rebuilds the model, as a file gives it back."""
        return json.loads(json.dumps(self.variant.context.host.compression_state(self.controller)))

    def save(self, which: str, metrics: dict[str, Any]) -> None:
        """Write one checkpoint of the model as it is."""
        context = self.variant.context
        context.state.require()
        progress = {
            "variant": self.variant.name,
            "seed": context.seed,
            "stage": self.stage,
            "stages": len(context.recipe.training.stages),
            "epoch": metrics.get("epoch", -1) + 1,
        }
        # first: hosts bring parameters up to date that an algorithm has taken over
        compression_state = context.host.compression_state(self.controller)
        checkpoint = Checkpoint(
            cpu_state(self.model),
            config=self.config,
            compression_state=compression_state,
            rewrites=self.variant.rewrites,
            recipe=context.recipe.model_dump(mode="json"),
            progress=progress,
            metrics=metrics,
        )
        save_checkpoint(checkpoint_path(self.variant.directory, which), checkpoint)
