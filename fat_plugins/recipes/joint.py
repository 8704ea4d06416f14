"""Training of one model at several bit widths: the network runs at each of them in every step of the optimizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from fat_plugins.config import CompressionConfig, Section
from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import TensorSpec
from fat_plugins.recipes.hooks import Part
from fat_plugins.registry import make_quantizer
from fat_plugins.switching import at_bits, widths

if TYPE_CHECKING:
    from fat_plugins.recipes.trainer import EpochRecord, Trainer


class JointSection(Section):
    """Every step trains several bit widths of one model, and averages their gradients."""

    widths: Literal["all", "sandwich"] = Field(
        "all", description="'all' widths in every step; 'sandwich': the widest, the narrowest and some drawn ones."
    )
    random: int = Field(2, ge=0, le=32, description="sandwich: how many are drawn for each step.")
    alpha: float = Field(
        0.0, ge=0, le=1, description="Share of the widest one's answers, in place of labels, in the loss of the others."
    )
    temperature: float = Field(1.0, gt=0, description="Both logits are divided by it.")


def check_joint(config: CompressionConfig) -> None:
    """Refuse a config in which nothing has several widths.

    :raises ConfigError: names its algorithms.
    """
    for part in config.parts:
        for role, shape in (("weight", (8, 8, 3, 3)), ("activation", ())):
            found = part.resolve(TensorSpec(role, 8, name=part.where, shape=shape), lambda scope: False)
            if found is not None and len(make_quantizer(*found).widths) > 1:
                return
    names = ", ".join(f"'{part.algorithm}'" for part in config.parts)
    raise ConfigError(f"training.joint: {names} computes at one bit width here; leave the key out")


class JointStep(Part):
    """Runs the model at several widths in every step, and evaluates it at all of them after every epoch.

    Knows nothing but :func:`fat_plugins.widths` and :func:`fat_plugins.at_bits`. Which widths are drawn follows from
    the run's seed and the number of the step, so there is nothing to save and all processes draw the same.

    :param several: widths of the model, descending.
    """

    name = "joint"

    def __init__(self, section: JointSection, several: Sequence[int]) -> None:
        self.section, self.widths = section, tuple(several)
        # logits of the widest width, part by part of the batch, and where the pass that is running stands in them
        self._answers: list[Tensor] = []
        self._first, self._at = True, 0

    def drawn(self, seed: int, step: int) -> tuple[int, ...]:
        """Widths of one step, descending."""
        middle = self.widths[1:-1]
        if self.section.widths == "all" or len(middle) <= self.section.random:
            return self.widths
        chosen = random.Random(f"{seed} {step}").sample(middle, self.section.random)
        return (self.widths[0], *sorted(chosen, reverse=True), self.widths[-1])

    def passes(self, trainer: Trainer) -> list[AbstractContextManager[Any]]:
        """One for each width of the step, the widest first."""
        chosen = self.drawn(trainer.seed, trainer.epoch * trainer.steps + trainer.step)
        return [self._pass(trainer.model, bits) for bits in chosen]

    @contextmanager
    def _pass(self, model: nn.Module, bits: int) -> Iterator[None]:
        self._first, self._at = bits == self.widths[0], 0
        with at_bits(model, bits):
            yield

    def loss(self, trainer: Trainer, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """What has to be added to the loss by labels of all widths but the widest."""
        alpha, t = self.section.alpha, self.section.temperature
        if not alpha:
            return None
        if self._first:
            self._answers.append(logits.detach())
            return None
        wanted = self._answers[self._at]
        self._at += 1
        apart = kl_div((logits / t).log_softmax(1), (wanted / t).log_softmax(1), reduction="batchmean", log_target=True)
        by_labels = cross_entropy(logits, labels, label_smoothing=float(trainer.section.label_smoothing))
        return alpha * (t**2 * apart - by_labels)

    def after_step(self, trainer: Trainer) -> None:
        self._answers.clear()

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """Adds ``widths``: validation loss and accuracy at each."""
        record.values["widths"] = measured(trainer.model, trainer)


def measured(model: nn.Module, trainer: Trainer) -> dict[str, dict[str, float]]:
    """Validation loss and accuracy at every width of ``model``, by the width as text."""
    from fat_plugins.recipes.trainer import evaluate

    found = {}
    for bits in widths(model):
        with at_bits(model, bits):
            loss, accuracy = evaluate(model, trainer.data.validation_loader(), trainer.world, trainer.data.task)
        found[str(bits)] = {"validation_loss": loss, "validation_accuracy": accuracy}
    return found
