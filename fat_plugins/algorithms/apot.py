"""APoT: Additive Powers-of-Two quantization (Li, Dong, Wang, ICLR 2020, arXiv 1909.13144).

A level is a sum of two or three powers of two, so levels are dense where weights are, and all of them are multiples of
one small unit: they lie on an 8-bit grid exactly. Sections quoted below are those of the project's baselines
specification; the formulas were read in the authors' code.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.clipping import ClipSearch, best_clip
from fat_plugins.forms import Codebook, Form, Staircase
from fat_plugins.functional import level_index, level_quantize, positive, wide
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: exponents of the powers of two in each term, by the number of magnitude bits (section 3); every term may also be 0
_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((1, 2, 3),),
    3: ((1, 2, 4), (3,)),
    4: ((1, 3, 5), (2, 4, 6)),
    5: ((1, 3, 6), (2, 4, 7), (5,)),
}


class APoTParams(Params):
    """Options of ``"algorithm": "apot"`` (JSON section ``params``)."""

    alpha: float | None = Field(
        None,
        gt=0,
        description="Initial weight clip, in standard deviations; null takes the one with the least squared error "
        "(the authors: 3.0, and each width begins with the network trained at the next wider one).",
    )
    activation_alpha: float | None = Field(
        None, gt=0, description="Initial activation clip; null takes the best one on calibration data (the authors: 6)."
    )
    restore_scale: bool | Literal["auto"] = Field(
        "auto",
        description="Multiply the weight's standard deviation back. 'auto': where no batch norm follows the layer. "
        "An extension, not in the paper.",
    )


def magnitudes(bits: int) -> list[int]:
    """Ascending integers of the 2^bits magnitudes ``S(bits)``, in units of the smallest power of two in them.

    Section 8.1: the largest is 1, 4, 10, 48 or 100 at 1 to 5 bits.
    """
    terms = _TERMS[bits]
    finest = max(e for term in terms for e in term)
    sums = {sum(c) for c in product(*[(0, *(2 ** (finest - e) for e in term)) for term in terms])}
    return sorted(sums)


def levels_of(bits: int, signed: bool) -> Tensor:
    """Ascending int64 levels: ``S(bits)``, or sign and magnitude ``+-S(bits - 1)``."""
    found = magnitudes(bits - 1 if signed else bits)
    return torch.tensor(([-v for v in reversed(found) if v] if signed else []) + found, dtype=torch.int64)


class _Levels(nn.Module):
    """The levels of one tensor as integers, since a model cast to half precision must not round them."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.register_buffer("levels", levels_of(bits, signed), persistent=False)
        self.unit = 1.0 / int(self.levels[-1])

    @property
    def thresholds(self) -> Tensor:
        """Midpoints of the levels: exact, being halves of integers."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def quantize(self, x: Tensor, clip: Tensor, clip_x_grad: bool = True) -> Tensor:
        """``clip * P(x / clip)`` with section 4's gradients: of the clip ``P(u) - u`` inside, the sign outside."""
        return level_quantize(x, clip * self.unit, self.levels, self.thresholds, clip_x_grad=clip_x_grad)


