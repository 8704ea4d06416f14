"""Running statistics of batch norms for the deployed network, on whatever host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fat_plugins.errors import ConfigError
from fat_plugins.network import named_quantizers


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _move(v, device) for k, v in value.items()}
    return [_move(v, device) for v in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def reestimate_batch_norms(model: nn.Module, batches: Iterable[Any], count: int | None = None) -> int:
    """Renew the running statistics of every batch norm from data that runs through the evaluation forward.

    Everything but the batch norms is in evaluation mode meanwhile: quantizers without noise and masks, no dropout. The
    new statistics are plain averages over the batches, whatever momentum the norms have. Modes are restored.

    :param batches: tensors, ``(input, target)`` pairs or dictionaries of keyword arguments.
    :param count: how many of them to take at most; default all.
    :return: number of batch norms that were renewed.
    :raises ConfigError: there is no batch; the statistics are then as before.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    modes = {m: m.training for m in model.modules()}
    momenta = [norm.momentum for norm in norms]
    fresh = True
    try:
        model.eval()
        for batch in islice(iter(batches), count):
            if fresh:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum, norm.training = None, True  # None: an average over all batches
                fresh = False
            inputs = _move(batch[0] if isinstance(batch, (tuple, list)) else batch, device)
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs) if isinstance(inputs, list) else model(inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if fresh:
        raise ConfigError("re-estimation of batch norms: there is no batch; at least one is needed")
    return len(norms)


def has_noise(model: nn.Module) -> bool:
    """Whether the training forward of some quantizer in ``model`` is not the deployed one now."""
    return any(quantizer.enabled and quantizer.noisy for _, quantizer in named_quantizers(model))


__all__ = ["has_noise", "reestimate_batch_norms"]
