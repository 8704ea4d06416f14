"""Files from which a training goes on: any tree of tensors and JSON types as one safetensors file. No pickle."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from fat_plugins.errors import CheckpointError
from fat_plugins.recipes.checkpoint import write_atomically
from fat_plugins.recipes.sealed import check_seal, contents_of, sealed

FORMAT = 1
_KEY, _TENSOR, _ITEMS, _TUPLE = "fat_plugins_state", "$tensor", "$items", "$tuple"


# --------------------------------------------------------------------------------------------------------------------
# trees
# --------------------------------------------------------------------------------------------------------------------
def _pack(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(tree, Tensor):
        # a copy: tensors that share memory are stored one by one
        tensors[path] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in tree):
            return {k: _pack(v, tensors, f"{path}/{k}") for k, v in tree.items()}
        items = enumerate(tree.items())
        return {_ITEMS: [[_pack(k, tensors, f"{path}/{i}k"), _pack(v, tensors, f"{path}/{i}v")] for i, (k, v) in items]}
    if isinstance(tree, (list, tuple)):
        packed = [_pack(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
        return {_TUPLE: packed} if isinstance(tree, tuple) else packed
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise CheckpointError(f"training state: {path[1:]} is a {type(tree).__name__}; allowed: tensors and JSON types")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _ITEMS in tree:
            return {_unpack(k, tensors): _unpack(v, tensors) for k, v in tree[_ITEMS]}
        if _TUPLE in tree:
            return tuple(_unpack(v, tensors) for v in tree[_TUPLE])
        return {k: _unpack(v, tensors) for k, v in tree.items()}
    return [_unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree


def to_bytes(tree: Any) -> bytes:
    """A tree of tensors (any device), dictionaries, lists, tuples and JSON types, as a safetensors file.

    :raises CheckpointError: there is something else in it; names the place.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, tensors, "")
    text = json.dumps({"format": FORMAT, "tree": packed})
    return sealed(tensors, _KEY, text)


def from_bytes(data: bytes, where: str = "training state") -> Any:
    """Inverse of :func:`to_bytes`, tensors on the CPU.

    :raises CheckpointError: damaged, foreign, or of another layout.
    """
    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        text = metadata.get(_KEY)
        if text is not None:
            check_seal(metadata, tensors, text, where)
        found = json.loads(text) if text is not None else None
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{where}: not a readable training state: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{where}: no training state of this version of fat-plugins")
    with contents_of(where):
        return _unpack(found["tree"], tensors)


# --------------------------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------------------------
def previous_of(path: Path) -> Path:
    """Where the file that was at ``path`` before is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class StateFile:
    """The newest training state and the one before, which takes over should the newest be damaged."""

    def __init__(self, path: Path) -> None:
        self.path, self.previous = path, previous_of(path)
        self._damaged = False

    def save(self, tree: Any) -> None:
        """Write to the disk, then move into place; at no moment is there no complete file.

        :raises CheckpointError: it cannot be written, or holds what no file can.
        """
        data = to_bytes(tree)
        # the good one of before must not make room for a damaged one
        write_atomically(self.path, lambda p: p.write_bytes(data), keep=None if self._damaged else self.previous)
        self._damaged = False

    def load(self, say: Callable[[str], None]) -> Any:
        """The newest readable state, ``None`` when there is no file at all.

        :param say: is told when the newest is damaged.
        :raises CheckpointError: there are files, none of them readable.
        """
        error = None
        for path in (self.path, self.previous):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as problem:
                error = error or CheckpointError(f"{path}: {problem.strerror or problem}")
                continue
            try:
                tree = from_bytes(data, str(path))
            except CheckpointError as problem:
                error = error or problem
                continue
            if error is not None:
                self._damaged = True
                say(f"warning: {error}; going on from the state before it")
            return tree
        if error is not None:
            raise error
        return None


@dataclass
class Saving:
    """When the state of a training is saved, and where to. It always is at the end of an epoch.

    :param write: gets the state.
    :param steps: also every so many optimizer steps.
    :param seconds: also when that much time has passed.
    """

    write: Callable[[dict[str, Any]], None]
    steps: int | None = None
    seconds: float | None = None
    _last: float = field(default_factory=time.monotonic)

    def by_step(self, step: int) -> bool:
        """Whether this optimizer step (counted from 1) is one of those."""
        return bool(self.steps) and step % self.steps == 0

    def by_time(self) -> bool:
        """Whether enough time has passed."""
        return self.seconds is not None and time.monotonic() - self._last >= self.seconds

    def save(self, training: Any) -> None:
        """Save what ``training.state_dict()`` gives, now."""
        self.write(training.state_dict())
        self._last = time.monotonic()


# --------------------------------------------------------------------------------------------------------------------
# random numbers
# --------------------------------------------------------------------------------------------------------------------
def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Where the global generators of torch (all devices), numpy and Python stand."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "key": torch.from_numpy(state["state"]["key"].astype(np.int64)),
            "pos": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        },
        "python": [version, torch.tensor(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`. Devices that are not there any more are left out."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy = state["numpy"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
