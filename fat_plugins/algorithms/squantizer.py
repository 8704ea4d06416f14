"""SQuantizer (Park, Xu, Brick, 2018, arXiv 1812.08301): sparse and low-bit weights in one training.

In every forward a threshold from mean and deviation of the dense weights prunes, and the survivors are quantized
between it and the largest magnitude; their gradient reaches the dense weights, that of the pruned ones is zero.
Activations are PACT's. Sections quoted below are those of the project's SQuantizer specification.

Our own: the ``aligned`` grid, zeros of another sparsity algorithm in the place of the threshold (``keep_zeros``), and
guards where the paper's formulas divide by zero or flip signs (section 10).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.algorithms.pact import PACTActivation
from fat_plugins.errors import ConfigError
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, SumOfGrids, UniformGrid
from fat_plugins.functional import wide
from fat_plugins.kernels import evaluate
from fat_plugins.quantizer import FrozenTensor, Params, Progress, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: the aligned grid's integers fit 8 bits
_TOP = 127
#: below this share of the largest magnitude the survivors count as equal (section 10.1)
_EQUAL = 1e-6


class SQuantizerParams(Params):
    """Options of ``"algorithm": "squantizer"`` (JSON section ``params``)."""

    sigma: float | None = Field(
        0.0,
        description="Threshold in standard deviations of the magnitude above its mean; more prunes more. null: no "
        "threshold, the paper's dense ablation.",
    )
    grid: Literal["paper", "aligned"] = Field(
        "paper",
        description="'paper': levels from the threshold to the largest magnitude, deployed as the sum of two integers. "
        "'aligned': the gap around zero is a whole number of steps, one integer. An extension, not in the paper.",
    )
    delay: float = Field(
        1 / 3, ge=0, lt=1, description="Share of the training in which weights stay dense floats, where its length is "
        "known and delay_epochs is null."
    )  # fmt: skip
    delay_epochs: int | None = Field(None, ge=0, description="The same in epochs.")
    alpha: float | None = Field(
        10.0, gt=0, description="Initial clip of the activations (PACT); null takes the best one on calibration data."
    )


class _Levels(NamedTuple):
    """The grid of one weight; 0-dim tensors.

    :param gap: value of the lowest non-zero level.
    :param step: distance of the levels.
    :param first: the lowest non-zero level in steps (``aligned`` grid only, else 0).
    :param threshold: magnitudes below are pruned.
    """

    gap: Tensor
    step: Tensor
    first: Tensor
    threshold: Tensor


def _kept(out, w: Tensor, gap: Tensor, step: Tensor, first: Tensor, threshold: Tensor, n: int, whole: bool):
    """Steps 4 to 6: ``sign * (gap + steps * step)`` of the survivors, or ``sign * steps * step`` when ``whole``."""
    w = wide(w)
    magnitude = w.abs()
    keep = magnitude.clone().ge_(threshold)
    steps = (magnitude if whole else magnitude.sub_(gap)).div_(step)
    # as the form adds them up; the signs change nothing about the rounding
    steps = torch.minimum(torch.maximum(steps, first), first + n).round_().mul_(step)
    if not whole:
        steps.add_(gap.clamp_min(0))
    return torch.mul(steps, keep.mul_(torch.sign(w)), out=out), ()


def _survivors(out, grad: Tensor, w: Tensor, threshold: Tensor):
    return torch.mul(wide(w).abs().ge_(threshold), wide(grad), out=out), ()


class _PassSurvivors(torch.autograd.Function):
    """``out``, whose gradient reaches the weights of at least ``threshold`` (section 4: masked, nothing else)."""

    @staticmethod
    def forward(ctx, weight, out, threshold):
        ctx.save_for_backward(weight, threshold)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, threshold = ctx.saved_tensors
        if threshold is None:  # somebody else's mask: he decides what the pruned weights see
            return grad, None, None
        return evaluate(_survivors, (grad, weight), (threshold,))[0], None, None


class SQuantizerWeight(WeightQuantizer):
    """Sections 3 and 4, one threshold and range per tensor. Nothing is learned beside the dense weights."""

    params: SQuantizerParams
    prunes = True

    def __init__(self, spec: TensorSpec, params: SQuantizerParams) -> None:
        super().__init__(spec, params)
        self.n = 2 ** (spec.bits - 1) - 1
        self.dense = params.sigma is None
        self.aligned = params.grid == "aligned" and not self.dense
        self.waiting = False

    def on_progress(self, progress: Progress) -> None:
        """Section 7, Algorithm 1: float weights until the delay is over. Without ``delay_epochs``, in a training of
        unknown length, there is none."""
        done, total = progress.step, progress.total_steps
        if self.params.delay_epochs is not None:
            self.waiting = progress.epoch < self.params.delay_epochs
            return
        if not total:
            done, total = progress.epoch, progress.total_epochs
        self.waiting = bool(total) and done < self.params.delay * total

    def _levels(self, w: Tensor) -> _Levels:
        """Steps 1 to 3 of section 3.1, or section 3.3, without gradient. ``w``: float32 or float64."""
        a = w.detach().abs()
        largest = a.amax()
        one = torch.ones_like(largest)
        # a power of two: statistics of huge and of tiny weights neither overflow nor vanish, all others are exact
        unit = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, one))).clamp_min(-100))
        a, top = a / unit, largest / unit
        if self.spec.keep_zeros:
            mask = (a > 0).to(a.dtype)
            threshold = torch.where(a > 0, a, top).amin()  # the smallest survivor stands for the threshold
        elif self.dense:
            mask, threshold = torch.ones_like(a), torch.zeros_like(top)
        else:
            std = a.std() if a.numel() > 1 else torch.zeros_like(top)
            # not below zero, where signs would flip; not above the largest, so that one survives (section 10)
            threshold = torch.minimum((a.mean() + self.params.sigma * std).clamp_min(0), top)
            mask = (a >= threshold).to(a.dtype)
        gap = torch.zeros_like(top) if self.dense else threshold
        if self.n == 1 and not self.dense:
            count = mask.sum()
            gap = (a * mask).sum() / count.clamp_min(1)
            top = gap + 2 * (((a - gap) * mask).square().sum() / (count - 1).clamp_min(1)).sqrt()
        # rounding of the mean must not reach past an all-equal tensor
        equal = top - gap <= _EQUAL * top
        gap = torch.where(equal, torch.minimum(gap, largest / unit), gap)
        span = torch.where(equal, one, top - gap)
        if self.aligned:
            first = torch.where(equal, one * _TOP, torch.round(gap * self.n / span)).clamp(1, _TOP - self.n)
            step = top / (first + self.n)
            gap = first * step
        else:
            first, step = torch.zeros_like(one), span / self.n
        # an all-zero tensor has no unit of its own
        step = torch.where(top > 0, step, one)
        return _Levels(gap * unit, step * unit, first, threshold * unit)

    def _codes(self, w: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
        """Steps 4 and 5: the sign that the gap has (0 where it is not counted), and the signed number of steps."""
        a = w.abs()
        sign = torch.sign(w) * (a >= levels.threshold).to(w.dtype)
        low = levels.first
        above = a if self.aligned else a - levels.gap
        steps = torch.round((above / levels.step).clamp(low, low + self.n))
        return sign * (levels.gap > 0), sign * steps

    def quantize(self, weight: Tensor) -> Tensor:
        """Step 6; in training before the end of the delay the weight itself. ``dL/dW = M * dL/dwsq`` (section 4)."""
        if self.training and self.waiting:
            return weight
        with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
            levels = self._levels(wide(weight))
            first = levels.first.to(levels.step.dtype)
            scales = levels.gap, levels.step, first, levels.threshold
            out, _ = evaluate(_kept, (weight,), scales, (self.n, self.aligned or self.dense))
        threshold = None if self.spec.keep_zeros or self.dense else levels.threshold
        return _PassSurvivors.apply(weight, out, threshold)

    def grid_scale(self, weight: Tensor) -> Tensor:
        levels = self._levels(wide(weight))
        return (levels.step if self.aligned or self.dense else self._gap_scale(levels)).reshape(1)

    @staticmethod
    def _gap_scale(levels: _Levels) -> Tensor:
        """The scale of the gap's grid; no code uses it where the gap is zero."""
        return torch.where(levels.gap > 0, levels.gap, levels.step)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Section 8: ``gap * T + step * J`` (option A), or one grid of integers (option B, and the dense ablation)."""
        w = wide(weight)
        levels = self._levels(w)
        gaps, steps = self._codes(w, levels)
        axis, step = self.spec.channel_axis, levels.step.reshape(1)
        if self.dense:
            return FrozenTensor(steps.to(torch.int32), UniformGrid(self.spec.bits, True, True, step, axis))
        if self.aligned:
            first = int(levels.first)
            above = torch.arange(first, first + self.n + 1, device=w.device)
            integers = torch.cat([-above.flip(0), above.new_zeros(1), above])
            codes = torch.searchsorted(integers, steps.long().contiguous())
            return FrozenTensor(codes.to(torch.int32), Codebook(self.spec.bits + 1, integers, step, axis))
        parts = (
            UniformGrid(2, True, True, self._gap_scale(levels).reshape(1), axis),
            UniformGrid(self.spec.bits, True, True, step, axis),
        )
        form: Form = SumOfGrids(parts)
        above = torch.arange(self.n + 1, device=w.device)
        signs = torch.ones_like(above) * int(levels.gap > 0)
        every = (torch.cat([-signs, signs, signs[:1] * 0]), torch.cat([-above, above, above[:1]]))
        form = SumOfGrids(parts, form.pack(every).long().unique())
        return FrozenTensor(form.pack((gaps.to(torch.int32), steps.to(torch.int32))), form)

    @torch.no_grad()
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the threshold below which weights are pruned, and whether they are still dense floats (1) or not (0)."""
        numbers = super().monitor(weight)
        if weight is None:
            return numbers
        return {**numbers, "threshold": float(self._levels(wide(weight)).threshold), "dense": float(self.waiting)}

    @torch.no_grad()
    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """Compression rates of the layer by all accountings."""
        codes_and_form = None if weight is None else self.freeze(weight)
        if codes_and_form is None or not bool((codes_and_form.form.decode(codes_and_form.codes) != 0).any()):
            return []
        rates = compression_rates([codes_and_form], self.spec.bits, 0)
        names = ["as published", "non-zero codes", "with a mask"]
        values = [rates.published, rates.without_index, rates.with_index]
        return [Figure.bars("Compression rate of the weight", names, {"times smaller": values}, "", "")]


