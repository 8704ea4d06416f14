"""``fat-plugins`` with a model that has no batch norms, and as the environment asks: on the toy host, slowly, failing.

``OWN_CLI`` holds words: ``toy``; ``slow``, a pause in every step; ``fail1``, process 1 fails in its third step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from fat_plugins.cli import main
from fat_plugins.errors import FatPluginsError
from fat_plugins.quantizer import Params
from fat_plugins.recipes import loaded, models, run
from fat_plugins.recipes.trainer import Trainer

WORDS = os.environ.get("OWN_CLI", "").split()


class Plain(nn.Module):
    """Three convolutions and a linear layer, so that every process computes exactly its part of a batch."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu()
        return self.head(x.flatten(1))


models.MODELS["plain"] = (Params, lambda params, shape, classes: Plain(shape[0], classes))

if "toy" in WORDS:
    from toy_host import ToyHost

    run.get_host = loaded.get_host = lambda name: ToyHost()

step = Trainer._one_step


def own_step(self, images, labels):
    if "slow" in WORDS:
        time.sleep(0.1)
    if "fail1" in WORDS and self.world.rank == 1 and self.step == 2:
        raise FatPluginsError("the disk of process 1 is full")
    step(self, images, labels)


Trainer._one_step = own_step

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
