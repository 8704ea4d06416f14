"""Codes of activations compared: what differs, and how close to a rounding threshold that is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import per_channel_view

#: codes are compared as real numbers in units of the step: this much relative deviation is float noise
_STEP_TOLERANCE = 1e-4


def ends(form: Form) -> tuple[int, int]:
    """Lowest and highest integer of an activation's form."""
    return (form.low, form.high) if isinstance(form, UniformGrid) else (int(form.levels[0]), int(form.levels[-1]))


def _scale(form: Form, ndim: int) -> Tensor:
    return per_channel_view(form.scale.double(), ndim, form.channel_axis)


def differs(form: Form, values: Tensor, codes: Tensor) -> Tensor:
    """Where quantized ``values`` of the runtime are not what ``codes`` stand for. Not rounded or clipped on the way, so
    that a wrong scale or a missing clamp shows."""
    wanted = form.integers(codes).double()
    steps = values.double() / _scale(form, values.ndim)
    return ~((steps - wanted).abs() <= _STEP_TOLERANCE * wanted.abs().clamp(min=1))


def quantizer_guard(form: Form, tie_guard: float) -> float:
    """Within how many steps of a threshold two runtimes may round one number differently: the arithmetic of rounding
    itself, on a carrier of 8 bits."""
    return tie_guard * max(1.0, max(map(abs, ends(form))) / 255) if isinstance(form, UniformGrid) else tie_guard


def input_guard(form: Form, tie_guard: float) -> float:
    """Within how many steps of a threshold the sums of a layer may come out differently: in proportion to the range, as
    the rounding of float32 sums is."""
    return tie_guard * max(1.0, max(map(abs, ends(form))) / 15)


def off_tie(form: Form, x: Tensor, codes: Tensor, where: Tensor, guard: float) -> Tensor:
    """``x`` moved away from the threshold, within torch's own code, where the runtime decided a tie otherwise."""
    out, step = x.clone(), _scale(form, x.ndim)
    for move in (4 * guard, -4 * guard):
        moved = (x.double() + move * step).to(x.dtype)
        out = torch.where(where & (form.encode(moved) == codes), moved, out)
    return out


def input_error(form: Form, x: Tensor, computed: Tensor) -> float:
    """Largest deviation in steps, both clipped to the ends of the grid."""
    scale, bounds = _scale(form, x.ndim), ends(form)
    a, b = ((v.double() / scale).clamp(*bounds) for v in (x, computed))
    return float((a - b).abs().max()) if a.numel() else 0.0


def largest(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest deviation; infinity where the shapes differ or something is not a number."""
    if found.shape != wanted.shape:
        return float("inf")
    error = float(np.abs(found.astype(np.float64) - wanted).max()) if wanted.size else 0.0
    return error if error == error else float("inf")
