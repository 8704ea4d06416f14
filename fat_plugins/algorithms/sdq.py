"""SDQ: quantization and pruning by standard deviations, inspired by the abstract of Ardakani et al. (2022, arXiv
2202.12422), of which nothing else was read.

The clip of a weight is a learned multiple of its standard deviation, and the threshold below which it is pruned a fixed
one. Levels are evenly spaced or powers of two. Activations are clipped at a learned multiple of a running deviation.
Sections quoted below are those of the project's SDQ specification, a reconstruction.

Our own beyond it: thresholds as a quantile, zeros of another sparsity algorithm, clips that start at the least squared
error, and what stands in for a deviation of zero.
"""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fat_plugins.clipping import ClipSearch, best_clip
from fat_plugins.errors import ConfigError
from fat_plugins.forms import Codebook, Form, UniformGrid
from fat_plugins.functional import fake_quantize, grad_scale, positive, staircase, sum_of_processes, wide
from fat_plugins.kernels import evaluate, total
from fat_plugins.quantizer import (
    ActivationQuantizer,
    FrozenTensor,
    Params,
    Progress,
    TensorSpec,
    WeightQuantizer,
)
from fat_plugins.registry import Algorithm

#: no deviation falls below it (section 10)
_FLOOR = 1e-8
#: a deviation below this share of the largest magnitude is rounding noise
_CONSTANT = 1e-6
#: powers of two up to 2^14 fit 16 bits with their sign (section 8)
_MOST_POWERS = 5


_Clip = Annotated[float, Field(gt=0)] | Literal["mse"] | None


class SDQParams(Params):
    """Options of ``"algorithm": "sdq"`` (JSON section ``params``)."""

    levels: Literal["uniform", "power_of_two"] = Field(
        "uniform", description="Weight levels: evenly spaced, or the clip times 1, 1/2, 1/4, ..."
    )
    alpha: _Clip = Field(
        None,
        description="Initial weight clip in standard deviations; 'mse': the one with the least squared error; null: 3, "
        "at two bits 2.",
    )
    activation_alpha: _Clip = Field(
        None,
        description="Initial activation clip in running deviations; 'mse' as for alpha, on calibration data; null: 3, "
        "at three bits 2.5, at two 2.",
    )
    tau: float | None = Field(
        None, ge=0, description="Weights below this many standard deviations are pruned; null: only what rounds to 0."
    )
    pruning_ratio: float | None = Field(
        None, ge=0, lt=1, description="The threshold by the share of every layer's weights that it prunes."
    )
    ramp: float = Field(
        1 / 3, ge=0, le=1, description="Share of the training over which the threshold grows from 0, where its length "
        "is known."
    )  # fmt: skip
    momentum: float = Field(0.1, ge=0, le=1, description="Weight of a new batch in the running deviation.")
    clip_lr: float = Field(1.0, gt=0, description="Learning rate of the clips, as a multiple of the base rate.")

    @model_validator(mode="after")
    def _one_threshold(self) -> SDQParams:
        if self.tau is not None and self.pruning_ratio is not None:
            raise ValueError(f"pruning_ratio: {self.pruning_ratio} and tau: {self.tau} are two thresholds; give one")
        return self


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
def _codes(r: Tensor, threshold: Tensor, top: int, bounds: Tensor | None, gaps: Tensor | None) -> Tensor:
    """Integers nearest to ``r``, a new tensor: ``-top .. top``, or with ``bounds`` the powers of two, whose boundaries
    lie in the middle of their exponents; 0 where ``|r|`` is below ``threshold``."""
    size = r.abs()
    if bounds is None:
        codes = r.clamp(-top, top).round_()
    else:
        codes = staircase(size, bounds, gaps).add_(1).mul_(torch.sign(r))
    return codes.mul_(size.ge_(threshold))


def _forward(out, w: Tensor, scale: Tensor, threshold: Tensor, top: int, bounds, gaps):
    codes = _codes(wide(w) / scale, threshold, top, bounds, gaps)
    return torch.mul(codes, scale, out=out).add_(0.0), ()  # makes -0 a 0


def _backward(out, grad: Tensor, w: Tensor, scale: Tensor, threshold: Tensor, top: int, bounds, gaps):
    r, g = wide(w) / scale, wide(grad)
    size = r.abs()
    by_scale = _codes(r, threshold, top, bounds, gaps).addcmul_(size.lt(top), r, value=-1).mul_(g)
    return torch.mul(size.le_(top), g, out=out), (total(by_scale, scale),)


