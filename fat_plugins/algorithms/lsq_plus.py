"""LSQ+ (Bhalgat et al., 2020): LSQ with a learned offset for activations and another initialisation.

Formulas of the project's baselines specification, sections 3 to 6: believed to match the paper, checked numerically,
not checked against its text.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms.lsq import LSQWeight
from fat_plugins.errors import QuantizationError
from fat_plugins.forms import Form, Staircase, UniformGrid
from fat_plugins.functional import grad_scale, positive, wide
from fat_plugins.kernels import evaluate, total
from fat_plugins.quantizer import ActivationQuantizer, Params, TensorSpec
from fat_plugins.registry import Algorithm

_FLOOR = 1e-12
#: an offset beyond that many steps is no grid any more: float32 does not count further
_MOST_STEPS = 2**24
#: steps that the initialisation tries, as fractions of the one that spans the whole range
_TRIED = tuple(i / 40 for i in range(4, 41))


class LSQPlusParams(Params):
    """Options of ``"algorithm": "lsq_plus"``."""

    train_float_offset: bool = Field(
        False,
        description="true: train with the paper's offset and round it to a whole number of steps for deployment only. "
        "false: round it in training too, so that what is trained is what runs.",
    )


class LSQPlusWeight(LSQWeight):
    """As LSQ, symmetric; only the initial step differs."""

    def init_from_weight(self, weight: Tensor) -> None:
        """``s = max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1)`` (section 6), per channel where the step is."""
        w = wide(weight)
        rows = w.movedim(self.spec.channel_axis, 0).reshape(w.shape[self.spec.channel_axis], -1)
        rows = rows if self.spec.per_channel else rows.reshape(1, -1)
        mean = rows.mean(1)
        std = rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(mean)
        reach = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs())
        self.step.copy_((reach / 2 ** (self.spec.bits - 1)).clamp(_FLOOR, 1e36))


class _Affine(torch.autograd.Function):
    """``round(clip((x - beta)/s, 0, high)) s + beta``, with beta rounded to whole steps unless told otherwise.

    Gradients of section 4: x strictly inside the clip band; s the rounding residual inside and the bound outside; beta
    outside. Codes are recomputed in the backward.
    """

    @staticmethod
    def forward(ctx, x, step, beta, high, rounded):
        ctx.save_for_backward(x, step, beta)
        ctx.args = (high, rounded)
        return evaluate(_affine, (x,), (step, beta), ctx.args)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, step, beta = ctx.saved_tensors
        grad_x, (by_step, by_beta) = evaluate(_affine_backward, (grad, x), (step, beta), ctx.args)
        return grad_x, by_step.to(step.dtype), by_beta.to(beta.dtype), None, None


def _affine(out, x: Tensor, step: Tensor, beta: Tensor, high: int, rounded: bool):
    """Rounded: between the offset in whole steps and ``high`` above it; x is rounded before the offset is taken off,
    which would round once more."""
    if not rounded:
        codes = torch.sub(wide(x), beta).div_(step).clamp_(0, high).round_()
        return torch.add(codes.mul_(step), beta, out=out), ()
    offset = torch.round(beta / step)
    codes = torch.div(wide(x), step).round_()
    return torch.mul(torch.maximum(torch.minimum(codes, offset + high), offset), step, out=out), ()


def _affine_backward(out, grad: Tensor, x: Tensor, step: Tensor, beta: Tensor, high: int, rounded: bool):
    g = wide(grad)
    r = torch.div(wide(x), step).sub_(torch.round(beta / step)) if rounded else torch.sub(wide(x), beta).div_(step)
    clipped = r.clamp(0, high)
    above = r.clone().gt_(0)
    inside = r.lt_(high).mul_(above)
    grad_x = torch.mul(g, inside, out=out)
    by_step = torch.round(clipped).addcmul_(clipped, inside, value=-1).mul_(g)
    return grad_x, (total(by_step, step), total(inside.mul_(-1).add_(1).mul_(g), beta))


class LSQPlusActivation(ActivationQuantizer):
    """Codes ``0 .. 2^b - 1`` with a learned step and a learned offset; no sign is needed.

    Deployed with the offset rounded to whole steps, as integer targets want it (section 8.1).
    """

    params: LSQPlusParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: LSQPlusParams) -> None:
        super().__init__(spec, params)
        self.step = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.zeros(()))
        self.high = 2**spec.bits - 1

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The step and offset of least squared error on the batch (section 6); of later ones those with the wider
        range."""
        low, high = (v.to(self.step.dtype) for v in torch.aminmax(x))
        span = high.clamp_min(0) - low.clamp_max(0)  # zero stays in reach
        best, error = None, None
        flat = x.reshape(-1)[:: max(1, x.numel() // 65536)]
        for fraction in _TRIED:
            step = (span * fraction / self.high).clamp_min(_FLOOR)
            beta = torch.round((low * fraction).clamp_max(0) / step) * step
            codes = torch.round(((flat - beta) / step).clamp(0, self.high))
            tried = (codes * step + beta - flat).square().sum()
            if error is None or bool(tried < error):
                best, error = (step, beta), tried
        if first or bool(best[0] > self.step):
            self.step.copy_(best[0])
            self.beta.copy_(best[1])

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: the grid that spans it."""
        low, high = min(low, 0.0), max(high, 0.0)
        self.step.fill_(max((high - low) / self.high, _FLOOR))
        self.beta.fill_(low)

    def quantize(self, x: Tensor) -> Tensor:
        """Gradients of step and offset times ``g`` of LSQ."""
        features = max(x.numel() // max(x.shape[0], 1), 1) if x.ndim else 1
        g = 1.0 / sqrt(features * self.high)
        step = grad_scale(positive(wide(self.step), _FLOOR), g)
        rounded = not (self.training and self.params.train_float_offset)
        return _Affine.apply(x, step, grad_scale(wide(self.beta), g), self.high, rounded)

    def grid_scale(self) -> Tensor:
        return positive(wide(self.step), _FLOOR).detach().reshape(1)

    def form(self) -> Form:
        """A uniform grid when the offset is zero, else a staircase whose integers start at the offset."""
        step = positive(wide(self.step), _FLOOR).detach()
        offset = float(torch.round(wide(self.beta.detach()) / step))
        if not abs(offset) < _MOST_STEPS:
            raise QuantizationError(
                f"{self.spec.name or 'activation'}: the offset is {offset:.3g} steps; training has diverged, lower the "
                "learning rate"
            )
        offset = int(offset)
        if offset == 0:
            return UniformGrid(self.spec.bits, False, False, step.reshape(1), 1)
        levels = torch.arange(offset, offset + self.high + 1)
        # ties go to the even level, as in the forward: below an even one the tie itself must count as above
        middle = (levels[:-1] + 0.5).float()
        below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        thresholds = torch.where(levels[1:] % 2 == 0, below, middle).double()
        return Staircase(self.spec.bits, levels.to(step.device), thresholds.to(step.device), step.reshape(1))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The offset is a position: decay would pull it to zero."""
        return [{"params": [self.beta], "lr": lr, "weight_decay": 0.0}]


class LSQPlus(Algorithm):
    """Registry entry of LSQ+."""

    name = "lsq_plus"
    title = "LSQ+ with learned offsets"
    paper = "Bhalgat, Lee, Nagel, Blankevoort, Kwak: LSQ+, CVPR Workshops 2020"
    arxiv = "2004.09576"
    fidelity = "C: well-known formulas, believed to match the paper, checked numerically, not against its text"
    Params = LSQPlusParams
    weight_quantizer = LSQPlusWeight
    activation_quantizer = LSQPlusActivation
    bits_reason = "LSQ's signed grid needs a positive level"
    per_channel_weights = True
