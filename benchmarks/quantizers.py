"""Forward + backward of one fake quantization: time, memory and kept tensors of every algorithm here, of NNCF's and
Brevitas's own quantizers and of torch's, in ratios to a floor of five copies of the tensor."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
from measuring import by_turns, medians, peak_bytes, saved_bytes

from fat_plugins import ConfigError, TensorSpec, get_backend, set_backend
from fat_plugins.errors import QuantizationError
from fat_plugins.registry import algorithms

FLOOR = "floor (5 copies)"
#: of a convolution's weight and of its input, per number of elements
WEIGHTS = {10**4: (32, 32, 3, 3), 10**5: (96, 96, 3, 3), 10**6: (320, 320, 3, 3), 10**7: (1024, 1024, 3, 3)}
ACTIVATIONS = {10**4: (1, 16, 25, 25), 10**5: (2, 16, 56, 56), 10**6: (8, 40, 56, 56), 10**7: (50, 64, 56, 56)}
LARGE = 10**8
WEIGHTS[LARGE], ACTIVATIONS[LARGE] = (3328, 3328, 3, 3), (500, 64, 56, 56)
#: the weight whose numbers count: 512 x 512 x 3 x 3
TYPICAL = (512, 512, 3, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    """One tensor that all candidates quantize."""

    role: str
    shape: tuple[int, ...]
    dtype: str
    per_channel: bool


@dataclass
class Row:
    """What one candidate needed in one setting.

    :param time: of forward + backward, in five copies of the tensor.
    :param peak: most extra memory at one time, in sizes of the tensor.
    :param saved: bytes per element that the graph keeps beside the tensor itself.
    """

    name: str
    bits: int
    setting: Setting
    time: float
    peak: float
    saved: float


class Candidate(NamedTuple):
    """A quantizer as a differentiable function, and the tensors that it owns."""

    bits: int
    function: Callable[[torch.Tensor], torch.Tensor]
    own: tuple[torch.Tensor, ...] = ()
    backend: tuple[str, str] | None = None


def ours(
    setting: Setting, x: torch.Tensor, bits: int, backends: list[str], names: list[str] | None = None
) -> Iterator[tuple[str, Candidate]]:
    """Every algorithm that has the granularity, at its width nearest to ``bits``."""
    for name, algorithm in algorithms().items():
        if names and name not in names:
            continue
        low, high = getattr(algorithm, f"{setting.role}_bits")
        own = min(max(bits, low), high)
        shape = setting.shape if setting.role == "weight" else ()
        axis = 0 if setting.role == "weight" else 1
        spec = TensorSpec(setting.role, own, name, shape, axis, setting.per_channel, followed_by_norm=True)
        try:
            algorithm.check(spec, algorithm.parse_params({}))
            quantizer = algorithm.make(spec, {}).to(x.device)
            quantizer.calibrate(x[:2] if setting.role == "activation" else x.float())
        except (ConfigError, QuantizationError):
            continue
        quantizer.train()
        tensors = (*quantizer.parameters(), *quantizer.buffers())
        for backend in backends:
            yield f"{name}, {backend}", Candidate(own, quantizer, tensors, (backend, "inductor"))


def with_torch(setting: Setting, x: torch.Tensor, bits: int) -> Iterator[tuple[str, Candidate]]:
    """torch's learnable fake quantization (float32 only)."""
    if x.dtype != torch.float32:
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    channels = setting.shape[0] if setting.per_channel else 1
    scale = torch.full((channels,), float(x.abs().max()) / high, device=x.device, requires_grad=True)
    zero = torch.zeros(channels, device=x.device)
    if setting.per_channel:

        def function(t):
            return torch._fake_quantize_learnable_per_channel_affine(t, scale, zero, 0, low, high, 1.0)
    else:

        def function(t):
            return torch._fake_quantize_learnable_per_tensor_affine(t, scale, zero, low, high, 1.0)

    yield "torch, learnable fake quantize", Candidate(bits, function, (scale, zero))


