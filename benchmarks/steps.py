"""Time and memory of a training step and of an evaluation: float, a host's own quantizers, and ours on that host.

Every host runs in a process of its own (NNCF 2 in an environment of its own: ``--nncf2-python``), in which its
candidates and the float network take turns. What is compared is the median's ratio to that float network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.measuring import by_turns, medians, saved_bytes
from benchmarks.nets import NETS
from benchmarks.step_hosts import HOSTS, Candidate, make

_ROOT = Path(__file__).parents[1]
#: batch and side of the images
_SIZES = {"cpu": (8, 112), "cuda": (64, 224), "quick": (4, 64)}


class Run:
    """One candidate with its optimizer."""

    def __init__(self, candidate: Candidate, x: Tensor, y: Tensor) -> None:
        self.model, self.each_step = candidate
        self.x, self.y = x, y
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def _loss(self) -> Tensor:
        term = self.each_step()
        loss = cross_entropy(self.model(self.x), self.y)
        return loss if term is None else loss + term

    def step(self) -> None:
        """Forward, loss, backward, SGD."""
        self.optimizer.zero_grad()
        self._loss().backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward pass of a model in evaluation mode."""
        self.model(self.x)

    def memory(self) -> int:
        """Bytes: on CUDA the peak of a step above what stood there before, else those that autograd saves."""
        if self.x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        return saved_bytes(self._loss, *self.model.parameters())


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What one process measures: notes, and by candidate ``step_s``, ``eval_s`` and ``bytes``, or an ``error``."""
    torch.manual_seed(0)
    batch, side = job["size"]
    shape = (batch, 3, side, side)
    x = torch.randn(shape).to(job["device"])
    if job["channels_last"]:
        x = x.to(memory_format=torch.channels_last)
    y = (torch.arange(batch) % 1000).to(job["device"])
    host = HOSTS[job["host"]][0](x, job["bits"])
    net = NETS[job["net"]]()
    if job["channels_last"]:
        net = net.to(memory_format=torch.channels_last)
    found: dict[str, Any] = {"notes": host.notes(), "rows": {}}
    runs: dict[str, Run] = {}
    for name in job["candidates"]:
        try:
            run = Run(make(host, net, name), x, y)
            run.step()
        except Exception as error:  # the others are still worth their numbers
            found["rows"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        runs[name] = run
    turns, how = {name: run.step for name, run in runs.items()}, {"warm_up": 1, "device": job["device"]}
    steps = medians(by_turns(turns, job["repeats"], **how))
    memory = {name: run.memory() for name, run in runs.items()}
    for run in runs.values():
        run.model.eval()
    turns = {name: run.evaluate for name, run in runs.items()}
    evaluations = medians(by_turns(turns, job["repeats"], **how))
    for name in runs:
        found["rows"][name] = {"step_s": steps[name], "eval_s": evaluations[name], "bytes": memory[name]}
    return found


def _spawn(python: str, job: dict[str, Any], extensions: str) -> dict[str, Any]:
    environment = {
        # a compiler is wanted here, and patience with it: NNCF's own quantizers are to be at their best
        **{k: v for k, v in os.environ.items() if k != "CXX"},
        "NNCF_CI": "1", "NNCF_EXTENSION_LOAD_TIMEOUT": "0", "TORCH_EXTENSIONS_DIR": extensions,
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        **HOSTS[job["host"]][1],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, "-W", "ignore", "-m", "benchmarks.steps", "--worker", json.dumps(job), str(out)]
        done = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
        if done.returncode or not out.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return {"notes": {}, "rows": {}, "error": last[:200]}
        return json.loads(out.read_text())


def rows_of(net: str, host: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one process, with ratios to its float network and to the host's own quantizers."""
    if "error" in result:
        return [{"net": net, "host": host, "candidate": "-", "error": result["error"]}]
    found = result["rows"]
    rows = []
    for name, row in found.items():
        row = {"net": net, "host": host, "candidate": name, **row}
        for reference in ("float", "own"):
            base = found.get(reference, {})
            if "error" not in row and "step_s" in base:
                row[f"step_to_{reference}"] = row["step_s"] / base["step_s"]
                row[f"eval_to_{reference}"] = row["eval_s"] / base["eval_s"]
                row[f"bytes_to_{reference}"] = row["bytes"] / max(base["bytes"], 1)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("net", "host", "quantizers", "step ms", "x float", "x own", "eval ms", "x float", "x own", "MB", "x float")
    keys = ("step_to_float", "step_to_own", "eval_to_float", "eval_to_own", "bytes_to_float")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        start = [row["net"], row["host"], row["candidate"]]
        if "error" in row:
            lines.append("| " + " | ".join([*start, row["error"]]) + " |" + " |" * (len(head) - 4))
            continue
        step, step_own, evaluation, evaluation_own, memory = (f"{row[key]:.2f}" if key in row else "-" for key in keys)
        cells = [f"{row['step_s'] * 1e3:.0f}", step, step_own, f"{row['eval_s'] * 1e3:.0f}", evaluation,
                 evaluation_own, f"{row['bytes'] / 1e6:.0f}", memory]  # fmt: skip
        lines.append("| " + " | ".join(start + cells) + " |")
    return "\n".join(lines)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS), help="default: all that have an environment")
    parser.add_argument("--algorithms", nargs="+", help="default: every one of the registry")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--side", type=int, help="of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--quick", action="store_true", help="LSQ and FAT on ResNet-18 and small images")
    parser.add_argument("--nncf2-python", help="the interpreter of an environment with NNCF 2")
    parser.add_argument("--extensions", help="folder for the extension that NNCF compiles (kept between runs)")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """See ``--help``."""
    args = _options(sys.argv[1:] if arguments is None else arguments)
    if args.worker:
        result = work(json.loads(args.worker[0]))
        Path(args.worker[1]).write_text(json.dumps(result))
        return
    from fat_plugins.registry import algorithms

    hosts = args.hosts or ["nncf3", "brevitas", "brevitas-jit", *(["nncf2"] if args.nncf2_python else [])]
    names = args.algorithms or (["lsq", "fat"] if args.quick else list(algorithms()))
    nets = ["resnet18"] if args.quick else args.nets
    batch, side = _SIZES["quick" if args.quick else args.device]
    job = {
        "size": (args.batch or batch, args.side or side), "bits": args.bits, "device": args.device,
        "repeats": args.repeats, "channels_last": args.channels_last,
    }  # fmt: skip
    rows, notes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for net in nets:
            for host in hosts:
                python = args.nncf2_python or sys.executable if host == "nncf2" else sys.executable
                candidates = ["float", "own", *(names if host != "brevitas-jit" else names[:1])]
                print(f"{net} on {host}: {', '.join(candidates)}", file=sys.stderr)
                each = {**job, "net": net, "host": host, "candidates": candidates}
                result = _spawn(python, each, os.path.join(args.extensions or folder, host))
                notes[host] = result["notes"]
                rows += rows_of(net, host, result)
    about = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), **{k: str(v) for k, v in job.items()}}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for host, said in notes.items():
        print(f"{host}: " + ", ".join(f"{key} {value}" for key, value in said.items()))
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "notes": notes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
