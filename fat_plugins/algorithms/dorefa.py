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
    """``scale * (2 round((2^b - 1)(x + 1)/2) - (2^b - 1))`` for x in [-1, 1], straight through the rounding."""

    @staticmethod
    def forward(ctx, x, scale, n):
        integers = _odd_integers(x, n)
        ctx.save_for_backward(x, scale)
        ctx.n = n
        return integers * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * (scale * ctx.n), (grad * _odd_integers(x, ctx.n)).sum(), None


def _odd_integers(x: Tensor, n: int) -> Tensor:
    return 2 * torch.round((x * 0.5 + 0.5).clamp(0, 1) * n) - n


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
            return t / largest, largest / self.n if self.restore else torch.full_like(largest, 1.0 / self.n)

    def quantize(self, weight: Tensor) -> Tensor:
        """The gradient passes through tanh and the maximum (section 4)."""
        if self.spec.bits == 1:
            w = wide(weight)
            return _Sign.apply(w, w.detach().abs().mean()).to(weight.dtype)
        x, scale = self._normalised(weight)
        return _OddGrid.apply(x, scale, self.n).to(weight.dtype)

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
