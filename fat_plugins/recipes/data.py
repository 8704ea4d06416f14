"""Datasets that recipes name, and the two small ones that need no files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Params
from fat_plugins.recipes.data_cifar import CIFAR10, CIFAR100, CifarParams, cifar
from fat_plugins.recipes.data_folder import FolderParams, imagefolder
from fat_plugins.recipes.data_own import CallableDataParams, own
from fat_plugins.recipes.data_sr import GeneratedSRParams, generated_sr
from fat_plugins.recipes.loading import Data, Images, ShiftedImages, stratified_split


class DigitsParams(Params):
    """Options of the dataset ``digits``."""

    test_fraction: float = Field(0.3, gt=0, lt=0.9, description="Part of all images that is the test set.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="Part of the rest that chooses the best epoch.")
    split_seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the stratified split; every run seed shares it."
    )
    shift: int = Field(1, ge=0, le=3, description="Random shift of training images, in pixels.")


def _shifted(images: Images, shift: int, fill: float, seed: int) -> ShiftedImages:
    return ShiftedImages(images, seed, shift, fill)


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

    def part(index: np.ndarray) -> Images:
        return Images(torch.from_numpy((images[index] - mean) / std), torch.from_numpy(labels[index]))

    images_to_learn = part(train)
    return Data(
        images_to_learn,
        part(validation),
        part(test),
        classes=10,
        augmented=partial(_shifted, images_to_learn, params.shift, -mean / std),
        description=f"scikit-learn digits, 8x8, {len(train)} training / {len(validation)} validation / "
        f"{len(test)} test images",
    )


class ShapesParams(Params):
    """Options of the dataset ``shapes``."""

    train: int = Field(2000, ge=100, le=100_000, description="Training images, ten classes alike.")
    validation: int = Field(300, ge=50, le=100_000, description="Images that choose the best epoch.")
    test: int = Field(1500, ge=100, le=100_000, description="Test images.")
    size: int = Field(16, ge=12, le=64, description="Height and width in pixels.")
    noise: float = Field(0.1, ge=0, description="Standard deviation of the noise; the shape's contrast is 0.6 to 1.")
    data_seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the images; every run seed shares them.")
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

    def part(count: int) -> Images:
        labels = rng.permutation(np.arange(count) % (len(_OUTLINES) * _TEXTURES))
        images = _shape_images(labels, params, rng)
        return Images(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

    train, validation, test = part(params.train), part(params.validation), part(params.test)
    return Data(
        train,
        validation,
        test,
        classes=len(_OUTLINES) * _TEXTURES,
        augmented=partial(_shifted, train, params.shift, 0.0),
        description=f"procedural shapes, {params.size}x{params.size}, noise {params.noise:g}, "
        f"{params.train} training / {params.validation} validation / {params.test} test images",
    )


#: what a recipe may name: options and maker
DATASETS: dict[str, tuple[type[Params], Callable[[Any], Data]]] = {
    "digits": (DigitsParams, _digits),
    "shapes": (ShapesParams, _shapes),
    "generated_sr": (GeneratedSRParams, generated_sr),
    "cifar10": (CifarParams, partial(cifar, CIFAR10)),
    "cifar100": (CifarParams, partial(cifar, CIFAR100)),
    "imagenet": (FolderParams, partial(imagefolder, "ImageNet")),
    "imagefolder": (FolderParams, partial(imagefolder, "images in folders")),
    "callable": (CallableDataParams, own),
}
