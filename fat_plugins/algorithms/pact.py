"""PACT: Parameterized Clipping Activation (Choi et al., 2018), with DoReFa's weights as in the paper.

Formulas of the project's baselines specification, sections 3 to 6: believed to match the paper, checked numerically,
not checked against its text.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms.dorefa import DoReFaParams, DoReFaWeight
from fat_plugins.clipping import ClipSearch
from fat_plugins.forms import Form, UniformGrid
from fat_plugins.functional import fake_quantize, positive, wide
from fat_plugins.quantizer import ActivationQuantizer, TensorSpec
from fat_plugins.registry import Algorithm

_LEAST = 1e-5  # of the initial clip


class PACTParams(DoReFaParams):
    """Options of ``"algorithm": "pact"``."""

    alpha: float | None = Field(
        10.0,
        gt=0,
        description="Initial clip (about 8 to 10 in the paper); null takes the best one on calibration data.",
    )


class PACTActivation(ActivationQuantizer):
    """Section 5: ``clip(x, 0, alpha)`` on ``2^b`` levels with a learned ``alpha``, which weight decay pulls down.

    Signed inputs, which the paper does not have, get the symmetric grid of the same clip.
    """

    params: PACTParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: PACTParams) -> None:
        super().__init__(spec, params)
        self._search = ClipSearch()
        self.alpha = nn.Parameter(torch.tensor(float(params.alpha or 10.0)))

    def init_from_range(self, low: float, high: float) -> None:
        if self.params.alpha is None:
            self.alpha.fill_(max(abs(low), abs(high), _LEAST))

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        if self.params.alpha is None:
            low = -self._high if self.signed else 0
            clip = self._search.add(
                x,
                lambda v, c: fake_quantize(v, c / self._high, low, self._high),
                signed=self.signed,
                first=first,
            )
            self.alpha.fill_(max(clip, _LEAST))

    @property
    def _high(self) -> int:
        return 2 ** (self.spec.bits - 1) - 1 if self.signed else 2**self.spec.bits - 1

    def _scale(self) -> Tensor:
        return positive(wide(self.alpha)) / self._high

    def quantize(self, x: Tensor) -> Tensor:
        """``dy/dx = 1`` on (0, alpha); ``dy/dalpha = 1`` from alpha on, 0 below (at the boundary: section 5)."""
        low = -self._high if self.signed else 0
        return fake_quantize(x, self._scale(), low, self._high, residual_scale_grad=False, inclusive=False)

    def form(self) -> Form:
        return UniformGrid(self.spec.bits, self.signed, self.signed, self._scale().detach().reshape(1), 1)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The L2 penalty on the clip, with the coefficient of the weights, is a part of the method."""
        return [{"params": [self.alpha], "lr": lr, "weight_decay": weight_decay}]


class PACT(Algorithm):
    """Registry entry of PACT."""

    name = "pact"
    title = "Parameterized Clipping Activation"
    paper = "Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan: PACT, 2018"
    arxiv = "1805.06085"
    fidelity = "C: well-known formulas, believed to match the paper, checked numerically, not against its text"
    Params = PACTParams
    weight_quantizer = DoReFaWeight
    activation_quantizer = PACTActivation
    weight_bits = (1, 8)
    bits_reason = "a signed grid of one bit has no positive level"
