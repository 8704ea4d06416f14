"""One cell of the comparison: a task, a method, a bit width and a seed."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fat_brevitas
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.measuring import saved_bytes
from benchmarks.method_comparison.stock import brevitas_stock, nncf_stock
from fat_plugins.errors import ExportError
from fat_plugins.recipes.checkpoint import Checkpoint, cpu_state, load_checkpoint, save_checkpoint
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.deploy import deploy
from fat_plugins.recipes.schema import DataSection, ModelSection, OptimizerSection, ScheduleSection, TrainSection
from fat_plugins.recipes.targets import OPENVINO
from fat_plugins.recipes.trainer import evaluate, fit
from fat_plugins.registry import algorithms

#: task: data, model, and epochs of float training and of fine-tuning
TASKS: dict[str, tuple[DataSection, ModelSection, int, int]] = {
    "digits": (DataSection(name="digits"), ModelSection(name="digits_cnn", params={"width": 16}), 25, 15),
    "shapes": (
        DataSection(name="shapes", params={"noise": 0.17}),
        ModelSection(name="digits_cnn", params={"width": 16}),
        25,
        15,
    ),
}
FLOAT, BREVITAS, NNCF = "float", "brevitas-own", "nncf-own"
#: of another kind, measured on pages of their own: nothing learned, post-training, super-resolution, many widths
ELSEWHERE = ("minmax", "cfws", "daq", "gpfq", "one_model_for_all")
METHODS = [FLOAT, *(a for a in algorithms() if a not in ELSEWHERE), BREVITAS, NNCF]
#: options that a method needs to be comparable, beside its defaults
PARAMS: dict[str, dict[str, Any]] = {
    "pact": {"alpha": None},
    "sdq": {"alpha": "mse", "activation_alpha": "mse"},
    "slb": {"alpha": None, "optimizer": "sgd"},
    "squantizer": {"alpha": None},
}
BATCH = 64
_TIMED_STEPS = 12


@dataclass(frozen=True)
class Cell:
    """What one run is."""

    task: str
    method: str
    bits: int
    seed: int

    def __str__(self) -> str:
        return f"{self.task}-{self.method}-w{self.bits}a{self.bits}-s{self.seed}"


def _train(epochs: int, lr: float, decay: float) -> TrainSection:
    optimizer = OptimizerSection(name="sgd", lr=lr, momentum=0.9, weight_decay=decay)
    return TrainSection(epochs=epochs, optimizer=optimizer, schedule=ScheduleSection(name="cosine", warmup_epochs=1.0))


def _float_model(cell: Cell, data: Data, results: Path) -> nn.Module:
    """Trained once for each task and seed."""
    _, model_section, epochs, _ = TASKS[cell.task]
    path = results / f"{cell.task}-float-s{cell.seed}.safetensors"
    torch.manual_seed(cell.seed)
    model = model_section.build(data)
    if path.exists():
        model.load_state_dict(load_checkpoint(path).state)
    else:
        fit(model, data, _train(epochs, 0.05, 5e-4), batch_size=BATCH, seed=cell.seed)
        save_checkpoint(path, Checkpoint(cpu_state(model)))
    return model


def _quantized(cell: Cell, model: nn.Module, data: Data) -> tuple[nn.Module, Any]:
    """Model to train and what drives it (``None`` for the hosts' own quantizers)."""
    loader = data.calibration_loader(BATCH)
    if cell.method == BREVITAS:
        return brevitas_stock(model, cell.bits, loader, data.example), None
    if cell.method == NNCF:
        return nncf_stock(model, cell.bits, loader, data.example), None
    section = {
        "algorithm": cell.method, "weights": {"bits": cell.bits}, "activations": {"bits": cell.bits},
        "params": PARAMS.get(cell.method, {}),
    }  # fmt: skip
    quantized = fat_brevitas.quantize(model, section, loader, example_input=data.example)
    return quantized, fat_brevitas.Controller(quantized)


def run_cell(cell: Cell, results: Path) -> dict[str, Any]:
    """Fine-tune, deploy and measure.

    :param results: where float models are kept.
    :raises FatPluginsError: the method does not have this width.
    """
    data_section, _, float_epochs, epochs = TASKS[cell.task]
    data = data_section.build()
    model = _float_model(cell, data, results)
    facts = {
        "data": data.description, "float_epochs": float_epochs, "epochs": epochs,
        "float_accuracy": evaluate(model, data.test_loader())[1],
    }  # fmt: skip
    if cell.method == FLOAT:  # trained on for as long as the others, or they would win by training longer
        facts["saved_bytes"] = kept_bytes(deepcopy(model), data)
        fit(model, data, _train(epochs, 0.02, 1e-4), batch_size=BATCH, seed=cell.seed)
        return {**facts, "accuracy": evaluate(model, data.test_loader())[1]}
    torch.manual_seed(cell.seed)
    quantized, controller = _quantized(cell, deepcopy(model), data)
    facts["step_ratio"] = step_ratio(quantized, controller, deepcopy(model), data)
    facts["saved_bytes"] = kept_bytes(quantized, data)
    torch.manual_seed(cell.seed)
    quantized, controller = _quantized(cell, deepcopy(model), data)
    fit(quantized, data, _train(epochs, 0.02, 1e-4), batch_size=BATCH, seed=cell.seed, controller=controller)
    facts["accuracy"] = evaluate(quantized, data.test_loader())[1]
    return {**facts, **(_deployed(quantized, data) if controller is not None else {})}


def _deployed(model: nn.Module, data: Data) -> dict[str, Any]:
    samples = data.test.tensors[0][:64]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        try:
            frozen = fat_brevitas.frozen(model, data.example)
            done = deploy(OPENVINO, frozen, path, data.example, data.test_loader(), samples)
        except ExportError as error:
            return {"export": " ".join(str(error).split())}
    weights = [row for row in done.layers if row.kind == "weight"]
    return {
        "openvino_accuracy": done.accuracy,
        "weights_bytes": done.weights_bytes,
        "float_bytes": done.float_bytes,
        "integer_kernels": sum(row.speed == "int8" for row in weights),
        "layers": len(weights),
        "differences": sum(row.differences or 0 for row in done.layers),
        "layer_bits": {row.name: row.bits for row in weights},
    }


def _step(model: nn.Module, controller: Any, data: Data) -> Callable[[], None]:
    images, labels = (t[:BATCH] for t in data.train.tensors)
    model.train()

    def step() -> None:
        loss = cross_entropy(model(images), labels)
        if controller is not None:
            loss = loss + controller.loss()
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def step_ratio(model: nn.Module, controller: Any, float_model: nn.Module, data: Data) -> float:
    """Time of a training step as a multiple of the float model's, medians of steps that alternate."""
    steps = (_step(model, controller, data), _step(float_model, None, data))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(_TIMED_STEPS + 2):
        for step, found in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if i >= 2:  # the first ones allocate
                found.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def kept_bytes(model: nn.Module, data: Data) -> int:
    """Bytes that the forward of one batch keeps for the backward."""
    images, labels = (t[:BATCH] for t in data.train.tensors)
    model.train()
    return saved_bytes(lambda: cross_entropy(model(images), labels))
