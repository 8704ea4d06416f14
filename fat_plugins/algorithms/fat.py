"""FAT: Frequency-Aware Transformation (Tao et al., arXiv 2102.07444, TNNLS 2024). Follows the authors' released code.

The weight is standardised, its filters are gated in the frequency domain by a learned map between output channels, and
the result goes through a symmetric quantizer with a learned clip. The transform exists in training only. Sections
quoted below are those of the project's FAT specification.

Deviations from the released code, all on the safe side of its edge cases (section 10.3): signed activations get a
symmetric clip, unsigned ones an explicit lower clamp, the clips cannot become negative, constant weights do not become
NaN, clips start at the least squared error unless ``alpha`` and ``activation_alpha`` are given (the authors begin with
constants at 5 bits and come down by progressive bits), and layers that no batch norm follows keep their scale
(``restore_scale``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.clipping import ClipSearch, best_clip
from fat_plugins.errors import ConfigError
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.functional import dft_gate, fake_quantize, level_index, level_quantize, positive, standardize, wide
from fat_plugins.functional import uniform_codes as codes_of
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm


class FATParams(Params):
    """Options of ``"algorithm": "fat"`` (JSON section ``params``)."""

    levels: Literal["uniform", "power_of_two"] = Field("uniform", description="Grid of weights and activations.")
    transform: Literal["dft", "none", "uniquant"] = Field(
        "dft",
        description="'dft': the paper's gate. 'none': gate fixed to 1 (ablation). 'uniquant': subtract the mean only, "
        "as the authors do outside MobileNetV2's projection layers.",
    )
    variant: Literal["cifar", "imagenet"] = Field(
        "cifar",
        description="Which copy of the authors' code: gradient of the activation clip with ('cifar') or without "
        "('imagenet') the rounding residual, and the learning rates of param_groups.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="Initial weight clip, in standard deviations; null takes the one with the least squared error "
        "(the authors: 3.0, at the 5 bits where their progression begins).",
    )
    activation_alpha: float | None = Field(
        None,
        gt=0,
        description="Initial activation clip; null takes the best one on calibration data (the authors: 5.0 or 8.0).",
    )
    restore_scale: bool | Literal["auto"] = Field(
        "auto",
        description="Multiply the weight's standard deviation back. 'auto': where no batch norm follows the layer. "
        "An extension, not in the paper.",
    )


def power_of_two_levels(count: int, signed: bool) -> tuple[Tensor, float]:
    """Integer levels of ``{0} U {2^-j : j = 0 .. count - 1}`` (and their negatives), and the unit they count.

    :return: ascending int64 levels, and the unit as a fraction of alpha (section 8, "Log quantizer").
    """
    unit = 2 ** (count - 1)
    positive_levels = [2**j for j in range(count)]
    levels = ([-v for v in reversed(positive_levels)] if signed else []) + [0] + positive_levels
    return torch.tensor(levels, dtype=torch.int64), 1.0 / unit


class _Grid(nn.Module):
    """The two grids of FAT for one tensor, in units that both the fake quantization and the form use."""

    def __init__(self, params: FATParams, bits: int, signed: bool) -> None:
        super().__init__()
        self.power_of_two = params.levels == "power_of_two"
        self.bits, self.signed = bits, signed
        if self.power_of_two:
            levels, self.unit = power_of_two_levels(2 ** (bits - 1) - 1 if signed else 2**bits - 1, signed)
            # integers, since a model cast to half precision must not round them
            self.register_buffer("levels", levels, persistent=False)
        else:
            n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            self.low, self.high, self.unit = (-n if signed else 0), n, 1.0 / n

    @property
    def thresholds(self) -> Tensor:
        """Midpoints of the levels (section 3, step 9: nearest in the linear domain); exact, being 3 * 2^k or 1/2."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def fake_quantize(self, x: Tensor, scale: Tensor, clip_x_grad: bool, residual: bool) -> Tensor:
        if self.power_of_two:
            return level_quantize(
                x, scale, self.levels, self.thresholds, clip_x_grad=clip_x_grad, residual_scale_grad=residual
            )
        return fake_quantize(
            x, scale, self.low, self.high, clip_x_grad=clip_x_grad, residual_scale_grad=residual, inclusive=True
        )


