"""The inputs of single outputs of a layer as the rows of a matrix, for algorithms that look at what a layer reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fat_plugins.errors import QuantizationError
from fat_plugins.quantizer import TensorSpec


def is_transposed(spec: TensorSpec) -> bool:
    """Whether the weight is that of a transposed convolution."""
    return spec.channel_axis == 1 and len(spec.shape) > 2


def input_rows(
    x: Tensor,
    spec: TensorSpec,
    choose: Callable[[int, int, torch.device], Tensor],
    *,
    groups: int | None = None,
    stride: tuple[int, ...] | None = None,
) -> Tensor:
    """Inputs of single outputs, ``groups x n x d``: unfolded patches of ``x``, input channel first, then the kernel's
    axes. Zeros of the padding are part of them.

    :param x: input of the layer: ``N x C x spatial`` for convolutions, ``... x C`` for linear layers.
    :param choose: ``choose(samples, positions, device)`` gives the indices of the outputs that are looked at: 1-d for
        all samples alike, or ``samples x n``.
    :param groups: blocks that the input channels are split into; default: those of the convolution.
    :param stride: in the place of the layer's own (not for transposed convolutions).
    :raises QuantizationError: ``x`` has other channels than the weight, or is smaller than the kernel.
    """
    x = x.detach()
    transposed, spatial = is_transposed(spec), len(spec.shape) - 2
    channels = spec.shape[0] if transposed else spec.shape[1 - spec.channel_axis] * spec.groups
    at = x.ndim - 1 - spatial
    if at < 0 or x.shape[at] != channels:
        raise QuantizationError(
            f"{spec.name}: input of shape {list(x.shape)}; expected {channels} channels at axis {at}"
        )
    if spatial < 1:
        x = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, channels)
        return _chosen(x.transpose(1, 2), choose(len(x), x.shape[1], x.device)).transpose(1, 2).reshape(1, -1, channels)
    x = x.reshape(-1, *x.shape[at:])
    kernel = spec.shape[2:]
    own, dilation = spec.stride or (1,) * spatial, spec.dilation or (1,) * spatial
    stride = own if stride is None or transposed else stride
    padding = list(spec.padding or (0,) * (2 * spatial))
    if transposed:  # the convolution of the input with zeros between its values, kernel reversed
        x = _stuffed(x, own)
        padding = [dilation[i // 2] * (kernel[i // 2] - 1) - p for i, p in enumerate(padding)]
        stride = (1,) * spatial
    pairs = [padding[2 * i : 2 * i + 2] for i in reversed(range(spatial))]
    x = F.pad(x, [n for pair in pairs for n in pair])
    sizes = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(spatial)]
    if min(sizes) < 1:
        raise QuantizationError(f"{spec.name}: the input is smaller than the kernel {list(kernel)}")
    taps, chosen = [], choose(len(x), torch.Size(sizes).numel(), x.device)
    for offset in product(*map(range, kernel)):
        if transposed:
            offset = tuple(k - 1 - o for k, o in zip(kernel, offset, strict=True))
        where = [slice(o * d, o * d + s * (n - 1) + 1, s)
                 for o, d, s, n in zip(offset, dilation, stride, sizes, strict=True)]  # fmt: skip
        taps.append(_chosen(x[(slice(None), slice(None), *where)].flatten(2), chosen))
    patches = torch.stack(taps, 2)  # N x C x K x P
    g = spec.groups if groups is None else groups
    patches = patches.reshape(len(patches), g, -1, patches.shape[-1])
    return patches.permute(1, 0, 3, 2).reshape(g, -1, patches.shape[2])


def _chosen(x: Tensor, positions: Tensor) -> Tensor:
    """``N x C x P`` of ``N x C x L``."""
    if positions.ndim == 1:
        return x[:, :, positions]
    return x.gather(2, positions.unsqueeze(1).expand(-1, x.shape[1], -1))


def _stuffed(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return out