def with_nncf(setting: Setting, x: torch.Tensor, bits: int) -> Iterator[tuple[str, Candidate]]:
    """NNCF's symmetric quantizer, with its extension where it could be built."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    try:
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
        from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
        from nncf.torch.quantization.reference import ReferenceQuantizedFunctions
    except ImportError:
        return
    shape = (setting.shape[0],) + (1,) * (len(setting.shape) - 1) if setting.per_channel else (1,)
    signed = setting.role == "weight"
    quantizer = SymmetricQuantizer(PTQuantizerSpec(bits, "symmetric", signed, False, False, shape, False))
    with torch.no_grad():
        quantizer.scale.fill_(float(x.abs().max()))
    quantizer = quantizer.to(x.device).train()
    name = "NNCF, symmetric"
    if x.device.type == "cpu":
        slow = QuantizedFunctionsCPU.get("Quantize_forward") == ReferenceQuantizedFunctions.Quantize_forward
        name += " (no extension)" if slow else " (extension)"
    yield name, Candidate(bits, quantizer, (*quantizer.parameters(), *quantizer.buffers()))


def with_brevitas(setting: Setting, x: torch.Tensor, bits: int) -> Iterator[tuple[str, Candidate]]:
    """Brevitas's quantizers with a learned scale; ``BREVITAS_JIT`` decides whether they are scripted."""
    try:
        from brevitas import config
        from brevitas.core.scaling import ScalingImplType
        from brevitas.nn import QuantConv2d, QuantIdentity
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
    except ImportError:
        return
    name = f"Brevitas, learned scale (JIT {'on' if config.JIT_ENABLED else 'off'})"
    if setting.role == "weight":
        learned = ScalingImplType.PARAMETER_FROM_STATS
        options = dict(weight_scaling_impl_type=learned, weight_scaling_per_output_channel=setting.per_channel)
        layer = QuantConv2d(
            setting.shape[1], setting.shape[0], setting.shape[2:], weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=bits, bias=False, **options,
        ).to(x.device)  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(x)
        proxy, tensors = layer.weight_quant, (*layer.parameters(), *layer.buffers())
    else:
        layer = QuantIdentity(Int8ActPerTensorFloat, bit_width=bits, collect_stats_steps=1).to(x.device).train()
        layer(x)
        proxy, tensors = layer, (*layer.parameters(), *layer.buffers())

    def function(t):
        out = proxy(t)
        return out if isinstance(out, torch.Tensor) and type(out) is torch.Tensor else out.value

    yield name, Candidate(bits, function, tensors)


OTHERS = {"torch": with_torch, "nncf": with_nncf, "brevitas": with_brevitas}


def measure(setting: Setting, args: argparse.Namespace) -> list[Row]:
    """All candidates in one setting."""
    torch.manual_seed(0)
    x = torch.randn(setting.shape, device=args.device) * (0.05 if setting.role == "weight" else 1.0)
    x = (x if setting.role == "weight" else x.relu()).to(DTYPES[setting.dtype])
    found = {} if args.scripted else dict(ours(setting, x, args.bits, args.backends, args.algorithms))
    for other in args.others:
        found |= dict(OTHERS[other](setting, x, args.bits))
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def stepper(candidate: Candidate):
        def step() -> None:
            if candidate.backend:
                set_backend(*candidate.backend)
            leaf.grad = None
            candidate.function(leaf).backward(grad)

        return step

    buffers = [torch.empty_like(x) for _ in range(2)]

    def floor() -> None:
        for i in range(5):
            buffers[i % 2].copy_(x)

    steps = {FLOOR: floor, **{name: stepper(candidate) for name, candidate in found.items()}}
    times = medians(by_turns(steps, args.repeats, device=args.device, busy=args.busy))
    rows, size = [], x.numel() * x.element_size()
    for name, candidate in found.items():
        leaf.grad = None
        peak = peak_bytes(steps[name], args.device) / size
        leaf.grad = None
        saved = saved_bytes(lambda c=candidate: c.function(leaf), leaf, *candidate.own) / x.numel()
        rows.append(Row(name, candidate.bits, setting, times[name] / times[FLOOR], peak, saved))
    return rows


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """What is measured: roles, shapes, dtypes and granularities."""
    sizes = [n for n in WEIGHTS if n < LARGE or args.large]
    for role, shapes in (("weight", WEIGHTS), ("activation", ACTIVATIONS)):
        if args.role not in (None, role):
            continue
        chosen = [shapes[n] for n in sizes] + ([TYPICAL] if role == "weight" else [])
        if args.quick:
            chosen = [(160, 160, 3, 3) if role == "weight" else (4, 32, 40, 40)]
        for shape in [tuple(args.shape)] if args.shape else chosen:
            for dtype in args.dtypes:
                for per_channel in (False, True):
                    yield Setting(role, shape, dtype, per_channel)


