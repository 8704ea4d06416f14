"""The algorithm ``cfws``: weights by their largest magnitude, activations by a modified KL threshold (section 5).

Post-training: the threshold comes from calibration batches and stays. Of the authors' rule only the score is published;
histogram, candidates and levels are a reconstruction.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.algorithms.minmax import MinMaxWeight
from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import fake_quantize, wide
from fat_plugins.quantizer import ActivationQuantizer, Params, TensorSpec
from fat_plugins.registry import Algorithm

_FLOOR = 1e-12
#: bins of the histogram that is searched, and the least number of them that a threshold leaves (section 5)
BINS, LEAST = 2048, 128
#: bins that are counted: the range grows by doubling, so half of them may be empty
_FINE = 8 * BINS
#: elements that are counted at once
_CHUNK = 2**22


class CFWSParams(Params):
    """Options of ``"algorithm": "cfws"``."""

    score: Literal["paper", "standard"] = Field(
        "paper", description="The authors' score, which penalises clipping, or the usual KL divergence."
    )
    unsigned_levels: Literal[128, 256] = Field(
        256, description="Levels of unsigned activations at 8 bits in the search; signed ones have 128."
    )


def kl_scores(counts: Tensor, levels: int, score: str = "paper") -> tuple[Tensor, Tensor]:
    """Scores of all thresholds of a histogram; the least one wins.

    For ``i`` bins, ``p`` is the histogram up to there, with all that lies beyond added to its last bin; ``q`` has the
    histogram's own counts in ``levels`` groups, spread evenly over those bins of a group where ``p`` is not zero. With
    ``P = sum p`` and ``S = sum q``, over bins where both are not zero: the paper's ``1/P sum p (log Pp - log Sq)``, the
    standard ``1/P sum p (log Sp - log Pq)``. Infinite where nothing is left, or where what was clipped has no level.

    :param counts: numbers of magnitudes in bins of equal width, 1-d, float64.
    :return: the numbers of bins ``i`` (int64, ascending), their scores (float64).
    """
    bins = len(counts)
    kept = torch.arange(min(max(LEAST, levels), bins), bins + 1, device=counts.device)
    starts = torch.zeros(bins + 1, 3, dtype=torch.float64, device=counts.device)
    columns = [counts, (counts > 0).double(), torch.special.xlogy(counts, counts)]
    starts[1:] = torch.stack(columns, 1).cumsum(0)
    edges = kept[:, None] * torch.arange(levels + 1, device=counts.device) // levels
    total, filled, entropy = (starts[edges[:, 1:]] - starts[edges[:, :-1]]).unbind(-1)
    last, own = counts[kept - 1], starts[kept, 0]
    clipped = starts[-1, 0] - own
    # the last bin of p, which holds what was clipped
    filled[:, -1] += ((last == 0) & (clipped > 0)).double()
    mass, p_log_p = total.clone(), entropy.sum(1)
    mass[:, -1] += clipped
    p_log_p += torch.special.xlogy(last + clipped, last + clipped) - torch.special.xlogy(last, last)
    mean = torch.where(total > 0, total / filled.clamp_min(1), torch.ones_like(total))
    divergence = p_log_p - (mass * mean.log()).sum(1)
    whole = starts[-1, 0]
    ratio = torch.log(whole / own.clamp_min(1e-300))
    found = (divergence + whole * (ratio if score == "paper" else -ratio)) / whole.clamp_min(1)
    lost = (own <= 0) | ((total[:, -1] <= 0) & (clipped > 0))
    return kept, torch.where(lost, torch.inf, found)


class MagnitudeHistogram:
    """Counts of magnitudes over batches, in bins that become twice as wide when a larger one comes.

    Exact zeros do not count: every grid has them. Behind a ReLU they are half of all values, and in groups with their
    neighbours they would make every wide range look bad.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_FINE, dtype=torch.int64)
        #: upper end of the bins, and the largest magnitude so far
        self.range = self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Count the elements of a batch (finite, any shape)."""
        magnitudes = x.detach().reshape(-1)
        largest = float(magnitudes.abs().max())
        if self.range == 0:
            self.range = largest
        if self.range:
            while self.range < largest:
                self.counts = torch.cat([self.counts.reshape(-1, 2).sum(1), torch.zeros(_FINE // 2, dtype=torch.int64)])
                self.range *= 2
        self.largest = max(self.largest, largest)
        if largest == 0 and self.range == 0:
            return
        for chunk in magnitudes.split(_CHUNK):
            index = (chunk.abs().double() * (_FINE / self.range)).long().clamp_(max=_FINE - 1)
            index = index[chunk != 0]
            self.counts += torch.bincount(index, minlength=_FINE).cpu()

    def bins(self) -> Tensor:
        """Counts in 2048 bins between 0 and the largest magnitude, float64."""
        middle = (torch.arange(_FINE, dtype=torch.float64) + 0.5) * (self.range / _FINE)
        index = (middle * (BINS / self.largest)).long().clamp_(max=BINS - 1)
        return torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, self.counts.double())


class CFWSActivation(ActivationQuantizer):
    """Symmetric grid (unsigned when nothing is negative) up to a threshold. Buffer: ``threshold`` (1)."""

    params: CFWSParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: CFWSParams) -> None:
        super().__init__(spec, params)
        self.register_buffer("threshold", torch.ones(1))
        self._histogram = MagnitudeHistogram()

    @property
    def _largest_code(self) -> int:
        return 2 ** (self.spec.bits - self.signed) - 1

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows ranges only: the largest magnitude."""
        self.threshold.fill_(max(abs(low), abs(high)))

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """The threshold with the least score on all batches so far."""
        if first:
            self._histogram = MagnitudeHistogram()
        self._histogram.add(x)
        if not self._histogram.largest:
            self.threshold.fill_(0.0)
            return
        at_8_bits = 128 if self.signed else self.params.unsigned_levels
        levels = max(at_8_bits >> (8 - self.spec.bits), 1)
        kept, scores = kl_scores(self._histogram.bins(), levels, self.params.score)
        self.threshold.fill_(self._histogram.largest * int(kept[scores.argmin()]) / BINS)

    def quantize(self, x: Tensor) -> Tensor:
        form = self.form()
        return fake_quantize(x, form.scale.reshape(()), form.low, form.high)

    def form(self) -> Form:
        step = wide(self.threshold) / self._largest_code
        return UniformGrid(self.spec.bits, self.signed, self.signed, step.clamp_min(_FLOOR), 1)


class CFWS(Algorithm):
    """Registry entry of the calibration."""

    name = "cfws"
    title = "Calibration of CFWS: modified KL threshold"
    paper = "Yang et al., 2023"
    arxiv = "2312.10588"
    fidelity = "C: of the activation threshold only the score is published; weights are by the largest magnitude"
    Params = CFWSParams
    weight_quantizer = MinMaxWeight
    activation_quantizer = CFWSActivation
    bits_reason = "a symmetric grid of one bit has no level beside zero"
    per_channel_weights = True
