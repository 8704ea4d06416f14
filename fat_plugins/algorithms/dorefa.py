"""DoReFa-Net (Zhou et al., 2016): weights through tanh, activations clipped to [0, 1].

Formulas of the project's baselines specification, sections 3 to 5: believed to match the paper, checked numerically,
not checked against its text.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.forms import Codebook, Form, UniformGrid
from fat_plugins.functional import fake_quantize, wide
from fat_plugins.kernels import evaluate
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

_FLOOR = 1e-30


class DoReFaParams(Params):
    """Options of ``"algorithm": "dorefa"``."""

    restore_scale: bool | Literal["auto"] = Field(
        "auto",
        description="Multiply the weights' range back (it is normalised to [-1, 1]). 'auto': where no batch norm "
        "follows the layer. An extension, not in the paper.",
    )


class _OddGrid(torch.autograd.Function):
    """``scale * (2 round((2^b - 1)(x + 1)/2) - (2^b - 1))`` for ``x = t / max|t|``, straight through the rounding.

    The scale is ``1 / n``, or ``max|t| / n`` with ``restore``; the gradient passes through the maximum, in equal parts
    where several elements reach it.
    """

    @staticmethod
    def forward(ctx, t, n, restore):
        low, high = torch.aminmax(t)
        largest = torch.maximum(high, -low)
        ctx.save_for_backward(t, largest)
        ctx.args = (n, restore)
        floored = largest.clamp_min(_FLOOR)
        return evaluate(_odd_grid, (t,), (floored, _scale_of(floored, n, restore)), (n,))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        t, largest = ctx.saved_tensors
        n, restore = ctx.args
        floored = largest.clamp_min(_FLOOR)
        scale = _scale_of(floored, n, restore)
        by_scale, by_x, count = evaluate(_odd_sums, (grad, t), (floored, largest), (n,), values=False)[1]
        by_largest = by_x * (-scale * n / floored)
        if restore:
            by_largest = by_largest + by_scale / n
        share = by_largest / count * (largest >= _FLOOR).to(largest.dtype)
        return evaluate(_odd_backward, (grad, t), (largest, scale * n / floored, share))[0], None, None


def _scale_of(largest: Tensor, n: int, restore: bool) -> Tensor:
    """Scale of the odd integers, shape ()."""
    return largest / n if restore else torch.full_like(largest, 1.0 / n)


def _odd_grid(out, t: Tensor, largest: Tensor, scale: Tensor, n: int):
    return torch.mul(_odd_integers(t / largest, n), scale, out=out), ()


def _odd_sums(out, grad: Tensor, t: Tensor, floored: Tensor, largest: Tensor, n: int):
    """Sums of ``G`` times the integers, of ``G x``, and how many elements reach the maximum."""
    x = t / floored
    at_top = t.abs().eq_(largest)
    by_x = (x * grad).sum()
    return None, (_odd_integers(x, n).mul_(grad).sum(), by_x, at_top.sum())


def _odd_backward(out, grad: Tensor, t: Tensor, largest: Tensor, factor: Tensor, share: Tensor):
    at_top = t.abs().eq_(largest).mul_(torch.sign(t)).mul_(share)
    return torch.add(grad * factor, at_top, out=out), ()


def _odd_integers(x: Tensor, n: int) -> Tensor:
    return torch.mul(x, 0.5).add_(0.5).clamp_(0, 1).mul_(n).round_().mul_(2).sub_(n)


class _Sign(torch.autograd.Function):
    """``scale * sgn(x)`` with sgn(0) = 1; the gradient of ``x`` is the identity, the scale has none."""

    @staticmethod
    def forward(ctx, x, scale):
        return torch.where(x < 0, -scale, scale)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class DoReFaWeight(WeightQuantizer):
    """Section 3: odd multiples of ``1 / (2^b - 1)``; one bit: ``sign(w) E|w|``. Nothing is learned."""

    has_zero = False
    params: DoReFaParams

    def __init__(self, spec: TensorSpec, params: DoReFaParams) -> None:
        super().__init__(spec, params)
        self.n = 2**spec.bits - 1
        self.restore = params.restore_scale if params.restore_scale != "auto" else not spec.followed_by_norm

    def _normalised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``tanh(w) / max|tanh w|`` and the scale of the odd integers, shapes of the weight and ()."""
        with torch.autocast(weight.device.type, enabled=False):
            t = torch.tanh(wide(weight))
            largest = t.abs().amax().clamp_min(_FLOOR)
            return t / largest, _scale_of(largest, self.n, self.restore)

    def quantize(self, weight: Tensor) -> Tensor:
        """The gradient passes through tanh and the maximum (section 4)."""
        if self.spec.bits == 1:
            w = wide(weight)
            return _Sign.apply(w, w.detach().abs().mean()).to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            return _OddGrid.apply(torch.tanh(wide(weight)), self.n, self.restore).to(weight.dtype)

    def grid_scale(self, weight: Tensor) -> Tensor:
        w = wide(weight.detach())
        scale = w.abs().mean() if self.spec.bits == 1 else self._normalised(w)[1]
        return scale.reshape(1)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """The weight behind tanh, in units of the levels."""
        if self.spec.bits == 1:
            return weight
        x, scale = self._normalised(weight)
        return x * (scale * self.n)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        axis = self.spec.channel_axis
        levels = torch.arange(-self.n, self.n + 1, 2, device=weight.device)
        if self.spec.bits == 1:
            w = wide(weight)
            return FrozenTensor((w >= 0).to(torch.int32), Codebook(1, levels, w.abs().mean().reshape(1), axis))
        x, scale = self._normalised(weight)
        codes = (_odd_integers(x, self.n) + self.n) / 2
        return FrozenTensor(codes.to(torch.int32), Codebook(self.spec.bits, levels, scale.detach().reshape(1), axis))


class DoReFaActivation(ActivationQuantizer):
    """Section 5: ``q_b(clip(x, 0, 1))``; signed inputs, which the paper does not have, are clipped to [-1, 1]."""

    def __init__(self, spec: TensorSpec, params: DoReFaParams) -> None:
        super().__init__(spec, params)
        self.register_buffer("clip", torch.ones(1), persistent=False)

    def init_from_range(self, low: float, high: float) -> None:
        """The range is fixed."""

    def quantize(self, x: Tensor) -> Tensor:
        form = self.form()
        return fake_quantize(x, form.scale.reshape(()), form.low, form.high)

    def form(self) -> Form:
        bits, signed = self.spec.bits, self.signed
        scale = wide(self.clip) / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        return UniformGrid(bits, signed, signed, scale, 1)


class DoReFa(Algorithm):
    """Registry entry of DoReFa-Net."""

    name = "dorefa"
    title = "DoReFa-Net"
    paper = "Zhou, Wu, Ni, Zhou, Wen, Zou: DoReFa-Net, 2016"
    arxiv = "1606.06160"
    fidelity = "C: well-known formulas, believed to match the paper, checked numerically, not against its text"
    Params = DoReFaParams
    weight_quantizer = DoReFaWeight
    activation_quantizer = DoReFaActivation
    weight_bits = (1, 8)
    bits_reason = "a signed grid of one bit has no positive level"