def jitted(args: argparse.Namespace) -> list[Row]:
    """Brevitas with its scripted quantizers, which a process decides on at its start; with a floor of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--scripted", "--json", str(path)]
        subprocess.run(command, env={**os.environ, "BREVITAS_JIT": "1"}, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(path.read_text())["rows"]
    return [Row(**{**row, "setting": Setting(r[0], tuple(r[1]), *r[2:])}) for row in rows if (r := row["setting"])]


def table(rows: list[Row]) -> str:
    """Text, one block for each setting."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        granularity = "per channel" if setting.per_channel else "per tensor"
        lines += ["", f"{setting.role} {'x'.join(map(str, setting.shape))}, {setting.dtype}, {granularity}"]
        lines.append(f"{'':46s} {'bits':>4s} {'time':>8s} {'peak':>7s} {'saved':>7s}")
        for row in sorted((r for r in rows if r.setting == setting), key=lambda r: r.time):
            lines.append(f"{row.name:46s} {row.bits:4d} {row.time:7.2f}x {row.peak:6.2f}x {row.saved:6.2f}B")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size per role, float32, eager, few repeats")
    parser.add_argument("--large", action="store_true", help="also 1e8 elements")
    parser.add_argument("--role", choices=["weight", "activation"])
    parser.add_argument("--shape", type=int, nargs="+", help="this shape only")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=None)
    parser.add_argument("--bits", type=int, default=4, help="or the nearest that an algorithm has")
    parser.add_argument("--algorithms", nargs="+", choices=list(algorithms()), help="default: all")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backends", nargs="+", choices=["eager", "compile"], default=None)
    parser.add_argument("--json", help="also write everything to this file")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--busy", action="store_true", help="the machine does other work: processor time, one thread")
    parser.add_argument("--others", nargs="*", choices=list(OTHERS), default=list(OTHERS), help="beside our own")
    parser.add_argument("--scripted", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 9)
    args.dtypes = args.dtypes or (["float32"] if args.quick else list(DTYPES))
    args.backends = args.backends or (["eager"] if args.quick else ["eager", "compile"])
    if args.scripted:
        args.others = ["brevitas"]
    args.threads = 1 if args.busy else args.threads
    if args.threads:
        torch.set_num_threads(args.threads)

    before = get_backend()
    rows = []
    for setting in settings(args):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            rows += measure(setting, args)
        print(table([r for r in rows if r.setting == setting]), flush=True)
    set_backend(before)
    if not args.scripted and any(r.name.startswith("Brevitas") for r in rows):
        scripted = jitted(args)
        print(table(scripted))
        rows += scripted
    if args.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": args.device}
        facts["clock"] = "processor" if args.busy else "wall"
        Path(args.json).write_text(json.dumps({**facts, "rows": [asdict(r) for r in rows]}, indent=2))


if __name__ == "__main__":
    main()
