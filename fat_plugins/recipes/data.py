"""Datasets that recipes name. A name stands for a function of this file; nothing is imported from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Params


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Keys ``(epoch, index)`` of the images of every step: a shuffled pass that depends on seed and epoch only.

    :param batch_size: images per step of one process. ``world`` processes see the same images per step as one process
        with ``world`` times that batch size.
    :ivar epoch, skip: what the next pass is, and the step that it begins with.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=epoch_generator(self.seed, self.epoch)).tolist()
        share = min(self.batch_size, -(-self.length // self.world))  # of the one step of a small set
        for step in range(self.skip, len(self)):
            start = (step * self.world + self.rank) * share
            yield [(self.epoch, i) for i in order[start : start + share]]


def epoch_generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on these numbers only."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


class ShiftedImages(Dataset):
    """Training images by key ``(epoch, index)``, each moved by up to ``pixels`` in both directions.

    The space that opens is filled with ``fill``. Offsets depend on seed, epoch and index only.

    :param images, labels: N x C x H x W and N.
    """

    def __init__(self, images: Tensor, labels: Tensor, pixels: int, fill: float, seed: int) -> None:
        self.images, self.labels, self.pixels, self.fill, self.seed = images, labels, pixels, fill, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        p, epoch = self.pixels, keys[0][0]
        index = torch.tensor([i for _, i in keys])
        images, labels = self.images[index], self.labels[index]
        if p == 0:
            return images, labels
        n, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (p, p, p, p), value=self.fill)
        offsets = torch.randint(0, 2 * p + 1, (2, len(self)), generator=epoch_generator(self.seed, epoch, 1))
        dy, dx = offsets[:, index]
        rows = dy[:, None] + torch.arange(height)
        columns = dx[:, None] + torch.arange(width)
        index = torch.arange(n)[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous(), labels


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


class TrainingLoader(DataLoader):
    """Epochs of :class:`EpochBatches`; it draws nothing from torch's global generator."""

    def begin(self, epoch: int, step: int = 0) -> TrainingLoader:
        """The next pass is that of ``epoch``, without its first ``step`` batches."""
        self.batch_sampler.epoch, self.batch_sampler.skip = epoch, step
        return self


@dataclass(frozen=True)
class Data:
    """One dataset, split once and for all.

    :param train, validation, test: images (float32, N x C x H x W) and labels (int64, N).
    :param classes: number of labels.
    :param shift: random shift of training images, in pixels; ``fill`` is the value of the background.
    :param description: one line for reports.
    """

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    classes: int
    shift: int
    fill: float
    description: str

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one image, C x H x W."""
        return tuple(self.train.tensors[0].shape[1:])

    @property
    def example(self) -> Tensor:
        """One training image as a batch, 1 x C x H x W."""
        return self.train.tensors[0][:1]

    def training_loader(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> TrainingLoader:
        """Shuffled and shifted, by seed, epoch and index only. An incomplete last batch is left out.

        :param batch_size: images per step and process.
        :param rank, world: this process and how many there are; each gets its part of every step.
        """
        images = ShiftedImages(*self.train.tensors, self.shift, self.fill, seed)
        batches = EpochBatches(len(self.train), batch_size, seed, rank, world)
        return TrainingLoader(
            images, batch_sampler=batches, collate_fn=_as_it_is, generator=torch.Generator().manual_seed(0)
        )

    def calibration_loader(self, batch_size: int) -> DataLoader:
        """Training images as they are, in a fixed order that mixes the classes."""
        return DataLoader(self.train, batch_size)

    def validation_loader(self, batch_size: int = 256) -> DataLoader:
        """Held-out part of the training images, which chooses the best epoch."""
        return DataLoader(self.validation, batch_size)

    def test_loader(self, batch_size: int = 256) -> DataLoader:
        """Test images; nothing is chosen by them."""
        return DataLoader(self.test, batch_size)


class DigitsParams(Params):
    """Options of the dataset ``digits``."""

    test_fraction: float = Field(0.3, gt=0, lt=0.9, description="Part of all images that is the test set.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="Part of the rest that chooses the best epoch.")
    split_seed: int = Field(0, ge=0, description="Seed of the stratified split; every run seed shares it.")
    shift: int = Field(1, ge=0, le=3, description="Random shift of training images, in pixels.")


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the two parts, every class divided alike, both shuffled.

    :param fraction: size of the second part.
    """
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        second.append(members[: round(len(members) * fraction)])
    second = rng.permutation(np.concatenate(second))
    first = rng.permutation(np.setdiff1d(np.arange(len(labels)), second))
    return first, second