class FATWeight(WeightQuantizer):
    """Weight side of FAT, sections 3 and 4. Parameters: ``alpha`` (one clip, in standard deviations) and, for
    ``transform: dft``, ``transform`` (C x C)."""

    params: FATParams

    def __init__(self, spec: TensorSpec, params: FATParams) -> None:
        super().__init__(spec, params)
        self.grid = _Grid(params, spec.bits, True)
        self.restore = params.restore_scale if params.restore_scale != "auto" else not spec.followed_by_norm
        self.alpha = nn.Parameter(torch.tensor(float(params.alpha or 3.0)))
        channels = spec.shape[spec.channel_axis]
        self.transform = (
            nn.Parameter(torch.full((channels, channels), 1.0 / channels)) if params.transform == "dft" else None
        )

    def init_from_weight(self, weight: Tensor) -> None:
        """The clip with the least squared error: 1.2 to 3.1 standard deviations of a normal weight at 2 to 5 bits.

        From the authors' 3.0 (section 6), which is right at 5 bits, direct training at 2 bits does not recover: seven
        of eight weights are zero there.
        """
        if self.params.alpha is None:
            with torch.autocast(weight.device.type, enabled=False):
                gated = self._gated(weight if weight.dtype == torch.float64 else weight.float())[0]
                clip = best_clip(gated, lambda v, c: self.grid.fake_quantize(v, c * self.grid.unit, False, True))
            self.alpha.fill_(clip or 3.0)

    def _gated(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 1 to 8 of section 3, shape of the weight, and the weight's deviation, shape ()."""
        normalised, std = standardize(w, scale=self.params.transform != "uniquant")
        if self.transform is not None:
            moved = normalised.movedim(self.spec.channel_axis, 0)
            gated = dft_gate(moved.reshape(moved.shape[0], -1), self.transform.to(w.dtype))
            normalised = gated.reshape(moved.shape).movedim(0, self.spec.channel_axis)
        return normalised, std

    def _transformed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``Wt`` and the scale of its grid, shapes of the weight and ()."""
        with torch.autocast(weight.device.type, enabled=False):
            w = weight if weight.dtype == torch.float64 else weight.float()
            normalised, std = self._gated(w)
            scale = positive(self.alpha.to(w.dtype)) * self.grid.unit
            return (normalised * std, scale * std) if self.restore else (normalised, scale)

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3, step 9. The gradient reaches the transformed weight everywhere (section 4: not masked)."""
        transformed, scale = self._transformed(weight)
        return self.grid.fake_quantize(transformed, scale, clip_x_grad=False, residual=True).to(weight.dtype)

    def grid_scale(self, weight: Tensor) -> Tensor:
        """Without the transform; the deviation of the weight joins where it is restored."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            w = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
            scale = positive(self.alpha.to(w.dtype)) * self.grid.unit
            return (
                scale * standardize(w, scale=self.params.transform != "uniquant")[1] if self.restore else scale
            ).reshape(1)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Codes on the trained grid; mean, deviation, transform and DFT are gone (section 8)."""
        transformed, scale = self._transformed(weight)
        axis, bits = self.spec.channel_axis, self.spec.bits
        if self.grid.power_of_two:
            form: Form = Codebook(bits, self.grid.levels, scale.reshape(1), axis)
            codes = level_index(transformed, scale, self.grid.thresholds)
        else:
            form = UniformGrid(bits, True, True, scale.reshape(1), axis)
            codes = codes_of(transformed, scale, self.grid.low, self.grid.high)
        return FrozenTensor(codes.to(torch.int32), form)

    def gate(self, weight: Tensor) -> Tensor | None:
        """The soft mask M (C x (N // 2 + 1), half spectrum) of ``weight``, for reports; ``None`` without transform."""
        if self.transform is None:
            return None
        with torch.no_grad():
            moved = standardize(weight.float())[0].movedim(self.spec.channel_axis, 0)
            spectrum = torch.fft.rfft(moved.reshape(moved.shape[0], -1), dim=1)
            return torch.sigmoid(self.transform.float() @ spectrum.abs())

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """The standardised and gated weight."""
        return self._transformed(weight)[0]

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the clip, in standard deviations, and the mean of the gate."""
        numbers = {**super().monitor(weight), "clip": float(positive(self.alpha.detach()))}
        gate = None if weight is None else self.gate(weight)
        return numbers if gate is None else {**numbers, "gate": float(gate.mean())}

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """The gate over output channels and frequencies."""
        gate = None if weight is None else self.gate(weight)
        if gate is None:
            return []
        return [Figure.image("Gate in the frequency domain", gate, "frequency", "output channel", (0.0, 1.0))]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Section 7.1 (CIFAR: 0.02 at a base of 0.04, decay 1e-4) or one group as the rest (7.2, ImageNet)."""
        if self.params.variant == "imagenet":
            return []
        own = [self.alpha] + ([self.transform] if self.transform is not None else [])
        return [{"params": own, "lr": lr * 0.5, "weight_decay": min(weight_decay, 1e-4)}]


class FATActivation(ActivationQuantizer):
    """Activation side of FAT, section 5: one learned clip ``alpha``."""

    params: FATParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: FATParams) -> None:
        super().__init__(spec, params)
        self._search = ClipSearch()
        # both, since signedness may come from calibration; no parameters and nothing in the state dict
        self.grids = nn.ModuleList(_Grid(params, spec.bits, s) for s in (False, True))
        self.alpha = nn.Parameter(torch.tensor(float(params.activation_alpha or 5.0)))

    def init_from_range(self, low: float, high: float) -> None:
        if self.params.activation_alpha is None:
            self.alpha.fill_(max(abs(low), abs(high), 1e-5))

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The clip with the least squared error; the authors' progressive bits reach it in hundreds of epochs."""
        if self.params.activation_alpha is None:
            grid = self.grids[int(self.signed)]
            clip = self._search.add(
                x, lambda v, c: grid.fake_quantize(v, c * grid.unit, True, True), signed=self.signed, first=first
            )
            self.alpha.fill_(max(clip, 1e-5))

    def _grid_and_scale(self) -> tuple[_Grid, Tensor]:
        grid = self.grids[int(self.signed)]
        return grid, positive(wide(self.alpha)) * grid.unit

    def quantize(self, x: Tensor) -> Tensor:
        """``dL/dx = G [r <= 1]``; ``dL/dalpha`` with (cifar) or without (imagenet) the residual."""
        grid, scale = self._grid_and_scale()
        return grid.fake_quantize(x, scale, clip_x_grad=True, residual=self.params.variant == "cifar")

    def grid_scale(self) -> Tensor:
        return wide(self._grid_and_scale()[1].detach()).reshape(1)

    def form(self) -> Form:
        grid, scale = self._grid_and_scale()[0], self.grid_scale()
        if grid.power_of_two:
            return Staircase(self.spec.bits, grid.levels, grid.thresholds.double(), scale)
        return UniformGrid(self.spec.bits, self.signed, self.signed, scale, 1)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Section 7.1 (CIFAR: 0.1 at a base of 0.04, decay 1e-4) or one group as the rest (7.2, ImageNet)."""
        if self.params.variant == "imagenet":
            return []
        return [{"params": [self.alpha], "lr": lr * 2.5, "weight_decay": min(weight_decay, 1e-4)}]


class FAT(Algorithm):
    """Registry entry of FAT."""

    name = "fat"
    title = "Frequency-Aware Transformation"
    paper = "Tao, Lin, Chen, Zhang, Luo, Wong: FAT, TNNLS 35(2), 2024"
    arxiv = "2102.07444"
    fidelity = "B: follows the authors' released code; the body of the paper was not available"
    Params = FATParams
    weight_quantizer = FATWeight
    activation_quantizer = FATActivation
    max_power_of_two_bits = 5
    bits_reason = "FAT has no 1-bit form: its grid would have no level beside zero"

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses power-of-two levels whose integers would not fit 32 bits (section 8)."""
        super().check(spec, params)
        if getattr(params, "levels", "uniform") == "power_of_two" and spec.bits > cls.max_power_of_two_bits:
            raise ConfigError(
                f"{spec.name or spec.role}: FAT's power-of-two levels need more than 32-bit integers at {spec.bits} "
                f"bits; allowed: 2 to {cls.max_power_of_two_bits}, or levels 'uniform'"
            )
