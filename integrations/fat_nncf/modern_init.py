"""Initialisation of quantizers and batch norms on NNCF 3."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import torch
from nncf.torch.function_hook.hook_storage import decode_hook_name
from torch import nn

from fat_nncf.modern_data import Batches, call
from fat_nncf.modern_hooks import (
    PluginQuantizer,
    is_activation,
    is_weight,
    plugin_hooks,
    quantizer_input,
    remove_hook,
    set_hook,
    storage_of,
)
from fat_nncf.modern_placement import Point
from fat_plugins.network import in_force
from fat_plugins.quantizer import ROLES, Role
from fat_plugins.switching import each_width

#: batches that initialise quantizers which want data and not a range
_DATA_BATCHES = 4


def calibrate_weights(model: nn.Module, resolved: Iterable[tuple[Point, PluginQuantizer]]) -> None:
    """Initialise weight quantizers from the weights behind sparsity masks."""
    for point, hook in resolved:
        if is_weight(hook):
            hook.core.calibrate(quantizer_input(model, hook, point.slots[0]))


def calibrate_activations(
    model: nn.Module, resolved: list[tuple[Point, PluginQuantizer]], batches: Batches, *, ranges_first: bool
) -> None:
    """Initialise activation quantizers from the ranges that NNCF collected, or from batches where they prefer these.

    :param ranges_first: the user configured the ranges, so all quantizers take them.
    """
    hungry = []
    for point, hook in resolved:
        if not is_activation(hook):
            continue
        if hook.core.calibration == "data" and not ranges_first:
            hungry.append(hook)
        else:
            hook.core.calibrate_range(*point.range)
    curious = any(is_weight(hook) and hook.core.wants_input for _, hook in resolved)
    if hungry or curious:
        _observe(model, hungry, [hook for _, hook in resolved], batches)


class _Spy(nn.Module):
    """A hook that shows what passes it."""

    def __init__(self, show: Any) -> None:
        super().__init__()
        self._show = show

    def forward(self, x: Any) -> Any:
        with torch._C.DisableTorchFunction():  # NNCF looks at every operation otherwise
            self._show(x.detach())
        return x


@contextmanager
def _showing_inputs(model: nn.Module) -> Iterator[None]:
    """Layers whose weight quantizer wants its input show it, as it is behind the quantizer of that input."""
    storage, spies = storage_of(model), []
    for hook, slots in plugin_hooks(model).items():
        if not (is_weight(hook) and hook.core.wants_input):
            continue
        for slot in slots:
            kind, operation, port = decode_hook_name(slot)
            if kind == "pre_hooks":  # the weight of an operation; the other operand is its input
                spies.append(f"pre_hooks.{operation.replace('.', ':')}__{1 - min(port, 1)}.spy")
                set_hook(storage, spies[-1], _Spy(hook.core.observe_input))
    try:
        yield
    finally:
        for slot in spies:
            remove_hook(storage, slot)


class Pass:
    """Passes calibration data through the quantized model as it stands, in evaluation mode."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._model, self._batches = model, batches

    @torch.no_grad()
    def __call__(self, samples: int, turns: Sequence[Collection[Role]] = (ROLES,)) -> None:
        """See :class:`fat_plugins.quantizer.Calibration`."""
        modes = {m: m.training for m in self._model.modules()}
        try:
            self._model.eval()
            with _showing_inputs(self._model):
                for inputs in self._batches.take(-(-samples // max(self._batches.batch_size, 1))):
                    for roles in turns:
                        with in_force(self._model, roles):
                            call(self._model, inputs)
        finally:
            for module, training in modes.items():
                module.training = training


@torch.no_grad()
def _observe(model: nn.Module, hungry: list[PluginQuantizer], hooks: list[PluginQuantizer], batches: Batches) -> None:
    """Run a few batches through the float model and show quantizers their inputs, and layers theirs."""
    modes = {m: m.training for m in model.modules()}
    enabled = {hook: hook.core.enabled for hook in hooks}
    try:
        model.eval()
        for hook in hooks:
            hook.core.enabled = False
        for hook in hungry:
            hook.observing = True
        with _showing_inputs(model):
            for inputs in batches.take(_DATA_BATCHES):
                call(model, inputs)
    finally:
        for hook in hooks:
            hook.core.enabled, hook.observing = enabled[hook], False
        for module, training in modes.items():
            module.training = training


def adapt_batch_norms(model: nn.Module, batches: Batches, count: int) -> None:
    """NNCF's batch-norm adaptation over ``count`` batches at every width, when the model has batch norms."""
    if count and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        for _ in each_width(model):
            nncf.batch_norm_adaptation(model, batches.dataset(), num_iterations=count)
