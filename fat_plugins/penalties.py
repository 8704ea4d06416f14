"""Penalties: terms of a loss that prepare a network for quantization, by name through ``fat_plugins.penalties``.

A penalty quantizes nothing and knows no host. It works in float training, before any post-training quantization, and
where it can, in training with quantizers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import ConfigError
from fat_plugins.plugins import Plugin, load_group, named
from fat_plugins.quantizer import Params

GROUP = "fat_plugins.penalties"


class PenaltyParams(Params):
    """Options that every penalty has."""

    start: float = Field(0.0, ge=0, description="Epochs before the penalty begins.")
    warmup: float = Field(0.0, ge=0, description="Epochs over which it then rises from nothing, linearly.")


class Penalty(Plugin):
    """What a paper adds to the loss. Subclass it in one file and name it in one entry point.

    In a loop of one's own::

        penalty = get_penalty("gradient_l1")(model, lambda_weights=0.01)
        ...
        loss = penalty(criterion(model(images), labels))
        loss.backward()

    Class attributes describe it for tables, docs and validation, as those of
    :class:`~fat_plugins.registry.Algorithm` do.

    :param model: what is trained; it is neither changed nor kept alive longer than the penalty.
    :param params: options, as keywords.
    :raises ConfigError: unknown option or bad value.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    #: arXiv number, or "" when there is none
    arxiv: ClassVar[str] = ""
    #: the grade and what it means for this penalty, as the spec words it
    fidelity: ClassVar[str]
    Params: ClassVar[type[PenaltyParams]] = PenaltyParams

    def __init__(self, model: nn.Module, **params: Any) -> None:
        self.model = model
        self.params = self.parse_params(params)
        self._epoch: float | None = None

    def set_epoch(self, epoch: float) -> None:
        """Tell where training stands, before the forward of a step; needed for ``start`` and ``warmup`` only.

        :param epoch: epochs done, with the fraction of the one that is running.
        """
        self._epoch = float(epoch)

    @property
    def factor(self) -> float:
        """What the penalty is multiplied by now, 0 to 1.

        :raises ConfigError: there is a schedule, and nobody called :meth:`set_epoch`.
        """
        start, warmup = self.params.start, self.params.warmup
        if not (start or warmup):
            return 1.0
        if self._epoch is None:
            raise ConfigError(f"{self.name}: start and warmup count epochs; call set_epoch(epoch) before every step")
        done = self._epoch - start
        if done < 0:
            return 0.0
        return min(done / warmup, 1.0) if warmup else 1.0

    def term(self, loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor | None:
        """What joins the loss, a scalar with its graph, weights included; ``None`` where there is nothing to add.

        :param loss: scalar of the forward that has just run, not scaled.
        :param scaler: of training in half precision, whose small gradients need it here too.
        """
        raise NotImplementedError

    def __call__(self, loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """``loss`` with the penalty. The very same tensor where there is nothing to add."""
        term = self.term(loss, scaler)
        return loss if term is None else loss + term

    def try_out(self, example: Tensor, training: bool = False) -> None:
        """Find out now whether the penalty can be computed for this model (default: there is nothing to find out).

        Weights and random numbers stay as they are; in evaluation mode, statistics of batch norms too.

        :param example: a batch for the model, N x ...
        :param training: try it in training mode, in which quantizers may compute something else.
        :raises FatPluginsError: it cannot; one line says why, and the cure.
        """

    def values(self) -> dict[str, Tensor]:
        """The parts of the last :meth:`term` by name, before their weights, without gradient (default: none)."""
        return {}

    def remove(self) -> None:
        """Take out of the model what the penalty has hooked into it; it cannot be used any more."""


def _load() -> tuple[dict[str, type[Penalty]], dict[str, str]]:
    return load_group(GROUP, Penalty, "penalty")


def penalties() -> dict[str, type[Penalty]]:
    """All registered penalties by name. One that cannot be loaded is left out with a warning."""
    return dict(_load()[0])


def get_penalty(name: str) -> type[Penalty]:
    """The penalty called ``name``.

    :raises ConfigError: unknown name, with the nearest valid one, or a penalty that cannot be loaded.
    """
    return named(_load(), "penalty", name)


__all__ = ["Penalty", "PenaltyParams", "get_penalty", "penalties"]
