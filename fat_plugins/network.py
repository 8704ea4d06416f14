"""What is asked of all quantizers of a model at once, whatever host placed them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fat_plugins.quantizer import Coordinator, Progress, Quantizer, Role

_MOST_DIMENSIONS = 8


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer inside ``model`` with its module path, each one once, whatever host placed it."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def coordinators(model: nn.Module) -> Iterator[Coordinator]:
    """Every coordinator inside ``model``, whatever host put it there."""
    return (m for m in model.modules() if isinstance(m, Coordinator))


@contextmanager
def in_force(model: nn.Module, roles: Collection[Role]) -> Iterator[None]:
    """Quantizers of other roles than these are disabled; those that are disabled already stay so."""
    off = [q for _, q in named_quantizers(model) if q.enabled and q.role not in roles]
    try:
        for quantizer in off:
            quantizer.enabled = False
        yield
    finally:
        for quantizer in off:
            quantizer.enabled = True


def begin(model: nn.Module) -> None:
    """Let every coordinator do what it does before training (see :meth:`Coordinator.begin`)."""
    for coordinator in coordinators(model):
        coordinator.begin()


def _quantizers_and_coordinators(model: nn.Module) -> tuple[list[Quantizer], list[Coordinator]]:
    """Both, each one once, in the order of ``modules()``; five times as fast, as every training step asks for them."""
    quantizers: list[Quantizer] = []
    found: list[Coordinator] = []
    seen: set[nn.Module] = set()
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, Quantizer):
            quantizers.append(module)
        elif isinstance(module, Coordinator):
            found.append(module)
        if module._modules:
            ahead.extend(child for child in reversed(module._modules.values()) if child is not None)
    return quantizers, found


def regularization(model: nn.Module) -> Tensor | None:
    """Sum of the loss terms of all quantizers and coordinators, or ``None`` when there is none."""
    quantizers, found = _quantizers_and_coordinators(model)
    terms = [t for part in (*quantizers, *found) if getattr(part, "enabled", True)
             and (t := part.regularization()) is not None]  # fmt: skip
    return torch.stack([t.reshape(()) for t in terms]).sum() if terms else None


def set_progress(model: nn.Module, progress: Progress, *, begun: bool = True) -> None:
    """Tell every quantizer, then every coordinator, where training stands.

    :param begun: ``False`` as long as a checkpoint may still be loaded: a coordinator, which may begin its work at
        once, is not told then.
    """
    quantizers, found = _quantizers_and_coordinators(model)
    for quantizer in quantizers:
        quantizer.on_progress(progress)
    for coordinator in found if begun else ():
        coordinator.on_progress(progress)


def broadcast_state(quantizer: Quantizer, src: int = 0) -> None:
    """Give every process of a distributed training the state of process ``src``.

    Only that one may have calibrated, so buffers whose length comes from the data may differ in shape until now.
    """
    state = quantizer.state_dict()
    for name, tensor in state.items():
        shape = torch.full((_MOST_DIMENSIONS,), -1, dtype=torch.int64, device=tensor.device)
        shape[: tensor.ndim] = torch.tensor(tensor.shape, dtype=torch.int64)
        torch.distributed.broadcast(shape, src=src)
        found = [n for n in shape.tolist() if n >= 0]
        state[name] = tensor if list(tensor.shape) == found else tensor.new_empty(found)
        torch.distributed.broadcast(state[name], src=src)
    quantizer.load_state_dict(state)  # renews what Python mirrors of the buffers


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, keep: Callable[[nn.Parameter], bool] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of a model with quantizers: the base group, then what each algorithm asks for.

    :param lr, weight_decay: base values.
    :param keep: leave out parameters for which it returns ``False`` (default: those without gradient).
    :return: groups for ``torch.optim.*``; groups with equal options are merged; every parameter stands in one group.
    """
    keep = keep or (lambda p: p.requires_grad)
    taken: set[int] = set()
    merged: dict[tuple, dict[str, Any]] = {}
    for part in (*(q for _, q in named_quantizers(model)), *coordinators(model)):
        for group in part.param_groups(lr, weight_decay):
            options = {k: v for k, v in group.items() if k != "params"}
            params = [p for p in group["params"] if keep(p) and id(p) not in taken]
            taken.update(id(p) for p in params)
            if params:
                key = tuple(sorted(options.items()))
                merged.setdefault(key, {"params": [], **options})["params"].extend(params)
    rest = [p for p in model.parameters() if keep(p) and id(p) not in taken]
    return [{"params": rest, "lr": lr, "weight_decay": weight_decay}, *merged.values()]
