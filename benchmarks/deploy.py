"""Deployed models in OpenVINO, side by side: float, NNCF's own 8 and 4 bits, and ours at 8 to 1 bit.

    python -m benchmarks.deploy --json deploy.json

One process compiles all models and runs them by turns; latency is one image at a time, throughput is the plugin's own
streams. Precision hints are left at the plugin's defaults, as users run models: where the processor has bf16
instructions, float layers run in bf16. The line "float, f32" switches that off.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import by_turns, medians, spread, write_json
from benchmarks.nets import NETS, SIDES, batches, settled

#: what stands for each width: LSQ's uniform grid down to 2 bits, BiTAT's -1 and +1 at one bit
OURS = {8: "lsq", 4: "lsq", 3: "lsq", 2: "lsq", 1: "bitat"}


def section(algorithm: str, bits: int, shape: list[int]) -> dict[str, Any]:
    """NNCF JSON config: the widths everywhere but in the first and last layer, which have 8 bits."""
    compression = {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}}
    return {"input_info": {"sample_size": shape}, "compression": compression}


def export_ours(model: nn.Module, bits: int, images: torch.Tensor, path: Path) -> None:
    """Place, calibrate and export one of our algorithms."""
    import fat_nncf

    shape = [1, *images.shape[1:]]
    config = fat_nncf.NNCFConfig.from_dict(section(OURS[bits], bits, shape))
    config = fat_nncf.register_default_init_args(config, batches(images, 4))
    _, compressed = fat_nncf.create_compressed_model(deepcopy(model), config)
    fat_nncf.export_openvino(compressed.eval(), path, images[:1])


def export_stock(model: nn.Module, bits: int, images: torch.Tensor, path: Path) -> None:
    """NNCF's own quantizers: ``nncf.quantize``, and below 8 bits its quantizers narrowed on the layers that ours take.

    8 bits go through ``nncf.strip``; the others as fake quantization, which is all that NNCF has for them.
    """
    import nncf
    import openvino

    from benchmarks.method_comparison.stock import nncf_stock

    example = images[:1]
    if bits == 8:
        data = nncf.Dataset(batches(images, 4), lambda batch: batch[0])
        stock = nncf.strip(nncf.quantize(deepcopy(model), data), do_copy=False, example_input=example)
    else:
        stock = nncf_stock(deepcopy(model), bits, batches(images, 4), example)
    shape = openvino.PartialShape([-1, *example.shape[1:]])
    openvino.save_model(openvino.convert_model(stock.eval(), example_input=example, input=shape), str(path))


def export_float(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """The float model; ``save_model`` stores its weights in fp16, as is its default."""
    import openvino

    shape = openvino.PartialShape([-1, *images.shape[1:]])
    openvino.save_model(openvino.convert_model(model, example_input=images[:1], input=shape), str(path))


def kernels(compiled: Any) -> dict[str, int]:
    """How many convolutions and matrix products run on which kernel: name and precision."""
    found: collections.Counter[str] = collections.Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {k: str(v.astype(str) if hasattr(v, "astype") else v) for k, v in node.get_rt_info().items()}
        if info.get("layerType") in ("Convolution", "FullyConnected", "MatMul"):
            found[info.get("primitiveType", "?").replace("unknown", "").strip("_")] += 1
    return dict(found)


class Deployed:
    """One IR, compiled for one image at a time and for throughput."""

    def __init__(self, path: Path, images: Any, settings: dict[str, str]) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        model.reshape([1, *images.shape[1:]])
        self.images = images[:1]
        one = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **settings})
        self.kernels = kernels(one)
        self.request = one.create_infer_request()
        many = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", **settings})
        self.queue = openvino.AsyncInferQueue(many)
        self.bytes = path.with_suffix(".bin").stat().st_size

    def latency(self) -> None:
        """One image."""
        self.request.infer({0: self.images})

    def throughput(self, count: int = 16) -> None:
        """``count`` images through the plugin's streams."""
        for _ in range(count):
            self.queue.start_async({0: self.images})
        self.queue.wait_all()


def candidates(net: str, folder: Path, size: int | None) -> dict[str, Deployed]:
    """Every model of the comparison, exported into ``folder`` and compiled."""
    torch.manual_seed(0)
    side = size or SIDES[net]
    images = torch.rand(8, 3, side, side)
    model = settled(NETS[net](), images)
    plans: dict[str, tuple[Any, dict[str, str]]] = {
        "float": (lambda p: export_float(model, images, p), {}),
        "float, f32": (lambda p: export_float(model, images, p), {"INFERENCE_PRECISION_HINT": "f32"}),
        "NNCF's own, 8 bits": (lambda p: export_stock(model, 8, images, p), {}),
        "NNCF's own, 4 bits": (lambda p: export_stock(model, 4, images, p), {}),
    }
    for bits in OURS:
        plans[f"ours, {bits} bit" + "s" * (bits > 1)] = (lambda p, b=bits: export_ours(model, b, images, p), {})
    found = {}
    for i, (name, (export, settings)) in enumerate(plans.items()):
        path = folder / f"{net}{i}.xml"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            export(path)
        found[name] = Deployed(path, images.numpy(), settings)
    return found


def measure(found: dict[str, Deployed], repeats: int) -> list[dict[str, Any]]:
    """One row per candidate: ratios to float of latency, throughput and file, and the kernels."""
    latency = by_turns({n: d.latency for n, d in found.items()}, repeats)
    stream = by_turns({n: d.throughput for n, d in found.items()}, max(repeats // 8, 3), 1)
    one, many = medians(latency), medians(stream)
    rows = []
    for name, deployed in found.items():
        rows.append(
            {
                "model": name,
                "latency": one[name] / one["float"],
                "latency_spread": spread(latency[name]),
                "faster": one["float"] / one[name],
                "faster_than_nncf4": one["NNCF's own, 4 bits"] / one[name],
                "throughput": many["float"] / many[name],
                "bytes": deployed.bytes,
                "kernels": deployed.kernels,
            }
        )
    return rows


def table(net: str, rows: list[dict[str, Any]]) -> str:
    """Markdown, one table per network."""
    lines = [
        f"### {net}",
        "",
        "| model | one image: times as fast as float | than NNCF's 4 bits | throughput over float | kB | kernels |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ran = ", ".join(f"{n} {k}" for k, n in sorted(r["kernels"].items(), key=lambda kv: -kv[1]))
        lines.append(
            f"| {r['model']} | {r['faster']:.2f} | {r['faster_than_nncf4']:.2f} | {r['throughput']:.2f} "
            f"| {r['bytes'] / 1000:.0f} | {ran} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--size", type=int, help="side of the images (default: 224, the small net 56)")
    parser.add_argument("--repeats", type=int, default=60, help="images per model that count for the latency")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for net in args.nets:
            results[net] = measure(candidates(net, Path(folder), args.size), args.repeats)
            print(table(net, results[net]), flush=True)
            print()
    write_json(args.json, {"args": vars(args), "results": results})


if __name__ == "__main__":
    main()
