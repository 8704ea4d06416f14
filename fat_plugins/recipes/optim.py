"""Optimizers by name, and learning rates as a function of time: nothing to save, so nothing to lose on resume."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fat_plugins.errors import CheckpointError, ConfigError, shown, unknown
from fat_plugins.network import param_groups

if TYPE_CHECKING:
    from fat_plugins.recipes.schema import OptimizerSection, ScheduleSection

#: the only classes of torch that a recipe can name
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    kind.__name__.lower(): kind
    for kind in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.ASGD,
    )
}
#: arguments with a key of their own, and those that are about speed or order of computation
_OWN = ("params", "lr", "weight_decay", "momentum", "nesterov")
_TECHNICAL = ("foreach", "fused", "capturable", "differentiable", "maximize")
#: share of a onecycle schedule in which the rate rises, its start, and its end as a fraction of the start
_RISE, _START, _END = 0.3, 1 / 25, 1e-4


def optimizer_options(name: str) -> list[str]:
    """Names of the further options of an optimizer."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    own = _OWN if name == "sgd" else [o for o in _OWN if o != "momentum"]
    return [o for o in known if o not in own and o not in _TECHNICAL]


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Optimizer over the groups that the algorithms ask for.

    :raises ConfigError: torch refuses an option.
    """
    groups = param_groups(model, float(section.lr), float(section.weight_decay))
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.options.items()}
    if section.name == "sgd":
        momentum = 0.9 if section.momentum is None else float(section.momentum)
        options.update(momentum=momentum, nesterov=section.nesterov)
    try:
        return OPTIMIZERS[section.name](groups, lr=float(section.lr), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options: {section.name}: {error}") from None


def check_state(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Refuse a state that torch's optimizer has taken and would stumble over in its next step.

    :raises CheckpointError: an option of another type, moments that are missing, of another shape or not numbers.
    """
    fresh = optimizer.defaults
    for group in optimizer.param_groups:
        for key, usual in fresh.items():
            if key not in group:
                raise CheckpointError(f"{where}: optimizer: {key} is missing")
            value = group[key]
            numbers = (bool, int, float)
            if not isinstance(value, numbers if isinstance(usual, numbers) else (type(usual), list, *numbers)):
                raise CheckpointError(f"{where}: optimizer: {key} is {shown(value)}, expected as {usual!r}")
    kinds = {tuple(sorted((k, type(v).__name__) for k, v in m.items())) for m in optimizer.state.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"{where}: optimizer: moments of some parameters are missing: {shown(sorted(kinds))}")
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if not isinstance(value, torch.Tensor):
                if value is not None and not isinstance(value, (int, float)):
                    raise CheckpointError(f"{where}: optimizer: {key} is {shown(value)}, expected numbers")
            elif value.numel() != 1 and value.shape != parameter.shape:
                raise CheckpointError(f"{where}: optimizer: {key} has shape {tuple(value.shape)}, not the parameter's")


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that the optimizer does not have.

    :raises ValueError: with the nearest name.
    """
    allowed = optimizer_options(name)
    for key in options:
        if key not in allowed:
            raise ValueError(f"options: {unknown(f'option of {name}', key, allowed)}")


def lr_factor(section: ScheduleSection, epochs: int, epoch: float) -> float:
    """Factor on every learning rate after ``epoch`` epochs (with fraction) of ``epochs``."""
    warmup, hold, final = float(section.warmup_epochs), float(section.hold_epochs), float(section.final)
    if section.name == "onecycle":
        return _one_cycle(epoch / max(epochs, 1e-9))
    if epoch < warmup:
        return (epoch + 1e-3) / (warmup + 1e-3)
    if section.name in ("cosine", "linear", "polynomial"):
        begin = warmup + hold
        done = min(max((epoch - begin) / max(epochs - begin, 1e-9), 0.0), 1.0)
        power = float(section.power) if section.name == "polynomial" else 1.0
        left = 0.5 * (1 + math.cos(math.pi * done)) if section.name == "cosine" else (1 - done) ** power
        return final + (1 - final) * left
    if section.name == "multistep":
        return float(section.gamma) ** bisect_right(sorted(section.milestones), epoch)
    if section.name == "step":
        return float(section.gamma) ** (int(epoch) // section.step_epochs)
    if section.name == "exponential":
        return float(section.gamma) ** int(epoch)
    return 1.0


def _one_cycle(done: float) -> float:
    """Smith's: up from a 25th of the rate, then down to almost nothing, both as half a cosine."""

    def between(start: float, end: float, part: float) -> float:
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))

    if done < _RISE:
        return between(_START, 1.0, done / _RISE)
    return between(1.0, _START * _END, (done - _RISE) / (1 - _RISE))