class _Quantize(torch.autograd.Function):
    """Section 4. Of the weight 1 up to the clip, also where it is pruned; of the step ``code - w/step`` inside the clip
    and the code outside. Keeps only the weight."""

    @staticmethod
    def forward(ctx, weight, scale, threshold, top, bounds, gaps):
        ctx.save_for_backward(weight, scale, threshold, bounds, gaps)
        ctx.top = top
        return evaluate(_forward, (weight,), (scale, threshold), (top, bounds, gaps))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, scale, threshold, *powers = ctx.saved_tensors
        dx, sums = evaluate(_backward, (grad, weight), (scale, threshold), (ctx.top, *powers))
        return dx, sums[0].reshape(scale.shape).to(scale.dtype), None, None, None, None


class SDQWeight(WeightQuantizer):
    """Weight side. Parameter: ``alpha``, the clip in standard deviations of the weight."""

    params: SDQParams
    prunes = True

    def __init__(self, spec: TensorSpec, params: SDQParams) -> None:
        super().__init__(spec, params)
        count = 2 ** (spec.bits - 1) - 1
        powers = params.levels == "power_of_two"
        #: the clip in steps
        self.top = 2 ** (count - 1) if powers else count
        exponents = torch.arange(count - 1 if powers else 0, dtype=torch.float64)
        # a model that is cast to half precision must not round them
        self.register_buffer("gaps", torch.exp2(exponents).long() if powers else None, persistent=False)
        self._start = 3.0 if spec.bits > 2 else 2.0
        self.alpha = nn.Parameter(torch.tensor(self._start if params.alpha in (None, "mse") else float(params.alpha)))
        # where the schedule stands follows from the host's progress, which its checkpoint holds
        self.register_buffer("ramp", torch.ones(()), persistent=False)
        self.ramping = False

    # -- schedule ----------------------------------------------------------------------------------------------------
    @property
    def _own_threshold(self) -> bool:
        """Whether the threshold is another than that of rounding; a sparsity algorithm has one of its own."""
        return not self.spec.keep_zeros and (self.params.tau, self.params.pruning_ratio) != (None, None)

    @property
    def noisy(self) -> bool:
        """Training prunes less than what is deployed as long as the threshold grows."""
        return self.ramping

    def on_progress(self, progress: Progress) -> None:
        """Section 7: the threshold grows linearly; without a known length it is there from the start."""
        done, planned = progress.step, progress.total_steps
        if not planned:
            done, planned = progress.epoch, progress.total_epochs
        share = min(done / (self.params.ramp * planned), 1.0) if planned and self.params.ramp else 1.0
        self.ramp.fill_(share)
        self.ramping = self._own_threshold and share < 1

    # -- start -------------------------------------------------------------------------------------------------------
    def init_from_weight(self, weight: Tensor) -> None:
        if self.params.alpha == "mse":
            w = wide(weight)
            clip = best_clip(w, lambda v, clip: self._on_grid(v, clip / self.top, self._natural(clip)))
            deviation = float(self._deviation(w))
            self.alpha.fill_(clip / deviation if clip and deviation > _FLOOR else self._start)
        else:
            self.alpha.fill_(self._start if self.params.alpha is None else float(self.params.alpha))

    # -- forward -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _deviation(self, w: Tensor) -> Tensor:
        """``s``, shape (): biased, of the survivors where another algorithm prunes. A constant has none; it gets the
        value that puts the first clip on it."""
        size = w.abs()
        largest = size.amax()
        # a power of two: squares of huge and of tiny weights neither overflow nor vanish, all others are exact
        unit = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))).clamp_min(-100))
        scaled = w / unit
        if self.spec.keep_zeros:
            kept = (size > 0).to(w.dtype)
            count = kept.sum().clamp_min(1)
            mean = scaled.sum() / count
            std = ((scaled - mean).square().mul_(kept).sum() / count).sqrt()
        else:
            std = scaled.std(correction=0)
        std = torch.where(std <= _CONSTANT * largest / unit, largest / unit / self._start, std)
        return (std * unit).clamp_min(_FLOOR)

    def _natural(self, like: Tensor) -> Tensor:
        """The threshold of rounding, in steps: half a step rounds by itself; powers of two end at ``2^-1/2``."""
        return torch.full_like(like, 0.0 if self.gaps is None else 0.5**0.5)

    def _parts(self, w: Tensor, ramped: bool = False) -> tuple[Tensor, Tensor]:
        """Step and threshold (in steps, without gradient), both of shape (); ``ramped``: as far as it has grown."""
        deviation = self._deviation(w)
        scale = positive(self.alpha.to(w.dtype)) * deviation / self.top
        with torch.no_grad():
            if not self._own_threshold:
                return scale, self._natural(scale)
            if self.params.pruning_ratio is not None:
                size = w.detach().abs().reshape(-1)
                limit = size.kthvalue(int(self.params.pruning_ratio * size.numel()) + 1).values
            else:
                limit = self.params.tau * deviation
            limit = limit / scale
            return scale, limit * self.ramp.to(limit.dtype) if ramped else limit

    def _powers(self) -> tuple[Tensor | None, Tensor | None]:
        """Boundaries between the powers of two, ``2^(k + 1/2)`` in steps, and the gaps between them."""
        return (None, None) if self.gaps is None else (self.gaps.double() * 2**0.5, self.gaps)

    def _on_grid(self, w: Tensor, scale: Tensor, threshold: Tensor) -> Tensor:
        return _Quantize.apply(w, scale, threshold, self.top, *self._powers())

    def quantize(self, weight: Tensor) -> Tensor:
        """Sections 3 and 4; gradient of ``alpha`` times ``1 / sqrt(N n)``."""
        with torch.autocast(weight.device.type, enabled=False):
            scale, threshold = self._parts(wide(weight), self.training)
            count = weight.numel() * (2 ** (self.spec.bits - 1) - 1)
            return self._on_grid(weight, grad_scale(scale, 1 / sqrt(max(count, 1))), threshold)

    def grid_scale(self, weight: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            w = wide(weight.detach())
            return (positive(self.alpha.to(w.dtype)) * self._deviation(w) / self.top).reshape(1)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Section 8: one uniform grid, or powers of two as integers of a wider one; deviation and clip are folded."""
        w = wide(weight.detach())
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            scale, threshold = self._parts(w)
            integers = _codes(w / scale, threshold, self.top, *self._powers())
        bits, axis, scale = self.spec.bits, self.spec.channel_axis, scale.reshape(1)
        if self.gaps is None:
            return FrozenTensor(integers.to(torch.int32), UniformGrid(bits, True, True, scale, axis))
        above = torch.cat([self.gaps, self.gaps.new_tensor([self.top])])
        levels = torch.cat([-above.flip(0), above.new_zeros(1), above])
        codes = torch.searchsorted(levels, integers.long().contiguous())
        return FrozenTensor(codes.to(torch.int32), Codebook(bits, levels, scale, axis))

    # -- reports and rates -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the clip, in standard deviations, and how much of the threshold training applies."""
        own = {"ramp": float(self.ramp)} if self._own_threshold else {}
        return {**super().monitor(weight), "clip": float(positive(self.alpha)), **own}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay on the clip (section 7)."""
        return [{"params": [self.alpha], "lr": lr * self.params.clip_lr, "weight_decay": 0.0}]


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
def _deviation_of_processes(x: Tensor, signed: bool) -> Tensor:
    """Biased deviation of a batch over all processes of a distributed training, float64 of shape ().

    An unsigned tensor is what a ReLU has left of a distribution around 0: half of its squares are missing.
    """
    sums = x.new_zeros(3, dtype=torch.float64)
    if x.numel():
        variance, mean = (v.double() for v in torch.var_mean(wide(x), correction=0))
        sums = torch.stack([torch.ones_like(mean), mean, variance + mean.square()]).mul_(x.numel())
    count, first, second = sum_of_processes(sums).unbind()
    return (second / count - (first / count).square() if signed else 2 * second / count).clamp_min(0).sqrt()


class SDQActivation(ActivationQuantizer):
    """Section 5, for the input of a layer. Parameter: ``alpha``, the clip in running deviations. Buffer: ``sigma``, the
    running deviation. Signed inputs get the symmetric grid of the same clip."""

    params: SDQParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: SDQParams) -> None:
        super().__init__(spec, params)
        self._search = ClipSearch()
        self._batches, self._was_signed = 0, False  # of the calibration that is running
        self._start = {2: 2.0, 3: 2.5}.get(spec.bits, 3.0)
        given = params.activation_alpha
        self.alpha = nn.Parameter(torch.tensor(self._start if given in (None, "mse") else float(given)))
        self.register_buffer("sigma", torch.ones(()))

    @property
    def _high(self) -> int:
        return 2 ** (self.spec.bits - 1) - 1 if self.signed else 2**self.spec.bits - 1

    # -- start -------------------------------------------------------------------------------------------------------
    def init_from_range(self, low: float, high: float) -> None:
        """The deviation that puts the clip on the end of the range; training moves it to that of the data."""
        self._batches = 0
        self.sigma.fill_(max(abs(low), abs(high)) / float(positive(self.alpha))).clamp_(_FLOOR)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The mean deviation of the batches."""
        self._batches = 1 if first or self.signed != self._was_signed else self._batches + 1
        self._was_signed = self.signed
        seen = _deviation_of_processes(x.double(), self.signed).clamp_min(_FLOOR)
        self.sigma.lerp_(seen.to(self.sigma.dtype), 1 / self._batches)
        if self.params.activation_alpha == "mse":
            clip = self._search.add(x, self._on_grid, signed=self.signed, first=first)
            self.alpha.fill_(clip / float(self.sigma) if clip else self._start)

    # -- forward -----------------------------------------------------------------------------------------------------
    def _on_grid(self, x: Tensor, clip: Tensor) -> Tensor:
        high = self._high
        return fake_quantize(x, clip / high, -high if self.signed else 0, high)

    def _clip(self) -> Tensor:
        return positive(wide(self.alpha)) * wide(self.sigma).clamp_min(_FLOOR)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        seen = _deviation_of_processes(x, self.signed).to(self.sigma.dtype)
        self.sigma.lerp_(torch.where(torch.isfinite(seen), seen, self.sigma), self.params.momentum)

    def quantize(self, x: Tensor) -> Tensor:
        """Gradient of ``alpha`` times ``1 / sqrt(N n)``, N = features per sample (section 4)."""
        if self.training:
            self._follow(x.detach())
        features = max(x.numel() // max(x.shape[0], 1), 1) if x.ndim else 1
        return self._on_grid(x, grad_scale(self._clip(), 1 / sqrt(features * self._high)))

    def grid_scale(self) -> Tensor:
        return (self._clip().detach() / self._high).reshape(1)

    def form(self) -> Form:
        return UniformGrid(self.spec.bits, self.signed, self.signed, self.grid_scale(), 1)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the clip, in running deviations."""
        return {**super().monitor(weight), "clip": float(positive(self.alpha.detach()))}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay on the clip (section 7)."""
        return [{"params": [self.alpha], "lr": lr * self.params.clip_lr, "weight_decay": 0.0}]


class SDQ(Algorithm):
    """Registry entry of what SDQ's abstract inspired."""

    name = "sdq"
    title = "Clips and pruning in standard deviations, inspired by SDQ"
    paper = (
        "Ardakani, Ardakani, Meyer, Clark, Gross: Standard Deviation-Based Quantization for Deep Neural Networks, 2022"
    )
    arxiv = "2202.12422"
    fidelity = "D: inspired by the abstract, the only text that was read; formulas and constants are ours"
    Params = SDQParams
    weight_quantizer = SDQWeight
    activation_quantizer = SDQActivation
    bits_reason = "a symmetric grid of one bit has no level beside zero"

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses powers of two that do not fit 16 bits."""
        super().check(spec, params)
        powers = spec.role == "weight" and getattr(params, "levels", "uniform") == "power_of_two"
        if powers and spec.bits > _MOST_POWERS:
            raise ConfigError(
                f"{spec.name or 'weight'}: levels 'power_of_two' need integers of more than 16 bits at {spec.bits} "
                f"bits; allowed: 2 to {_MOST_POWERS}, or levels 'uniform'"
            )

    @classmethod
    def network_facts(cls, weights: list[tuple[WeightQuantizer, FrozenTensor]], others: int) -> dict[str, float]:
        """The share of zeros, since pruning is a part of the method."""
        count = sum(frozen.codes.numel() for _, frozen in weights)
        zeros = sum(int((frozen.form.decode(frozen.codes) == 0).sum()) for _, frozen in weights)
        return {"zeros of the quantized weights": zeros / count} if count else {}
