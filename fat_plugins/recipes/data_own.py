"""Datasets that a function of the user's own returns."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch.utils.data import Dataset

from fat_plugins.errors import ConfigError, shown, unknown
from fat_plugins.quantizer import Params
from fat_plugins.recipes.imports import call
from fat_plugins.recipes.loading import Data, DrawnImages, Mapped

_DATASETS = ("train", "test", "validation", "plain")
MAX_CLASSES = 1_000_000
_KEYS = ("train", "test", "classes", "validation", "plain", "description")


class CallableDataParams(Params):
    """Options of the dataset ``callable``."""

    factory: str = Field(
        description="'module:function'; it is called with `options` and returns a dictionary: `train` and `test` are "
        "map-style datasets of (float tensor C x H x W, label), `classes` a number; if it likes also `validation`, "
        "`plain` (the images of `train` without augmentation) and `description`."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the function.")
    validation_fraction: float = Field(
        0.1, gt=0, lt=0.9, description="Part of `train` that chooses the best epoch, where there is no `validation`."
    )
    split_seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of that split; every run seed shares it.")
    calibration: int | None = Field(None, ge=1, description="Training images that initialise quantizers; null: all.")
    workers: int = Field(0, ge=0, le=256, description="Processes that read and augment images.")


class Checked(Dataset):
    """A dataset of the user's; what it returns is looked at before it is used.

    :param name: what the user calls it, ``where``: the place in the recipe, for messages.
    :param shape: of the images, filled in with that of the first one.
    """

    def __init__(self, source: Any, name: str, where: str, classes: int, shape: list[tuple[int, ...]]) -> None:
        self.source, self.name, self.where, self.classes, self.shape = source, name, where, classes, shape
        if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise ConfigError(f"{where}: {name} is a {type(source).__name__}, expected a map-style dataset")
        if not len(source):
            raise ConfigError(f"{where}: {name} is empty")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        item = self.source[index]
        place = f"{self.where}: {self.name}[{index}]"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ConfigError(f"{place} is a {type(item).__name__}, expected (image, label)")
        image, label = item
        if not isinstance(image, torch.Tensor) or image.dtype != torch.float32 or image.ndim != 3:
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ConfigError(f"{place}: the images are {what}, expected float32 tensors C x H x W")
        if not self.shape:
            self.shape.append(tuple(image.shape))
        if tuple(image.shape) != self.shape[0]:
            raise ConfigError(f"{place}: an image of {tuple(image.shape)}, the first one has {self.shape[0]}")
        if not bool(torch.isfinite(image).all()):
            raise ConfigError(f"{place}: the image holds NaN or infinity")
        try:
            number = operator.index(label)
        except TypeError:
            raise ConfigError(f"{place}: label {shown(label)}, expected an integer") from None
        if not 0 <= number < self.classes:
            raise ConfigError(f"{place}: label {number}; allowed: 0 to {self.classes - 1}")
        return image, number


def _same(image: Any) -> Any:
    return image


def own(params: CallableDataParams) -> Data:
    """Call the user's function and arrange what it returns.

    :raises ConfigError: not permitted, not found, or it returns something else.
    """
    key = "data.params.factory"
    parts = call(params.factory, key, params.options)
    if isinstance(parts, Data):
        return parts
    if not isinstance(parts, dict):
        raise ConfigError(f"{key}: {params.factory} returned {type(parts).__name__}, expected a dictionary")
    for name in parts:
        if name not in _KEYS:
            raise ConfigError(f"{key}: {params.factory} returned an {unknown('entry', name, _KEYS)}")
    for name in _KEYS[:3]:
        if name not in parts:
            raise ConfigError(f"{key}: {params.factory} returned no {name!r}")
    classes = parts["classes"]
    if not isinstance(classes, int) or not 1 < classes <= MAX_CLASSES:
        raise ConfigError(f"{key}: {params.factory} returned classes {shown(classes)}; allowed: 2 to {MAX_CLASSES}")
    shape: list[tuple[int, ...]] = []  # of the first image: that of all
    parts = {
        name: Checked(part, name, f"{key}: {params.factory}", classes, shape) if name in _DATASETS else part
        for name, part in parts.items()
    }
    train = parts["train"]
    plain = parts.get("plain", train)
    plain[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(params.split_seed)).tolist()
    held_out: list[int] = []
    if "validation" not in parts:
        count = round(len(train) * params.validation_fraction)
        if not 0 < count < len(train):
            raise ConfigError(f"data.params.validation_fraction: {params.validation_fraction} of {len(train)} is none")
        order, held_out = order[count:], order[:count]
    validation = parts.get("validation", Mapped(plain, held_out, _same))
    description = parts.get("description") or (
        f"{params.factory}, {len(order)} training / {len(validation)} validation / {len(parts['test'])} test images"
    )
    return Data(
        Mapped(plain, order, _same),
        validation,
        parts["test"],
        classes=classes,
        description=str(description),
        augmented=partial(DrawnImages, Mapped(train, order, _same)),
        workers=params.workers,
        calibration=params.calibration,
    )
