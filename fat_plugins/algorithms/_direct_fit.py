"""Fitting levels by least squares, for :mod:`fat_plugins.algorithms.direct` (sections 5.2 and 6 of its specification).

A *table* has a row for every code and P columns; a level is the product of a row with the basis of P positive numbers.
P is the number of bits, or 1 where the bits are tied to 1, 2, 4, ... times one number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fat_plugins.functional import per_channel_view, wide
from fat_plugins.kernels import evaluate, total

#: no entry of a basis falls below it
LEVEL_FLOOR = 1e-6
#: half gaps are at least this where something is divided by them
UNIT_ERROR = 1e-8
_DAMPING = 1e-4
_MOST_ROUNDS = 20
_LEAST_MARGIN = 0.02
_ENERGY_FLOOR = 1e-3
_RIDGE = 1e-6


def bit_table(bits: int, signed: bool) -> Tensor:
    """Every code, the first bit changing fastest: 2^K x K, entries 0 and 1, or -1 and +1 when ``signed``."""
    codes = (torch.arange(2**bits).unsqueeze(1) >> torch.arange(bits)) & 1
    return (2 * codes - 1 if signed else codes).float()


def basis_codes(bits: int, signed: bool, tied: bool) -> Tensor:
    """The table of levels: :func:`bit_table`, or its product with 1, 2, 4, ... in one column."""
    table = bit_table(bits, signed)
    return table @ (2.0 ** torch.arange(bits)).unsqueeze(1) if tied else table


def sorted_levels(table: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending levels (2^K) of a basis (P), and the rows of the table in their order. Equal levels keep theirs."""
    values, order = torch.sort((table * basis).sum(1), stable=True)
    return values, table[order]


def integer_table(table: Tensor, basis: Tensor, most: int) -> Tensor:
    """Ascending levels as integers (int64), the one of largest magnitude being ``most``."""
    values = (table.double() * basis.double()).sum(1) / basis.double().sum() * most
    return torch.sort(torch.round(values).long()).values


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class Tally(NamedTuple):
    """What a least-squares step needs of a batch, by channel (C) and level (M): means over the channel's elements.

    :ivar share: C x M, fraction of the elements at each level.
    :ivar moment: C x M, sum of those elements divided by how many the channel has.
    :ivar mean_square: C.
    """

    share: Tensor
    moment: Tensor
    mean_square: Tensor

    def over_processes(self) -> Tally:
        """The mean over all processes of a distributed training, which see batches of one size."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self
        both = torch.cat([self.share, self.moment, self.mean_square.unsqueeze(1)], 1)
        distributed.all_reduce(both)
        both = both / distributed.get_world_size()
        levels = self.share.shape[1]
        return Tally(both[:, :levels], both[:, levels:-1], both[:, -1])


def channel_tally(x: Tensor, thresholds: Tensor, axis: int = 0) -> Tally:
    """Count a batch by the thresholds (M - 1, ascending), one after the other in one buffer.

    NaN and infinity make the tally NaN, which :func:`fit_step` looks for.

    :param x: float tensor whose channels lie along ``axis``; one channel where it has no such axis.
    """
    channels = x.shape[axis] if x.ndim > axis else 1
    count = x.numel() // channels
    pattern = per_channel_view(x.new_zeros(channels), x.ndim, axis)
    _, sums = evaluate(_tally, (x,), (pattern,), (thresholds.to(wide(x).dtype),), values=False)
    total_, square, *found = (s.reshape(-1) / count for s in sums)
    above, beyond = [torch.ones_like(total_), *found[::2]], [total_, *found[1::2]]
    none = torch.zeros_like(total_)
    share = torch.stack(above, 1) - torch.stack([*above[1:], none], 1)
    moment = torch.stack(beyond, 1) - torch.stack([*beyond[1:], none], 1)
    return Tally(share, moment, square)


def _tally(out: None, x: Tensor, pattern: Tensor, thresholds: Tensor):
    """By channel: the sum and the sum of squares; for each threshold how many are above it, and their sum."""
    x = wide(x)
    sums = [total(x, pattern), total(x.square(), pattern)]
    for threshold in thresholds.unbind():
        above = torch.gt(x, threshold, out=torch.empty_like(x))
        sums.append(total(above, pattern))
        sums.append(total(above.mul_(x), pattern))
    return None, tuple(sums)


def channel_weights(kind: Literal["norm", "l21", "none"], cap: float, energy: Tensor, error: Tensor) -> Tensor:
    """omega (C, mean 1) of section 5.2. Channels whose statistics overflowed count 1.

    :param energy: moving mean square of every channel.
    :param error: mean squared quantization error of every channel.
    """
    if kind == "none":
        return torch.ones_like(energy)
    if kind == "norm":
        raw = 1 / (energy + _ENERGY_FLOOR * energy.mean())
        raw = (raw / raw.median()).clamp(max=cap)
    else:
        raw = 1 / (error.sqrt() + _ENERGY_FLOOR * error.mean().sqrt())
    omega = raw / raw.mean()
    return torch.where(torch.isfinite(omega), omega, torch.ones_like(omega))


def fit_step(
    tally: Tally, values: Tensor, codes: Tensor, basis: Tensor, energy: Tensor, kind: str, cap: float
) -> Tensor:
    """``(A + r I)^-1 (y + r v)``, at least 1e-6, ascending; ``basis`` where the batch is not finite.

    :param values, codes: of :func:`sorted_levels`, by which the batch was counted.
    :param energy: moving mean square of every channel, for ``kind`` "norm".
    """
    error = tally.mean_square - 2 * (tally.moment * values).sum(1) + (tally.share * values.square()).sum(1)
    omega = channel_weights(kind, cap, energy.to(values.dtype), error.clamp_min(0))
    share, moment = (omega.unsqueeze(1) * tally.share).sum(0), (omega.unsqueeze(1) * tally.moment).sum(0)
    a = codes.T @ (share.unsqueeze(1) * codes)
    ridge = _RIDGE * a.diagonal().mean()
    right = (moment.unsqueeze(1) * codes).sum(0) + ridge * basis
    new = solve(a + ridge * torch.eye(len(basis), dtype=a.dtype, device=a.device), right)
    new = torch.where(torch.isfinite(new).all(), new, basis)
    return torch.sort(new.clamp_min(LEVEL_FLOOR)).values


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solution of a system of at most a few positive-definite equations, batched (... x P x P, ... x P).

    By elimination in tensor operations: torch's own solvers synchronise with the device.
    """
    rows = torch.cat([matrix, right.unsqueeze(-1)], -1)
    size = right.shape[-1]
    for i in range(size):
        pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        others = (torch.arange(size, device=rows.device) != i).to(rows.dtype).unsqueeze(-1)
        rows = rows - others * rows[..., i : i + 1] * pivot
        rows = torch.where(others.bool(), rows, pivot)
    return rows[..., -1]


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
class _Fit(NamedTuple):
    basis: Tensor  # C x P
    index: Tensor  # C x n, position of each weight's level among the sorted ones
    order: Tensor  # C x M, row of the table of each sorted level


