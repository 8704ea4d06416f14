"""DAQ: channel-wise distribution-aware quantization of super-resolution networks (Hong et al., WACV 2022,
arXiv 2012.11230).

Grids are multiples of the standard deviation: of the whole weight, and of every channel of every image, found anew in
each forward (``dynamic``). Such a range fits no file, so by default the statistics of calibration take its place.
Sections quoted below are those of the project's DAQ specification.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fat_plugins.errors import ExportError
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.functional import fake_quantize, level_quantize, per_channel_view, wide
from fat_plugins.kernels import evaluate
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: the optimal uniform step of a normal distribution by bits, from 0 on (section 2)
STEPS = (2.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.057, 0.031)
#: calibrated steps stay between these, so that no level vanishes or overflows
_FLOOR, _CEILING = 1e-12, 1e36
#: a calibrated mean is at most so many steps away from zero
_MOST_STEPS = 1024
#: why dynamic activations cannot be exported
_NO_FILE = (
    "daq's dynamic activations have a range per image and channel, which no file can hold; set params.dynamic: false "
    "to deploy the statistics of calibration"
)


class DAQParams(Params):
    """Options of ``"algorithm": "daq"`` (JSON section ``params``)."""

    dynamic: bool = Field(
        False,
        description="Activations: the range of every channel of every image from its own statistics, as in the paper; "
        "for torch only. false: the mean statistics of the calibration data, which can be exported.",
    )
    step_index: Literal["bits-1", "bits"] = Field(
        "bits-1",
        description="Where the table of steps is read: the authors' code looks one bit below the number of levels, "
        "'bits' takes the step that is optimal for a normal distribution.",
    )
    sigma_bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="Bits of the standard deviations themselves, over the channels of an image; null: float. The "
        "authors: 4, or 8 for large networks.",
    )
    clip: bool = Field(
        True,
        description="Clip activations behind a ReLU to 2^bits levels; the authors' code does not (dynamic only).",
    )

    @model_validator(mode="after")
    def _clipped(self) -> DAQParams:
        if not self.clip and not self.dynamic:
            raise ValueError("clip: false has more than 2^bits levels, which only dynamic: true computes")
        return self

    def step(self, bits: int) -> float:
        """Step of ``2^bits`` levels, in standard deviations."""
        return STEPS[bits - 1 if self.step_index == "bits-1" else bits]


# --------------------------------------------------------------------------------------------------------------------
# the mid-rise grid, section 2
# --------------------------------------------------------------------------------------------------------------------
def _odd(r: Tensor, half: int) -> Tensor:
    """Odd integers ``2 round(r + 1/2) - 1`` of ``r`` in steps, within ``-(2 half - 1) .. 2 half - 1``; in place."""
    return r.add_(0.5).round_().clamp_(1 - half, half).mul_(2).sub_(1)


def _mid_rise(out, x: Tensor, step: Tensor, half: int):
    # a step of zero gives zero
    divisor = torch.where(step > 0, step, torch.ones_like(step))
    return torch.mul(_odd(wide(x) / divisor, half), step / 2, out=out), ()


class _MidRise(torch.autograd.Function):
    """``M(x; step, 2^(bits - 1))`` with the gradient 1 for ``x`` everywhere and none for the step (section 4)."""

    @staticmethod
    def forward(ctx, x, step, half):
        return evaluate(_mid_rise, (x,), (step,), (half,))[0]

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _unit(x: Tensor) -> Tensor:
    """A power of two near the largest magnitude: squares of ``x`` in units of it neither overflow nor vanish."""
    largest = x.abs().amax()
    return torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))).clamp_min(-100))


def _deviation(x: Tensor, dims: tuple[int, ...], mean: Tensor) -> Tensor:
    """Unbiased standard deviation around ``mean``, dimensions kept; 0 of one element."""
    count = 1
    for d in dims:
        count *= x.shape[d]
    return ((x - mean).square().sum(dims, keepdim=True) / max(count - 1, 1)).sqrt()


class DAQWeight(WeightQuantizer):
    """Section 3: odd multiples of half a step, the step from the unbiased deviation of the current weight. A weight
    whose elements are all equal becomes zero."""

    params: DAQParams
    has_zero: ClassVar[bool] = False

    def _step(self, weight: Tensor) -> Tensor:
        """Without gradient, shape ()."""
        with torch.no_grad():
            w = wide(weight.detach())
            unit = _unit(w)
            w, dims = w / unit, tuple(range(w.ndim))
            sigma = _deviation(w, dims, w.mean(dims, keepdim=True)).reshape(())
            # rounding leaves a trace of equal elements
            sigma = torch.where(sigma > 1e-6 * w.abs().amax(), sigma, torch.zeros_like(sigma))
            return sigma * unit * self.params.step(self.spec.bits)

    def quantize(self, weight: Tensor) -> Tensor:
        return _MidRise.apply(weight, self._step(weight), 2 ** (self.spec.bits - 1))

    def grid_scale(self, weight: Tensor) -> Tensor:
        return (self._step(weight) / 2).reshape(1)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Indices of odd integers; one scale (section 8)."""
        half, step = 2 ** (self.spec.bits - 1), self._step(weight)
        odd = _odd(wide(weight) / torch.where(step > 0, step, torch.ones_like(step)), half)
        levels = torch.arange(1 - 2 * half, 2 * half, 2, device=weight.device)
        codes = ((odd + (2 * half - 1)) / 2).to(torch.int32)
        return FrozenTensor(codes, Codebook(self.spec.bits, levels, (step / 2).reshape(1), self.spec.channel_axis))


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class _Straight(torch.autograd.Function):
    """``value``, with the gradient of ``x``."""

    @staticmethod
    def forward(ctx, x, value):
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class DAQActivation(ActivationQuantizer):
    """Section 5. Signed inputs (branch B): mid-rise around the mean. Behind a ReLU (branch A): ``0 .. 2^b - 1`` steps.
    Which one is known from calibration or the host, never from the minimum of a batch.

    Buffers: ``mean`` and ``sigma`` of calibration, one element, or one per channel with ``per_channel``.
    """

    params: DAQParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: DAQParams) -> None:
        super().__init__(spec, params)
        self.half = 2 ** (spec.bits - 1)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("sigma", torch.ones(1))
        self._images = 0

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name in ("mean", "sigma"):  # as many channels as the checkpoint has
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.ndim == 1 and stored.shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- statistics --------------------------------------------------------------------------------------------------
    def _statistics(self, x: Tensor, dims: tuple[int, ...], *, centred: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and deviation over ``dims``, which are kept; without ``centred`` the deviation of signed inputs is taken
        around zero."""
        unit = _unit(x)
        x = x / unit
        if self.signed:
            mean = x.mean(dims, keepdim=True) if centred else torch.zeros_like(x.mean(dims, keepdim=True))
            return mean * unit, _deviation(x, dims, mean) * unit
        x = x.clamp_min(0)
        count = (x > 0).sum(dims, keepdim=True) + 1
        mean = x.sum(dims, keepdim=True) / count
        # the zeros count in neither sum nor number, hence the mean of the others
        sigma = (x.square().sum(dims, keepdim=True) / count - mean.square()).clamp_min(0).sqrt()
        return mean * unit, sigma * unit

    def _coarse(self, sigma: Tensor, axis: int) -> Tensor:
        """Deviations on the grid of their own spread along ``axis``, none below zero."""
        bits = self.params.sigma_bits
        if bits is None or sigma.shape[axis] < 2:
            return sigma
        mean = sigma.mean(axis, keepdim=True)
        step = _deviation(sigma, (axis,), mean) * self.params.step(bits)
        return (mean + _mid_rise(None, sigma - mean, step, 2 ** (bits - 1))[0]).clamp_min(0)

    def _over(self, x: Tensor, per_channel: bool) -> tuple[int, ...]:
        """Dimensions that share statistics: positions, and channels unless each has its own. An input without
        positions (N x C) has one value per channel, so its channels share theirs in any case."""
        axis = self.spec.channel_axis
        return tuple(d for d in range(1, x.ndim) if d != axis or not per_channel or x.ndim <= 2)

    # -- start -------------------------------------------------------------------------------------------------------
    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The mean over all images of what each has by itself; per channel around zero, since the levels of a channel
        cannot be moved by themselves."""
        x = x.reshape(1, -1) if x.ndim < 2 else x
        per_channel = bool(self.spec.per_channel) and x.ndim > 2
        mean, sigma = self._statistics(x, self._over(x, per_channel), centred=not per_channel)
        mean, sigma = (t.mean(0).reshape(-1) for t in (mean, sigma))
        fresh = first or sigma.shape != self.sigma.shape
        share = 1.0 if fresh else len(x) / (self._images + len(x))
        self._images = len(x) + (0 if fresh else self._images)
        self.mean = (mean if fresh else torch.lerp(self.mean, mean.to(self.mean), share)).to(self.mean)
        self.sigma = (sigma if fresh else torch.lerp(self.sigma, sigma.to(self.sigma), share)).to(self.sigma)

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: the grid that spans it, around zero."""
        largest = max(abs(low), abs(high))
        steps = self.half - 0.5 if self.signed else 2 * self.half - 1
        self.mean = self.mean.new_zeros(1)
        self.sigma = self.sigma.new_full((1,), largest / steps / self.params.step(self.spec.bits))

    # -- forward -----------------------------------------------------------------------------------------------------
    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of signed inputs: half a step (1-d), levels and thresholds in units of it, shifted by the mean in such."""
        half_step = self._step() / 2
        shift = torch.round(wide(self.mean).to(half_step) / half_step) if half_step.numel() == 1 else 0.0
        levels = torch.arange(1 - 2 * self.half, 2 * self.half, 2, device=half_step.device) + shift
        middle = ((levels[1:] + levels[:-1]) / 2).float()
        below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        # ties go to the even whole number of steps (section 2): the threshold itself must count as above at odd ones
        number = torch.arange(1 - self.half, self.half, device=half_step.device)
        return half_step, levels, torch.where(number % 2 == 1, below, middle).double()

    def _step(self) -> Tensor:
        """The calibrated step, 1-d."""
        sigma = self._coarse(wide(self.sigma), 0)
        step = (sigma * self.params.step(self.spec.bits)).clamp(_FLOOR, _CEILING)
        if self.signed:
            step = torch.maximum(step, wide(self.mean).abs() / _MOST_STEPS)
        return step

    def quantize(self, x: Tensor) -> Tensor:
        """The gradient of ``x`` is 1 everywhere, also where it is clipped (section 5)."""
        if self.params.dynamic:
            return self._dynamic(x)
        if not self.signed:
            step = per_channel_view(self._step(), x.ndim, self.spec.channel_axis)
            return fake_quantize(x, step, 0, 2 * self.half - 1, clip_x_grad=False)
        half_step, levels, thresholds = self._grid()
        view = per_channel_view(half_step, x.ndim, self.spec.channel_axis)
        return level_quantize(x, view, levels, thresholds, clip_x_grad=False)

    def _dynamic(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        with torch.no_grad():
            v = wide(x.detach())
            v = v.reshape(1, -1) if v.ndim < 2 else v
            mean, sigma = self._statistics(v, self._over(v, True))
            step = self._coarse(sigma, self.spec.channel_axis) * self.params.step(self.spec.bits)
            if self.signed:
                value = mean + _mid_rise(None, v - mean, step, self.half)[0]
            else:
                codes = torch.round(v / torch.where(step > 0, step, torch.ones_like(step))).clamp_min_(0)
                value = (codes.clamp_max_(2 * self.half - 1) if self.params.clip else codes) * step
            value = value.reshape(x.shape).to(x.dtype)
        return _Straight.apply(x, value)

    # -- what is deployed --------------------------------------------------------------------------------------------
    def nominal_form(self) -> Form:
        """The calibrated grid, also where every image has its own."""
        if not self.signed:
            return UniformGrid(self.spec.bits, False, False, self._step(), self.spec.channel_axis)
        half_step, levels, thresholds = self._grid()
        return Staircase(self.spec.bits, levels.long(), thresholds, half_step, self.spec.channel_axis)

    def form(self) -> Form:
        """A uniform grid, or the staircase of a mid-rise grid.

        :raises ExportError: the range is found in every image, which no deployed form can say.
        """
        if self.params.dynamic:
            raise ExportError(f"{self.spec.name or 'activation'}: {_NO_FILE}")
        return self.nominal_form()

    def grid_scale(self) -> Tensor:
        step = self._step()
        return step / 2 if self.signed else step


class DAQ(Algorithm):
    """Registry entry of DAQ."""

    name = "daq"
    title = "Distribution-aware quantization of super-resolution networks"
    paper = (
        "Hong et al.: DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution Networks, "
        "WACV 2022"
    )
    arxiv = "2012.11230"
    fidelity = (
        "B: the authors' code was executed and restated with equal results; the body of the paper was not available"
    )
    Params = DAQParams
    weight_quantizer = DAQWeight
    activation_quantizer = DAQActivation
    weight_bits = (1, 8)
    activation_bits = (1, 8)
    bits_reason = "a level needs at least one bit"
    per_channel_activations = True

    @classmethod
    def not_deployable(cls, params: DAQParams) -> str:
        return _NO_FILE if params.dynamic else ""
