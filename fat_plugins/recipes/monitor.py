"""What quantizers say about themselves after every epoch, for reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fat_plugins.placed import monitor
from fat_plugins.recipes.hooks import Part

if TYPE_CHECKING:
    from fat_plugins.recipes.trainer import EpochRecord, Trainer


class QuantizerLog(Part):
    """Adds ``quantizers`` to the values of every epoch: see :func:`fat_plugins.placed.monitor`."""

    name = "quantizers"

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        record.values[self.name] = monitor(trainer.model)
