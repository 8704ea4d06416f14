"""PSNR of a small EDSR on drawn images: DAQ with run-time and with calibrated ranges beside LSQ and plain rounding,
before and after training with quantizers, from the same float weights. Writes the tables of ``docs/algorithms/daq.md``.

    python -m benchmarks.super_resolution results.json --seeds 0 1 2
    python -m benchmarks.super_resolution results.json --table
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fat_plugins.recipes import load_recipe
from fat_plugins.recipes.checkpoint import Checkpoint, cpu_state, load_checkpoint, save_checkpoint, write_json
from fat_plugins.recipes.hosts import get_host
from fat_plugins.recipes.state import seed_everything
from fat_plugins.recipes.trainer import evaluate, fit

RECIPE = "sr/edsr_tiny_daq_w4a4"
WIDTHS = (4, 3, 2)
#: algorithm, its options, one scale per channel of activations; the last column: whether it is trained as well
METHODS: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "DAQ dynamic, 4-bit sigma": ("daq", {"dynamic": True, "sigma_bits": 4}, False, True),
    "DAQ dynamic, float sigma": ("daq", {"dynamic": True}, False, False),
    "DAQ dynamic, not clipped": ("daq", {"dynamic": True, "sigma_bits": 4, "clip": False}, False, False),
    "DAQ dynamic, step of `bits`": ("daq", {"dynamic": True, "sigma_bits": 4, "step_index": "bits"}, False, False),
    "DAQ static, per tensor": ("daq", {}, False, True),
    "DAQ static, per channel": ("daq", {}, True, False),
    "LSQ": ("lsq", {}, False, True),
    "largest magnitude (`minmax`)": ("minmax", {}, False, True),
    "DAQ static, per tensor, step of `bits`": ("daq", {"step_index": "bits"}, False, True),
}


def _config(algorithm: str, params: dict[str, Any], per_channel: bool, bits: int) -> dict[str, Any]:
    config = deepcopy(load_recipe(RECIPE).compression)
    section = config["compression"]
    activations = {"bits": bits, **({"per_channel": True} if per_channel else {})}
    section.update(algorithm=algorithm, params=params, weights={"bits": bits}, activations=activations)
    return config


def run(path: Path, seeds: list[int], epochs: int | None) -> None:
    """Fill in what ``path`` does not hold yet."""
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE)
    host, data = get_host(recipe.host), recipe.data.build()
    done = json.loads(path.read_text()) if path.exists() else {"data": data.description, "cells": {}}
    cells = done["cells"]
    training = recipe.training.model_copy(update={} if epochs is None else {"epochs": epochs})
    done["epochs"] = {"float": recipe.pretrain.epochs, "quantized": training.epochs}

    def add(key: str, value: float) -> None:
        cells[key] = round(value, 3)
        write_json(path, done)
        print(f"{key}: {value:.2f} dB", flush=True)

    for seed in seeds:
        seed_everything(seed)
        model, kept = recipe.model.build(data), path.with_suffix(f".float{seed}.safetensors")
        if kept.exists():
            model.load_state_dict(load_checkpoint(kept).state)
        else:
            fit(model, data, recipe.pretrain, batch_size=recipe.data.batch_size, seed=seed)
            save_checkpoint(kept, Checkpoint(cpu_state(model)))
        add(f"float/{seed}", evaluate(model.eval(), data.test_loader(), None, data.task)[1])
        for trained in (False, True):
            for name, (algorithm, params, per_channel, trains) in METHODS.items():
                for bits in WIDTHS:
                    key = f"{name}/{bits}/{'trained' if trained else 'rounded'}/{seed}"
                    if key in cells or (trained and not trains):
                        continue
                    seed_everything(seed)
                    config = _config(algorithm, params, per_channel, bits)
                    loader = data.calibration_loader(recipe.data.batch_size)
                    controller, quantized = host.compress(deepcopy(model), config, loader, data.example)
                    if trained:
                        size = recipe.data.batch_size
                        fit(quantized, data, training, batch_size=size, seed=seed, controller=controller)
                    add(key, evaluate(quantized.eval(), data.test_loader(), None, data.task)[1])


def table(path: Path) -> str:
    """Markdown: mean over the seeds."""
    done = json.loads(path.read_text())
    cells, lines = done["cells"], []
    seeds = sorted({key.rpartition("/")[2] for key in cells})
    for trained in ("rounded", "trained"):
        lines += [f"| {trained} | " + " | ".join(f"{b}/{b}" for b in WIDTHS) + " |", "|---" * (len(WIDTHS) + 1) + "|"]
        for name in METHODS:
            row = [[cells.get(f"{name}/{bits}/{trained}/{seed}") for seed in seeds] for bits in WIDTHS]
            row = [[v for v in values if v is not None] for values in row]
            if any(row):
                lines.append(f"| {name} | " + " | ".join(f"{mean(v):.2f}" if v else "" for v in row) + " |")
        lines.append("")
    floats = [cells[f"float/{seed}"] for seed in seeds]
    lines.append(f"{done['data']}; float: {mean(floats):.2f} dB; seeds: {', '.join(seeds)}; epochs: {done['epochs']}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="of training with quantizers; default: the recipe's")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    if not args.table:
        run(args.results, args.seeds, args.epochs)
    print(table(args.results))


if __name__ == "__main__":
    main()
