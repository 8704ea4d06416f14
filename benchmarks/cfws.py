"""Post-training quantization of a small RepVGG, with and without CFWS's split and its thresholds.

    python -m benchmarks.cfws --json cfws.json

Every variant starts from the same merged float network of a seed. Plain is nearest rounding: weights per output
channel and activations by their largest magnitude. Accuracy of the test images, and the signal-to-noise ratio of the
logits (dB, float network against quantized one, test images).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import write_json
from fat_plugins import rewrite
from fat_plugins.recipes import checkpoint_path, load_checkpoint, load_recipe, train
from fat_plugins.recipes.hosts import get_host

SUMS = r"{re}CoarseFine\[\w+\]/(__add__|add)"
#: name, algorithm, options, options of the split or None, whether the parts of sums are quantized too
VARIANTS: tuple[tuple[str, str, dict[str, Any], dict[str, Any] | None, bool], ...] = (
    ("plain", "minmax", {}, None, False),
    ("KL, standard score", "cfws", {"score": "standard"}, None, False),
    ("KL, paper's score", "cfws", {}, None, False),
    ("split", "minmax", {}, {}, False),
    ("split, each part of a sum quantized", "minmax", {}, {}, True),
    ("split of the whole kernel", "minmax", {}, {"extract_center": False}, False),
    ("split, KL, paper's score", "cfws", {}, {}, False),
)


def float_network(data: str, seed: int, epochs: int, folder: Path) -> tuple[nn.Module, Any]:
    """The recipe's network, trained and merged, and its data."""
    settings = [f"seeds=[{seed}]", f"pretrain.epochs={epochs}", "export=null", "baselines=[]"]
    settings += [] if data == "digits" else ["data.name=shapes", "data.params={}"]
    recipe = load_recipe("digits_cfws_w8a8", settings)
    train(recipe, folder)
    images = recipe.data.build()
    model = recipe.model.build(images)
    model.load_state_dict(load_checkpoint(checkpoint_path(folder, "float")).state)
    rewrite(model.eval(), "reparameterize", images.example)
    return model, images


@torch.no_grad()
def logits(model: nn.Module, images: Any) -> tuple[Tensor, float]:
    """Of the test images, and the accuracy."""
    outputs, right = [], 0
    for x, labels in images.test_loader():
        outputs.append(model(x).float())
        right += int((outputs[-1].argmax(1) == labels).sum())
    found = torch.cat(outputs)
    return found, right / len(found)


def measure(model: nn.Module, images: Any, host: Any, bits: int, batch: int) -> dict[str, dict[str, float]]:
    """Accuracy and signal-to-noise ratio of every variant."""
    reference, accuracy = logits(model, images)
    rows = {"float": {"accuracy": accuracy, "snr": float("inf")}}
    for name, algorithm, params, split, all_parts in VARIANTS:
        network = deepcopy(model)
        changed = 0
        if split is not None:
            (report,) = rewrite(network, "cfws", params={"bits": bits, **split})
            changed = len(report.changed)
        section = {
            "algorithm": algorithm,
            "weights": {"bits": bits, "per_channel": True},
            "activations": {"bits": 8, "ignored_scopes": [] if all_parts or not changed else [SUMS]},
            "params": params,
        }
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, quantized = host.compress(
                network, {"compression": section}, images.calibration_loader(batch), images.example
            )
        found, accuracy = logits(quantized.eval(), images)
        noise = (found - reference).double().square().sum()
        snr = 10 * float(torch.log10(reference.double().square().sum() / noise))
        rows[name] = {"accuracy": accuracy, "snr": snr, "layers": changed}
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, lowest to highest behind them."""
    widths = sorted({r["bits"] for r in results}, reverse=True)
    head = [f"W{b}A8: accuracy | W{b}A8: SNR of the logits" for b in widths]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---|---|" * len(widths)]
    for name in results[0]["rows"]:
        cells = []
        for b in widths:
            found = [r["rows"][name] for r in results if r["bits"] == b]
            accuracy, snr = [f["accuracy"] for f in found], [f["snr"] for f in found]
            cells.append(f"{mean(accuracy):.2%} ({min(accuracy):.2%} to {max(accuracy):.2%})")
            cells.append("-" if name == "float" else f"{mean(snr):.1f} dB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["digits", "shapes"], choices=["digits", "shapes"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--host", default="nncf")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    host, everything = get_host(args.host), {}
    for data in args.data:
        results = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                model, images = float_network(data, seed, args.epochs, Path(folder))
            results += [{"seed": seed, "bits": bits, "rows": measure(model, images, host, bits, 64)} for bits in (8, 4)]
        everything[data] = results
        print(f"\n{images.description}; seeds {args.seeds}, {args.epochs} epochs, host {args.host}\n\n{table(results)}")
    if args.json is not None:
        write_json(args.json, everything)


if __name__ == "__main__":
    main()
