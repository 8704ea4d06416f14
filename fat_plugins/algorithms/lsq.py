"""LSQ: Learned Step Size Quantization (Esser et al., ICLR 2020), the baseline that results are compared with.

Formulas of the project's baselines specification, sections 3 to 6: believed to match the paper, checked numerically,
not checked against its text.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import fake_quantize, grad_scale, per_channel_view, positive, uniform_codes, wide
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

_FLOOR = 1e-12  # steps are plain parameters: keep them from reaching zero
_CEILING = 1e36  # the mean of huge values may overflow, the largest code times the step must not


class LSQWeight(WeightQuantizer):
    """Weights on ``-2^(b-1) .. 2^(b-1) - 1`` with a learned step, one or one per output channel."""

    accepts_slices = True

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        super().__init__(spec, params)
        self.low, self.high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        self.step = nn.Parameter(torch.ones(spec.shape[spec.channel_axis] if spec.per_channel else 1))

    def init_from_weight(self, weight: Tensor) -> None:
        """``s = 2 mean|v| / sqrt(Q_P)`` (section 6)."""
        rows = weight.abs().movedim(self.spec.channel_axis, 0)
        rows = rows.reshape(rows.shape[0], -1)
        mean = rows.mean(1) if self.spec.per_channel else weight.abs().mean().reshape(1)
        self.step.copy_((2 * mean / sqrt(self.high)).clamp(_FLOOR, _CEILING))

    def _scale(self, ndim: int) -> Tensor:
        return per_channel_view(positive(wide(self.step), _FLOOR), ndim, self.spec.channel_axis)

    def quantize(self, weight: Tensor) -> Tensor:
        """Gradient of the step times ``g = 1 / sqrt(N Q_P)``, N = weights per step (section 4)."""
        g = 1.0 / sqrt(max(weight.numel() // self.step.numel(), 1) * self.high)
        scale = grad_scale(self._scale(weight.ndim), g)
        return fake_quantize(weight, scale, self.low, self.high, inclusive=False)

    def grid_scale(self, weight: Tensor) -> Tensor:
        return positive(wide(self.step), _FLOOR).detach()

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        scale = positive(wide(self.step), _FLOOR).detach()
        codes = uniform_codes(weight, self._scale(weight.ndim), self.low, self.high)
        return FrozenTensor(
            codes.to(torch.int32), UniformGrid(self.spec.bits, True, False, scale, self.spec.channel_axis)
        )


class LSQActivation(ActivationQuantizer):
    """Activations on ``0 .. 2^b - 1`` (or the signed grid when negatives occur) with one learned step."""

    calibration = "data"

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        super().__init__(spec, params)
        self.step = nn.Parameter(torch.ones(1))
        self._first_high: int | None = None

    @property
    def _bounds(self) -> tuple[int, int]:
        b = self.spec.bits
        return (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if self.signed else (0, 2**b - 1)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """``s = 2 mean|v| / sqrt(Q_P)`` of the first batch (section 6); later ones can only turn the grid signed,
        which changes Q_P."""
        high = self._bounds[1]
        if first:
            self.step.copy_((2 * x.abs().mean() / sqrt(high)).clamp(_FLOOR, _CEILING).reshape(1))
        elif self._first_high not in (None, high):
            self.step.mul_(sqrt(self._first_high / high))
        self._first_high = high

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: the step that reaches its ends."""
        self.step.fill_(max(abs(low), abs(high)) / self._bounds[1])
        self.step.clamp_(min=_FLOOR)

    def quantize(self, x: Tensor) -> Tensor:
        """Gradient of the step times ``g``, N = features per sample (section 4)."""
        low, high = self._bounds
        features = max(x.numel() // max(x.shape[0], 1), 1) if x.ndim else 1
        scale = grad_scale(positive(wide(self.step), _FLOOR).reshape(()), 1.0 / sqrt(features * high))
        return fake_quantize(x, scale, low, high, inclusive=False)

    def form(self) -> Form:
        return UniformGrid(self.spec.bits, self.signed, False, positive(wide(self.step), _FLOOR).detach(), 1)


class LSQ(Algorithm):
    """Registry entry of LSQ."""

    name = "lsq"
    title = "Learned Step Size Quantization"
    paper = "Esser, McKinstry, Bablani, Appuswamy, Modha: LSQ, ICLR 2020"
    arxiv = "1902.08153"
    fidelity = "C: well-known formulas, believed to match the paper, checked numerically, not against its text"
    weight_quantizer = LSQWeight
    activation_quantizer = LSQActivation
    bits_reason = "LSQ's signed grid needs a positive level"
    per_channel_weights = True