def _digits(params: DigitsParams) -> Data:
    """Scikit-learn's handwritten digits: 1797 images of 8x8 pixels, read from the installed package."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("data 'digits' needs scikit-learn: pip install 'fat-plugins[digits]'") from None
    bunch = load_digits()
    images, labels = bunch.images.astype(np.float32)[:, None], bunch.target.astype(np.int64)
    rng = np.random.default_rng(params.split_seed)
    rest, test = stratified_split(labels, params.test_fraction, rng)
    inner_train, inner_validation = stratified_split(labels[rest], params.validation_fraction, rng)
    train, validation = rest[inner_train], rest[inner_validation]
    mean, std = float(images[train].mean()), float(images[train].std())

    def part(index: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.from_numpy((images[index] - mean) / std), torch.from_numpy(labels[index]))

    return Data(
        part(train),
        part(validation),
        part(test),
        classes=10,
        shift=params.shift,
        fill=-mean / std,
        description=f"scikit-learn digits, 8x8, {len(train)} training / {len(validation)} validation / "
        f"{len(test)} test images",
    )


class ShapesParams(Params):
    """Options of the dataset ``shapes``."""

    train: int = Field(2000, ge=100, description="Training images, ten classes alike.")
    validation: int = Field(300, ge=50, description="Images that choose the best epoch.")
    test: int = Field(1500, ge=100, description="Test images.")
    size: int = Field(16, ge=12, le=64, description="Height and width in pixels.")
    noise: float = Field(0.1, ge=0, description="Standard deviation of the noise; the shape's contrast is 0.6 to 1.")
    data_seed: int = Field(0, ge=0, description="Seed of the images; every run seed shares them.")
    shift: int = Field(1, ge=0, le=3, description="Random shift of training images, in pixels.")


#: outlines as functions of position relative to the centre, in radii
_OUTLINES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: u**2 + v**2 < 1,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.85,
    lambda u, v: (v > -0.7) & (np.abs(u) * 1.6 < 0.9 - v),
    lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.35) & (np.maximum(np.abs(u), np.abs(v)) < 1),
    lambda u, v: (u**2 + v**2 < 1.1) & (u**2 + v**2 > 0.35),
)
_TEXTURES = 2


def _shape_images(labels: np.ndarray, params: ShapesParams, rng: np.random.Generator) -> np.ndarray:
    """One outline with one texture each, somewhere, at any angle, on a sloping background, under noise."""
    half = (params.size - 1) / 2
    y, x = (np.mgrid[: params.size, : params.size] - half) / half
    images = np.empty((len(labels), 1, params.size, params.size), np.float32)
    for i, label in enumerate(labels):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.75)
        dx, dy = rng.uniform(-0.25, 0.25, 2)
        u = (np.cos(angle) * (x - dx) + np.sin(angle) * (y - dy)) / radius
        v = (np.cos(angle) * (y - dy) - np.sin(angle) * (x - dx)) / radius
        outline = _OUTLINES[label // _TEXTURES](u, v)
        stripes = np.sin(6 * u) if label % _TEXTURES else np.ones_like(u)
        contrast = rng.uniform(0.6, 1.0) * rng.choice((-1, 1))
        slope, direction = rng.uniform(0, 0.5), rng.uniform(0, 2 * np.pi)
        background = slope * (np.cos(direction) * x + np.sin(direction) * y)
        images[i, 0] = outline * stripes * contrast + background + rng.normal(0, params.noise, x.shape)
    return images


def _shapes(params: ShapesParams) -> Data:
    """Five outlines, plain or striped: drawn by formula, so nothing has to be downloaded."""
    rng = np.random.default_rng(params.data_seed)

    def part(count: int) -> TensorDataset:
        labels = rng.permutation(np.arange(count) % (len(_OUTLINES) * _TEXTURES))
        images = _shape_images(labels, params, rng)
        return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

    train, validation, test = part(params.train), part(params.validation), part(params.test)
    return Data(
        train,
        validation,
        test,
        classes=len(_OUTLINES) * _TEXTURES,
        shift=params.shift,
        fill=0.0,
        description=f"procedural shapes, {params.size}x{params.size}, noise {params.noise:g}, "
        f"{params.train} training / {params.validation} validation / {params.test} test images",
    )


#: what a recipe may name: options and maker
DATASETS: dict[str, tuple[type[Params], Callable[[Any], Data]]] = {
    "digits": (DigitsParams, _digits),
    "shapes": (ShapesParams, _shapes),
}
