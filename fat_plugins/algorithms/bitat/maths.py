"""The maths of BiTAT without any state of training: input statistics, importance metric, solver, k-means.

Sections quoted are those of the project's BiTAT specification. All of it runs in float64, outside autocast, when a
stage begins; nothing here is part of a training step. Everything is batched over the groups ``g`` of a convolution;
``d`` counts the inputs of one output, ``o`` the outputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from fat_plugins import unfold
from fat_plugins.quantizer import TensorSpec

_ROWS_PER_SAMPLE = 196  # 1024 samples times this are the 2e5 rows of section 3.1
_MOST_ROWS = 200_000
_SWEEPS = 20
_KMEANS_STEPS = 50
ALPHA_FLOOR = 1e-8


def sign(x: Tensor) -> Tensor:
    """-1 or +1 of the same shape and dtype; ``sgn(0) = +1`` (section 2)."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# layers as matrices
# --------------------------------------------------------------------------------------------------------------------
def groups_of(spec: TensorSpec) -> int:
    """How many blocks of outputs have inputs of their own. The groups of a transposed convolution share the scales
    of their outputs, so they are one block whose metric knows no cross terms."""
    return 1 if unfold.is_transposed(spec) else spec.groups


def to_columns(weight: Tensor, spec: TensorSpec) -> Tensor:
    """A weight as ``g x d x o``: one column per filter, in the order of ``weight.flatten(1)`` (section 2)."""
    rows = weight.movedim(spec.channel_axis, 0)
    rows = rows.reshape(rows.shape[0], -1)
    g = groups_of(spec)
    return rows.reshape(g, rows.shape[0] // g, rows.shape[1]).transpose(1, 2)


def from_columns(columns: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of :func:`to_columns`."""
    moved = [spec.shape[spec.channel_axis], *(n for i, n in enumerate(spec.shape) if i != spec.channel_axis)]
    return columns.transpose(1, 2).reshape(moved).movedim(0, spec.channel_axis)


def input_rows(x: Tensor, spec: TensorSpec) -> Tensor:
    """Inputs of single outputs, ``g x n x d``: unfolded patches of ``x`` in the order of the weight's columns.

    At most 196 evenly spaced positions per sample. Zeros of the padding are part of the distribution (section 10).

    :param x: input of the layer: ``N x C x spatial`` for convolutions, ``... x C`` for linear layers.
    :raises QuantizationError: ``x`` has other channels than the weight.
    """
    return unfold.input_rows(x, spec, _positions, groups=groups_of(spec))


def _positions(samples: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(0, count, max(1, ceil(count / _ROWS_PER_SAMPLE)), device=device)


# --------------------------------------------------------------------------------------------------------------------
# section 3.1: statistics
# --------------------------------------------------------------------------------------------------------------------
class Moments:
    """Streaming float64 sums ``n``, ``sum x`` and ``sum x x^T`` of a layer's input, per group."""

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(groups, size, dtype=torch.float64, device=device)
        self.outer = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        """``rows``: ``g x n x d``; what exceeds 2e5 rows in all is left out."""
        rows = rows[:, : max(0, _MOST_ROWS - self._rows)].double()
        self._rows += rows.shape[1]
        self.count += rows.shape[1]
        self.sum += rows.sum(1)
        self.outer += rows.transpose(1, 2) @ rows

    def reduce(self) -> None:
        """Sums over all processes of a distributed run."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (self.count, self.sum, self.outer):
                torch.distributed.all_reduce(tensor)

    def covariance(self) -> tuple[Tensor, Tensor]:
        """``mu`` (g x d) and the centred ``Sigma`` (g x d x d); zeros when nothing was seen."""
        n = self.count.clamp_min(1)
        mean = self.sum / n
        return mean, self.outer / n - mean.unsqueeze(2) * mean.unsqueeze(1)


# --------------------------------------------------------------------------------------------------------------------
# sections 3.2, 3.3, 3.7: the metric
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Metric:
    """``M = P^T V diag(s^2) V^T P + s_perp^2 (I - P^T P)`` per group, or ``V diag(s^2) V^T`` without reduction.

    :param basis: V, ``g x k x k``, orthonormal columns.
    :param importance: s, ``g x k``.
    :param mean: mu, ``g x d``.
    :param level: lambda_bar, ``g``.
    :param reduction: P, ``g x k x d``, or ``None`` where k = d.
    :param residual: s_perp^2, ``g`` (0 without reduction).
    :param blind: no input varies in a group, so that M = I there.
    """

    basis: Tensor
    importance: Tensor
    mean: Tensor
    level: Tensor
    reduction: Tensor | None
    residual: Tensor
    blind: bool = False

    def __post_init__(self) -> None:
        scaled = self.basis * self.importance.unsqueeze(1)
        self._inner = scaled @ scaled.transpose(1, 2)

    def times(self, e: Tensor) -> Tensor:
        """``M e``, ``g x d x o``."""
        if self.reduction is None:
            return self._inner @ e
        p, r = self.reduction, self.residual.reshape(-1, 1, 1)
        low = p @ e
        return p.transpose(1, 2) @ (self._inner @ low - r * low) + r * e

    def diagonal(self) -> Tensor:
        """``M_ii``, ``g x d``."""
        if self.reduction is None:
            return self._inner.diagonal(dim1=1, dim2=2)
        p, r = self.reduction, self.residual.reshape(-1, 1)
        return ((self._inner @ p) * p).sum(1) + r * (1 - (p * p).sum(1))

    def column(self, index: Tensor) -> Tensor:
        """Column ``index[g]`` of every group's M, ``g x d``, formed on the fly."""
        group = torch.arange(len(index), device=index.device)
        if self.reduction is None:
            return self._inner[group, :, index]
        p = self.reduction
        low = p[group, :, index].unsqueeze(2)
        out = (p.transpose(1, 2) @ (self._inner @ low - self.residual.reshape(-1, 1, 1) * low)).squeeze(2)
        out[group, index] += self.residual
        return out

    def objective(self, e: Tensor) -> Tensor:
        """``J = tr(E^T M E)`` summed over groups (section 3.4), a scalar."""
        return (e * self.times(e)).sum()


def make_metric(
    mean: Tensor, sigma: Tensor, count: float, *, eps: float, k_max: int, seed: int = 0, blocks: int = 1
) -> Metric:
    """PCA of the input correlation (section 3.3), aggregated to ``k_max`` dimensions when there are more (3.7).

    :param mean, sigma: from :meth:`Moments.covariance`.
    :param count: rows that they stand on; fewer than 10 d are shrunk towards the identity (section 10).
    :param blocks: equal blocks of inputs that never meet (grouped transposed convolutions).
    """
    d = sigma.shape[-1]
    if blocks > 1:
        block = torch.arange(d, device=sigma.device) // (d // blocks)
        sigma = sigma * (block.unsqueeze(0) == block.unsqueeze(1))
    level = sigma.diagonal(dim1=1, dim2=2).mean(1)
    # what is left of a constant input by rounding is no variance
    power = level + mean.square().mean(1)
    blind = (level <= 1e-12 * power) | (level <= torch.finfo(torch.float64).tiny)
    identity = torch.eye(d, dtype=sigma.dtype, device=sigma.device).expand_as(sigma)
    sigma = torch.where(blind.reshape(-1, 1, 1), identity, sigma)
    level = torch.where(blind, torch.ones_like(level), level)
    if count < 10 * d:
        rho = min(0.5, d / max(count, 1.0))
        sigma = (1 - rho) * sigma + rho * level.reshape(-1, 1, 1) * identity
    reduction, residual = None, torch.zeros_like(level)
    reduced = sigma
    if d > k_max:
        reduction = torch.stack([_reduction(s, k_max, seed) for s in sigma])
        reduced = reduction @ sigma @ reduction.transpose(1, 2)
        outside = d * level - reduced.diagonal(dim1=1, dim2=2).sum(1)
        residual = (outside / ((d - k_max) * level)).clamp_min(eps)
    values, vectors = torch.linalg.eigh(reduced)
    importance = (values.flip(1) / level.unsqueeze(1)).clamp_min(eps).sqrt()
    return Metric(vectors.flip(2), importance, mean, level, reduction, residual, bool(blind.any()))


def identity_metric(groups: int, d: int, k_max: int, device: torch.device) -> Metric:
    """The metric of a layer about whose input nothing is known."""
    zeros = torch.zeros(groups, d, dtype=torch.float64, device=device)
    sigma = torch.eye(d, dtype=torch.float64, device=device).expand(groups, d, d)
    metric = make_metric(zeros, sigma, float("inf"), eps=1e-4, k_max=k_max)
    return replace(metric, blind=True)


def _reduction(sigma: Tensor, k: int, seed: int) -> Tensor:
    """P (k x d) with ``P P^T = I``: k-means on the rows of the correlation matrix (section 3.7)."""
    deviation = sigma.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation.clamp_min(1e-300), torch.zeros_like(deviation))
    labels = kmeans((sigma * inverse * inverse.unsqueeze(1)).float(), k, seed)
    p = F.one_hot(labels, k).T.to(sigma.dtype)
    return p / p.sum(1, keepdim=True).sqrt()


def kmeans(rows: Tensor, k: int, seed: int) -> Tensor:
    """Labels (n) of ``k`` non-empty clusters of ``rows`` (n x m, n >= k): k-means++ start, at most 50 steps.

    Deterministic: the draws come from a generator on the CPU that depends on ``seed`` only.
    """
    n = len(rows)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(n, (), generator=generator))]
    nearest = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < k:
        chances = nearest.double().cpu()
        chances[chosen] = 0
        if float(chances.sum()) <= 0:  # copies of the centres: any row that is none yet
            chances = torch.ones(n, dtype=torch.float64)
            chances[chosen] = 0
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    centres, labels = rows[chosen], None
    for _ in range(_KMEANS_STEPS):
        distances = torch.cdist(rows, centres)
        new = _without_empty(distances.argmin(1), distances, k)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        counts = torch.bincount(labels, minlength=k).to(rows.dtype).unsqueeze(1)
        centres = torch.zeros_like(centres).index_add_(0, labels, rows) / counts
    return labels


