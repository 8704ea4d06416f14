"""Plain 8-bit-style quantization by the largest magnitude: nothing is learned. Used for first and last layers.

Weights: ``scale = max|W| / (2^(b-1) - 1)`` of the current weight, straight-through everywhere. This is FAT's rule for
first and last layers with the symmetric maximum that its specification recommends (section 7.4, [reconstruction]; the
authors' code takes the signed maximum). Activations: a moving average of the extreme values.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import fake_quantize, largest_of_processes, per_channel_view, uniform_codes, wide
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

_FLOOR = 1e-12


class MinMaxParams(Params):
    """Options of ``"algorithm": "minmax"``."""

    momentum: float = Field(0.01, ge=0, le=1, description="Weight of a new batch in the moving range of activations.")


class MinMaxWeight(WeightQuantizer):
    """Symmetric narrow grid scaled by the largest magnitude, per output channel unless told otherwise."""

    def _scale(self, weight: Tensor) -> Tensor:
        w = wide(weight.detach())
        if self.spec.per_channel is False:
            largest = w.abs().amax().reshape(1)
        else:
            rows = w.abs().movedim(self.spec.channel_axis, 0)
            largest = rows.reshape(rows.shape[0], -1).amax(1)
        return (largest / (2 ** (self.spec.bits - 1) - 1)).clamp_min(_FLOOR)

    def quantize(self, weight: Tensor) -> Tensor:
        n = 2 ** (self.spec.bits - 1) - 1
        scale = per_channel_view(self._scale(weight), weight.ndim, self.spec.channel_axis)
        return fake_quantize(weight, scale, -n, n, clip_x_grad=False)

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._scale(weight)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        n, axis = 2 ** (self.spec.bits - 1) - 1, self.spec.channel_axis
        scale = self._scale(weight)
        codes = uniform_codes(weight, per_channel_view(scale, weight.ndim, axis), -n, n)
        return FrozenTensor(codes.to(torch.int32), UniformGrid(self.spec.bits, True, True, scale, axis))


class MinMaxActivation(ActivationQuantizer):
    """Symmetric grid (unsigned when nothing is negative) over a moving range."""

    params: MinMaxParams

    def __init__(self, spec: TensorSpec, params: MinMaxParams) -> None:
        super().__init__(spec, params)
        self.register_buffer("largest", torch.ones(1))

    def init_from_range(self, low: float, high: float) -> None:
        self.largest.fill_(max(abs(low), abs(high)))

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        largest = x.abs().max().reshape(1).to(self.largest.dtype)
        self.largest.copy_(largest if first else torch.maximum(self.largest, largest))

    def quantize(self, x: Tensor) -> Tensor:
        if self.training and x.numel():
            with torch.no_grad():
                seen = x.detach().abs().max().to(self.largest.dtype)
                seen = torch.where(torch.isfinite(seen), seen, self.largest)
                self.largest.lerp_(largest_of_processes(seen), self.params.momentum)
        form = self.form()
        return fake_quantize(x, form.scale.reshape(()), form.low, form.high)

    def form(self) -> Form:
        b = self.spec.bits
        n = 2 ** (b - 1) - 1 if self.signed else 2**b - 1
        return UniformGrid(b, self.signed, self.signed, (wide(self.largest) / n).clamp_min(_FLOOR), 1)


class MinMax(Algorithm):
    """Registry entry of the plain quantizer."""

    name = "minmax"
    title = "Largest magnitude, nothing learned"
    paper = "folklore; FAT's rule for first and last layers"
    fidelity = "folklore: no paper is claimed"
    Params = MinMaxParams
    weight_quantizer = MinMaxWeight
    activation_quantizer = MinMaxActivation
    bits_reason = "a symmetric grid of one bit has no level beside zero"
    per_channel_weights = True
