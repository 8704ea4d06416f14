"""Forward + backward of one fake quantization: ours, NNCF's own and torch's own, as ratios to a five-copy floor."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fat_plugins import TensorSpec, set_backend
from fat_plugins.registry import algorithms


def candidates(x: torch.Tensor, bits: int) -> dict[str, Callable[[], None]]:
    """Name to a function that runs one forward + backward on ``x``."""
    grad = torch.randn_like(x)
    leaf = x.clone().requires_grad_()

    def step(module: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf.grad = None
            module(leaf).backward(grad)

        return run

    buffers = [torch.empty_like(x) for _ in range(2)]

    def floor() -> None:
        for i in range(5):
            buffers[i % 2].copy_(x)

    found: dict[str, Callable[[], None]] = {"floor (5 copies)": floor}
    for name, algorithm in algorithms().items():
        quantizer = algorithm.make_activation(TensorSpec("activation", bits)).to(x.device)
        quantizer.calibrate(x)
        found[f"{name} activation"] = step(quantizer.train())

    scale, zero = torch.ones(1, device=x.device, requires_grad=True), torch.zeros(1, device=x.device)
    found["torch learnable fake quantize"] = step(
        lambda t: torch._fake_quantize_learnable_per_tensor_affine(t, scale, zero, -8, 7, 1.0)
    )
    try:
        from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
    except ImportError:
        return found
    spec = PTQuantizerSpec(bits, "symmetric", True, False, False, (1,), False)
    found["NNCF symmetric quantizer"] = step(SymmetricQuantizer(spec).to(x.device))
    return found


def measure(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds per run, the candidates taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # two warm-up turns
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 64, 56, 56])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", choices=["auto", "eager", "compile"])
    parser.add_argument("--json", help="also write the ratios to this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    set_backend(args.backend)
    x = torch.randn(args.shape, device=args.device).abs()
    medians = measure(candidates(x, args.bits), args.repeats, args.device)
    floor = medians["floor (5 copies)"]
    ratios = {name: value / floor for name, value in medians.items()}
    print(f"{args.bits}-bit, {tuple(args.shape)}, {args.device}, backend {args.backend}, torch {torch.__version__}")
    for name, ratio in sorted(ratios.items(), key=lambda kv: kv[1]):
        print(f"{name:32s} {ratio:6.2f} x floor")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"args": vars(args), "ratios": ratios}, file, indent=2)


if __name__ == "__main__":
    main()
