"""The maths of GPFQ without any network: alphabets, what is summed over a layer's inputs, the greedy path.

Sections quoted are those of the project's GPFQ specification. All of it runs in float64. Everything is batched over the
groups ``g`` of a convolution; ``o`` counts the neurons (outputs) of one group, ``d`` the inputs of one neuron, ``m``
the rows of data. ``x`` is what a layer reads in the float network, ``xq`` in the quantized one, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: columns whose share of earlier ones is computed at once
_BLOCK = 64


@dataclass(frozen=True)
class Alphabet:
    """Levels of one neuron in signed codes, and the rule that picks one (section 3).

    Code ``c`` is worth ``c d``; with a gap, ``sign(c) (gap + (|c| - 1) d)``, so that zero stands alone in it.

    :param steps: K. Codes reach to ``-K .. K``, or one further on either side of a gap.
    :param gap: threshold of the L0 mode, 0 for all others.
    :param soft: threshold of the L1 mode, 0 for all others.
    """

    steps: int
    gap: float = 0.0
    soft: float = 0.0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.steps + int(self.gap > 0)

    def step(self, radius: Tensor) -> Tensor:
        """d for levels that end at ``radius`` (any shape). Not positive where the gap leaves no room."""
        return (radius - self.gap) / self.steps

    def codes(self, z: Tensor, d: Tensor, draw: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The codes (in z's dtype) of ``z``; half points go towards plus infinity. NaN stays NaN.

        :param d: broadcastable to ``z``.
        :param draw: SGPFQ: gives numbers of [0, 1) like its argument; the part of a step that is left is then the
            probability of one more.
        """
        if self.gap:
            above = z.abs() - self.gap
            # the threshold itself is zero
            return torch.sign(z) * (_nearest(above / d).clamp(max=self.steps) + 1) * (above > 0)
        if self.soft:
            z = torch.sign(z) * (z.abs() - self.soft).clamp_min(0)
        if draw is not None:
            low = torch.floor(z / d)
            return (low + (draw(z) < z / d - low)).clamp(-self.steps, self.steps)
        return _nearest(z / d).clamp(-self.steps, self.steps)

    def values(self, codes: Tensor, d: Tensor) -> Tensor:
        """What codes (of a float dtype) are worth, in their dtype."""
        if not self.gap:
            return codes * d
        sign = torch.sign(codes)
        # as the two grids of the deployed form are added
        return sign * self.gap + (codes - sign) * d


