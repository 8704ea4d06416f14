"""Schedules and regularisation in a training loop of the user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fat_brevitas.calibration import device_of
from fat_plugins import network
from fat_plugins.quantizer import Progress


def set_progress(
    model: nn.Module,
    progress: Progress | None = None,
    *,
    step: int = 0,
    epoch: int = 0,
    total_steps: int | None = None,
    total_epochs: int | None = None,
    begun: bool = True,
) -> None:
    """Tell every quantizer and coordinator where training stands; call it before each step or epoch, and after the
    state dict is loaded.

    :param progress: all numbers at once, in the place of the others.
    :param step: optimizer steps done.
    :param epoch: epochs begun, counted from 0.
    :param total_steps, total_epochs: planned, when known.
    :param begun: ``False`` as long as a state dict may still be loaded; coordinators are left out then.
    """
    network.set_progress(model, progress or Progress(step, epoch, total_steps, total_epochs), begun=begun)


def regularization(model: nn.Module) -> Tensor:
    """What the algorithms add to the training loss: a scalar on the model's device, 0 when they add nothing."""
    total = network.regularization(model)
    return torch.zeros((), device=device_of(model)) if total is None else total


class QuantizationCallback:
    """Drives schedules from a Lightning-style trainer: ``Trainer(callbacks=[QuantizationCallback()])``.

    Lightning looks methods up by name, so nothing is imported from it; hooks that are not here do nothing.
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Announce the plan."""
        self._announce(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Announce the epoch."""
        self._announce(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Announce the step."""
        self._announce(trainer, pl_module)

    def _announce(self, trainer: Any, pl_module: nn.Module) -> None:
        set_progress(
            pl_module,
            step=int(getattr(trainer, "global_step", 0)),
            epoch=int(getattr(trainer, "current_epoch", 0)),
            total_steps=_planned(getattr(trainer, "estimated_stepping_batches", None)),
            total_epochs=_planned(getattr(trainer, "max_epochs", None)),
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("on_", "setup", "teardown")):
            return _nothing
        raise AttributeError(f"'QuantizationCallback' has no attribute {name!r}")

    def state_dict(self) -> dict[str, Any]:
        """The trainer counts; there is nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""

    @property
    def state_key(self) -> str:
        """Name in a trainer's checkpoint."""
        return type(self).__name__


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _planned(value: Any) -> int | None:
    """Lightning says "unlimited" as -1, infinity or ``None``."""
    if value is None or not 0 <= value < float("inf"):
        return None
    return int(value)
