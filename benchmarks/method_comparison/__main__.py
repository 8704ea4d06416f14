"""Every algorithm against the others and against the hosts' own quantizers: accuracy, step time, memory, size, kernels.

    python -m benchmarks.method_comparison                          # everything; resumes where it was stopped
    python -m benchmarks.method_comparison --task digits --bits 4 --seed 0 --method fat --method lsq
    python -m benchmarks.method_comparison --render                 # only write docs/method_comparison.md again

One JSON file per cell (task, method, bits, seed) in ``--results``; a cell that is there is not run again. Cells run one
after the other in one process and one thread; start several processes with different seeds to use more cores.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.method_comparison.cells import METHODS, TASKS, Cell, run_cell
from benchmarks.method_comparison.table import write_page
from fat_plugins.errors import FatPluginsError

ROOT = Path(__file__).resolve().parents[2]


def main(
    task: Annotated[list[str] | None, typer.Option(help="digits or shapes; default: both.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Width of both; default: 4, 3, 2, 1.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2.")] = None,
    results: Annotated[Path, typer.Option(help="Where the cells are kept.")] = ROOT / "benchmarks" / "results",
    render: Annotated[bool, typer.Option("--render", help="Run nothing, write the page.")] = False,
) -> None:
    """Run what is missing and write docs/method_comparison.md."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results.mkdir(parents=True, exist_ok=True)
    wanted = [
        Cell(t, m, b, s)
        for s in seed or (0, 1, 2)
        for t in task or TASKS
        for b in bits or (4, 3, 2, 1)
        for m in method or METHODS
    ]
    for cell in [] if render else wanted:
        path = results / f"{cell}.json"
        if path.exists():
            continue
        try:
            found = run_cell(cell, results)
        except FatPluginsError as error:  # a width that a method does not have is a result as well
            found = {"refused": " ".join(str(error).split())}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**vars(cell), **found}, indent=1))
        temporary.replace(path)
        typer.echo(f"{cell}: {found.get('refused') or format(found['accuracy'], '.2%')}")
    write_page(results, ROOT / "docs" / "method_comparison.md")


if __name__ == "__main__":
    typer.run(main)
