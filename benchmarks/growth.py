"""How cost grows: importing, compressing and training against layers, width and bits, as ratios.

    python -m benchmarks.growth --json growth.json

Needs NNCF 3. Compressing is compared with ``nncf.quantize`` (its statistics, without bias correction) on the same
batches; a training step with the float step of the same network. Saved bytes are what autograd keeps between forward
and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import subprocess
import sys
import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import by_turns, medians, saved_bytes, write_json
from benchmarks.nets import batches, small_cnn

#: what is imported, and what it is compared with
IMPORTS = (
    ("import fat_plugins", "import torch"),
    ("import fat_nncf", "import nncf.torch"),
    ("import fat_brevitas", "import brevitas.nn"),
)


def import_times(repeats: int) -> list[dict[str, Any]]:
    """Fresh interpreters by turns: ours over what it stands on."""
    rows = []
    for ours, base in IMPORTS:
        if importlib.util.find_spec(base.split()[1].split(".")[0]) is None:
            continue

        def run(code: str) -> None:
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)

        found = medians(by_turns({c: lambda c=c: run(c) for c in (ours, base)}, repeats, 1))
        rows.append({"import": ours.split()[1], "over": base.split()[1], "ratio": found[ours] / found[base]})
    return rows


def compressed(model: nn.Module, algorithm: str, bits: int, images: torch.Tensor) -> nn.Module:
    """``model`` with the quantizers of ``algorithm``, calibrated on ``images``; the first and last layer too."""
    import fat_nncf

    compression = {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}}
    compression |= {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}
    config = {"input_info": {"sample_size": [1, *images.shape[1:]]}, "compression": compression}
    config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), batches(images, 4))
    return fat_nncf.create_compressed_model(deepcopy(model), config)[1]


def stock(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """NNCF's own quantization of a copy of ``model``."""
    import nncf

    plain = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, disable_channel_alignment=True)
    data = nncf.Dataset(batches(images, 4), lambda batch: batch[0])
    return nncf.quantize(deepcopy(model), data, advanced_parameters=plain, fast_bias_correction=True)


def step(model: nn.Module, images: torch.Tensor) -> Any:
    """One training step as a function: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    target = torch.zeros(len(images), dtype=torch.int64)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()

    return run


def kept_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward of one forward, parameters left out."""
    return saved_bytes(lambda: model.train()(images).sum(), *model.parameters())


def row(depth: int, width: int, bits: int, algorithm: str, repeats: int) -> dict[str, Any]:
    """One network: compressing over ``nncf.quantize``, step and memory over float."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    model = small_cnn(width=width, depth=depth)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        builds = {
            "ours": lambda: compressed(model, algorithm, bits, images),
            "NNCF": lambda: stock(model, images),
        }
        build = medians(by_turns(builds, 3, 1))
        quantized = compressed(model, algorithm, bits, images)
    steps = medians(by_turns({"float": step(deepcopy(model), images), "ours": step(quantized, images)}, repeats))
    return {
        "layers": depth + 1,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits": bits,
        "algorithm": algorithm,
        "compress": build["ours"] / build["NNCF"],
        "step": steps["ours"] / steps["float"],
        "saved": kept_bytes(quantized, images) / kept_bytes(deepcopy(model), images),
    }


def grow(algorithms: list[str], repeats: int) -> list[dict[str, Any]]:
    """Depth, width and bits one after another, the others held."""
    plans = [(d, 32, 4) for d in (4, 8, 16, 32)] + [(8, w, 4) for w in (16, 64, 128)] + [(8, 32, b) for b in (2, 3, 8)]
    return [row(*plan, algorithm, repeats) for algorithm in algorithms for plan in plans]


def tables(imports: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| import | over | time, ratio |", "|---|---|---:|"]
    lines += [f"| {r['import']} | {r['over']} | {r['ratio']:.2f} |" for r in imports]
    lines += [
        "",
        "| algorithm | layers | parameters | bits | compressing / NNCF | step / float | kept bytes / float |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['algorithm']} | {r['layers']} | {r['parameters']:,} | {r['bits']} | {r['compress']:.2f} "
            f"| {r['step']:.2f} | {r['saved']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["lsq", "fat", "dropbits"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    imports = import_times(max(args.repeats // 3, 3))
    rows = grow(args.algorithms, args.repeats)
    print(tables(imports, rows))
    write_json(args.json, {"args": vars(args), "imports": imports, "growth": rows})


if __name__ == "__main__":
    main()
