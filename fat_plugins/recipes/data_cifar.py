"""CIFAR-10 and CIFAR-100, from the binary version of the files or through torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.errors import ConfigError
from fat_plugins.files import is_file, is_folder
from fat_plugins.quantizer import Params
from fat_plugins.recipes.loading import Data, Images, ShiftedImages, split
from fat_plugins.recipes.vision import torchvision


@dataclass(frozen=True)
class _Set:
    """One of the two sets. ``labels`` bytes stand before each image, the last one is the label."""

    title: str
    classes: int
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = _Set(
    "CIFAR10",
    10,
    "cifar-10-batches-bin",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    ("test_batch.bin",),
    1,
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),  # what the papers' code divides by: a mean over images of their deviations
)
CIFAR100 = _Set(
    "CIFAR100",
    100,
    "cifar-100-binary",
    ("train.bin",),
    ("test.bin",),
    2,
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
)
_PIXELS = 3 * 32 * 32
#: images of a file, at most
_MOST = 60_000


class CifarParams(Params):
    """Options of the datasets ``cifar10`` and ``cifar100``."""

    root: str = Field("data", description="Folder with the files, or with the folder that the archive unpacks to.")
    format: Literal["binary", "torchvision"] = Field(
        "binary",
        description="'binary': the files of the binary version (cifar-10-binary.tar.gz). 'torchvision': the Python "
        "version, read by torchvision, which unpickles the files after checking their MD5 sums.",
    )
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=0.9,
        description="Part of the training images that chooses the best epoch instead of being learnt.",
    )
    split_seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the stratified split; every run seed shares it."
    )
    shift: int = Field(4, ge=0, le=16, description="Random shift in pixels: a random crop of the image padded by that.")
    flip: bool = Field(True, description="Mirror every second training image.")
    calibration: int | None = Field(
        None, ge=1, description="Training images that may initialise quantizers and batch norms; null: all."
    )


def _read(path: Path, about: _Set) -> tuple[np.ndarray, np.ndarray]:
    record = about.labels + _PIXELS
    try:
        size = path.stat().st_size
        if size > record * _MOST:
            raise ConfigError(f"{path}: {size} bytes, expected up to {record * _MOST}: not {about.title}")
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    if not len(data) or len(data) % record:
        raise ConfigError(f"{path}: {len(data)} bytes, expected a multiple of {record}: damaged, or not {about.title}")
    data = data.reshape(-1, record)
    labels = data[:, about.labels - 1].astype(np.int64)
    if labels.max() >= about.classes:
        raise ConfigError(f"{path}: label {labels.max()}, expected 0 to {about.classes - 1}: not {about.title}")
    return data[:, about.labels :].reshape(-1, 3, 32, 32), labels


def _binary(root: Path, about: _Set) -> list[tuple[np.ndarray, np.ndarray]]:
    folder = root / about.folder if is_folder(root / about.folder) else root
    missing = next((n for n in (*about.train, *about.test) if not is_file(folder / n)), None)
    if missing is not None:
        archive = {10: "cifar-10", 100: "cifar-100"}[about.classes] + "-binary.tar.gz"
        raise ConfigError(
            f"data.params.root: no {missing} in {folder}: unpack {archive} there "
            "(from https://www.cs.toronto.edu/~kriz/cifar.html), or set data.params.root"
        )
    parts = []
    for names in (about.train, about.test):
        read = [_read(folder / name, about) for name in names]
        parts.append(tuple(np.concatenate(arrays) for arrays in zip(*read, strict=True)))
    return parts


def _by_torchvision(root: Path, about: _Set) -> list[tuple[np.ndarray, np.ndarray]]:
    kind = getattr(torchvision("data.params.format: torchvision").datasets, about.title)
    try:
        sets = [kind(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"data.params.root: {root}: {str(error).split('.')[0].splitlines()[0]}") from None
    return [(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2)), np.array(s.targets)) for s in sets]


def _augmented(train: Images, params: CifarParams, seed: int) -> ShiftedImages:
    return ShiftedImages(train, seed, params.shift, 0, params.flip)


def cifar(about: _Set, params: CifarParams) -> Data:
    """Read one of the sets into memory (bytes; 200 MB)."""
    read = {"binary": _binary, "torchvision": _by_torchvision}[params.format]
    (images, labels), (test_images, test_labels) = read(Path(params.root), about)
    train, validation = split(labels, params.validation_fraction, params.split_seed)

    def part(images: np.ndarray, labels: np.ndarray) -> Images:
        tensors: list[Tensor] = [torch.from_numpy(a) for a in (images, labels)]
        return Images(*tensors, about.mean, about.std)

    to_learn = part(images[train], labels[train])
    return Data(
        to_learn,
        part(images[validation], labels[validation]),
        part(test_images, test_labels),
        classes=about.classes,
        description=f"{about.title}, 32x32, {len(train)} training / {len(validation)} validation / "
        f"{len(test_labels)} test images",
        augmented=partial(_augmented, to_learn, params),
        calibration=params.calibration,
    )
