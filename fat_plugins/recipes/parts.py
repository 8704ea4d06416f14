"""Parts of a training step that recipes switch on: averaged weights, a teacher, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fat_plugins.errors import CheckpointError, ConfigError, nearest


class WeightAverage:
    """Exponential moving average of what is trained, and of the statistics of batch norms.

    Tensors that do not train now (the float copy of a fixed layer, the counters and codes of quantizers) are never
    averaged: evaluation uses them as they are.

    :param decay: share of the old average that a step keeps; below it in the first steps, ``(1 + n) / (10 + n)``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.values = {k: v.detach().clone() for k, v in self._live().items()}

    def _live(self) -> dict[str, Tensor]:
        found = {k: p.data for k, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                found.update({f"{name}.running_mean": module.running_mean, f"{name}.running_var": module.running_var})
        return found

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now in. What has begun to train since joins with its present value."""
        live = self._live()
        self.values = {k: self.values[k] if k in self.values else v.clone() for k, v in live.items()}
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        kinds: dict[Any, list[str]] = {}  # the fused update wants one dtype and device
        for key, value in live.items():
            kinds.setdefault((value.dtype, value.device), []).append(key)
        average = get_ema_multi_avg_fn(decay)
        for keys in kinds.values():
            average([self.values[k] for k in keys], [live[k] for k in keys], None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averages meanwhile."""
        live = self._live()
        kept = {k: v.clone() for k, v in live.items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for key, value in kept.items():
                    live[key].copy_(value)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averages for good."""
        for key, value in self._live().items():
            if key in self.values:
                value.copy_(self.values[key])

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and averages."""
        return {"steps": self.steps, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        :raises CheckpointError: averages of another model.
        """
        own = dict(self.model.state_dict())
        for key, value in state["values"].items():
            if key not in own or own[key].shape != value.shape:
                raise CheckpointError(f"averaged weights: belong to another model: {key!r}{nearest(key, own)}")
        self.steps = int(state["steps"])
        self.values = {k: v.detach().clone().to(own[k].device) for k, v in state["values"].items()}


class Distillation:
    """A teacher's answers in place of a part of the labels: ``(1 - alpha) loss + alpha T^2 KL(teacher || student)``.

    :param teacher: gives logits N x C; it is put into evaluation mode and learns nothing.
    :param alpha: share of the teacher, 0 to 1.
    :param temperature: both logits are divided by it.
    """

    def __init__(self, teacher: nn.Module, alpha: float, temperature: float) -> None:
        self.teacher, self.alpha, self.temperature = teacher.eval().requires_grad_(False), alpha, temperature

    def __call__(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The mixed loss, a scalar, of the loss by labels, the student's logits and the images behind them."""
        with torch.no_grad():
            wanted = self.teacher(images)
        if wanted.shape != logits.shape:
            raise ConfigError(f"distillation: the teacher gives {tuple(wanted.shape)}, the model {tuple(logits.shape)}")
        t = self.temperature
        student, teacher = ((x.float() / t).log_softmax(1) for x in (logits, wanted))
        apart = kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss + self.alpha * t**2 * apart


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
