"""The processes of one training. Without ``torchrun`` it is a world of one, for which nothing here costs anything."""

from __future__ import annotations

import inspect
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fat_plugins.errors import ConfigError, FatPluginsError
from fat_plugins.network import broadcast_state, named_quantizers
from fat_plugins.recipes.state import from_bytes, to_bytes
from fat_plugins.switchable_norms import SwitchableNorm

DEVICES = ("auto", "cpu", "cuda")
#: keys of the store: how many processes have failed, and are done
_FAILED, _DONE = "failed", "done"
#: seconds that the first process waits, when it is done or fails, for the others to notice
_PATIENCE = 5.0
#: seconds between two looks for a message of the first process
_POLL = 0.05


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """:param name: one of :data:`DEVICES`; ``auto`` is CUDA where there is one.
    :raises ConfigError: unknown name, or CUDA that is not there.
    """
    if name not in DEVICES:
        raise ConfigError(f"--device: unknown device {name!r}; allowed: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch finds no CUDA device; allowed here: cpu, auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: {torch.cuda.device_count()} CUDA devices for local process {local_rank}; start fewer "
            "processes"
        )
    return torch.device("cuda", local_rank)


@dataclass
class World:
    """This process among all.

    :ivar rank, size: number of this process, and how many there are.
    :ivar device: where this process trains.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _store: Any = None
    _messages: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    # -- numbers -----------------------------------------------------------------------------------------------------
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether one process at least raises the flag."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(int(flag))
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return bool(tensor)

    def gather(self, tree: Any) -> list[Any]:
        """The trees of all processes (see :mod:`fat_plugins.recipes.state`), on every one."""
        if self.size == 1:
            return [tree]
        mine = torch.frombuffer(bytearray(to_bytes(tree)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(sizes, torch.tensor([mine.numel()]))
        longest = max(int(n) for n in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        found = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(found, padded)
        return [from_bytes(f[: int(n)].numpy().tobytes()) for f, n in zip(found, sizes, strict=True)]

    # -- models ------------------------------------------------------------------------------------------------------
    def same_quantizers(self, model: nn.Module) -> None:
        """Quantizers as the first process calibrated them."""
        if self.size > 1:
            for _, quantizer in named_quantizers(model):
                broadcast_state(quantizer)

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to run forwards of a training on: gradients of the parameters are then means over all processes."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # buffers are the business of quantizers and of same_buffers; torch 2.13 has a new name for that option
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # norms of other widths have no part in a pass
        unused = any(isinstance(m, SwitchableNorm) for m in model.modules())
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=unused, **{option: False}
        )

    @torch.no_grad()
    def same_buffers(self, model: nn.Module) -> None:
        """Buffers (running statistics of batch norms above all) as the first process has them."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

    # -- one process for all -----------------------------------------------------------------------------------------
    def tell(self, value: Any = None) -> Any:
        """The JSON value of the first process, on every one; the others wait for it as long as it takes."""
        if self.size == 1:
            return value
        self._messages += 1
        key = f"message/{self._messages}"
        if self.main:
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):  # in short steps, so that signals are noticed
            if self._store.check([_FAILED]):
                raise FatPluginsError("another process failed")
            time.sleep(_POLL)
        return json.loads(self._store.get(key))

    def is_loss(self, error: Exception) -> bool:
        """Whether this error says that another process does not answer any more."""
        return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

    def part(self) -> None:
        """All is done: the first process, which may keep what it told the others, waits until they have read it."""
        if self.size == 1:
            return
        self._store.add(_DONE, 1)
        end = time.monotonic() + _PATIENCE
        while self.main and self._store.add(_DONE, 0) < self.size and time.monotonic() < end:
            time.sleep(_POLL)

    def first_to_fail(self, error: Exception) -> bool:
        """Whether no other process has reported an error; the first one tells the user, the others end silently."""
        if self.size == 1:
            return True
        try:
            first = self._store.add(_FAILED, 1) == 1
            # this process may keep the store, and the others are to find the report in it
            if self.main and not self.is_loss(error):
                _leave_group()
                end = time.monotonic() + _PATIENCE
                while self._store.add(_FAILED, 0) < self.size and time.monotonic() < end:
                    time.sleep(_POLL)
            return first
        except RuntimeError:  # the process that kept the store was killed, and could not tell anybody
            return True


def _leave_group() -> None:
    """Whoever waits for this process in a sum gets an error."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world that ``torchrun`` started this process in, or one of its own.

    :param device: one of :data:`DEVICES`.
    :raises ConfigError: see :func:`choose_device`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # about the layout of weights with one input channel: it costs time where there is none to lose
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    store, rank, size = next(distributed.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, store=distributed.PrefixStore("torch", store), rank=rank, world_size=size, timeout=timedelta(hours=2)
    )
    world = World(rank, size, chosen, distributed.PrefixStore("fat_plugins", store))
    try:
        yield world
        world.part()
    finally:
        _leave_group()
