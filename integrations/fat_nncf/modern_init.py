"""Initialisation of quantizers and batch norms on NNCF 3."""

from __future__ import annotations

from collections.abc import Iterable

import nncf
import torch
from torch import nn

from fat_nncf.modern_data import Batches, call
from fat_nncf.modern_hooks import PluginQuantizer, is_activation, is_weight, quantizer_input
from fat_nncf.modern_placement import Point

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
    if hungry:
        _observe(model, hungry, [hook for _, hook in resolved], batches)


@torch.no_grad()
def _observe(model: nn.Module, hungry: list[PluginQuantizer], hooks: list[PluginQuantizer], batches: Batches) -> None:
    """Run a few batches through the float model and show the hungry quantizers their inputs."""
    modes = {m: m.training for m in model.modules()}
    enabled = {hook: hook.core.enabled for hook in hooks}
    try:
        model.eval()
        for hook in hooks:
            hook.core.enabled = False
        for hook in hungry:
            hook.observing = True
        for inputs in batches.take(_DATA_BATCHES):
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.core.enabled, hook.observing = enabled[hook], False
        for module, training in modes.items():
            module.training = training


def adapt_batch_norms(model: nn.Module, batches: Batches, count: int) -> None:
    """NNCF's batch-norm adaptation over ``count`` batches, when the model has batch norms."""
    if count and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        nncf.batch_norm_adaptation(model, batches.dataset(), num_iterations=count)
