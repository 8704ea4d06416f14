"""Files that tell whether they are whole: a digest of what they hold, and one error for contents that do not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fat_plugins.errors import CheckpointError, FatPluginsError, one_line

#: key of the digest in the header of a safetensors file
_KEY = "fat_plugins_sha256"


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def sealed(tensors: Mapping[str, Tensor], key: str, text: str) -> bytes:
    """A safetensors file with these tensors, the description ``text`` under ``key``, and the digest of both.

    Equal contents give equal bytes: safetensors itself writes metadata in an order that changes from call to call.
    """
    data = save(dict(tensors), metadata={key: text})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {key: text, _KEY: _digest(tensors, text)}
    lines = json.dumps(header, separators=(",", ":")).encode()
    lines += b" " * (-len(lines) % 8)  # the tensors stay aligned
    return b"".join((len(lines).to_bytes(8, "little"), lines, data[8 + size :]))


def check_seal(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], text: str, where: str) -> None:
    """Refuse a file of which a bit has changed. Files that were written before there was one pass.

    :raises CheckpointError: names the file.
    """
    if metadata.get(_KEY, "") not in ("", _digest(tensors, text)):
        raise CheckpointError(f"{where}: damaged: its contents are not those that were written (SHA-256 differs)")


def refuse_nan(tree: Any, where: str, path: str = "") -> None:
    """Refuse a tree of which a tensor holds NaN: a training that went on from it would only end in an error later.

    :raises CheckpointError: names the tensor.
    """
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and bool(torch.isnan(tree).any()):
            raise CheckpointError(f"{where}: {path} holds NaN")
        return
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in pairs:
        refuse_nan(value, where, f"{path}.{key}" if path else str(key))


@contextmanager
def contents_of(where: str) -> Iterator[None]:
    """What a file holds is used inside; whatever that leads to is an error of the file.

    :raises CheckpointError: names the file.
    """
    try:
        yield
    except (FatPluginsError, MemoryError, OSError):
        raise
    except Exception as error:
        what = one_line(str(error).strip().split("\n")[0], 200)
        raise CheckpointError(
            f"{where}: its contents are not what this version of fat-plugins writes ({type(error).__name__}: {what})"
        ) from error
