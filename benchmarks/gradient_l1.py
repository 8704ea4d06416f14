"""Gradient l1 before post-training quantization: float accuracy, and min-max quantization at several widths.

    python -m benchmarks.gradient_l1 --results gradient_l1.json     # resumes; prints the tables of the docs page

The networks and data of ``benchmarks.method_comparison``. Every float network is trained once for each seed, then
quantized without any training at each width. Rows differ in weight decay and in the penalty only.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from statistics import mean
from typing import Annotated

import fat_brevitas
import torch
import typer
from torch import nn

from benchmarks.method_comparison.cells import BATCH, TASKS
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.penalty import PenaltySection
from fat_plugins.recipes.schema import OptimizerSection, ScheduleSection, TrainSection
from fat_plugins.recipes.trainer import Trainer, evaluate

WIDTHS = (8, 6, 5, 4, 3)
#: name of a row: weight decay, and lambda of weights and activations
ROWS: dict[str, tuple[float, float]] = {
    "nothing": (0.0, 0.0),
    "weight decay": (5e-4, 0.0),
    "weight decay, mild penalty": (5e-4, 1e-3),
    "weight decay, strong penalty": (5e-4, 1e-2),
}
#: share of the epochs before the penalty begins, and again in which it rises
START = 0.2


def train(task: str, row: str, seed: int, epochs: int, data: Data) -> nn.Module:
    """A float network."""
    decay, weight = ROWS[row]
    model_section = TASKS[task][1]
    torch.manual_seed(seed)
    model = model_section.build(data)
    begin = START * epochs
    params = {"lambda_weights": weight, "lambda_activations": weight, "start": begin, "warmup": begin}
    section = TrainSection(
        epochs=epochs,
        optimizer=OptimizerSection(name="sgd", lr=0.05, momentum=0.9, weight_decay=decay),
        schedule=ScheduleSection(name="cosine", warmup_epochs=1.0),
        penalty=PenaltySection(name="gradient_l1", params=params) if weight else None,
    )
    Trainer(model, data, section, batch_size=BATCH, seed=seed, parts=parts_of(section, model)).run()
    return model


def run(task: str, row: str, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies (0 to 1) on the test images by width, ``"float"`` among them."""
    data = TASKS[task][0].build()
    model = train(task, row, seed, epochs, data)
    found = {"float": evaluate(model, data.test_loader())[1]}
    for bits in WIDTHS:
        section = {
            "algorithm": "minmax", "weights": {"bits": bits, "per_channel": False}, "activations": {"bits": bits},
            "first_layer": "same", "last_layer": "same",
        }  # fmt: skip
        loader = data.calibration_loader(BATCH)
        quantized = fat_brevitas.quantize(model, section, loader, example_input=data.example)
        found[str(bits)] = evaluate(quantized.eval(), data.test_loader())[1]
    return found


def table(task: str, cells: dict[str, dict[str, float]], seeds: list[int]) -> str:
    """Rows of one task in Markdown: mean (lowest to highest) in percent."""
    columns = ["float", *map(str, WIDTHS)]
    lines = [f"| {task} | float | {' | '.join(f'{b}/{b}' for b in WIDTHS)} |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        found = [cells[key] for seed in seeds if (key := f"{task}/{row}/{seed}") in cells]
        if found:
            texts = []
            for column in columns:
                values = [100 * f[column] for f in found]
                texts.append(f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(
    task: Annotated[list[str] | None, typer.Option(help="digits or shapes; default: both.")] = None,
    row: Annotated[list[str] | None, typer.Option(help=f"Default: all of {', '.join(ROWS)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2.")] = None,
    epochs: Annotated[int, typer.Option(help="Of float training.")] = 25,
    results: Annotated[Path, typer.Option(help="What is there already is not run again.")] = Path("gradient_l1.json"),
) -> None:
    """Run what is missing and print the tables."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seeds = seed or [0, 1, 2]
    cells = json.loads(results.read_text()) if results.exists() else {}
    for t in task or TASKS:
        for s in seeds:
            for r in row or ROWS:
                if (key := f"{t}/{r}/{s}") not in cells:
                    cells[key] = run(t, r, s, epochs)
                    temporary = results.with_suffix(".tmp")
                    temporary.write_text(json.dumps(cells, indent=1))
                    temporary.replace(results)
                    typer.echo(f"{key}: {cells[key]}", err=True)
        typer.echo(table(t, cells, seeds) + "\n")


if __name__ == "__main__":
    typer.run(main)