class _Normalize(torch.autograd.Function):
    """``(W - mean) / std`` over the whole tensor, or ``W - mean`` when ``restore``; and the deviation, shape ().

    Mean and deviation have their gradients (section 10), in closed form: the chain through the deviation of huge
    weights would overflow. A constant or one-element tensor, whose deviation is zero, is divided by its largest
    magnitude instead (1 when it is all zero) and keeps its mean.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, restore: bool) -> tuple[Tensor, Tensor]:
        largest = weight.abs().max()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        # a power of two: sums and squares of huge and of tiny weights neither overflow nor vanish
        unit = torch.exp2(torch.floor(torch.log2(largest)))
        scaled = weight / unit
        mean = scaled.mean()
        std = (scaled - mean).square().sum().div(max(weight.numel() - 1, 1)).sqrt()
        constant = std <= 1e-6 * largest / unit
        mean, std = torch.where(constant, 0.0, mean).to(mean.dtype), torch.where(constant, largest / unit, std)
        unity = (scaled - mean) / std
        ctx.save_for_backward(unity, std * unit, constant)
        ctx.restore = restore
        return (scaled - mean) * unit if restore else unity, std * unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, grad_std: Tensor):
        unity, std, constant = ctx.saved_tensors
        moves = (~constant).to(grad.dtype)  # a constant has nothing that follows its mean and deviation
        reach = unity * (moves / max(unity.numel() - 1, 1))
        centred = grad - grad.mean() * moves
        if ctx.restore:
            return centred + grad_std * reach, None
        return (centred - (grad * unity).sum() * reach) / std + grad_std * reach, None


def normalized(weight: Tensor, restore: bool = False) -> tuple[Tensor, Tensor]:
    """:class:`_Normalize` of a weight of any shape."""
    return _Normalize.apply(weight, restore)


class APoTWeight(WeightQuantizer):
    """Weight side. Parameter: ``alpha``, one clip, in standard deviations of the weight."""

    params: APoTParams

    def __init__(self, spec: TensorSpec, params: APoTParams) -> None:
        super().__init__(spec, params)
        self.grid = _Levels(spec.bits, True)
        self.restore = params.restore_scale if params.restore_scale != "auto" else not spec.followed_by_norm
        self.alpha = nn.Parameter(torch.tensor(float(params.alpha or 3.0)))

    def init_from_weight(self, weight: Tensor) -> None:
        """The clip with the least squared error; from 3.0 two bits leave seven of eight weights at zero."""
        if self.params.alpha is None:
            self.alpha.fill_(best_clip(normalized(wide(weight))[0], self.grid.quantize) or 3.0)

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is projected on the levels, shape of the weight, and the clip, shape ()."""
        w, std = normalized(wide(weight), self.restore)
        clip = positive(self.alpha.to(w.dtype))
        return w, clip * std if self.restore else clip

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3 and 4: the gradient passes inside the clip, at two bits everywhere, and through mean and std."""
        with torch.autocast(weight.device.type, enabled=False):
            w, clip = self._parts(weight)
            return self.grid.quantize(w, clip, clip_x_grad=self.spec.bits > 2).to(weight.dtype)

    def grid_scale(self, weight: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            clip = positive(wide(self.alpha.detach()))
            std = normalized(wide(weight.detach()))[1] if self.restore else 1.0
            return (clip * std * self.grid.unit).reshape(1)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Indices into the integer levels; mean and deviation are gone (section 8.1)."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            w, clip = self._parts(weight)
        scale = clip * self.grid.unit
        codes = level_index(w, scale, self.grid.thresholds)
        form = Codebook(self.spec.bits, self.grid.levels, scale.detach().reshape(1), self.spec.channel_axis)
        return FrozenTensor(codes.to(torch.int32), form)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """The normalised weight."""
        return self._parts(weight)[0]

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the clip, in standard deviations."""
        return {**super().monitor(weight), "clip": float(positive(self.alpha.detach()))}


class APoTActivation(ActivationQuantizer):
    """Activation side: ``S(b)``, or sign and magnitude where values below zero occur. Parameter: ``alpha``."""

    params: APoTParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: APoTParams) -> None:
        super().__init__(spec, params)
        self._search = ClipSearch()
        # both, since signedness may come from calibration; no parameters and nothing in the state dict
        self.grids = nn.ModuleList(_Levels(spec.bits, s) for s in (False, True))
        self.alpha = nn.Parameter(torch.tensor(float(params.activation_alpha or 6.0)))

    @property
    def _grid(self) -> _Levels:
        return self.grids[int(self.signed)]

    def init_from_range(self, low: float, high: float) -> None:
        if self.params.activation_alpha is None:
            self.alpha.fill_(max(abs(low), abs(high), 1e-5))

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The clip with the least squared error."""
        if self.params.activation_alpha is None:
            clip = self._search.add(x, self._grid.quantize, signed=self.signed, first=first)
            self.alpha.fill_(max(clip, 1e-5))

    def quantize(self, x: Tensor) -> Tensor:
        """Section 5."""
        return self._grid.quantize(x, positive(wide(self.alpha)))

    def grid_scale(self) -> Tensor:
        return (positive(wide(self.alpha.detach())) * self._grid.unit).reshape(1)

    def form(self) -> Form:
        grid = self._grid
        return Staircase(self.spec.bits, grid.levels, grid.thresholds.double(), self.grid_scale())


class APoT(Algorithm):
    """Registry entry of APoT."""

    name = "apot"
    title = "Additive Powers-of-Two Quantization"
    paper = "Li, Dong, Wang: Additive Powers-of-Two Quantization, ICLR 2020"
    arxiv = "1909.13144"
    fidelity = "B: follows the authors' released code; the body of the paper was not read"
    Params = APoTParams
    weight_quantizer = APoTWeight
    activation_quantizer = APoTActivation
    weight_bits = (2, 6)
    activation_bits = (2, 5)
    bits_reason = "a sign and a magnitude need two bits"
