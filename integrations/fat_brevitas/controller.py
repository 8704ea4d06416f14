"""What drives quantizers during training in a loop that was written for NNCF's controller."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fat_brevitas.coordinators import attach_by_hand
from fat_brevitas.training import regularization, set_progress
from fat_plugins.errors import CheckpointError, HostError
from fat_plugins.network import named_quantizers


class Scheduler:
    """Counts steps and epochs and tells quantizers and coordinators.

    Call :meth:`epoch_step` at the start of each epoch and :meth:`step` at the start of each training step. Both
    counters are -1 before the first call.

    :ivar total_steps, total_epochs: what the training plans, when known; set them for algorithms whose schedules need
        an end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.current_step = self.current_epoch = -1
        self.total_steps: int | None = None
        self.total_epochs: int | None = None
        self.announce(begun=False)

    def step(self, next_step: int | None = None) -> None:
        """Begin the next training step (or the one given)."""
        self.current_step = self.current_step + 1 if next_step is None else int(next_step)
        self.announce()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin the next epoch (or the one given)."""
        self.current_epoch = self.current_epoch + 1 if next_epoch is None else int(next_epoch)
        self.announce()

    def get_state(self) -> dict[str, Any]:
        """JSON-ready counters."""
        keys = ("current_step", "current_epoch", "total_steps", "total_epochs")
        return {key: getattr(self, key) for key in keys}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`get_state` was called; load the model's state dict before.

        :raises CheckpointError: counters are missing.
        """
        try:
            self.current_step, self.current_epoch = int(state["current_step"]), int(state["current_epoch"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("scheduler: the counters are missing") from None
        self.total_steps, self.total_epochs = state.get("total_steps"), state.get("total_epochs")
        self.announce(begun=False)

    def announce(self, begun: bool = True) -> None:
        """Tell everybody where training stands.

        :param begun: ``False`` as long as a state dict may still be loaded; coordinators are left out then.
        """
        set_progress(
            self._model, step=max(self.current_step, 0), epoch=max(self.current_epoch, 0),
            total_steps=self.total_steps, total_epochs=self.total_epochs, begun=begun,
        )  # fmt: skip


class Controller:
    """The loss and schedule of a model that :func:`fat_brevitas.quantize` gave, or that is built of our layers by hand.

    :param calibration: a loader or list of batches, as for ``quantize``. A model that is built by hand needs it when an
        algorithm acts on the whole network: its coordinator is built here, in the order in which the first batch meets
        the layers, and its state becomes part of the model's. Build the optimizer, and load a state dict, afterwards.
    :raises HostError: another model, or ``calibration`` is missing.
    """

    def __init__(self, model: nn.Module, calibration: Iterable[Any] | None = None) -> None:
        if not any(True for _ in named_quantizers(model)):
            raise HostError(
                f"{type(model).__name__} was not quantized by fat_brevitas.quantize and has none of its layers"
            )
        attach_by_hand(model, calibration)
        self.model = model
        self.scheduler = Scheduler(model)

    def loss(self) -> Tensor:
        """What the algorithms add to the training loss: a scalar on the model's device, 0 when they add nothing."""
        return regularization(self.model)

    def compression_state(self) -> dict[str, Any]:
        """What rebuilds the model, in JSON types.

        :raises HostError: the model is built by hand; only its code rebuilds it.
        """
        if not getattr(self.model, "compression_state", None):
            raise HostError(
                f"{type(self.model).__name__} is built by hand: build it again, then Controller(model, calibration), "
                "then load_state_dict"
            )
        return copy.deepcopy(self.model.compression_state)
