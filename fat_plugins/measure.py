"""Numbers about quantized tensors that reports and summaries share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fat_plugins.forms import Form, SumOfGrids, UniformGrid

#: what a signal-to-noise ratio without any noise counts as, in dB
LOSSLESS = 999.0


@dataclass(frozen=True)
class Error:
    """How far a tensor is from its reference.

    :param sqnr_db: ``10 log10(|reference|^2 / |reference - value|^2)``, at most 999 (equal).
    :param relative_mse: the inverse of the same ratio, not in decibels.
    :param gain: the factor on the value that was chosen to make the error smallest; 1 where none was.
    """

    sqnr_db: float
    relative_mse: float
    gain: float = 1.0


@torch.no_grad()
def error_of(reference: Tensor, value: Tensor, *, fit: bool = False) -> Error | None:
    """Error of ``value`` against ``reference`` (same number of elements), ``None`` where the reference is all zero.

    :param fit: choose the single factor on ``value`` that makes the error smallest (a batch norm behind a layer
        absorbs any, and some algorithms rely on that).
    """
    a, b = reference.detach().double().flatten(), value.detach().double().flatten().to(reference.device)
    power, own = float(a @ a), float(b @ b)
    if not power or not math.isfinite(power) or not math.isfinite(own):
        return None
    gain = float(a @ b) / own if fit and own else 1.0
    difference = a - gain * b
    ratio = float(difference @ difference) / power
    return Error(min(-10 * math.log10(ratio), LOSSLESS) if ratio > 0 else LOSSLESS, ratio, gain)


@torch.no_grad()
def cosine(a: Tensor, b: Tensor) -> float | None:
    """Cosine of the angle between two tensors of as many elements, ``None`` where one is all zero."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten().to(a.device)
    length = float(a.norm()) * float(b.norm())
    return float(a @ b) / length if length else None


def packed_bytes(elements: int, form: Form) -> int:
    """Bytes of codes at their width, and of float32 scales."""
    scales = sum(p.scale.numel() for p in form.parts) if isinstance(form, SumOfGrids) else form.scale.numel()
    return -(-elements * form.bits // 8) + 4 * scales


def code_count(form: Form) -> int:
    """How many codes a form has."""
    if isinstance(form, UniformGrid):
        return form.high - form.low + 1
    if isinstance(form, SumOfGrids):
        return form.allowed.numel() if form.allowed is not None else math.prod(code_count(p) for p in form.parts)
    return form.levels.numel()


def sqnr_text(value: float | None) -> str:
    """``23.4``, ``equal`` where there is no noise."""
    return "-" if value is None else "equal" if value >= LOSSLESS else f"{value:.1f}"


def scale_text(scale: Tensor) -> str:
    """``0.0123``, or the range of several: ``0.01 to 0.03``."""
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.3g}" if scale.numel() == 1 or low == high else f"{low:.3g} to {high:.3g}"


__all__ = ["Error", "code_count", "cosine", "error_of", "packed_bytes", "scale_text", "sqnr_text"]
