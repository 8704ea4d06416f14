"""The clip with the least quantization error on data, for algorithms whose papers start from a constant.

The largest activation is a bad start at low bits: a few outliers take most of the levels, and a clip that learns with
the network's rate stays near them for hundreds of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: elements of a batch that are looked at, and candidates between nothing and the largest value
SAMPLES, CANDIDATES = 16384, 100


def best_clip(x: Tensor, quantize: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The clip with the least mean squared error, among hundredths of the largest magnitude; 0 for a tensor of zeros.

    :param x: float tensor of any shape; 16384 evenly spaced elements at most are looked at.
    :param quantize: ``quantize(x, clip)`` gives the quantized ``x`` (1-d) for a clip (0-d).
    """
    flat = x.detach().reshape(-1)
    largest = flat.abs().max()
    if not bool(largest > 0):
        return 0.0
    flat = flat[:: max(1, -(-flat.numel() // SAMPLES))] / largest
    clips = torch.arange(1, CANDIDATES + 1, device=x.device, dtype=flat.dtype) / CANDIDATES
    errors = [(quantize(flat, clip) - flat).square_().mean() for clip in clips]
    return float(clips[int(torch.stack(errors).argmin())]) * float(largest)


class ClipSearch:
    """Geometric mean of the best clips of several batches. It lives as long as a calibration and is no state."""

    def __init__(self) -> None:
        self._signed: bool | None = None
        self._count, self._total = 0, 0.0

    def add(self, x: Tensor, quantize: Callable[[Tensor, Tensor], Tensor], *, signed: bool, first: bool) -> float:
        """The clip after one more batch; 0 while all values were zero.

        :param signed: whether the grid is signed; where that changes, earlier batches count no more.
        :param first: begin anew.
        """
        if first or signed != self._signed:
            self._signed, self._count, self._total = signed, 0, 0.0
        if clip := best_clip(x, quantize):
            self._count, self._total = self._count + 1, self._total + math.log(clip)
        return math.exp(self._total / self._count) if self._count else 0.0
