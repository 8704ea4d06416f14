"""An exporter without a format: the codes as JSON, executed by torch. For what surrounds the real exporters."""

from __future__ import annotations

import copy
import json
import os
from types import SimpleNamespace

import torch

from fat_plugins.errors import ExportError
from fat_plugins.frozen import frozen_modules


def _codes(model) -> dict[str, list[int]]:
    return {m.name: m.codes.flatten().tolist() for m in frozen_modules(model)}


class FakeExporter:
    """Has the functions of a core exporter. ``batches`` notes what was executed; ``fails`` makes the export raise."""

    def __init__(self, suffix: str) -> None:
        self.suffix, self.models, self.batches, self.fails = suffix, {}, [], False

    def export(self, frozen_model, path, example_input, *, dynamic_batch=True):
        if path.suffix != self.suffix:
            raise ExportError(f"{path}: must end in {self.suffix}")
        if not path.parent.is_dir():
            raise ExportError(f"{path}: no such directory")
        if self.fails:
            raise ExportError(f"{path}: the fake refuses")
        path.write_text(json.dumps(_codes(frozen_model)))
        self.models[os.fspath(path)] = copy.deepcopy(frozen_model)
        layers = [
            SimpleNamespace(
                name=m.name, kind="weight", form="uniform", bits=m.form.bits, storage="text", bytes=1,
                elements=m.codes.numel(), note="",
            )
            for m in frozen_modules(frozen_model)
        ]  # fmt: skip
        return SimpleNamespace(path=str(path), weights_bytes=10, float_bytes=80, layers=layers, notes=["a note"])

    def verify(self, frozen_model, path, inputs, *, tie_guard=1e-4):
        if not path.is_file():
            raise ExportError(f"{path}: no such file")
        wanted, found = _codes(frozen_model), json.loads(path.read_text())
        weights = [
            SimpleNamespace(
                name=n, elements=len(c), differences=sum(a != b for a, b in zip(c, found[n], strict=True)),
            )
            for n, c in wanted.items()
        ]  # fmt: skip
        first = next((w.name for w in weights if w.differences), None)
        report = SimpleNamespace(ok=first is None, first_difference=first, weights=weights, activations=[])
        report.to_dict = lambda: {"ok": report.ok, "samples": len(inputs)}
        report.to_table = lambda: f"{path.name}: {'equal' if report.ok else 'unequal'}"
        return report

    def execute(self, path, inputs):
        self.batches.append(inputs[0].shape)
        with torch.no_grad():
            return [self.models[os.fspath(path)](torch.from_numpy(inputs[0])).numpy()]
