"""Checkpoints: one safetensors file that holds the model's state and, in its header, a JSON description.

One file is moved into place at once, so weights and description can never belong to different moments.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fat_plugins.errors import CheckpointError, FatPluginsError, nearest, shown
from fat_plugins.files import is_file
from fat_plugins.quantizer import Coordinator, Quantizer
from fat_plugins.recipes.sealed import check_seal, sealed

FORMAT = 1
_KEY = "fat_plugins"


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    :param state: the model's state dict, tensors on the CPU.
    :param config: the NNCF config that compressed the model, ``None`` for a float model.
    :param compression_state: what the host needs to rebuild the quantizers (JSON types), ``None`` for a float model.
    :param rewrites: what changed the float model before that (see :mod:`fat_plugins.rewrites`), as dictionaries.
    :param recipe: the resolved recipe.
    :param progress: where training stood: variant, seed, stage, epoch.
    :param metrics: loss and accuracy at that moment.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    compression_state: Any = None
    rewrites: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def _sync_directory(path: Path) -> None:
    """Bring names that were made or moved in a directory to the disk, where the system has a way to do so."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do it by themselves
            raise
    finally:
        os.close(handle)


def _make_directory(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_directory(made.parent)


def _move(temporary: Path, path: Path, keep: Path | None) -> None:
    """Put a complete file in its place, an earlier one in that of ``keep``."""
    kept = keep is not None and path.is_file()
    if kept:
        os.replace(path, keep)
    try:
        os.replace(temporary, path)
    except OSError:
        if kept:
            os.replace(keep, path)
        raise


def write_atomically(path: Path, write: Callable[[Path], None], keep: Path | None = None) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there; an earlier file survives a failure.

    The file is on the disk before it is moved, and its new name before this returns: a power cut leaves either the old
    or the new one.

    :param keep: where an earlier file is moved to instead of being replaced.
    :raises CheckpointError: the directory cannot be written.
    """
    try:
        _make_directory(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes it private; give it the rights that any new file gets
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _move(temporary, path, keep)
        _sync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # what made the writing fail may forbid this too
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, keep: Path | None = None) -> None:
    """A UTF-8 text file, moved into place; ``keep`` as for :func:`write_atomically`."""
    write_atomically(path, lambda p: p.write_bytes(text.encode("utf-8")), keep)


def write_json(path: Path, data: Any, keep: Path | None = None) -> None:
    """A JSON file, moved into place; ``keep`` as for :func:`write_atomically`."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n", keep)


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's state, contiguous and on the CPU (tensors that share memory are stored one by one)."""
    return {
        k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)
    }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint.

    :raises CheckpointError: the description is not JSON, or the file cannot be written.
    """
    description = {k: v for k, v in vars(checkpoint).items() if k != "state"}
    try:
        text = json.dumps({"format": FORMAT, **description})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: its description is not JSON: {error}") from None
    data = sealed(checkpoint.state, _KEY, text)
    write_atomically(path, lambda p: p.write_bytes(data))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    :raises CheckpointError: missing, truncated or foreign file, or one of a newer layout.
    """
    if not is_file(path):
        raise CheckpointError(f"no checkpoint {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(_KEY)
            if text is None:
                raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of fat-plugins")
            state = {k: file.get_tensor(k) for k in file.keys()}
        check_seal(metadata, state, text, str(path))
        description = json.loads(text)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, struct.error, ValueError, RuntimeError) as error:  # RecursionError among them
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path}: unknown checkpoint layout; allowed: {FORMAT}; upgrade fat-plugins")
    try:
        checkpoint = Checkpoint(state=state, **description)
    except TypeError:
        raise CheckpointError(f"{path}: unknown entries in the checkpoint's description") from None
    for name in ("config", "recipe", "progress", "metrics"):
        value = getattr(checkpoint, name)
        if not isinstance(value, dict) and not (name == "config" and value is None):
            raise CheckpointError(f"{path}: {name} in its description: expected an object, got {shown(value)}")
    if not isinstance(checkpoint.rewrites, list):
        raise CheckpointError(f"{path}: rewrites in its description: expected a list, got {shown(checkpoint.rewrites)}")
    return checkpoint


def _own_shapes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what gives its tensors the shapes of a state dict by itself (lengths may come from data)."""
    modules = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, m in modules if name and isinstance(m, (Quantizer, Coordinator)))


def check_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Refuse a state that is not the model's own. Shapes within quantizers are their own business.

    :raises CheckpointError: names the first key that is missing, unknown or of another shape.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    free = _own_shapes(model)
    for key, value in own.items():
        if key not in state:
            raise CheckpointError(f"{where}: belongs to another model: no {key!r} in it{nearest(key, state)}")
        if tuple(state[key].shape) != tuple(value.shape) and not key.startswith(free):
            raise CheckpointError(
                f"{where}: belongs to another model: {key!r} has shape {tuple(state[key].shape)}, "
                f"the model's has {tuple(value.shape)}"
            )
        if state[key].is_floating_point() != value.is_floating_point():
            raise CheckpointError(
                f"{where}: belongs to another model: {key!r} is {state[key].dtype}, the model's is {value.dtype}"
            )
        if not key.startswith(free) and value.is_floating_point() and bool(torch.isnan(state[key]).any()):
            raise CheckpointError(f"{where}: {key!r} holds NaN")
    foreign = next((k for k in state if k not in own), None)
    if foreign is not None:
        raise CheckpointError(f"{where}: belongs to another model: the model has no {foreign!r}{nearest(foreign, own)}")


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load ``state`` into ``model``, which it must fit exactly.

    :raises CheckpointError: see :func:`check_state`, when nothing is loaded; or a quantizer refuses its part.
    """
    check_state(model, state, where)
    try:
        model.load_state_dict(state, strict=False)
    except FatPluginsError as error:  # of a quantizer, which does not know the file
        raise CheckpointError(f"{where}: {error}") from None
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{where}: belongs to another model: {problem}") from None


def load_fitting(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load those entries that the model has in the same shape.

    :return: keys of the model that found nothing.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    fitting = {k: v for k, v in state.items() if k in own and tuple(v.shape) == tuple(own[k].shape)}
    model.load_state_dict(fitting, strict=False)
    return [k for k in own if k not in fitting]
