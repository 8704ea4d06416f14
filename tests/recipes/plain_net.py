"""A model for recipes that has no batch norms, so that every process computes exactly its part of a batch."""

from __future__ import annotations

import torch
from torch import nn

from fat_plugins.quantizer import Params
from fat_plugins.recipes.models import MODELS


class Plain(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu()
        return self.head(self.pool(x).flatten(1))


MODELS["plain"] = (Params, lambda params, shape, classes: Plain(shape[0], classes))

#: model and data of a recipe that is read and trained in no time
SECTIONS = """\
seeds: [3]
threads: 1
model: {name: plain}
data: {name: shapes, batch_size: BATCH, params: {train: 400, validation: 50, test: 100, size: 12}}
"""
