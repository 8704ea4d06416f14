"""Numbers that tell two quantizers apart: around every rounding threshold, at the ends, zeros, tiny and huge ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fat_plugins.forms import Codebook, Staircase, UniformGrid

#: zeros, the smallest and the largest floats, and what lies between them
_SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-20, -1e-20, 1e20, -1e20, 3.4e38, -3.4e38)


def thresholds(form: UniformGrid | Codebook | Staircase) -> Tensor:
    """Where the code of ``x / scale`` changes: ascending, one row for each channel (or for all), float64."""
    if isinstance(form, UniformGrid):
        return torch.arange(form.low, form.high, dtype=torch.float64)[None] + 0.5
    steps = form.thresholds.detach().cpu().double()
    return steps.reshape(-1, steps.shape[-1])


def points(form: UniformGrid | Codebook | Staircase, distance: float, ulps: int = 0) -> Tensor:
    """Inputs (float32) beside the thresholds, one row for each channel (or for all).

    :param distance: in steps, on both sides of every threshold.
    :param ulps: also the thresholds themselves and so many neighbours of theirs among the float32 numbers.
    """
    steps, scale = thresholds(form), form.scale.detach().cpu().double().reshape(-1, 1)
    real = [((steps + move) * scale).float() for move in (-distance, distance)]
    if ulps:
        up = down = (steps * scale).float()
        real.append(up)
        for _ in range(ulps):
            up, down = up.nextafter(torch.tensor(torch.inf)), down.nextafter(torch.tensor(-torch.inf))
            real += [up, down]
    # beyond the ends by half a step and by many
    first, last = steps[:, :1], steps[:, -1:]
    real += [((end + move) * scale).float() for end, move in ((first, -0.5), (last, 0.5), (first, -300), (last, 300))]
    special = torch.tensor(_SPECIAL).expand(max(len(r) for r in real), -1)
    return torch.cat([r.expand(len(special), -1) for r in (*real, special)], dim=1).clamp(-3.4e38, 3.4e38)


def fill(shape: torch.Size | tuple[int, ...], rows: Tensor, axis: int, start: int = 0) -> Tensor:
    """A tensor that holds the points of each channel in turn, evenly chosen ones where there is not room for all.

    :param rows: from :func:`points`; with several rows, one for each channel along ``axis``.
    :param start: the first point.
    """
    out = torch.empty(shape)
    moved = out.movedim(axis, 0) if len(rows) > 1 else out.reshape(1, -1)
    room = moved[0].numel()
    if not room:
        return out
    count = rows.shape[1]
    index = torch.arange(room) * count // room if room < count else torch.arange(room)
    moved.copy_(rows[:, (index + start) % count].reshape(moved.shape))
    return out
