"""What may take part in a training beside the loop itself: averaged weights, distillation, a chooser of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from fat_plugins.recipes.trainer import EpochRecord, Trainer


class Part:
    """Base of all parts; every hook does nothing until it is overridden.

    :cvar name: key of its state among those of a training; each training has at most one part of a name.
    """

    name: str

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: tensors and JSON types, nested as one likes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; tensors come on the CPU."""

    def before_step(self, trainer: Trainer) -> None:
        """Schedules are set for the step (learning rates, quantizers), the forward has not run."""

    def passes(self, trainer: Trainer) -> Sequence[AbstractContextManager[Any]] | None:
        """How the network runs for this step: in one context after the other, each of them a pass over the whole batch.
        Losses and gradients are means over the passes. ``None``: once, as it is. One part of a training may ask."""
        return None

    def loss(self, trainer: Trainer, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """A scalar that joins the loss of this step: a mean over the images of this process."""
        return None

    def after_step(self, trainer: Trainer) -> None:
        """The optimizer has stepped."""

    def evaluated(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Put the weights that are to be evaluated and kept in checkpoints into ``model``; take them out at the end."""
        return nullcontext()

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """The epoch was evaluated; the model still has the evaluated weights. ``record.values`` may be added to."""

    def finish(self, model: nn.Module) -> None:
        """Training is over: leave in ``model`` what is to be deployed."""
