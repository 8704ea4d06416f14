"""Candidates timed by turns in one process, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def by_turns(runs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each run, in the order in which they were measured; every turn runs all candidates once.

    The order within a turn is reversed every second time: a candidate does not always meet the same neighbour's caches.

    :param runs: by name; each call does the whole work and returns when it is done.
    :param warm_up: turns that are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + warm_up):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
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
