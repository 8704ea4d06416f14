"""Which images every step of a training sees, from seed, epoch and step only.

So a run can go on in the middle of an epoch, and several processes can share a batch, without anybody having drawn the
numbers before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fat_plugins.errors import ConfigError


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers of one epoch: first the order of the images, then what a dataset draws for each image."""
    # far apart, so that epoch 1 of seed 0 is not epoch 0 of seed 1
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def steps_per_epoch(images: int, batch_size: int, world: int = 1) -> int:
    """Optimizer steps; an incomplete last batch is left out, unless it is the only one.

    :param batch_size: images per step and process.
    :raises ConfigError: several processes, and fewer images than they take in one step.
    """
    if world > 1 and images < batch_size * world:
        raise ConfigError(f"data: {images} training images are less than one step of {world} processes x {batch_size}")
    return max(1, images // (batch_size * world))


def epoch_batches(order: Tensor, batch_size: int, *, start: int = 0, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Indices of the images of every step from ``start`` on.

    All processes together see ``batch_size * world`` images per step, the same ones as a single process with that batch
    size, each a run of neighbours.

    :param order: of the images in this epoch (int64, 1-d).
    """
    size = batch_size * world
    steps = steps_per_epoch(len(order), batch_size, world)
    return [order[i * size : (i + 1) * size].tensor_split(world)[rank].tolist() for i in range(start, steps)]
