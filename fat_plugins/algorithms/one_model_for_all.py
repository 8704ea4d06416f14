"""Wavelet-gain multi-bit QAT, after Sun et al. 2021 (One Model for All Quantization, arXiv 2105.01353).

One float weight serves several bit widths. Each width has gains of its own on the weight's Haar bands along the input
channels, and a step of its own. Only the abstract of the paper was available: this is a reconstruction, and sections
quoted below are those of the project's specification of it.
"""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StrictInt, field_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from fat_plugins.errors import ConfigError, QuantizationError
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.functional import (
    fake_quantize,
    grad_scale,
    level_index,
    level_quantize,
    per_channel_view,
    positive,
    uniform_codes,
    wide,
)
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: steps are plain parameters: keep them from reaching zero, and what they multiply from overflowing
_FLOOR, _CEILING = 1e-12, 1e36
#: widths beside that of the tensor, unless the options name others
_USUAL = (8, 4, 2)
#: so many input channels are no axis to transform along: depthwise layers, the stem behind an image
_FEW_CHANNELS = 3
_ROOT = sqrt(0.5)


class OneModelParams(Params):
    """Options of ``"algorithm": "one_model_for_all"`` (JSON section ``params``)."""

    bit_set: list[Annotated[StrictInt, Field(ge=1, le=8)]] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Bit widths that one weight serves, the tensor's own among them; null: 8, 4, 2 and its own.",
    )
    levels: int = Field(1, ge=1, le=4, description="Levels of the Haar transform along the input channels.")
    gains: Literal["band", "channel_band", "fixed"] = Field(
        "band",
        description="'band': one gain per width and band. 'channel_band': one for each output channel too. 'fixed': "
        "all 1, which is LSQ at several widths, the comparison that any claim about the gains needs.",
    )

    @field_validator("bit_set")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"{value} repeat each other")
        return value


def widths_of(params: OneModelParams, bits: int) -> tuple[int, ...]:
    """Descending."""
    found = {*_USUAL, bits} if params.bit_set is None else params.bit_set
    return tuple(sorted(found, reverse=True))


# --------------------------------------------------------------------------------------------------------------------
# the transform
# --------------------------------------------------------------------------------------------------------------------
def haar(x: Tensor, levels: int) -> list[Tensor]:
    """Orthonormal Haar bands ``[low, high_1 (finest), ..., high_levels]`` along axis 2 (section 3, step 1).

    A zero is appended wherever the length is odd. Shapes: ``x`` C x G x n x S; bands C x G x n' x S.
    """
    bands = []
    for _ in range(levels):
        if x.shape[2] % 2:
            x = pad(x, (0, 0, 0, 1))
        even, odd = x[:, :, 0::2], x[:, :, 1::2]
        bands.append((even - odd) * _ROOT)
        x = (even + odd) * _ROOT
    return [x, *bands]