def _nearest(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------
class Pairs:
    """What the path needs of a layer's inputs in both networks, gathered batch by batch.

    :param weight: ``g x o x d``, float64.
    :param direct: keep the rows themselves and not their products.
    """

    def __init__(self, weight: Tensor, direct: bool) -> None:
        g, _, d = weight.shape
        self.weight, self.direct = weight, direct
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.count = 0
        #: sums of the rows, g x d, and of the squared outputs of the float layer
        self.sum_x, self.sum_q = weight.new_zeros(g, d), weight.new_zeros(g, d)
        self.energy: Tensor | None = weight.new_zeros(())
        if not direct:
            #: H = sum xq^T xq and G = sum xq^T x, g x d x d
            self.h, self.g = weight.new_zeros(g, d, d), weight.new_zeros(g, d, d)

    @classmethod
    def from_products(cls, weight: Tensor, h: Tensor, g: Tensor) -> Pairs:
        """What somebody else has gathered; means and errors are unknown.

        :param h, g: ``sum xq^T xq`` and ``sum xq^T x``, g x d x d, with any common factor.
        """
        pairs = cls(weight, direct=False)
        pairs.h, pairs.g, pairs.energy = h.to(weight), g.to(weight), None
        return pairs

    def add(self, x: Tensor, xq: Tensor) -> None:
        """Rows of both networks, ``g x n x d`` each."""
        x, xq = x.to(self.weight), xq.to(self.weight)
        self.count += x.shape[1]
        self.sum_x += x.sum(1)
        self.sum_q += xq.sum(1)
        self.energy += (x @ self.weight.mT).square().sum()
        if self.direct:
            self.rows.append((x, xq))
        else:
            self.h += xq.mT @ xq
            self.g += xq.mT @ x

    def joined(self) -> tuple[Tensor, Tensor]:
        """All rows, ``g x m x d`` each; of the direct form only."""
        x, xq = zip(*self.rows, strict=True)
        return torch.cat(x, 1), torch.cat(xq, 1)

    def norms(self) -> Tensor:
        """``||X~_t||^2``, g x d."""
        if self.direct:
            return sum(xq.square().sum(1) for _, xq in self.rows)
        return self.h.diagonal(dim1=1, dim2=2)

    def error(self, q: Tensor) -> Tensor:
        """``||X w - X~ q||^2`` over all neurons relative to ``||X w||^2``; 0 where the layer gives nothing or that is
        not known."""
        w = self.weight
        if self.energy is None:
            return w.new_zeros(())
        if self.direct:
            found = sum((x @ w.mT - xq @ q.mT).square().sum() for x, xq in self.rows)
        else:
            found = self.energy + ((q @ self.h - 2 * (w @ self.g.mT)) * q).sum()
        return (found / self.energy.clamp_min(torch.finfo(w.dtype).tiny)).clamp_min(0)

    def lost_mean(self, q: Tensor) -> Tensor:
        """Mean of ``X w - X~ q`` for each neuron, g x o (bias correction)."""
        lost = self.weight @ self.sum_x.unsqueeze(2) - q @ self.sum_q.unsqueeze(2)
        return lost.squeeze(2) / max(self.count, 1)


# --------------------------------------------------------------------------------------------------------------------
# the path
# --------------------------------------------------------------------------------------------------------------------
#: codes (float64) of the values ``z`` of one coordinate, g x o; the second argument is the coordinate of each group
Pick = Callable[[Tensor, Tensor], Tensor]


def follow(pairs: Pairs, pick: Pick, value: Callable[[Tensor], Tensor], order: Tensor | None = None) -> Tensor:
    """Codes (g x o x d, float64) of the greedy path (section 3).

    :param pick: codes of the optima ``z_t``.
    :param value: what codes are worth, g x o each.
    :param order: g x d, the coordinates of each group in the order of the path; default: as they stand.
    """
    g, _, d = pairs.weight.shape
    order = torch.arange(d, device=pairs.weight.device).expand(g, d) if order is None else order
    walk = _direct if pairs.direct else _covariance
    codes = walk(pairs, pick, value, order)
    return torch.empty_like(codes).scatter_(2, order.unsqueeze(1).expand_as(codes), codes)


def _ordered(x: Tensor, order: Tensor, axis: int) -> Tensor:
    index = order.unsqueeze(2 if axis == 1 else 1).expand_as(x)
    return x.gather(axis, index)


def _direct(pairs: Pairs, pick: Pick, value: Callable[[Tensor], Tensor], order: Tensor) -> Tensor:
    """As the authors have it: u is carried along."""
    x, xq = pairs.joined()
    u = x.new_zeros(x.shape[0], pairs.weight.shape[1], x.shape[1])
    codes = torch.empty_like(pairs.weight)
    for t in range(codes.shape[2]):
        at = order[:, t].reshape(-1, 1, 1)
        column, read = x.gather(2, at.expand(-1, x.shape[1], 1)), xq.gather(2, at.expand(-1, x.shape[1], 1))
        w = pairs.weight.gather(2, at.expand(-1, codes.shape[1], 1))
        u = u + w * column.mT
        norm = read.square().sum(1)
        z = (u @ read).squeeze(2)
        z = torch.where(norm > 0, z / norm, 0.0)
        codes[:, :, t] = pick(z, order[:, t])
        u = u - value(codes[:, :, t]).unsqueeze(2) * read.mT
    return codes


def _covariance(pairs: Pairs, pick: Pick, value: Callable[[Tensor], Tensor], order: Tensor) -> Tensor:
    """The same from H and G: ``||X~_t||^2 z_t = sum_(s <= t) G_ts w_s - sum_(s < t) H_ts q_s``."""
    w = _ordered(pairs.weight, order, 2)
    h, g = (_ordered(_ordered(m, order, 1), order, 2) for m in (pairs.h, pairs.g))
    wanted = w @ g.tril().mT
    norms = h.diagonal(dim1=1, dim2=2)
    codes, q = torch.empty_like(w), torch.zeros_like(w)
    for first in range(0, w.shape[2], _BLOCK):
        last = min(first + _BLOCK, w.shape[2])
        ahead = wanted[:, :, first:last] - q[:, :, :first] @ h[:, first:last, :first].mT
        for t in range(first, last):
            own = q[:, :, first:t] @ h[:, t, first:t].unsqueeze(2)
            z = ahead[:, :, t - first] - own.squeeze(2)
            norm = norms[:, t : t + 1]
            codes[:, :, t] = pick(torch.where(norm > 0, z / norm, 0.0), order[:, t])
            q[:, :, t] = value(codes[:, :, t])
    return codes