def _assign(rows: Tensor, basis: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted levels (C x M), the table's rows in their order and the index of each weight's level (ties go down)."""
    values, order = torch.sort(basis @ table.T, dim=1, stable=True)
    return values, order, torch.searchsorted(midpoints_of(values), rows.contiguous())


def midpoints_of(values: Tensor) -> Tensor:
    """Thresholds (C x (M - 1)) between ascending levels (C x M)."""
    return ((values[:, 1:] + values[:, :-1]) / 2).contiguous()


def qem(rows: Tensor, bits: int, tied: bool, rounds: int = _MOST_ROUNDS) -> tuple[Tensor, Tensor]:
    """Least-squares levels of every row by alternation (section 6.1 a and b).

    :param rows: C x n in float64.
    :return: basis (C x P, positive, ascending) and bits (K x C x n, -1 and +1).
    """
    table = basis_codes(bits, True, tied).to(rows)
    planes = bit_table(bits, True).to(rows)
    width = table.shape[1]
    start = rows.abs().mean(1, keepdim=True) * 2.0 ** (1 - bits)
    basis = start * (2.0 ** torch.arange(width, dtype=rows.dtype, device=rows.device))
    code = None
    for _ in range(rounds):
        _, order, index = _assign(rows, basis, table)
        found = order.gather(1, index)
        if code is not None and torch.equal(found, code):
            break
        code = found
        chosen = table[code]  # C x n x P
        a = chosen.transpose(1, 2) @ chosen + _DAMPING * torch.eye(width).to(rows)
        y = (chosen.transpose(1, 2) @ rows.unsqueeze(2)).squeeze(2) + _DAMPING * basis
        basis = solve(a, y)
        code, basis = _canonical(code, basis, bits, tied)
    return basis.clamp_min(LEVEL_FLOOR), planes[code].movedim(2, 0)


def _canonical(code: Tensor, basis: Tensor, bits: int, tied: bool) -> tuple[Tensor, Tensor]:
    """Positive and ascending entries, the codes (bits as an integer) turned and permuted along."""
    flip = basis < 0
    basis = basis.abs()
    if tied:
        return torch.where(flip, 2**bits - 1 - code, code), basis
    basis, order = torch.sort(basis, dim=1, stable=True)
    flip = flip.gather(1, order)
    out = torch.zeros_like(code)
    for k in range(bits):
        bit = (code >> order[:, k : k + 1]) & 1
        out |= (bit ^ flip[:, k : k + 1].long()) << k
    return out, basis


def initial_weight(rows: Tensor, bits: int, tied: bool) -> tuple[Tensor, Tensor]:
    """Auxiliary variables and basis of a float weight (section 6.1).

    The magnitude of an auxiliary variable is the distance of its weight to the nearest threshold at which its bit
    changes, in units of half the mean gap, within [0.02, 1]; its sign is the bit.

    :param rows: C x n in float64.
    :return: K x C x n in [-1, 1], and P x C.
    """
    basis, planes = qem(rows, bits, tied)
    table = basis_codes(bits, True, tied).to(rows)
    values, order = torch.sort(basis @ table.T, dim=1, stable=True)
    thresholds, sorted_bits = midpoints_of(values), bit_table(bits, True).to(rows)[order]  # C x (M-1), C x M x K
    half_gap = ((values[:, -1:] - values[:, :1]) / (2 * (2**bits - 1))).clamp_min(UNIT_ERROR)
    margin = torch.full_like(planes, torch.inf)
    for m in range(2**bits - 1):
        distance = (rows - thresholds[:, m : m + 1]).abs()
        for k in range(bits):
            changes = (sorted_bits[:, m, k] != sorted_bits[:, m + 1, k]).unsqueeze(1)
            margin[k] = torch.where(changes, torch.minimum(margin[k], distance), margin[k])
    return planes * (margin / half_gap).clamp(_LEAST_MARGIN, 1), basis.T
