"""Damaged exported files, compared with the model that they were made of; whole configs, handed to NNCF."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from harness import Case
from kinds_text import SECTION, _free_in_section
from mutate import damage, damage_bytes
from programs import RECIPES

sys.path.insert(0, str(RECIPES.parent / "export"))

from frozen_nets import Layer, Single, build

from fat_plugins.errors import ExportError


class _Exported:
    """A file of one format."""

    module = ""
    files: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        from importlib import import_module

        self.folder, exporter = folder, import_module(self.module)
        self.verify = getattr(exporter, "verify", None) or import_module("fat_plugins.export.verify").verify
        self.model = build(Single, "stem", 3, 4, bits=4)
        assert isinstance(self.model.layer, Layer)
        self.images = torch.randn(1, 3, 6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exporter.export(self.model, folder / self.files[0], self.images)
        self.good = {name: (folder / name).read_bytes() for name in self.files}

    def case(self, rng: Random) -> Case:
        for name, data in self.good.items():
            (self.folder / name).write_bytes(data)
        name = rng.choice(self.files)
        data, what = damage_bytes(rng, self.good[name])
        if rng.random() < 0.3:
            data, what = self.edited(rng, self.good[name].decode("latin1"))
        (self.folder / name).write_bytes(data)
        return Case(f"{name}: {what}", self.compare, names=(self.files[0], "stem", *self.files), folder=self.folder)

    def compare(self) -> None:
        report = self.verify(self.model, self.folder / self.files[0], self.images)
        if not report.ok:
            raise ExportError(f"{self.files[0]}: codes differ first in {report.first_difference}")

    def edited(self, rng: Random, text: str) -> tuple[bytes, str]:
        """Words of the file's own language exchanged."""
        words = (
            "i4",
            "f32",
            "Convolution",
            "FakeQuantize",
            "stem",
            "axis",
            "64",
            "6",
            "3",
            "4",
            "weight",
            "uses",
            "kind",
            "bits",
        )
        old, new = rng.choice(words), rng.choice((*words, "", "-1", "99999999999", "&x;", "<", "\0"))
        return text.replace(old, new).encode("latin1"), f"{old!r} replaced by {new!r}"


class Irs(_Exported):
    name, share, needs, module = "OpenVINO files", 80, ("openvino",), "fat_plugins.export.openvino"
    files = ("model.xml", "model.bin")


class Onnx(_Exported):
    name, share, needs, module = "ONNX files", 80, ("onnx", "onnxruntime", "onnxscript"), "fat_plugins.export.onnx"
    files = ("model.onnx",)


class Qonnx(_Exported):
    name, share, needs, module = "QONNX files", 40, ("onnx", "qonnx", "onnxscript"), "fat_plugins.export.qonnx"
    files = ("model.onnx",)


class HostConfigs:
    """Whole configs as NNCF's users give them to ``create_compressed_model``'s config."""

    name, share, needs = "configs for NNCF", 300, ("nncf",)

    def __init__(self, folder: Path) -> None: ...

    def case(self, rng: Random) -> Case:
        from fat_nncf.recipe_host import NNCFHost

        section = copy.deepcopy(SECTION)
        del section["activations"]["unified_scale_ops"]  # NNCF 3 has none
        good: dict[str, Any] = {
            "input_info": {"sample_size": [1, 1, 8, 8]},
            "target_device": "CPU",
            "compression": rng.choice((section, [{"algorithm": "magnitude_sparsity", "params": {}}, section])),
        }
        good = json.loads(json.dumps(good))
        bad = damage(rng, good, lambda path: path[:1] != ("compression",) or _free_in_section(path) or True)
        return Case(bad.what, lambda: NNCFHost().check(bad.tree, torch.zeros(1, 1, 8, 8)))


KINDS = (Irs, Onnx, Qonnx, HostConfigs)