# --------------------------------------------------------------------------------------------------------------------
# compression rates
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CompressionRates:
    """How much smaller than float32 a network is, by both accountings of section 9.2.

    :param published: the paper's: ``floor(32/k * P_total / P_nonzero)``, all parameters at k bits, no index.
    :param without_index: non-zero codes at k bits, all other parameters at 32.
    :param with_index: the same and one bit per quantized weight that says whether it is zero.
    :param sparsity: share of zeros in all parameters and in the quantized weights.
    """

    published: int
    without_index: float
    with_index: float
    sparsity: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"compression rate as published {self.published}x (all parameters at k bits, no index); with other "
            f"parameters at 32 bits {self.without_index:.1f}x, and a 1-bit mask {self.with_index:.1f}x; zeros: "
            f"{self.sparsity[0]:.1%} of all parameters, {self.sparsity[1]:.1%} of the quantized weights"
        )


def compression_rates(weights: Iterable[FrozenTensor], bits: int, others: int) -> CompressionRates:
    """Both accountings for a network, from the codes of any algorithm.

    :param weights: codes and forms of the quantized weights.
    :param bits: k, the bits of a non-zero code (for a SQuantizer the bits of its config).
    :param others: how many other parameters the network has; they are dense float32.
    :raises ZeroDivisionError: nothing but zeros.
    """
    count = nonzero = 0
    for codes, form in weights:
        count += codes.numel()
        nonzero += int((form.decode(codes) != 0).sum())
    return compression_rates_of(count, nonzero, bits, others)


