"""Small random images in the formats of the real data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_PIXELS = 3 * 32 * 32


def cifar(folder: Path, classes: int, per_class: int = 2) -> Path:
    """The files of CIFAR's binary version: every file has so many images of each of ten or twenty labels.

    :param classes: 10 or 100.
    """
    rng = np.random.default_rng(classes)
    if classes == 10:
        name, files, labels = "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], 1
        files.append("test_batch.bin")
    else:
        name, files, labels = "cifar-100-binary", ["train.bin", "test.bin"], 2
    (folder / name).mkdir(parents=True)
    for file in files:
        records = rng.integers(0, 256, (10 * per_class, labels + _PIXELS), dtype=np.uint8)
        records[:, labels - 1] = np.arange(len(records)) % 10
        if labels == 2:
            records[:, 0] = 99  # the coarse label, which must not be taken for the fine one
        records.tofile(folder / name / file)
    return folder


def folders(folder: Path, parts: dict[str, int], classes: int = 4, size: tuple[int, int] = (40, 50)) -> Path:
    """``part/class/number.png``, so many per class.

    :param size: height and width.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for label in range(classes):
            target = folder / part / f"class{label}"
            target.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    return folder
