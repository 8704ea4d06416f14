"""What Relaxed Quantization (``rq``) and CPQ + DropBits (``dropbits``) share.

Both put a categorical distribution on the points ``alpha k`` of a uniform grid: the probability that a value with
logistic noise of scale ``sigma`` falls into the cell of a point. Sections quoted below are those of the project's
DropBits specification. All formulas are written for ``r = x / alpha`` and ``rho = alpha / sigma``, so that neither huge
nor tiny tensors overflow.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import best_step, uniform_codes, wide
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer

_LOWEST, _HIGHEST = 1e-12, 1e36  # of alpha; an all-zero tensor would give 0 (section 10.10)
#: beyond an argument of this size a sigmoid is its limit, to 1e-13
_SATURATED = 30.0
#: no exponent of float32 numbers is smaller: squares of less are denormal, which is slow. Enough for the cell at the
#: end of the grid and a value at the end of :func:`position`, since rho <= 20; other probabilities end at 1e-13
_LOWEST_EXPONENT = -40.0
#: sigma stays within alpha / 20 .. alpha (section 10.3)
_LEAST_SIGMA = math.log(20.0)


# --------------------------------------------------------------------------------------------------------------------
# the categorical, sections 3.1 and 4.1
# --------------------------------------------------------------------------------------------------------------------
class Slopes(NamedTuple):
    """A probability, and the derivatives of its logarithm by ``r`` (that is alpha d/dx), log alpha and log sigma."""

    value: Tensor
    by_x: Tensor | float
    by_alpha: Tensor | float
    by_sigma: Tensor | float


def position(x: Tensor, alpha: Tensor, rho: Tensor, low: int, high: int) -> Tensor:
    """``x / alpha`` in at least float32, kept where the formulas still differ from their limits far outside."""
    reach = 0.5 + _SATURATED / rho
    return torch.minimum(torch.maximum(wide(x) / alpha, low - reach), high + reach)


def _decay(t: Tensor) -> Tensor:
    """``exp(t)`` for ``t`` below 0, or not far above."""
    return torch.exp(t.clamp_min(_LOWEST_EXPONENT) if t.dtype == torch.float32 else t)


def cell(r: Tensor, rho: Tensor, point: Tensor | float) -> tuple[Tensor, Tensor]:
    """``raw = F(k + 1/2) - F(k - 1/2)`` of section 3.1 without its subtraction, for the point ``k``.

    The product of sigmoids of the stable form is ``sinh(rho/2) / (cosh(rho/2) + cosh(rho (r - k)))``: one exponential,
    no cancellation, no overflow.

    :return: raw, and ``S = sinh / (cosh + cosh)`` from which all derivatives follow.
    """
    distance = r - point
    q = _decay(distance.abs().mul_(rho).neg_())
    denominator = torch.add(q, 2 * torch.cosh(rho / 2)).mul_(q).add_(1)
    s = (1 - q * q).mul_(torch.sign(distance)).div_(denominator)
    return q.mul_(2 * torch.sinh(rho / 2)).div_(denominator), s


def raw_of(r: Tensor, rho: Tensor, point: Tensor | float) -> Tensor:
    """The first result of :func:`cell` alone."""
    q = _decay((r - point).abs_().mul_(rho).neg_())
    denominator = torch.add(q, 2 * torch.cosh(rho / 2)).mul_(q).add_(1)
    return q.mul_(2 * torch.sinh(rho / 2)).div_(denominator)


def log_raw(r: Tensor, rho: Tensor, point: Tensor | float) -> Tensor:
    """log raw of :func:`cell` up to a constant; finite wherever ``r`` is."""
    t = (r - point).abs() * rho
    q = torch.exp(-t)
    return -t - torch.log1p(q * (q + 2 * torch.cosh(rho / 2)))


def slopes_of(r: Tensor, rho: Tensor, point: Tensor | float, raw: Tensor, s: Tensor) -> Slopes:
    """Derivatives of ``log raw`` (section 4.1, closed forms) from what :func:`cell` gives."""
    common = rho * (0.5 / torch.tanh(rho / 2) - raw / 2)
    return Slopes(raw, -rho * s, common + rho * (point * s), -common + rho * ((r - point) * s))


def grid_mass(r: Tensor, rho: Tensor, low: int, high: int, truncated: bool) -> Slopes:
    """Probability of the whole grid, one interval in closed form; 1 where it is not divided by."""
    if not truncated:
        return Slopes(torch.ones_like(r), 0.0, 0.0, 0.0)
    a, b = (low - 0.5 - r) * rho, (high + 0.5 - r) * rho
    below, above = _decay(a), _decay(-b)
    n = (high - low + 1) * rho
    mass = -torch.expm1(-n) / ((1 + below) * (1 + above))
    below, above, width = below / (1 + below), above / (1 + above), n / torch.expm1(n)
    return Slopes(
        mass,
        (below - above) * rho,
        ((high + 0.5) * above - (low - 0.5) * below) * rho + width,
        a * below - b * above - width,
    )


def probability(r: Tensor, rho: Tensor, point: Tensor | float, low: int, high: int, truncated: bool) -> Slopes:
    """pi of the cell of ``point`` (shape of ``r``, or one number), section 3.1."""
    raw, s = cell(r, rho, point)
    own, grid = slopes_of(r, rho, point, raw, s), grid_mass(r, rho, low, high, truncated)
    return Slopes(
        own.value / grid.value,
        own.by_x - grid.by_x,
        own.by_alpha - grid.by_alpha,
        own.by_sigma - grid.by_sigma,
    )


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x, low, high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, low, high = ctx.saved_tensors
        outward = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None


def bounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` clipped to ``low .. high``. Outside, only a gradient whose descent leads back is passed on."""
    return _Bounded.apply(x, low, high)


