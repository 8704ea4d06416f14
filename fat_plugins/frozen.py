"""Frozen quantizers: what a host adapter puts in the place of its quantizers before a model is exported.

Both call one custom operator each (``fat_plugins::decode`` and ``fat_plugins::staircase``), so an exporter recognises
them in any traced graph by the operator alone, without looking at names or modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fat_plugins.forms import Form, UniformGrid


class FrozenWeight(nn.Module):
    """Ignores the float weight that the host passes and returns the decoded codes.

    :param codes: int32, shape of the weight.
    """

    def __init__(self, codes: Tensor, form: Form, name: str = "") -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32))
        self.form, self.name = form, name

    def forward(self, weight: Tensor) -> Tensor:
        return self.form.decode(self.codes).to(weight.dtype)


class FrozenActivation(nn.Module):
    """Applies a deployed activation form."""

    def __init__(self, form: Form, name: str = "") -> None:
        super().__init__()
        self.form, self.name = form, name

    def forward(self, x: Tensor) -> Tensor:
        return self.form.decode(self.form.encode(x)).to(x.dtype)


__all__ = ["FrozenActivation", "FrozenWeight", "UniformGrid"]
