"""The key ``penalty`` of a training: a term of the loss that prepares the network for quantization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import FatPluginsError
from fat_plugins.penalties import Penalty, get_penalty, penalties
from fat_plugins.recipes.hooks import Part
from fat_plugins.recipes.naming import FROM_NAME, NAME_OR_OBJECT, NamedSection
from fat_plugins.recipes.rewriting import rewritten

if TYPE_CHECKING:
    from fat_plugins.recipes.data import Data
    from fat_plugins.recipes.hosts import Host
    from fat_plugins.recipes.schema import Recipe
    from fat_plugins.recipes.trainer import EpochRecord, Trainer

#: of a batch on which a penalty is tried out; batch norms in training want more than one
_SAMPLES = 4


class PenaltySection(NamedSection):
    """One penalty."""

    kind: ClassVar[str] = "penalty"
    name: str = Field(description="Name of a registered penalty.")
    params: dict[str, Any] = Field(default_factory=dict, description="Options of the penalty.")

    @classmethod
    def registered(cls) -> dict[str, type[Penalty]]:
        return penalties()

    def build(self, model: nn.Module) -> Penalty:
        """The penalty of ``model``."""
        return get_penalty(self.name)(model, **self.params)


NamedPenalty = Annotated[PenaltySection, FROM_NAME, NAME_OR_OBJECT]


def try_penalties(recipe: Recipe, host: Host, data: Data) -> None:
    """Find out on fresh models, before any training, whether the penalties of a recipe can be computed.

    That of the training with quantizers takes one initialisation of them for every algorithm.

    :raises FatPluginsError: one line with the key.
    """
    section = recipe.pretrain.penalty
    if section is not None and recipe.pretrain.epochs:
        _try(section, recipe.model.build(data), data.example, "pretrain.penalty", training=False)
    section = recipe.training.penalty
    trained = next((stage for stage in recipe.training.stages if recipe.phase(stage).epochs), None)
    if section is None or trained is None:
        return
    images = next(iter(data.calibration_loader(recipe.data.batch_size)))[0]
    for baseline in (None, *recipe.baselines):
        model, _ = rewritten(recipe.model.build(data), recipe.rewrites_for(baseline), data.example)
        loader = data.calibration_loader(recipe.data.batch_size)
        _, model = host.compress(model, recipe.config_for(baseline, trained), loader, data.example)
        _try(section, model, images[:_SAMPLES], "training.penalty", training=True)


def _try(section: PenaltySection, model: nn.Module, images: Tensor, key: str, training: bool) -> None:
    try:
        section.build(model).try_out(images, training=training)
    except FatPluginsError as error:
        raise type(error)(f"{key}: {error}") from None


class PenaltyPart(Part):
    """Adds a penalty on the loss by labels to the loss, and its mean values to the records of the epochs.

    Each part of an accumulated batch, and each process, is penalised for its own mini-batch.
    """

    name = "penalty"

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        #: of this epoch and process: sums of the values by name, and how often there were some
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def before_step(self, trainer: Trainer) -> None:
        """Epochs count with the fraction that is done."""
        self.penalty.set_epoch(trainer.epoch + trainer.step / trainer.steps)

    def loss(self, trainer: Trainer, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """The penalty; what else joins the loss (a teacher, quantizers) has no part in it."""
        if not self.penalty.factor:
            return None
        by_labels = trainer.data.task.loss(logits, labels, float(trainer.section.label_smoothing))
        term = self.penalty.term(by_labels, trainer.precision.scaler)
        for name, value in self.penalty.values().items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        self._count += 1
        return term

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """``penalty``: what :meth:`Penalty.values` was on average over the epoch; nothing before it begins."""
        if self._sums:  # of the first process, whose state is the one that is saved
            means = {name: float(total) / self._count for name, total in self._sums.items()}
            record.values[self.name] = {name: float(f"{mean:.6g}") for name, mean in means.items()}
        self._sums, self._count = {}, 0

    def finish(self, model: nn.Module) -> None:
        """Copies are made of the model from here on."""
        self.penalty.remove()

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._sums, self._count = dict(state["sums"]), int(state["count"])
