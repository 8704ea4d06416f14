"""Multiply-accumulates of a layer, from its weight and its input."""

from __future__ import annotations

import math

from torch import Tensor

from fat_plugins.quantizer import TensorSpec


def multiply_accumulates(spec: TensorSpec, x: Tensor) -> int | None:
    """Multiply-accumulates that the layer of a weight spends on a whole batch, those with padding included.

    :param spec: of the weight.
    :param x: input of the layer: ``N x C x spatial`` or ``C x spatial`` for convolutions, ``... x C`` for linear
        layers. Only its shape is read. Integers are indices of a look-up, which multiplies nothing.
    :return: ``None`` where the input does not fit the weight, so that the layer is none of these.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return 0
    kernel, transposed = spec.shape[2:], spec.channel_axis == 1
    at = x.ndim - 1 - len(kernel)  # the axis of the channels
    if len(spec.shape) < 2 or spec.channel_axis > 1 or at < 0:
        return None
    if x.shape[at] != (spec.shape[0] if transposed else spec.shape[1] * spec.groups):
        return None
    sizes = list(x.shape[at + 1 :])
    if not transposed:  # else every position of the input is multiplied by the whole kernel
        n = len(kernel)
        stride, dilation, padding = spec.stride or (1,) * n, spec.dilation or (1,) * n, spec.padding or (0,) * (2 * n)
        sizes = [
            (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, size in enumerate(sizes)
        ]
    if any(size < 1 for size in sizes):
        return None
    return math.prod(spec.shape) * math.prod(sizes) * math.prod(x.shape[:at])
