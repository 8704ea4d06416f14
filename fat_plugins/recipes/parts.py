"""What recipes switch on in a training: averaged weights, a teacher, a penalty, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fat_plugins.errors import CheckpointError, ConfigError, nearest
from fat_plugins.recipes.hooks import Part
from fat_plugins.recipes.joint import JointStep
from fat_plugins.recipes.penalty import PenaltyPart
from fat_plugins.switchable_norms import norm_statistics
from fat_plugins.switching import widths

if TYPE_CHECKING:
    from fat_plugins.recipes.schema import TrainSection
    from fat_plugins.recipes.trainer import Trainer


class WeightAverage(Part):
    """Exponential moving average of what is trained, and of the statistics of batch norms. It is the averages that are
    evaluated, kept in checkpoints and left in the model in the end.

    Tensors that do not train now (the float copy of a fixed layer, the counters and codes of quantizers) are never
    averaged: evaluation uses them as they are.

    :param decay: share of the old average that a step keeps; below it in the first steps, ``(1 + n) / (10 + n)``.
    """

    name = "ema"

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.values = {k: v.detach().clone() for k, v in self._live().items()}
        # statistics of batch norms at the end of the last evaluation, before which they may have been renewed
        self.norms: dict[str, Tensor] = {}

    def _live(self) -> dict[str, Tensor]:
        found = {k: p.data for k, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}
        return {**found, **norm_statistics(self.model)}

    @torch.no_grad()
    def after_step(self, trainer: Trainer | None = None) -> None:
        """Take the weights of now in. What has begun to train since joins with its present value."""
        live = self._live()
        self.values = {k: self.values[k] if k in self.values else v.clone() for k, v in live.items()}
        self.steps += 1
        kinds: dict[Any, list[str]] = {}  # the fused update wants one dtype and device
        for key, value in live.items():
            kinds.setdefault((value.dtype, value.device), []).append(key)
        average = get_ema_multi_avg_fn(min(self.decay, (1 + self.steps) / (10 + self.steps)))
        for keys in kinds.values():
            average([self.values[k] for k in keys], [live[k] for k in keys], None)

    @contextmanager
    def evaluated(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages meanwhile."""
        live = self._live()
        kept = {k: v.clone() for k, v in live.items()}
        _copy(self.values, live)
        try:
            yield
            self.norms = {k: v.clone() for k, v in norm_statistics(self.model).items()}
        finally:
            _copy(kept, live)

    def finish(self, model: nn.Module) -> None:
        """Leave the averages in the model."""
        _copy({**self.values, **self.norms}, self._live())

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and averages."""
        return {"steps": self.steps, "values": dict(self.values), "norms": dict(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        :raises CheckpointError: averages of another model.
        """
        own = dict(self.model.state_dict())
        for key, value in (*state["values"].items(), *state["norms"].items()):
            if key not in own or not isinstance(value, torch.Tensor) or own[key].shape != value.shape:
                raise CheckpointError(f"averaged weights: belong to another model: {key!r}{nearest(key, own)}")
        self.steps = int(state["steps"])
        self.values, self.norms = (
            {k: v.detach().clone().to(own[k].device) for k, v in state[part].items()} for part in ("values", "norms")
        )


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, value in target.items():
        if key in source:
            value.copy_(source[key])


class Distillation(Part):
    """A teacher's answers in place of a part of the labels: ``(1 - alpha) loss + alpha T^2 KL(teacher || student)``.

    :param teacher: gives logits N x C; it is put into evaluation mode and learns nothing.
    :param alpha: share of the teacher, 0 to 1.
    :param temperature: both logits are divided by it.
    """

    name = "distillation"

    def __init__(self, teacher: nn.Module, alpha: float, temperature: float) -> None:
        self.teacher, self.alpha, self.temperature = teacher.eval().requires_grad_(False), alpha, temperature

    def loss(self, trainer: Trainer, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """What has to be added to the loss by labels."""
        with torch.no_grad(), trainer.precision.autocast():
            wanted = self.teacher(images)
        if wanted.shape != logits.shape:
            raise ConfigError(f"distillation: the teacher gives {tuple(wanted.shape)}, the model {tuple(logits.shape)}")
        t = self.temperature
        student, teacher = ((x.float() / t).log_softmax(1) for x in (logits, wanted))
        apart = kl_div(student, teacher, reduction="batchmean", log_target=True)
        by_labels = cross_entropy(logits, labels, label_smoothing=float(trainer.section.label_smoothing))
        return self.alpha * (t**2 * apart - by_labels)


class Precision:
    """Mixed precision of the forward pass, and what 16-bit gradients need.

    :param amp: ``"bf16"``, ``"fp16"`` or ``None``. Quantizers compute their own statistics in float32 all the same.
    """

    def __init__(self, amp: str | None, device: torch.device) -> None:
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[amp]
        self.device = device
        # half precision has few exponents: without a scale small gradients vanish
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Gradients, scaled where that is needed; they add up until :meth:`step`."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip_norm: float | None = None) -> None:
        """One step of the optimizer. With ``fp16`` it is left out where gradients overflow.

        :param clip_norm: largest norm of all gradients together.
        """
        if clip_norm is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Scale of the gradients; empty unless ``fp16``."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if state:
            self.scaler.load_state_dict(state)


def parts_of(section: TrainSection, model: nn.Module, teacher: nn.Module | None = None) -> list[Part]:
    """The parts that a section of a recipe switches on.

    :param model: what is trained, on its device.
    :param teacher: the float model; a copy of it on the device of ``model`` serves where the section wants it.
    """
    parts: list[Part] = []
    wanted = getattr(section, "distillation", None)
    if wanted is not None and teacher is not None:
        device = next(model.parameters()).device
        parts.append(Distillation(deepcopy(teacher).to(device), float(wanted.alpha), float(wanted.temperature)))
    if section.penalty is not None:
        parts.append(PenaltyPart(section.penalty.build(model)))
    joint, several = getattr(section, "joint", None), widths(model)
    if joint is not None and several:  # a baseline may have one width only
        parts.append(JointStep(joint, several))
    if section.ema is not None:
        parts.append(WeightAverage(model, float(section.ema.decay)))
    return parts
