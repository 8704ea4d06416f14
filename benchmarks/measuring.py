"""Time, memory and kept tensors of one forward + backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], None]


def medians(steps: dict[str, Step], repeats: int, device: str, busy: bool = False) -> dict[str, float]:
    """Median seconds of every step, the candidates taking turns; two warm-up turns.

    :param busy: processor time instead of the wall clock, where other programs want the machine too.
    """
    clock = time.process_time if busy else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Step, device: str) -> int:
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
