"""Pretrained weights: from a file of the user's, or torchvision's by name."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fat_plugins.errors import CheckpointError, ConfigError, shown, unknown
from fat_plugins.files import is_file as is_ordinary_file
from fat_plugins.recipes.checkpoint import check_state
from fat_plugins.recipes.vision import torchvision

_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *_TORCH)
#: under which name training scripts keep the state dict in their checkpoints
_NESTS = ("state_dict", "model_state_dict", "model", "net")


def is_file(weights: str) -> bool:
    """Whether this names a file, and not weights of torchvision."""
    return Path(weights).suffix in SUFFIXES or "/" in weights or "\\" in weights


def torchvision_weights(model: str, name: str) -> Any:
    """torchvision's description of its weights called ``name``.

    :raises ConfigError: there are none of that name.
    """
    known = torchvision("model.weights", "models").get_model_weights(model)
    if name != "DEFAULT" and name not in known.__members__:
        files = f", or a file: *{', *'.join(SUFFIXES)}"
        raise ConfigError(f"model.weights: {unknown('weights', name, [*known.__members__, 'DEFAULT'])}{files}")
    return known[name]


def _fetch(model: str, name: str) -> dict[str, Tensor]:
    weights = torchvision_weights(model, name)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a broken download
        raise ConfigError(
            f"model.weights: {name} of {model} cannot be had ({error}): download {weights.url} to {cache} yourself"
        ) from None


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix of a data-parallel wrapper. Nothing in it is run.

    :raises CheckpointError: no such file, a damaged one, or one with more than tensors in it.
    """
    if not is_ordinary_file(path):
        raise CheckpointError(f"model.weights: no file {shown(str(path), 300)}")
    try:
        if path.suffix not in _TORCH:
            state: Any = load_file(str(path))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's guesses about foreign files, which an error follows
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"model.weights: {path}: not a file of tensors (or it would run code when it is read): save the state dict "
            "as safetensors"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch's reader stumbles over damaged files in many ways
        what = [*str(error).splitlines(), "it is cut off"][0]
        raise CheckpointError(f"model.weights: {path}: not readable: {what}") from None
    nest = next((n for n in _NESTS if isinstance(state, dict) and isinstance(state.get(n), dict)), None)
    state = state[nest] if nest is not None else state
    if not isinstance(state, dict) or not state or not all(_is_entry(*item) for item in state.items()):
        raise CheckpointError(f"model.weights: {path}: expected a state dict, names and tensors")
    for prefix in ("module.", "_orig_mod."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def head_of(model: nn.Module) -> str:
    """Name of the layer that gives the classes: the last linear layer, or the last convolution where there is none."""
    layers = list(model.named_modules())
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in layers if isinstance(module, kind)]
        if found:
            return found[-1]
    raise ConfigError("model.new_head: the model has no linear layer and no convolution")


def load_weights(model: nn.Module, name: str, weights: str, new_head: bool = False) -> None:
    """Load pretrained weights, which must fit exactly.

    :param name: of the model, for torchvision's weights.
    :param weights: a file, or the name of torchvision's weights.
    :param new_head: leave out the layer that gives the classes.
    :raises ConfigError, CheckpointError: see :func:`read`; the first entry that does not fit.
    """
    state = read(Path(weights)) if is_file(weights) else _fetch(name, weights)
    own = model.state_dict()
    if not is_file(weights):  # auxiliary classifiers, which serve training only
        state = {k: v for k, v in state.items() if k in own}
    # counters that old checkpoints lack
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked") and k not in state}, **state}
    head = f"{head_of(model)}."
    if new_head:
        state = {**state, **{k: v for k, v in own.items() if k.startswith(head)}}
    try:
        check_state(model, state, f"model.weights: {weights}")
    except CheckpointError as error:
        if any(k.startswith(head) and k in state and state[k].shape != v.shape for k, v in own.items()):
            raise CheckpointError(f"{error}; for other classes set model.new_head: true") from None
        raise
    model.load_state_dict(state)
