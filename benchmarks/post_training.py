"""Post-training weights: GPFQ against rounding to nearest, on the networks of the method comparison.

    python -m benchmarks.post_training                          # three seeds, both tasks; writes the page of GPFQ
    python -m benchmarks.post_training --task digits --seed 0   # prints a part of it

Every layer is quantized, the first and the last too, one scale per layer; batch norms are neither folded nor adapted.
Float networks are those of ``benchmarks.method_comparison`` and are kept in ``--results``.
"""

from __future__ import annotations

import statistics
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import fat_brevitas
import torch
import typer
from torch import nn

from benchmarks.method_comparison.cells import BATCH, FLOAT, TASKS, Cell, _float_model
from fat_plugins.algorithms.gpfq import GPFQWeight
from fat_plugins.network import named_quantizers
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.trainer import evaluate

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algorithms" / "gpfq.md"
BEGIN, END = "<!-- measured: written by benchmarks.post_training -->", "<!-- end of measured -->"
BITS = (5, 4, 3, 2)
#: calibration images of each layer
SAMPLES = 512
#: row: algorithm, its options, and whether the path is left out
ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "largest weight, nearest": ("minmax", {}, False),
    "`C = 1.16`, nearest": ("gpfq", {}, True),
    "`C = 1.16`, GPFQ": ("gpfq", {}, False),
    "`C = 1.16`, GPFQ, bias correction `all`": ("gpfq", {"bias_correction": "all"}, False),
    "least error, nearest": ("gpfq", {"radius": None}, True),
    "least error, GPFQ": ("gpfq", {"radius": None}, False),
    "authors' alphabet (a bit more), nearest": ("gpfq", {"alphabet": "authors"}, True),
    "authors' alphabet (a bit more), GPFQ": ("gpfq", {"alphabet": "authors"}, False),
}


def section(row: str, bits: int, activations: bool) -> dict[str, Any]:
    """The compression section of one cell."""
    algorithm, params, rounded = ROWS[row]
    params = {**params, "samples": 1 if rounded else SAMPLES} if algorithm == "gpfq" else params
    return {
        "algorithm": algorithm,
        "weights": {"bits": bits, "per_channel": False},
        "activations": {"bits": 8} if activations else {"ignored_scopes": ["{re}.*"]},
        "first_layer": "same", "last_layer": "same", "params": params,
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    }  # fmt: skip


def accuracy(row: str, bits: int, activations: bool, model: nn.Module, data: Data) -> float:
    """Test accuracy (0 to 1) of one cell."""
    loader = data.calibration_loader(BATCH)
    found = fat_brevitas.quantize(deepcopy(model), section(row, bits, activations), loader)
    if ROWS[row][2]:
        floats = dict(model.named_parameters())
        for _, quantizer in named_quantizers(found):
            if isinstance(quantizer, GPFQWeight):
                quantizer.keep_nearest(floats[f"{quantizer.spec.name}.weight"])
    return evaluate(found, data.test_loader())[1]


def _cell(values: list[float]) -> str:
    spread = statistics.pstdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def table(task: str, seeds: list[int], results: Path) -> str:
    """Both tables of one task, in Markdown."""
    data_section, _, epochs, _ = TASKS[task]
    data = data_section.build()
    models = [_float_model(Cell(task, FLOAT, 4, seed), data, results).eval() for seed in seeds]
    floats = [evaluate(model, data.test_loader())[1] for model in models]
    lines = [f"**{task}**: {data.description}; float {_cell(floats)} % after {epochs} epochs.", ""]
    head = [f"W{bits}{a}" for a in ("", "A8") for bits in BITS]
    lines += [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for row in ROWS:
        cells = []
        for activations in (False, True):
            for bits in BITS:
                cells.append(_cell([accuracy(row, bits, activations, model, data) for model in models]))
        lines.append(f"| {row} | {' | '.join(cells)} |")
        typer.echo(lines[-1])
    return "\n".join(lines)


def main(
    task: Annotated[list[str] | None, typer.Option(help="digits or shapes; default: both.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2.")] = None,
    results: Annotated[Path, typer.Option(help="Where float networks are kept.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure, and write the page when nothing was left out."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results.mkdir(parents=True, exist_ok=True)
    seeds = seed or [0, 1, 2]
    tables = "\n\n".join(table(t, seeds, results) for t in task or TASKS)
    if task or seed:
        typer.echo(tables)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    temporary.replace(PAGE)


if __name__ == "__main__":
    typer.run(main)
