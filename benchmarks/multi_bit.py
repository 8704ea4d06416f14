"""One model at several bit widths against its ablation and against models of one width: a table for the docs.

For every seed one float network is trained, and from its weights: the recipe's algorithm with and without its gains,
all widths in one training each, and LSQ once for every width. Run from the repository:

    python benchmarks/multi_bit.py [--recipe recipes/digits_one_model_for_all.yaml] [--seeds 0 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat_plugins.recipes import load_recipe
from fat_plugins.recipes.hosts import get_host
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.rewriting import rewritten
from fat_plugins.recipes.schema import Recipe, plugin_section
from fat_plugins.recipes.state import seed_everything
from fat_plugins.recipes.trainer import Trainer, evaluate
from fat_plugins.switching import each_width

FLOAT, DEDICATED = "float32", "LSQ, a training for each width"
#: what is compared, by its row: options of the recipe's algorithm
JOINT = {"one model, gain per band": {"gains": "band"}, "one model, gains fixed at 1": {"gains": "fixed"}}


class Bench:
    """One recipe, the same float weights for all that is compared under one seed."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.data, self.host = recipe.data.build(), get_host(recipe.host)
        seed_everything(seed)
        self.float = recipe.model.build(self.data)
        self._train(self.float, recipe.pretrain)

    def _train(self, model: nn.Module, section: Any, **settings: Any) -> None:
        size = self.recipe.data.batch_size
        parts = parts_of(section, model)
        Trainer(model, self.data, section, batch_size=size, seed=self.seed, parts=parts, **settings).run()

    def accuracy(self, model: nn.Module) -> float:
        """On the test images, 0 to 1."""
        return evaluate(model, self.data.test_loader())[1]

    def quantized(self, changes: dict[str, Any], rewrite: bool) -> nn.Module:
        """Trained with ``changes`` in the recipe's section, from the float weights."""
        config = deepcopy(self.recipe.compression)
        plugin_section(config).update(changes)
        start = rewritten(self.float, self.recipe.rewrites if rewrite else [], self.data.example)[0]
        seed_everything(self.seed)
        loader = self.data.calibration_loader(self.recipe.data.batch_size)
        controller, model = self.host.compress(deepcopy(start), config, loader, self.data.example)
        self._train(model, self.recipe.training, controller=controller)
        return model

    def rows(self) -> dict[str, dict[str, float]]:
        """Accuracy by row and by width (as text)."""
        params = plugin_section(self.recipe.compression)["params"]
        found = {FLOAT: {"32": self.accuracy(self.float)}}
        for row, options in JOINT.items():
            model = self.quantized({"params": {**params, **options}}, rewrite=True)
            found[row] = {str(bits): self.accuracy(model) for bits in each_width(model)}
        dedicated = {}
        for bits in params["bit_set"]:
            tensor = {"bits": bits}
            changes = {"algorithm": "lsq", "params": {}, "weights": tensor, "activations": tensor}
            dedicated[str(bits)] = self.accuracy(self.quantized(changes, rewrite=False))
        return {**found, DEDICATED: dedicated}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: rows over widths, means of the seeds with the lowest and the highest."""
    runs = list(results.values())
    widths = ["32", *next(iter(runs))[DEDICATED]]
    lines = ["| | " + " | ".join(f"{w} bits" for w in widths) + " |", "|---|" + "---|" * len(widths)]
    for row in runs[0]:
        cells = []
        for width in widths:
            each = [run[row][width] for run in runs if width in run[row]]
            mean = f"{sum(each) / len(each):.1%} ({min(each):.1%} to {max(each):.1%})" if each else ""
            cells.append(mean.replace("%", " %"))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, print, and write after every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=str(Path(__file__).parents[1] / "recipes/digits_one_model_for_all.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="KEY=VALUE of the recipe")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.changes)
    recipe.check()
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for seed in given.seeds:
        results[str(seed)] = Bench(recipe, seed).rows()
        print(f"seeds: {', '.join(results)}\n{table(results)}", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
