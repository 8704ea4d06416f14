"""Datasets that a function of the user's own returns."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field

from fat_plugins.errors import ConfigError, unknown
from fat_plugins.quantizer import Params
from fat_plugins.recipes.imports import load
from fat_plugins.recipes.loading import Data, DrawnImages, Mapped

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


def _same(image: Any) -> Any:
    return image


def own(params: CallableDataParams) -> Data:
    """Call the user's function and arrange what it returns.

    :raises ConfigError: not permitted, not found, or it returns something else.
    """
    key = "data.params.factory"
    parts = load(params.factory, key)(**params.options)
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
    train = parts["train"]
    plain = parts.get("plain", train)
    image = plain[0][0]
    if not isinstance(image, torch.Tensor) or image.dtype != torch.float32:
        what = getattr(image, "dtype", type(image).__name__)
        raise ConfigError(f"{key}: the images of {params.factory} are {what}, expected float32 tensors C x H x W")
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
        classes=int(parts["classes"]),
        description=str(description),
        augmented=partial(DrawnImages, Mapped(train, order, _same)),
        workers=params.workers,
        calibration=params.calibration,
    )
