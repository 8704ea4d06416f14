"""Compression state on NNCF 3: JSON that rebuilds the hooks of a compressed model on a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.pruning.magnitude.modules import UnstructuredPruningMask
from nncf.torch.function_hook.pruning.rb.modules import RBPruningMask
from torch import nn

from fat_nncf.modern_data import device_of
from fat_nncf.modern_hooks import PluginQuantizer, parameter, set_hook
from fat_nncf.modern_placement import Traced
from fat_plugins.errors import CheckpointError, FatPluginsError, nearest

BUILDER, CONTROLLER = "builder_state", "ctrl_state"
#: the only classes that a state may name
_CLASSES = {c.__name__: c for c in (PluginQuantizer, UnstructuredPruningMask, RBPruningMask)}


def builder_state(model: nn.Module) -> dict[str, Any]:
    """Hooks of ours and of ``nncf.prune``, with their slots."""
    hooks: dict[nn.Module, dict[str, Any]] = {}
    for slot, module in get_hook_storage(model).named_hooks(remove_duplicate=False):
        if type(module).__name__ not in _CLASSES:
            continue
        if module not in hooks:
            config = {k: list(v) if isinstance(v, tuple) else v for k, v in module.get_config().items()}
            hooks[module] = {"class": type(module).__name__, "config": config, "slots": []}
        hooks[module]["slots"].append(slot)
    return {"format": 1, "hooks": list(hooks.values())}


def check_state(state: Any) -> Mapping[str, Any]:
    """Refuse what is no compression state of this adapter.

    :raises CheckpointError: one line.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get(BUILDER), Mapping):
        raise CheckpointError(f"compression_state: expected what get_compression_state() returned, got "
                              f"{type(state).__name__} without '{BUILDER}'")  # fmt: skip
    builder = state[BUILDER]
    if builder.get("format") != 1 or not isinstance(builder.get("hooks"), list):
        raise CheckpointError("compression_state: not written by this NNCF 3 adapter (format 1 expected)")
    return state


def rebuild(traced: Traced, state: Mapping[str, Any]) -> None:
    """Put the saved hooks on a traced model; their tensors come with the state dict.

    :raises CheckpointError: the state belongs to another model; names the first layer that does not fit.
    """
    nodes = {n.node_name for n in traced.graph.get_all_nodes()}
    storage, device = get_hook_storage(traced.model), device_of(traced.model)
    for entry in state[BUILDER]["hooks"]:
        try:
            kind, slots = _CLASSES[entry["class"]], entry["slots"]
            operations = [decode_hook_name(s)[1] for s in slots]
            hook = kind.from_config(entry["config"])
        except (KeyError, TypeError, ValueError, FatPluginsError) as error:
            if isinstance(error, FatPluginsError):
                raise CheckpointError(f"compression_state: {error}") from None
            raise CheckpointError(f"compression_state: damaged entry {str(entry)[:80]}") from None
        for operation in operations:
            if operation not in nodes:
                raise CheckpointError(f"compression_state: the model has no layer {operation!r}; it was saved from "
                                      f"another model{nearest(operation, nodes)}")  # fmt: skip
        _check_shape(traced.model, hook, operations[0])
        hook.to(device).train(traced.model.training)
        for slot in slots:
            set_hook(storage, slot, hook)


def _check_shape(model: nn.Module, hook: nn.Module, operation: str) -> None:
    if isinstance(hook, PluginQuantizer):
        if hook.tensor is None:
            return
        name, saved = hook.tensor, hook.core.spec.shape
    else:
        mask = hook.binary_mask if isinstance(hook, UnstructuredPruningMask) else hook.mask
        name, saved = operation, tuple(mask.shape)
    here = tuple(parameter(model, name).shape)
    if here != saved:
        raise CheckpointError(f"compression_state: {name} has shape {list(here)}, saved was {list(saved)}; it was "
                              "saved from another model")  # fmt: skip