# --------------------------------------------------------------------------------------------------------------------
# random numbers that depend on the seed, the tensor's name and the step only
# --------------------------------------------------------------------------------------------------------------------
def draw_seed(seed: int, spec: TensorSpec, step: int) -> int:
    """Seed of the draws of one tensor in one step: equal in every process and after a restart."""
    text = f"{seed}/{spec.role}/{spec.name}/{step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


# --------------------------------------------------------------------------------------------------------------------
# initialisation, section 6
# --------------------------------------------------------------------------------------------------------------------
def range_step(low: float, high: float, bits: int) -> float:
    """RQ's rule ``t / 2^b + 3 t / 2^(2b)``, ``t = high - low``; zero counts as seen, so that a constant has a range."""
    return (max(high, 0.0) - min(low, 0.0)) * (1 / 2**bits + 3 / 4**bits)


class _Grid(nn.Module):
    """Step ``alpha`` and noise scale ``sigma`` of one tensor, both as logarithms so that they stay positive."""

    def _add_grid(self) -> None:
        self.log_alpha = nn.Parameter(torch.zeros(1))
        self.log_sigma = nn.Parameter(torch.full((1,), -math.log(3.0)))

    def _set_step(self, step: float) -> None:
        """``sigma = alpha / 3`` (section 6)."""
        self.log_alpha.fill_(math.log(min(max(step, _LOWEST), _HIGHEST)))
        self.log_sigma.copy_(self.log_alpha - math.log(3.0))

    @property
    def alpha(self) -> Tensor:
        """The step, 1-d with one element."""
        return wide(self.log_alpha).exp()

    @property
    def sigma(self) -> Tensor:
        """The noise scale, within its bounds, 1-d with one element."""
        return self._log_sigma().exp()

    def _log_sigma(self) -> Tensor:
        highest = wide(self.log_alpha).detach()
        return bounded(wide(self.log_sigma), highest - _LEAST_SIGMA, highest)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the noise scale, in steps."""
        return {**super().monitor(weight), "noise": float((self.sigma / self.alpha).detach())}

    def _own_groups(self, lr: float, more: tuple[dict[str, Any], ...] = ()) -> list[dict[str, Any]]:
        """Section 7: a tenth of the learning rate, no decay."""
        return [{"params": [self.log_alpha, self.log_sigma], "lr": lr * 0.1, "weight_decay": 0.0}, *more]


class GridWeight(_Grid, WeightQuantizer):
    """Weights on ``-2^(b-1) .. 2^(b-1) - 1``, the full signed range. Parameters ``log_alpha``, ``log_sigma`` (1)."""

    accepts_slices = True

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        super().__init__(spec, params)
        self._add_grid()

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code of the width in force."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def init_from_weight(self, weight: Tensor) -> None:
        w = weight.float()
        if self.params.init == "rq":
            self._set_step(range_step(float(w.min()), float(w.max()), self.spec.bits))
        else:
            self._set_step(best_step(w, *self.bounds))

    def gradient_scale(self, x: Tensor) -> float:
        """``1 / sqrt(N k_max)``, since alpha and sigma gather the gradients of N weights (section 10.9)."""
        return 1.0 / math.sqrt(max(x.numel(), 1) * self.bounds[1])

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self.alpha.detach()

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Integers of the width in force; no noise, no masks (section 8)."""
        scale = self.alpha.detach()
        codes = uniform_codes(weight, scale.reshape(()), *self.bounds)
        form = UniformGrid(self.bits, True, False, scale, self.spec.channel_axis)
        return FrozenTensor(codes.to(torch.int32), form)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return self._own_groups(lr)


class GridActivation(_Grid, ActivationQuantizer):
    """Activations on ``0 .. 2^b - 1``, or the full signed range where negatives occur (section 5)."""

    calibration = "data"

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        super().__init__(spec, params)
        self._add_grid()
        # of the calibration that is running, not of the state: extremes, batches and the sum of the steps' logarithms
        self._seen: tuple[float, float, int, float, bool] | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code."""
        b = self.spec.bits
        return (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if self.signed else (0, 2**b - 1)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """RQ's rule for the extremes of all batches, or the geometric mean of each batch's best step; the mean starts
        anew where the grid turns signed."""
        low, high = float(x.min()), float(x.max())
        count, total = 0, 0.0
        if not first and self._seen is not None:
            low, high = min(low, self._seen[0]), max(high, self._seen[1])
            if self._seen[4] == self.signed:
                count, total = self._seen[2:4]
        if self.params.init == "rq":
            self._set_step(range_step(low, high, self.spec.bits))
        else:
            step = best_step(x, *self.bounds)
            if step > 0:  # a batch without a value says nothing
                count, total = count + 1, total + math.log(step)
            self._set_step(math.exp(total / count) if count else 0.0)
        self._seen = (low, high, count, total, self.signed)

    def init_from_range(self, low: float, high: float) -> None:
        """RQ's rule, or without data to minimise an error on, the step that reaches the ends."""
        if self.params.init == "rq":
            self._set_step(range_step(low, high, self.spec.bits))
        else:
            self._set_step(max(abs(low), abs(high)) / self.bounds[1])

    def gradient_scale(self, x: Tensor) -> float:
        """``1 / sqrt(N k_max)``, N = features of one sample (section 10.9)."""
        features = x.numel() // max(x.shape[0], 1) if x.ndim else 1
        return 1.0 / math.sqrt(max(features, 1) * self.bounds[1])

    def form(self) -> Form:
        return UniformGrid(self.spec.bits, self.signed, False, self.alpha.detach(), 1)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return self._own_groups(lr)
