"""The rewrite ``cfws``: a kernel becomes the sum of a coarse one, on its own grid, and a fine one (section 3).

The coarse kernel has the centre tap only, so it is a 1x1 convolution. Its grid has the step ``g = max|c| / Q``, which
is what any symmetric quantizer that scales by the largest magnitude computes from it: it is kept without error.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import ConfigError, nearest, shown
from fat_plugins.quantizer import Params
from fat_plugins.rewrites import Rewrite, RewriteReport, layer_of, replace_layer

#: centres below it are nothing to a quantizer, whose scales end there
_FLOOR = 1e-12
#: with so many bits of mantissa, float32 holds every product of a step and a code of 8 bits
_MANTISSA = 17


class SplitParams(Params):
    """Options of the rewrite ``cfws``."""

    threshold: float = Field(
        4.0, ge=0, description="Split kernels whose largest centre tap is this many times their largest neighbour."
    )
    bits: int = Field(8, ge=2, le=8, description="Width of the weights that the host is going to place.")
    per_channel: bool = Field(
        True, description="One step per output channel; false: one per tensor (the authors' no_rep_perchannel)."
    )
    extract_center: bool = Field(
        True, description="False: the coarse part is the whole kernel on its grid, a second dense convolution."
    )
    layers: list[str] | None = Field(
        None, description="Names of the convolutions that may be split, or patterns with *; null: all."
    )


class KernelSplit(NamedTuple):
    """``coarse + fine == weight`` exactly, both in the shape of the weight; ``step`` has one number or C_out."""

    coarse: Tensor
    fine: Tensor
    step: Tensor


def _centre(weight: Tensor) -> tuple[slice | int, ...]:
    return (slice(None), slice(None), *(n // 2 for n in weight.shape[2:]))


def _coarse_step(largest: Tensor, levels: int) -> Tensor:
    """``largest / levels``, rounded up by 2^-16 at most: its products by codes are then exact in float32, and the scale
    that a quantizer computes from the coarse kernel is this very number."""
    mantissa, exponent = torch.frexp(largest.double() / levels)
    step = torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(_MANTISSA))), exponent - _MANTISSA)
    return torch.where(step < _FLOOR, torch.zeros_like(step), step)


@torch.no_grad()
def split_kernel(weight: Tensor, bits: int = 8, per_channel: bool = True, extract_center: bool = True) -> KernelSplit:
    """Coarse and fine part of a kernel (section 3).

    :param weight: C_out x C_in/groups x k x k, every k odd, float32 or float64.
    :param bits: of the coarse grid, whose codes are ``-Q .. Q``, ``Q = 2^(bits-1) - 1``.
    :param per_channel: one step per output channel, else one for all.
    :param extract_center: split the centre tap, else every tap.
    """
    levels = 2 ** (bits - 1) - 1
    part = weight[_centre(weight)] if extract_center else weight.flatten(1)
    largest = part.abs().amax(1) if per_channel else part.abs().amax().reshape(1)
    step = _coarse_step(largest, levels)
    if extract_center and per_channel and part.shape[1] == 1:
        # a single tap is its own grid: all of it is coarse (section 10.6)
        step, coarse = part[:, 0].abs().double() / levels, part
    else:
        unit = step.unsqueeze(1)
        codes = torch.floor(part.double() / torch.where(unit > 0, unit, 1.0) + 0.5)
        coarse = (codes * unit).to(weight.dtype)
    whole = torch.zeros_like(weight)
    if extract_center:
        whole[_centre(weight)] = coarse
    else:
        whole = coarse.reshape(weight.shape)
    return KernelSplit(whole, weight - whole, step)


def centre_ratio(weight: Tensor) -> float:
    """Largest centre tap over the largest neighbour of a kernel; infinite where all neighbours are zero."""
    centre = weight.detach().abs()[_centre(weight)]
    around = weight.detach().abs().clone()
    around[_centre(weight)] = 0
    top, side = float(centre.max()), float(around.max())
    return top / side if side else math.inf if top else 0.0


class CoarseFine(nn.Module):
    """``fine(x) + coarse(x)``, the coarse convolution on what its centre taps read.

    :ivar fine: the convolution that was split, with its bias.
    :ivar coarse: 1x1 with the same stride, without bias; or one of the same shape.
    """

    def __init__(self, fine: nn.Conv2d, extract_center: bool = True) -> None:
        super().__init__()
        self.fine = fine
        where = {"device": fine.weight.device, "dtype": fine.weight.dtype}
        kernel, padding, self.crop = fine.kernel_size, fine.padding, (0, 0)
        if extract_center:
            pairs = zip(kernel, _paddings(fine), fine.dilation, strict=True)
            # how far the first centre lies inside the image
            inside = [d * (k // 2) - p for k, p, d in pairs]
            kernel, padding = (1, 1), tuple(max(0, -n) for n in inside)
            self.crop = tuple(max(0, n) for n in inside)
        self.coarse = nn.Conv2d(
            fine.in_channels, fine.out_channels, kernel, fine.stride, padding,
            dilation=1 if extract_center else fine.dilation, groups=fine.groups, bias=False,
            padding_mode=fine.padding_mode, **where,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """N x C_out x H' x W' of N x C_in x H x W, as the convolution that was split."""
        high, wide = self.crop
        inner = x if not (high or wide) else x[..., high : x.shape[-2] - high, wide : x.shape[-1] - wide]
        return self.fine(x) + self.coarse(inner)


def _paddings(conv: nn.Conv2d) -> list[int]:
    """Rows and columns before the image; after it there are as many, as kernels are odd."""
    if conv.padding == "same":
        return [d * (k // 2) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return [0, 0] if conv.padding == "valid" else list(conv.padding)


class CFWSSplit(Rewrite):
    """Registry entry of the rewrite."""

    name = "cfws"
    title = "Coarse and fine weight splitting"
    paper = "Yang et al., 2023"
    arxiv = "2312.10588"
    fidelity = "B: the split follows the released code, which was executed; the choice of layers by a ratio is ours"
    Params = SplitParams

    @classmethod
    def apply(cls, model: nn.Module, params: SplitParams, example_input: Tensor | None = None) -> RewriteReport:
        """Split every convolution that calls for it. Batch norms should have been folded before."""
        convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        for pattern in params.layers or ():
            if not any(fnmatchcase(name, pattern) for name in convolutions):
                raise ConfigError(
                    f"cfws: layers: no convolution is called {shown(pattern)}{nearest(pattern, convolutions)}"
                )
        report = RewriteReport(cls.name, params.model_dump())
        for name, conv in convolutions.items():
            if (why := _why_not(name, conv, params)) is not None:
                report.left[name] = why
            else:
                ratio = centre_ratio(conv.weight)
                report.changed[name] = {"ratio": ratio if math.isfinite(ratio) else None}
        for name in report.changed:
            conv = convolutions[name]
            coarse, fine, _ = split_kernel(conv.weight, params.bits, params.per_channel, params.extract_center)
            block = CoarseFine(conv, params.extract_center)
            with torch.no_grad():
                block.fine.weight.copy_(fine)
                block.coarse.weight.copy_(coarse[_centre(coarse)][..., None, None] if params.extract_center else coarse)
            replace_layer(model, name, block)
        return report

    @classmethod
    def rebuild(cls, model: nn.Module, params: SplitParams, changed: dict[str, dict[str, Any]]) -> None:
        for name in changed:
            conv = layer_of(model, name, nn.Conv2d)
            if (reason := _unfit(conv)) is not None:
                raise ConfigError(f"cfws: {name}: {reason}")
            replace_layer(model, name, CoarseFine(conv, params.extract_center))


def _why_not(name: str, conv: nn.Conv2d, params: SplitParams) -> str | None:
    """Why a convolution stays as it is, if it does."""
    if (reason := _unfit(conv)) is not None:
        return reason
    if not name:
        return "it is the model itself"
    if params.layers is not None and not any(fnmatchcase(name, p) for p in params.layers):
        return "not among the layers of the options"
    if not bool(torch.isfinite(conv.weight).all()):
        raise ConfigError(f"cfws: {name}: the weight holds NaN or infinite values")
    ratio = centre_ratio(conv.weight)
    if ratio == 0 or ratio < params.threshold:
        return f"centre taps up to {ratio:.3g} times their neighbours, threshold {params.threshold:g}"
    return None


def _unfit(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be split."""
    if type(conv) is not nn.Conv2d or "weight" not in conv._parameters:
        return "its weight is computed, or its class is not torch's own"
    if all(k == 1 for k in conv.kernel_size):
        return "a 1x1 kernel has no neighbours"
    if any(k % 2 == 0 for k in conv.kernel_size):
        return "an even kernel has no centre"
    if conv.weight.dtype not in (torch.float32, torch.float64):
        return f"{str(conv.weight.dtype).removeprefix('torch.')} does not hold coarse and fine parts exactly"
    return None


__all__ = ["CFWSSplit", "CoarseFine", "KernelSplit", "SplitParams", "centre_ratio", "split_kernel"]
