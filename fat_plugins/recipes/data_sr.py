"""Pairs of small and large images for super-resolution, drawn by formula: nothing is read or downloaded."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fat_plugins.quantizer import Params
from fat_plugins.recipes.loading import Data, Images, TurnedPairs
from fat_plugins.recipes.tasks import SuperResolution

#: pixels are stored around zero, as networks without normalisation want them
_LOW, _HIGH = -0.5, 0.5
#: images are drawn this much finer than they are kept, so that edges are soft as those of a camera
_FINER = 2
_SHAPES = 6


class GeneratedSRParams(Params):
    """Options of the dataset ``generated_sr``."""

    train: int = Field(400, ge=16, le=20_000, description="Training pairs.")
    validation: int = Field(50, ge=8, le=20_000, description="Pairs that choose the best epoch.")
    test: int = Field(100, ge=8, le=20_000, description="Test pairs.")
    size: int = Field(24, ge=8, le=128, description="Height and width of the small images, in pixels.")
    scale: int = Field(2, ge=2, le=4, description="Height of a large image over that of a small one.")
    channels: int = Field(3, ge=1, le=4, description="Channels of the images.")
    downsampling: Literal["bicubic", "area"] = Field("bicubic", description="How small images come from large ones.")
    shave: int | None = Field(
        None, ge=0, le=16, description="Pixels at each border that the PSNR leaves out; null: the scale."
    )
    data_seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the images; every run seed shares them.")


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _painted(size: int, channels: int, generator: torch.Generator) -> Tensor:
    """One image, channels x size x size, 0 to 1: a sloping background, and on it discs, boxes, half-planes and strokes,
    plain or striped, in any colour and at any angle."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")

    def colour() -> Tensor:
        return _uniform(generator, 0, 1, channels, 1, 1)

    image = colour() + _uniform(generator, -0.3, 0.3, channels, 1, 1) * x + _uniform(generator, -0.3, 0.3, 1) * y
    for kind in torch.randint(0, 4, (_SHAPES,), generator=generator).tolist():
        turn, cx, cy, radius, narrow, stripes, phase = _uniform(generator, 0, 1, 7).tolist()
        turn, radius, narrow = torch.tensor(6.2832 * turn), 0.15 + 0.55 * radius, 0.15 + 0.85 * narrow
        dx, dy = x - (2 * cx - 1), y - (2 * cy - 1)
        u = (torch.cos(turn) * dx + torch.sin(turn) * dy) / radius
        v = (torch.cos(turn) * dy - torch.sin(turn) * dx) / (radius * narrow)
        inside = (
            u**2 + v**2 < 1,
            torch.maximum(u.abs(), v.abs()) < 0.9,
            u < 0,
            (v.abs() < 0.25) & (u.abs() < 1.5),
        )[kind]
        paint = colour()
        if stripes < 0.5:  # from broad ones to those that the small image can only just hold
            wave = torch.sin(radius * u * (6 + 40 * stripes) + 6.2832 * phase)
            paint = paint + _uniform(generator, -0.4, 0.4, channels, 1, 1) * wave
        image = torch.where(inside, paint, image)
    return image.clamp(0, 1)


def large_images(count: int, size: int, channels: int, generator: torch.Generator) -> Tensor:
    """N x channels x size x size, -0.5 to 0.5."""
    fine = torch.stack([_painted(size * _FINER, channels, generator) for _ in range(count)])
    return avg_pool2d(fine, _FINER) + _LOW


def small_images(large: Tensor, scale: int, how: str) -> Tensor:
    """The images that a network gets, by the usual bicubic filter or by means over squares."""
    if how == "area":
        return avg_pool2d(large, scale)
    size = large.shape[-1] // scale
    return interpolate(large, (size, size), mode="bicubic", antialias=True).clamp(_LOW, _HIGH)


def bicubic(small: Tensor, scale: int) -> Tensor:
    """The interpolation that every network has to beat."""
    return interpolate(small, scale_factor=float(scale), mode="bicubic").clamp(_LOW, _HIGH)


def generated_sr(params: GeneratedSRParams) -> Data:
    """Draw the pairs."""
    generator = torch.Generator().manual_seed(params.data_seed)
    task = SuperResolution(params.scale if params.shave is None else params.shave, _LOW, _HIGH)

    def part(count: int) -> Images:
        large = large_images(count, params.size * params.scale, params.channels, generator)
        return Images(small_images(large, params.scale, params.downsampling), large)

    train, validation, test = part(params.train), part(params.validation), part(params.test)
    small, large = test.tensors
    reference = float(task.score(bicubic(small, params.scale), large)) / len(large)
    return Data(
        train,
        validation,
        test,
        classes=1,
        augmented=partial(TurnedPairs, train),
        description=f"drawn images, {params.size}x{params.size} to {params.size * params.scale}x"
        f"{params.size * params.scale} ({params.downsampling}), {params.train} training / {params.validation} "
        f"validation / {params.test} test images; bicubic interpolation: {task.metric.text(reference)}",
        task=task,
    )
