"""From the cells to ``docs/method_comparison.md``."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.method_comparison.cells import BREVITAS, FLOAT, METHODS, NNCF, TASKS
from fat_plugins.registry import algorithms

_INTRO = """# Method comparison

Written by `python -m benchmarks.method_comparison` ({cells} runs). Every method starts from the same float weights and
sees the same batches for as many epochs with the same optimizer (SGD, learning rate 0.02, momentum 0.9, decay 1e-4,
cosine), and quantizes the same layers: weights and inputs of all convolutions and linear layers, the first and
the last at 8 bits. The float network is trained on in the same way. Methods run on Brevitas through
`fat_brevitas.quantize`; `{brevitas}` is Brevitas's own learned scale and `{nncf}` NNCF's, at the same widths in the
same places. Options are the defaults, but PACT's, SQuantizer's, SDQ's and SLB's first clips are those with the least
squared error, and SLB is told that SGD trains it. What papers ask for (longer training, bits that come down step by
step) is not done: methods are compared as drop-in replacements.

* accuracy: on the test images, mean and range over seeds. A single number is one seed.
* step: time of a training step, as a multiple of the float model's in the same process (median; noisy below 10 %).
* kept: bytes that the forward keeps for the backward, as a multiple of the float model's.
* file: size of the OpenVINO `.bin` as a fraction of float32 weights; kernels: quantized layers that run int8; differ:
  integer codes that differ between torch and OpenVINO.
"""


def _cells(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("*-s*.json"))]


def _spread(values: list[float]) -> str:
    text = f"{mean(values):.2%}"
    return text if len(values) == 1 else f"{text} ({min(values):.2%} to {max(values):.2%})"


def _row(name: str, runs: list[dict[str, Any]], floats: dict[int, dict[str, Any]]) -> list[str]:
    kept = [r["saved_bytes"] / floats[r["seed"]]["saved_bytes"] for r in runs if r["seed"] in floats]
    row = [
        name,
        _spread([r["accuracy"] for r in runs]),
        f"{mean(r['step_ratio'] for r in runs):.2f}",
        f"{mean(kept):.2f}" if kept else "-",
    ]
    done = [r for r in runs if "weights_bytes" in r]
    if not done:
        return [*row, "-", "-", "-"]
    size = mean(r["weights_bytes"] / r["float_bytes"] for r in done)
    kernels = f"{min(r['integer_kernels'] for r in done)} of {done[0]['layers']}"
    return [*row, f"{size:.3f}", kernels, str(sum(r["differences"] for r in done))]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_page(results: Path, page: Path) -> None:
    """Write the page, in place of an earlier one."""
    cells = _cells(results)
    parts = [_INTRO.format(cells=len(cells), brevitas=BREVITAS, nncf=NNCF).strip()]
    for task in TASKS:
        own = [c for c in cells if c["task"] == task]
        floats = {c["seed"]: c for c in own if c["method"] == FLOAT}
        if not floats:
            continue
        one = next(iter(floats.values()))
        parts.append(
            f"## {task}\n\n{one['data']}; {one['float_epochs']} epochs in float, {one['epochs']} quantized. Float: "
            f"{_spread([c['float_accuracy'] for c in floats.values()])} at the start, "
            f"{_spread([c['accuracy'] for c in floats.values()])} after as many epochs more."
        )
        for bits in sorted({c["bits"] for c in own}, reverse=True):
            groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
            refused = []
            for c in own:
                if c["bits"] != bits or c["method"] == FLOAT:
                    continue
                if "refused" in c:
                    refused.append(f"`{c['method']}`: {c['refused']}")
                else:
                    groups[c["method"]].append(c)
            order = sorted(groups, key=lambda m: -mean(r["accuracy"] for r in groups[m]))
            rows = [_row(m, groups[m], floats) for m in order]
            header = [f"W{bits}A{bits}", "accuracy", "step", "kept", "file", "kernels", "differ"]
            parts.append(_markdown(header, rows))
            if refused:
                parts.append("Not run: " + "; ".join(sorted(set(refused))) + ".")
    parts.append((Path(__file__).with_name("notes.md")).read_text(encoding="utf-8").strip())
    fidelity = [f"* `{m}`: {algorithms()[m].title}. {algorithms()[m].fidelity}" for m in METHODS if m in algorithms()]
    parts.append("## How faithful the implementations are\n\n" + "\n".join(fidelity))
    temporary = page.with_suffix(".tmp")
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(temporary, page)
