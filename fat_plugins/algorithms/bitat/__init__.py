"""BiTAT: binarization with task-dependent aggregated transformation (Park et al., arXiv 2207.01394, 2022).

Reconstruction from the abstract and the method figure; not verified against the authors' code or tables. Sections
quoted are those of the project's BiTAT specification, which marks what is the paper's and what is ours.

Weights are two values per output channel, trained straight-through from signs that were solved for in the metric of the
layer's input; activations are signs behind a learned shift. The layers are binarized one after the other, bottom-up,
by the coordinator in ``stages.py``. Without a coordinator every layer is binarized from
the start, with no other metric than the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fat_plugins.algorithms.bitat.quantizers import BiTATActivation, BiTATParams, BiTATWeight
from fat_plugins.algorithms.bitat.stages import BiTATStages
from fat_plugins.registry import Algorithm


class RPReLU(nn.Module):
    """``PReLU_c(x + b1_c) + b2_c`` per channel (section 5, ReActNet's), for models that are built for binary layers.

    Place it behind the residual sum: RSign, binary convolution, batch norm, addition, RPReLU; no ReLU in between.

    :param channels: length of axis 1 of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        before, after = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in (self.before, self.after))
        return nn.functional.prelu(x + before, self.slope) + after


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``-(1/N) sum_n sum_c softmax(teacher)_c log softmax(student)_c`` of logits ``N x C`` (section 7, ReActNet's)."""
    return -(teacher.detach().softmax(1) * student.log_softmax(1)).sum(1).mean()


class BiTAT(Algorithm):
    """Registry entry of BiTAT."""

    name = "bitat"
    title = "Binarization with task-dependent aggregated transformation"
    paper = "Park, Yoon, Zhang, Zhang, Hwang, Eldar: BiTAT, 2022"
    arxiv = "2207.01394"
    fidelity = (
        "C: reconstruction from the abstract and the method figure; not verified against the authors' code or tables"
    )
    Params = BiTATParams
    weight_quantizer = BiTATWeight
    activation_quantizer = BiTATActivation
    weight_bits = (1, 1)
    activation_bits = (1, 1)
    bits_reason = "BiTAT's values are two, -alpha and +alpha; one bit is the least"
    per_channel_weights = True
    per_channel_activations = True
    coordinator = BiTATStages


__all__ = [
    "BiTAT",
    "BiTATActivation",
    "BiTATParams",
    "BiTATStages",
    "BiTATWeight",
    "RPReLU",
    "distillation_loss",
]
