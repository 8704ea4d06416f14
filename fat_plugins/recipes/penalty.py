"""A penalty of :mod:`fat_plugins.penalties` in the training of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fat_plugins.penalties import Penalty
from fat_plugins.recipes.hooks import Part

if TYPE_CHECKING:
    from fat_plugins.recipes.trainer import EpochRecord, Trainer


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
        by_labels = cross_entropy(logits, labels, label_smoothing=float(trainer.section.label_smoothing))
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