def _without_empty(labels: Tensor, distances: Tensor, k: int) -> Tensor:
    """An empty cluster takes the row that is farthest from its own centre, from a cluster that can spare it."""
    labels = labels.clone()
    far = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
    for empty in (torch.bincount(labels, minlength=k) == 0).nonzero().flatten().tolist():
        spare = torch.bincount(labels, minlength=k)[labels] > 1
        row = torch.where(spare, far, torch.full_like(far, -1)).argmax()
        labels[row], far[row] = empty, 0
    return labels


# --------------------------------------------------------------------------------------------------------------------
# section 3.5: the solver
# --------------------------------------------------------------------------------------------------------------------
def solve(weight: Tensor, metric: Metric, shared: bool = False) -> tuple[Tensor, Tensor, list[float]]:
    """``argmin J`` over signs and positive scales, by coordinate descent in the order of importance.

    :param weight: columns, ``g x d x o``, float64.
    :param shared: one scale for the whole layer instead of one per column.
    :return: signs (``g x d x o``), scales (``g x o``) and J after every step, never increasing.
    """
    b, diagonal = sign(weight), metric.diagonal()
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    group = torch.arange(len(weight), device=weight.device)
    target = metric.times(weight)
    history: list[float] = []
    for sweep in range(_SWEEPS + 1):
        image = metric.times(b)
        top, bottom = (b * target).sum(1), (b * image).sum(1)
        if shared:
            top, bottom = (t.sum().expand_as(t) for t in (top, bottom))
        turn = torch.where(top < 0, -1.0, 1.0).to(b.dtype).unsqueeze(1)
        b, image = b * turn, image * turn
        alpha = (top.abs() / bottom.clamp_min(torch.finfo(b.dtype).tiny)).clamp_min(ALPHA_FLOOR)
        scale = alpha.unsqueeze(1)
        residue = scale * image - target
        history.append(float(((scale * b - weight) * residue).sum()))
        if sweep == _SWEEPS or not _sweep(b, residue, alpha, order, diagonal, group, metric):
            break
        history.append(float(((scale * b - weight) * residue).sum()))
    return b, alpha, history


def _sweep(
    b: Tensor, residue: Tensor, alpha: Tensor, order: Tensor, diagonal: Tensor, group: Tensor, metric: Metric
) -> bool:
    """One pass over the coordinates, in place; whether a sign was flipped."""
    flipped = False
    for i in range(order.shape[1]):
        index = order[:, i]
        old = b[group, index]
        change = -4 * alpha * old * residue[group, index] + 4 * alpha.square() * diagonal[group, index].unsqueeze(1)
        flip = change < 0
        if bool(flip.any()):
            flipped = True
            step = (2 * alpha * old * flip).unsqueeze(1)
            residue -= step * metric.column(index).unsqueeze(2)
            b[group, index] = torch.where(flip, -old, old)
    return flipped
