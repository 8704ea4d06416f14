"""Bad images and labels."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from harness import Case
from mutate import damage_bytes
from programs import RECIPES  # noqa: F401  (makes tests/recipes importable)
from tiny_images import cifar as make_cifar
from tiny_images import folders as make_folders
from torchvision_shim import import_torchvision

from fat_plugins.recipes import imports
from fat_plugins.recipes.data import DATASETS
from fat_plugins.recipes.models import check_fit
from fat_plugins.recipes.schema import DataSection, ModelSection


def _read(name: str, params: dict[str, Any], model: str = "digits_cnn") -> None:
    """Everything that training would read, and the network on it."""
    data = DATASETS[name][1](DATASETS[name][0].model_validate(params))
    check_fit(ModelSection(name=model).build(data), model, data.example, data.classes)
    for loader in (data.training_loader(8, 0), data.validation_loader(8), data.test_loader(8)):
        for images, labels in loader:
            assert images.dtype == torch.float32
            assert torch.isfinite(images).all()
            assert 0 <= int(labels.min()) and int(labels.max()) < data.classes


class Cifar:
    """Files of the binary version."""

    name, share, needs = "CIFAR files", 500, ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for classes in (10, 100):
            make_cifar(folder / str(classes), classes, 6)
        self.files = [(p, p.read_bytes()) for p in sorted(folder.rglob("*.bin"))]

    def case(self, rng: Random) -> Case:
        for path, data in self.files:
            if path.is_dir():
                path.rmdir()
            path.write_bytes(data)
        path, data = rng.choice(self.files)
        record = len(data) // 60
        how = rng.randrange(6)
        if how == 0:
            new, what = data[: record * rng.randrange(1, 60) + rng.randrange(1, record)], "cut within an image"
        elif how == 1:
            at = record * rng.randrange(60) + (record - 3073)
            new, what = data[:at] + bytes([rng.randrange(100, 256)]) + data[at + 1 :], "a label out of range"
        elif how == 2:
            new, what = b"", "empty"
        elif how == 3:
            new, what = data + b"\0", "a byte more"
        elif how == 4:
            new, what = damage_bytes(rng, data)
        else:
            new, what = b"", "no file"
            path.unlink()
            if rng.random() < 0.5:
                path.mkdir()
        if path.is_file():
            path.write_bytes(new)
        classes = path.relative_to(self.folder).parts[0]
        bad = how in (0, 1, 2, 3, 5)
        if "test" not in path.name and how == 1 and classes == "100":
            what += ", of 100"
        return Case(f"{path.name}: {what}", lambda: _read(f"cifar{classes}", {"root": str(self.folder / classes)}),
                    bad, (path.name,), folder=self.folder)  # fmt: skip


class Folders:
    """Images in folders."""

    name, share, needs = "image folders", 400, ("torchvision", "PIL")

    def __init__(self, folder: Path) -> None:
        import_torchvision()
        self.folder, self.good = folder, folder.parent / "good"
        make_folders(self.good, {"train": 3, "val": 2}, 2, (12, 14))

    def case(self, rng: Random) -> Case:
        root = self.folder / "images"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.good, root)
        part, label = rng.choice(("train", "val")), rng.choice(("class0", "class1"))
        path = root / part / label / "0.png"
        how = rng.randrange(10)
        bad, names = True, (path.name, part, label)
        if how <= 3:
            data, what = damage_bytes(rng, path.read_bytes())
            path.write_bytes(data)
            bad = False
        elif how == 4:
            shutil.rmtree(path.parent)
            what = "no class"
        elif how == 5:
            for image in path.parent.iterdir():
                image.unlink()
            what = "a class without images"
        elif how == 6:
            path.write_bytes(_bomb(rng.choice((20_000, 60_000))))
            what = "an image that unpacks to gigabytes"
        elif how == 7:
            (root / part / "class7").mkdir()
            shutil.copy(path, root / part / "class7" / "0.png")
            what = "a class more"
        elif how == 8:
            what, other = rng.choice(
                (("text", b"hello"), ("HTML", b"<html>"), ("a GIF's head", b"GIF89a"), ("nothing", b""))
            )
            path.write_bytes(other)
        else:
            shutil.rmtree(root / part)
            what = "no folder"
            if rng.random() < 0.5:
                (root / part).write_text("a file")
        params = {"root": str(root), "size": 12, "workers": 0, "validation_fraction": 0.4, "calibration": 2}
        return Case(
            what, lambda: _read("imagefolder", {**params, "augment": "pad_crop"}), bad, names, folder=self.folder
        )


def _bomb(side: int) -> bytes:
    """A small PNG of so many pixels a side."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    out = io.BytesIO(b"")
    out.write(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    return out.getvalue()


CODE = """
import torch

class Set(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels
    def __len__(self):
        return len(self.labels)
    def __getitem__(self, i):
        return self.images[i], self.labels[i]

def data(wrong="", part="train", at=0):
    parts = {}
    for name in ("train", "test"):
        images = list(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        labels = [i % 3 for i in range(20)]
        if name == part:
            if wrong == "nan": images[at] = images[at] * float("nan")
            if wrong == "inf": images[at] = images[at] / 0
            if wrong == "size": images[at] = torch.zeros(1, 8, 9)
            if wrong == "channels": images[at] = torch.zeros(2, 8, 8)
            if wrong == "flat": images[at] = torch.zeros(64)
            if wrong == "bytes": images[at] = images[at].byte()
            if wrong == "double": images[at] = images[at].double()
            if wrong == "numpy": images[at] = images[at].numpy()
            if wrong == "none": images[at] = None
            if wrong == "large label": labels[at] = 3
            if wrong == "negative label": labels[at] = -1
            if wrong == "float label": labels[at] = 0.5
            if wrong == "text label": labels[at] = "cat"
            if wrong == "huge label": labels[at] = 10 ** 30
            if wrong == "no label": labels[at] = torch.zeros(2)
            if wrong == "empty": images, labels = [], []
        parts[name] = Set(images, labels)
    parts["classes"] = 3
    if wrong == "iterator": parts[part] = iter([])
    if wrong == "number": parts[part] = 3
    if wrong == "classes text": parts["classes"] = "3"
    if wrong == "classes 0": parts["classes"] = 0
    if wrong == "classes -1": parts["classes"] = -1
    if wrong == "classes 10**12": parts["classes"] = 10 ** 12
    if wrong == "missing": del parts[part]
    if wrong == "extra": parts["tset"] = parts[part]
    if wrong == "nothing": return None
    return parts

def model(sample_shape, classes, wrong=""):
    inputs = {"model inputs": 65}.get(wrong, 64)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs, {"model outputs": 5}.get(wrong, classes)))
    return {"model none": None, "model class": torch.nn.Linear}.get(wrong, net)
"""
_WRONG = (
    "nan", "inf", "size", "channels", "flat", "bytes", "double", "numpy", "none", "large label", "negative label",
    "float label", "text label", "huge label", "no label", "empty", "iterator", "number", "classes text", "classes 0",
    "classes -1", "classes 10**12", "missing", "extra", "nothing",
)  # fmt: skip
_MODEL = ("model inputs", "model outputs", "model none", "model class")


class Own:
    """What functions of the user's own return."""

    name, share, needs = "own data and models", 300, ()

    def __init__(self, folder: Path) -> None:
        (folder / "fuzz_own.py").write_text(CODE)
        sys.path.insert(0, str(folder))
        sys.modules.pop("fuzz_own", None)
        imports.allow("fuzz_own")

    def case(self, rng: Random) -> Case:
        if rng.random() < 0.15:
            name = rng.choice(
                ("fuzz_own:torch", "fuzz_own:Set", "fuzz_own:dta", "os:system", "fuzz_own.os:system", "x", "a:b:c")
            )
            return Case(name, lambda: _own({"factory": name}, ""), True, ("data.params.factory",))
        options: dict[str, Any] = {
            "wrong": rng.choice(_WRONG),
            "part": rng.choice(("train", "test")),
            "at": rng.randrange(20),
        }
        if rng.random() < 0.1:
            wrong = rng.choice(({"wrnog": 1}, {"at": 1, "x": 2}, {"sample_shape": 3}))
            return Case(f"options {wrong}", lambda: _own({"factory": "fuzz_own:data", "options": wrong}, ""), True)
        if rng.random() < 0.2:
            wrong = rng.choice(_MODEL)
            return Case(wrong, lambda: _own({"factory": "fuzz_own:data"}, wrong), True, ("model",))
        section = {"factory": "fuzz_own:data", "options": options, "validation_fraction": 0.2}
        return Case(str(options), lambda: _own(section, ""), True, ("data.params.factory",))


def _own(params: dict[str, Any], wrong: str) -> None:
    data = DataSection(name="callable", batch_size=8, params=params).build()
    section = ModelSection(name="callable", params={"factory": "fuzz_own:model", "options": {"wrong": wrong}})
    check_fit(section.build(data), "callable", data.example, data.classes)
    for loader in (data.training_loader(8, 0), data.validation_loader(8), data.test_loader(8)):
        for epoch in range(3):  # a pass leaves some images out
            for _ in loader.begin(epoch) if loader.batch_sampler.__class__.__name__ == "EpochBatches" else loader:
                pass


KINDS = (Cifar, Folders, Own)