def compression_rates_of(count: int, nonzero: int, bits: int, others: int) -> CompressionRates:
    """As :func:`compression_rates`, from numbers.

    :param count, nonzero: quantized weights, and those of them that are not zero.
    """
    total, size = count + others, nonzero * bits + others * 32
    return CompressionRates(
        floor(32 * total / (bits * (nonzero + others))),
        32 * total / size,
        32 * total / (size + count),
        ((count - nonzero) / total, (count - nonzero) / count),
    )


class SQuantizer(Algorithm):
    """Registry entry of SQuantizer."""

    name = "squantizer"
    title = "SQuantizer: sparsity and quantization at once"
    paper = "Park, Xu, Brick: SQuantizer, 2018"
    arxiv = "1812.08301"
    fidelity = "A: an implementation of the paper, with the deviations that its page names; there is no authors' code"
    Params = SQuantizerParams
    weight_quantizer = SQuantizerWeight
    activation_quantizer = PACTActivation
    bits_reason = "one bit would leave the survivors a single magnitude"

    @classmethod
    def network_facts(cls, weights: list[tuple[WeightQuantizer, FrozenTensor]], others: int) -> dict[str, float]:
        """Compression rates of the network by all accountings, where its quantizers have one width."""
        widths = {quantizer.spec.bits for quantizer, _ in weights}
        nonzero = any(bool((frozen.form.decode(frozen.codes) != 0).any()) for _, frozen in weights)
        if len(widths) != 1 or not nonzero:
            return {}
        rates = compression_rates([frozen for _, frozen in weights], widths.pop(), others)
        return {
            "compression rate as published (all parameters at k bits, no index)": float(rates.published),
            "compression rate, other parameters at 32 bits": rates.without_index,
            "compression rate, other parameters at 32 bits, with a 1-bit mask": rates.with_index,
            "zeros of the quantized weights": rates.sparsity[1],
        }

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses the aligned grid where its integers would not fit 8 bits."""
        super().check(spec, params)
        if getattr(params, "grid", "paper") == "aligned" and spec.role == "weight" and spec.bits > 7:
            raise ConfigError(
                f"{spec.name or 'weight'}: grid 'aligned' needs integers of more than 8 bits at {spec.bits} bits; "
                "allowed: 2 to 7, or grid 'paper'"
            )
