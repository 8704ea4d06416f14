"""SLB: Searching for Low-Bit Weights in Quantized Neural Networks (Yang et al., NeurIPS 2020, arXiv 2009.08695).

A weight *is* one logit per level; training uses the mean of the levels under their softmax, evaluation the level of the
largest logit. A temperature that grows with the epochs brings the two together. The float weight is gone after
initialisation, and the host's parameter holds the quantized value. Sections quoted below are those of the project's SLB
specification.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fat_plugins.algorithms.pact import PACTActivation, PACTParams
from fat_plugins.clipping import best_clip
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook
from fat_plugins.functional import wide
from fat_plugins.quantizer import FrozenTensor, Params, Progress, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: no scale falls below it
_FLOOR = 1e-12
#: sharpness of the logits that stand for a float weight, at one bit and above (section 6)
_SHARPNESS = (2.0, 1.5)


class SLBParams(Params):
    """Options of ``"algorithm": "slb"`` (JSON section ``params``)."""

    init: Literal["float", "he"] = Field(
        "float",
        description="'float': logits whose mean is the float weight, on a scale of its own (ours). 'he': He's normal "
        "logits and no scale, as the vendor's code trains from scratch.",
    )
    scale: Literal["mse", "max"] = Field(
        "mse",
        description="Where the outermost level of init 'float' stands: at the least squared error of the hard levels, "
        "or at the largest weight, where the soft weight is the float one.",
    )
    temperature: float = Field(1.0, gt=0, description="Factor on the logits in the first epochs.")
    growth: float = Field(1.2, ge=1, le=10, description="Factor on the temperature per epoch of the window.")
    begin: float = Field(0.2, ge=0, le=1, description="Where the window begins, as a fraction of all epochs.")
    end: float = Field(
        0.6, ge=0, le=1, description="Where it ends; from there on the hard levels train the rest of the network."
    )
    alpha: float | None = Field(10.0, gt=0, description="Initial clip of activations (PACT's).")
    optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="The optimizer of the run, for the learning rates of param_groups."
    )

    @model_validator(mode="after")
    def _in_order(self) -> SLBParams:
        if self.end < self.begin:
            raise ValueError(f"end: {self.end} lies before begin, {self.begin}")
        return self


class _SoftLevels(torch.autograd.Function):
    """``sum_k softmax(T A)_k v_k`` over the last axis, or the level of the largest logit when ``hard``; with the
    gradient of section 4 either way. Keeps nothing but ``A``.

    Shapes: ``logits`` S x m, ``levels`` m, ``temperature`` (). Result S.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, levels: Tensor, temperature: Tensor, hard: bool) -> Tensor:
        ctx.save_for_backward(logits, levels, temperature)
        if not hard:
            return torch.softmax(wide(logits) * temperature, -1) @ levels
        # NaN has no level, and must stay visible
        return torch.where(torch.isnan(logits).any(-1), torch.nan, levels[logits.argmax(-1)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        logits, levels, temperature = ctx.saved_tensors
        share = torch.softmax(wide(logits) * temperature, -1)
        away = levels - (share @ levels).unsqueeze(-1)
        return share.mul_(away).mul_((grad * temperature).unsqueeze(-1)).to(logits.dtype), None, None, None


class SLBWeight(WeightQuantizer):
    """Weight side. Parameter: ``logits`` (C x n x 2^b: outputs, weights per output, levels). Buffer: ``scale`` (C, or 1
    without ``per_channel``), the value of the outermost level."""

    params: SLBParams
    owns_weight: ClassVar[bool] = True
    has_zero: ClassVar[bool] = False

    def __init__(self, spec: TensorSpec, params: SLBParams) -> None:
        super().__init__(spec, params)
        self.steps = 2**spec.bits - 1
        channels = spec.shape[spec.channel_axis]
        count = torch.Size(spec.shape).numel() // channels
        self.logits = nn.Parameter(torch.zeros(channels, count, self.steps + 1))
        self.register_buffer("scale", torch.ones(channels if spec.per_channel else 1))
        integers = 2 * torch.arange(self.steps + 1) - self.steps
        self.register_buffer("integers", integers, persistent=False)
        # where the schedule stands follows from the host's progress, which its checkpoint holds
        self.register_buffer("temperature", torch.tensor(params.temperature), persistent=False)
        self.hard = False

    @property
    def noisy(self) -> bool:
        """Training is soft, what is deployed is hard."""
        return not self.hard

    def on_progress(self, progress: Progress) -> None:
        """Section 7.1, epochs counted from 1: growth within the window, then hard. Without a known length: none."""
        if not progress.total_epochs:
            return
        p, epoch = self.params, progress.epoch + 1
        first, last = int(progress.total_epochs * p.begin), int(progress.total_epochs * p.end)
        # beyond 1e30 products with logits overflow, and the softmax is hard long before
        factor = min(p.growth ** max(min(epoch, last) - first, 0), 1e30)
        self.temperature.fill_(p.temperature * factor)
        self.hard = epoch >= last

    # -- start -------------------------------------------------------------------------------------------------------
    def init_from_weight(self, weight: Tensor) -> None:
        """Section 6: ``A_k = -(c / D^2) (w/s - v_k)^2``, or normal of deviation ``sqrt(2 / (C_out k^2 2^b))``."""
        if self.params.init == "he":
            fan_out = weight.numel() // weight.shape[1 - self.spec.channel_axis] if weight.ndim > 1 else len(weight)
            # as every rank and every start of a run draws them
            generator = torch.Generator().manual_seed(sum(map(ord, self.spec.name)) + weight.numel())
            drawn = torch.randn(self.logits.shape, generator=generator)
            self.logits.copy_(drawn * (2 / (fan_out * (self.steps + 1))) ** 0.5)
            self.scale.fill_(1.0)
            return
        rows = wide(weight.movedim(self.spec.channel_axis, 0).reshape(len(self.logits), -1))
        self.scale.copy_(self._start(rows))
        unit = (rows / self.scale.to(rows.dtype).unsqueeze(-1)).clamp(-1, 1).unsqueeze(-1)
        sharpness = _SHARPNESS[self.spec.bits > 1] * (self.steps / 2) ** 2
        self.logits.copy_(-sharpness * (unit - self._levels(rows.dtype)).square())

    def _start(self, rows: Tensor) -> Tensor:
        """Value of the outermost level: one, or one per row."""
        groups = rows if self.spec.per_channel else rows.reshape(1, -1)
        if self.params.scale == "max":
            return groups.abs().amax(1).clamp_min(_FLOOR)

        def nearest(x: Tensor, clip: Tensor) -> Tensor:
            index = ((x / clip + 1) * (self.steps / 2)).round_().clamp_(0, self.steps)
            return (index * (2 / self.steps) - 1) * clip

        return rows.new_tensor([best_clip(group, nearest) or _FLOOR for group in groups]).clamp_min(_FLOOR)

    # -- forward -----------------------------------------------------------------------------------------------------
    def _levels(self, dtype: torch.dtype) -> Tensor:
        """``-1 .. 1``, evenly spaced."""
        return self.integers.to(dtype) / self.steps

    def _step(self) -> Tensor:
        """What one integer is worth, shape of the scale."""
        return wide(self.scale) / self.steps

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3: the soft weight in training, until the schedule makes it hard, and then no gradient any more (an
        optimizer's momentum would move logits on). Of ``weight`` only the dtype is read."""
        with torch.autocast(self.logits.device.type, enabled=False):
            step = self._step()
            logits = self.logits.detach() if self.hard else self.logits
            hard = self.hard or not self.training
            integers, temperature = self.integers.to(step.dtype), self.temperature.to(step.dtype)
            rows = _SoftLevels.apply(logits, integers, temperature, hard) * step.unsqueeze(-1)
            return self._shaped(rows).to(weight.dtype)

    def _shaped(self, rows: Tensor) -> Tensor:
        """C x n as the host has it."""
        shape = list(self.spec.shape)
        shape.insert(0, shape.pop(self.spec.channel_axis))
        return rows.reshape(shape).movedim(0, self.spec.channel_axis)

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._step()

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Indices of odd integers (section 8); logits and temperature are gone."""
        self._refuse_nonfinite(self.logits, "logits")
        form = Codebook(self.spec.bits, self.integers, self._step(), self.spec.channel_axis)
        return FrozenTensor(self._shaped(self.logits.detach().argmax(-1)).to(torch.int32).contiguous(), form)

    # -- reports and rates -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _gap(self) -> tuple[Tensor, Tensor]:
        """Soft and hard weight, both C x n in units of the scale."""
        soft = _SoftLevels.apply(self.logits, self._levels(torch.float32), self.temperature, False)
        return soft, self._levels(torch.float32)[self.logits.argmax(-1)]

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the temperature and the mean distance of soft and hard weights, in units of the scale."""
        soft, hard = self._gap()
        return {
            **super().monitor(weight),
            "temperature": float(self.temperature),
            "gap": float((soft - hard).abs().mean()),
        }

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """How many weights stand at each level, softly and hard."""
        _, hard = self._gap()
        levels = self._levels(torch.float32)
        share = torch.softmax(self.logits.detach().float() * self.temperature, -1).mean((0, 1))
        counts = torch.stack([(hard == v).float().mean() for v in levels])
        names = [f"{v:.2g}" for v in levels.tolist()]
        return [Figure.bars("Levels", names, {"soft": share, "hard": counts}, "level", "share of the weights")]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay on logits, which it would pull to the uniform mixture (section 10.2).

        Adam: the base rate. SGD: the base over the square of what a logit moves the weight by, so that weights move as
        fast as float ones would.
        """
        if self.params.optimizer == "adam" or self.params.init == "he":
            rate = lr
        else:
            # variance of the levels under the softmax at the start, in units of the scale
            variance = (2 / self.steps) ** 2 / (2 * _SHARPNESS[self.spec.bits > 1])
            rate = lr / max(float(wide(self.scale).square().mean()) * variance, _FLOOR)
        return [{"params": [self.logits], "lr": rate, "weight_decay": 0.0}]


class SLBActivation(PACTActivation):
    """Activation side (section 5): PACT."""

    def __init__(self, spec: TensorSpec, params: SLBParams) -> None:
        super().__init__(spec, PACTParams(alpha=params.alpha))


class SLB(Algorithm):
    """Registry entry of SLB."""

    name = "slb"
    title = "Searching for Low-Bit Weights"
    paper = "Yang et al.: Searching for Low-Bit Weights in Quantized Neural Networks, NeurIPS 2020"
    arxiv = "2009.08695"
    fidelity = (
        "B: follows the abstract, the authors' README and their vendor's implementation; the body of the paper was not "
        "available"
    )
    Params = SLBParams
    weight_quantizer = SLBWeight
    activation_quantizer = SLBActivation
    weight_bits = (1, 4)
    activation_bits = (2, 8)
    bits_reason = "a level needs at least one bit"
    per_channel_weights = True
