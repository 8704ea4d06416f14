"""Time and memory. Candidates are timed by turns in one process, so that what else the machine does meets all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def by_turns(
    runs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 2, *, device: str = "cpu", busy: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run, in the order in which they were measured; every turn runs all candidates once.

    The order within a turn is reversed every second time: a candidate does not always meet the same neighbour's caches.

    :param runs: by name; each call does the whole work and returns when it is done.
    :param warm_up: turns that are not counted.
    :param device: ``"cuda"`` waits for it before and after each run.
    :param busy: processor time instead of the wall clock, where other programs want the machine too.
    """
    clock = time.process_time if busy else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + warm_up):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            wait()
            start = clock()
            run()
            wait()
            if turn >= warm_up:
                times[name].append(clock() - start)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(values) for name, values in times.items()}


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles over the median: how much a ratio of medians is worth."""
    if len(times) < 4:
        return float("nan")
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Most memory that ``step`` holds at one time beyond what was held before it. CPU: by the profiler's records of
    torch's allocator, so without what a library allocates by itself."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], torch.Tensor], *known: torch.Tensor) -> int:
    """Bytes that the autograd graph of ``forward`` keeps, without the tensors ``known``; storages count once."""
    seen: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in known}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(seen.values())


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, versions."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("torch", "nncf", "brevitas", "openvino", "fat-plugins"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    model, flags = platform.processor(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        found = {k.strip(): v.strip() for k, v in lines.items()}
        model = found.get("model name", model)
        flags = [f for f in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if f in found.get("flags", "").split()]
    return {
        "processor": model or platform.machine(),
        "instructions": flags,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write ``content`` with :func:`machine`, if a path was asked for."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