def inverse_haar(bands: list[Tensor], length: int) -> Tensor:
    """Inverse of :func:`haar` of ``length`` numbers; its adjoint too."""
    lengths = [length]
    for _ in bands[2:]:
        lengths.append((lengths[-1] + 1) // 2)
    x = bands[0]
    for high, n in zip(reversed(bands[1:]), reversed(lengths), strict=True):
        x = torch.stack([x + high, x - high], 3).mul_(_ROOT).flatten(2, 3)[:, :, :n]
    return x


class _Gained(torch.autograd.Function):
    """``x + IDWT((gains - 1) * DWT(x))``: exactly ``x`` where all gains are 1. Gradients of section 4; keeps ``x``.

    Shapes: ``x`` C x G x n x S; ``gains`` C (or 1) x bands.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gains: Tensor) -> Tensor:
        ctx.save_for_backward(x, gains)
        return _apply(x, gains)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gains = ctx.saved_tensors
        by_x = _apply(grad, gains) if ctx.needs_input_grad[0] else None
        by_gains = None
        if ctx.needs_input_grad[1]:
            levels = gains.shape[1] - 1
            pairs = zip(haar(x, levels), haar(grad, levels), strict=True)
            by_gains = torch.stack([(b * g).sum((1, 2, 3)) for b, g in pairs], 1).sum_to_size(gains.shape)
        return by_x, by_gains


def _apply(x: Tensor, gains: Tensor) -> Tensor:
    bands = haar(x, gains.shape[1] - 1)
    moved = [b * (g - 1).reshape(-1, 1, 1, 1) for b, g in zip(bands, gains.unbind(1), strict=True)]
    return x + inverse_haar(moved, x.shape[2])


def gained(x: Tensor, gains: Tensor) -> Tensor:
    """:class:`_Gained`."""
    return _Gained.apply(x, gains)


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
def _rows(signed: bool, bits: int) -> tuple[int, int]:
    """Lowest and highest integer at a width; at one bit -1 and 1, or 0 and 1."""
    if bits == 1:
        return -int(signed), 1
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _middle(signs: Tensor) -> Tensor:
    """The threshold between -1 and 1."""
    return signs[:1] + 1


class _Several:
    """What both quantizers share: their widths, each with a row of the parameter ``step``."""

    @property
    def widths(self) -> tuple[int, ...]:
        return self._widths

    @property
    def _row(self) -> int:
        return self._widths.index(self.active_bits)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay, and gains at a tenth of the rate (section 7)."""
        groups = [{"params": [self.step], "lr": lr, "weight_decay": 0.0}]
        gains = getattr(self, "gains", None)
        return groups if gains is None else [*groups, {"params": [gains], "lr": lr / 10, "weight_decay": 0.0}]


class OneModelWeight(_Several, WeightQuantizer):
    """Weight side. Parameters: ``step`` (widths x channels, or x 1), and ``gains`` (widths x bands, or widths x
    channels x bands) where the layer is transformed. One bit has no step: the mean magnitude takes its place."""

    params: OneModelParams

    def __init__(self, spec: TensorSpec, params: OneModelParams) -> None:
        super().__init__(spec, params)
        self._widths = widths_of(params, spec.bits)
        if spec.keep_zeros and 1 in self._widths:
            raise QuantizationError(
                f"{spec.name or 'weight'}: the grid has no zero at 1 bit, so sparsity cannot be kept; leave 1 out of "
                f"bit_set, now {list(self._widths)}"
            )
        channels = spec.shape[spec.channel_axis]
        self.step = nn.Parameter(torch.ones(len(self._widths), channels if spec.per_channel else 1))
        # depthwise, stem, vectors: nothing to transform along
        inputs = spec.shape[1 - spec.channel_axis] if len(spec.shape) > 1 else 1
        #: a grouped transposed convolution has its groups along the axis of inputs
        self._groups = spec.groups if spec.channel_axis == 1 else 1
        inputs //= self._groups
        self.levels = min(params.levels, (inputs - 1).bit_length()) if inputs > _FEW_CHANNELS else 0
        self.gains: nn.Parameter | None = None
        if self.levels and params.gains != "fixed":
            each = (channels,) if params.gains == "channel_band" else ()
            self.gains = nn.Parameter(torch.ones(len(self._widths), *each, self.levels + 1))
        self.register_buffer("signs", torch.tensor([-1, 1]), persistent=False)

    def init_from_weight(self, weight: Tensor) -> None:
        """Section 6: LSQ's rule at every width, gains of 1."""
        if self.gains is not None:
            self.gains.fill_(1.0)
        mean = self._mean(weight)
        for row, bits in zip(self.step, self._widths, strict=True):
            row.copy_((2 * mean / sqrt(_rows(True, bits)[1])).clamp(_FLOOR, _CEILING))

    def _mean(self, weight: Tensor) -> Tensor:
        """Mean magnitude, shape of a row of ``step``; in float64, as the sum of huge weights must not overflow."""
        rows = weight.abs().movedim(self.spec.channel_axis, 0).flatten(1) if weight.ndim > 1 else weight.abs()[:, None]
        rows = rows if self.step.shape[1] > 1 else rows.reshape(1, -1)
        return rows.double().mean(1).to(weight.dtype)

    # -- values ------------------------------------------------------------------------------------------------------
    def _latent(self, weight: Tensor) -> Tensor:
        """``W_b`` of section 3, step 2: same shape, at least float32."""
        w = wide(weight)
        if self.gains is None:
            return w
        axis = self.spec.channel_axis
        moved = w.movedim(axis, 0)
        gains = self.gains[self._row].to(w.dtype).reshape(-1, self.levels + 1)
        inputs = moved.shape[1] // self._groups
        out = gained(moved.reshape(moved.shape[0], self._groups, inputs, -1), gains)
        return out.reshape(moved.shape).movedim(0, axis)

    def _scale(self, latent: Tensor) -> Tensor:
        """Value of one integer, 1-d; the mean of section 3's one-bit case has no gradient."""
        if self.active_bits == 1:
            return self._mean(latent.detach()).clamp_min(_FLOOR)
        return positive(wide(self.step[self._row]), _FLOOR)

    def _along(self, scale: Tensor) -> Tensor:
        return per_channel_view(scale, len(self.spec.shape), self.spec.channel_axis)

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3, step 3; gradients of section 4, the straight-through one at one bit for ``|W_b| <= 1``."""
        with torch.autocast(weight.device.type, enabled=False):
            latent = self._latent(weight)
            scale = self._scale(latent)
            if self.active_bits == 1:
                middle = _middle(self.signs)
                out = level_quantize(latent.clamp(-1, 1), self._along(scale), self.signs, middle, clip_x_grad=False)
                # the step has no part in it, but takes part in every backward, as data-parallel wrappers expect
                return (out + 0.0 * self.step[self._row].sum()).to(weight.dtype)
            low, high = _rows(True, self.active_bits)
            g = 1.0 / sqrt(max(weight.numel() // scale.numel(), 1) * high)
            return fake_quantize(latent, grad_scale(self._along(scale), g), low, high, inclusive=False).to(weight.dtype)

    def grid_scale(self, weight: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return self._scale(self._latent(weight.detach()) if self.active_bits == 1 else weight).detach()

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """At the active width; wavelet and gains are gone (section 8)."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            latent = self._latent(weight)
            scale = self._scale(latent).detach()
            if self.active_bits == 1:
                codes = level_index(latent.clamp(-1, 1), self._along(scale), _middle(self.signs))
                return FrozenTensor(codes.to(torch.int32), Codebook(1, self.signs, scale, self.spec.channel_axis))
            low, high = _rows(True, self.active_bits)
            codes = uniform_codes(latent, self._along(scale), low, high)
        form = UniformGrid(self.active_bits, True, False, scale, self.spec.channel_axis)
        return FrozenTensor(codes.to(torch.int32), form)

    # -- reports -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """``W_b`` at the active width."""
        return self._latent(weight)

    @torch.no_grad()
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the mean gain of every band at the active width."""
        numbers = super().monitor(weight)
        if self.gains is not None:
            names = ["low", *(f"high {j + 1}" for j in range(self.levels))]
            means = self.gains[self._row].reshape(-1, self.levels + 1).double().mean(0).tolist()
            numbers.update({f"gain {name}": value for name, value in zip(names, means, strict=True)})
        return numbers


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class OneModelActivation(_Several, ActivationQuantizer):
    """Activation side (section 5): LSQ with a step per width. At one bit 0 and 1 times the step, or -1 and 1 where
    values below zero occur. Parameter: ``step`` (widths)."""

    params: OneModelParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: OneModelParams) -> None:
        super().__init__(spec, params)
        self._widths = widths_of(params, spec.bits)
        self.step = nn.Parameter(torch.ones(len(self._widths)))
        self.register_buffer("signs", torch.tensor([-1, 1]), persistent=False)
        self._first_signed: bool | None = None

    def _highs(self, signed: bool) -> Tensor:
        highs = [_rows(signed, b)[1] for b in self._widths]
        return torch.tensor(highs, dtype=self.step.dtype, device=self.step.device)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """LSQ's rule at every width; as there, later batches can only turn the grid signed."""
        if first:
            self.step.copy_((2 * x.abs().mean() / self._highs(self.signed).sqrt()).clamp(_FLOOR, _CEILING))
        elif self._first_signed is not None and self._first_signed != self.signed:
            self.step.mul_((self._highs(self._first_signed) / self._highs(self.signed)).sqrt())
        self._first_signed = self.signed

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: the step that reaches its ends, at every width."""
        self.step.copy_((max(abs(low), abs(high)) / self._highs(self.signed)).clamp_min(_FLOOR))

    def _scale(self) -> Tensor:
        return positive(wide(self.step[self._row]), _FLOOR)

    @property
    def _signs_only(self) -> bool:
        return self.active_bits == 1 and self.signed

    def quantize(self, x: Tensor) -> Tensor:
        low, high = _rows(self.signed, self.active_bits)
        features = max(x.numel() // max(x.shape[0], 1), 1) if x.ndim else 1
        scale = grad_scale(self._scale(), 1.0 / sqrt(features * high))
        if self._signs_only:
            return level_quantize(x, scale, self.signs, _middle(self.signs))
        return fake_quantize(x, scale, low, high, inclusive=False)

    def grid_scale(self) -> Tensor:
        return self._scale().detach().reshape(1)

    def form(self) -> Form:
        if self._signs_only:
            return Staircase(1, self.signs, _middle(self.signs).double(), self.grid_scale(), 1)
        return UniformGrid(self.active_bits, self.signed, False, self.grid_scale(), 1)


class OneModelForAll(Algorithm):
    """Registry entry."""

    name = "one_model_for_all"
    title = "Wavelet-gain multi-bit QAT, after Sun et al. 2021"
    paper = "Sun et al.: One Model for All Quantization, 2021"
    arxiv = "2105.01353"
    fidelity = "D: a reconstruction; of the paper only the abstract and the first lines of the introduction were read"
    Params = OneModelParams
    weight_quantizer = OneModelWeight
    activation_quantizer = OneModelActivation
    weight_bits = (1, 8)
    activation_bits = (1, 8)
    bits_reason = "a code has at least one bit"
    per_channel_weights = True

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        super().check(spec, params)
        known = params.bit_set if isinstance(params, OneModelParams) else None
        if known is not None and spec.bits not in known:
            raise ConfigError(
                f"{spec.name or spec.role}: {spec.bits} bits are not in bit_set {known}; the tensor's width is the one "
                "that is active at first, and must be among them"
            )
