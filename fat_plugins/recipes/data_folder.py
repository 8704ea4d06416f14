"""Images in folders, one folder per class: ImageNet, and the user's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.data import Dataset

from fat_plugins.errors import ConfigError, unknown
from fat_plugins.files import is_folder
from fat_plugins.quantizer import Params
from fat_plugins.recipes.loading import Data, DrawnImages, Mapped, split
from fat_plugins.recipes.vision import IMAGENET_MEAN, IMAGENET_STD, torchvision


class FolderParams(Params):
    """Options of the datasets ``imagefolder`` and ``imagenet``."""

    root: str = Field("data/imagenet", description="Folder that holds the folders of the parts.")
    train: str = Field("train", description="Folder of the training images, with one folder per class.")
    test: str = Field("val", description="Folder of the test images, with the same classes.")
    validation: str | None = Field(
        None, description="Folder of the images that choose the best epoch; null: a part of the training images."
    )
    validation_fraction: float = Field(0.01, gt=0, lt=0.9, description="That part, of every class alike.")
    split_seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the stratified split; every run seed shares it."
    )
    size: int = Field(224, ge=8, le=2048, description="Height and width of what the network sees, in pixels.")
    resize: int | None = Field(
        None, ge=8, le=4096, description="Shorter side before the central crop in evaluation; null: size * 256 / 224."
    )
    augment: Literal["resized_crop", "crop", "pad_crop", "none"] = Field(
        "resized_crop",
        description="'resized_crop': a random part of 8 to 100 % of the area, resized. 'crop': shorter side to "
        "`resize`, then a random crop. 'pad_crop': resized, padded by an eighth, a random crop. All with a "
        "mirror image at random. 'none': as in evaluation.",
    )
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: list[float] = Field(default_factory=lambda: list(IMAGENET_MEAN), min_length=3, max_length=3)
    std: list[float] = Field(default_factory=lambda: list(IMAGENET_STD), min_length=3, max_length=3)
    calibration: int | None = Field(
        4096, ge=1, description="Training images that may initialise quantizers and batch norms; null: all."
    )
    workers: int = Field(4, ge=0, le=256, description="Processes that read and augment images.")


def transforms(params: FolderParams) -> tuple[Any, Any]:
    """torchvision transforms of one image for training and for evaluation."""
    v2 = torchvision("data 'imagefolder'", "transforms.v2")
    size, resize = params.size, params.resize or round(params.size * 256 / 224)
    mode = v2.InterpolationMode[params.interpolation.upper()]
    finish = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(params.mean, params.std),
        v2.ToPureTensor(),
    ]
    evaluation = [v2.Resize(resize, mode), v2.CenterCrop(size)]
    training = {
        "resized_crop": [v2.RandomResizedCrop(size, interpolation=mode)],
        "crop": [v2.Resize(resize, mode), v2.RandomCrop(size)],
        "pad_crop": [v2.Resize((size, size), mode), v2.RandomCrop(size, padding=size // 8)],
    }.get(params.augment)
    mirrored = evaluation if training is None else [*training, v2.RandomHorizontalFlip()]
    return v2.Compose([*mirrored, *finish]), v2.Compose([*evaluation, *finish])


class Folder(Dataset):
    """``(image in RGB, label)`` of one folder, read by torchvision.

    :raises ConfigError: no such folder, no class in it, a class without images; later: an image that cannot be read.
    """

    def __init__(self, path: Path, key: str) -> None:
        if not is_folder(path):
            raise ConfigError(f"{key}: no folder {path}; set data.params.root")
        try:
            self.files = torchvision("data 'imagefolder'").datasets.ImageFolder(str(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {path}: {str(error).splitlines()[0]}") from None
        self.classes: list[str] = self.files.classes
        self.labels: list[int] = self.files.targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.files[index]
        except Exception as error:  # Pillow raises many kinds for damaged files and those that unpack to gigabytes
            raise ConfigError(f"cannot read the image {self.files.samples[index][0]}: {error}") from None


def imagefolder(title: str, params: FolderParams) -> Data:
    """The user's images; nothing but their names is read here."""
    root = Path(params.root)
    training, evaluation = transforms(params)
    source = Folder(root / params.train, "data.params.train")
    test = Folder(root / params.test, "data.params.test")
    if params.validation is None:
        train, held_out = split(source.labels, params.validation_fraction, params.split_seed)
        held_out_source = source
    else:
        train, _ = split(source.labels, 0.0, params.split_seed)
        held_out_source = Folder(root / params.validation, "data.params.validation")
        held_out = range(len(held_out_source))
    for key, other in (("test", test), ("validation", held_out_source)):
        for name in set(other.classes) ^ set(source.classes):
            whole = unknown("class", name, source.classes) if len(source.classes) < 20 else f"class {name!r}"
            raise ConfigError(f"data.params.{key}: its classes are not those of the training images: {whole}")
    return Data(
        Mapped(source, train, evaluation),
        Mapped(held_out_source, held_out, evaluation),
        Mapped(test, range(len(test)), evaluation),
        classes=len(source.classes),
        description=f"{title}, {params.size}x{params.size}, {len(source.classes)} classes, {len(train)} training / "
        f"{len(held_out)} validation / {len(test)} test images",
        augmented=partial(DrawnImages, Mapped(source, train, training)),
        workers=params.workers,
        calibration=params.calibration,
    )
