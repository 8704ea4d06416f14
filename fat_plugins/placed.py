"""The float weight in front of every weight quantizer of a model, on whatever host.

A host adapter registers, when it is imported, a function that finds the weights of the quantizers that it placed; the
core imports none. Quantizers that stand as parametrizations of torch are found without a host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fat_plugins.network import coordinators, named_quantizers
from fat_plugins.quantizer import (
    Coordinator,
    FrozenTensor,
    Quantizer,
    WeightQuantizer,
)

#: from a model to its weight quantizers with the weights as they reach them: behind masks, in evaluation mode
Finder = Callable[[nn.Module], Iterable[tuple[WeightQuantizer, Tensor]]]

_finders: dict[str, Finder] = {}


def register_finder(host: str, find: Finder) -> None:
    """Tell how the quantizers of a host's models are found; a second call for the same host replaces the first.

    :param find: must give nothing, not fail, for models of other hosts.
    """
    _finders[host] = find


def _parametrized(model: nn.Module) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensors in module.parametrizations.values():
            value = getattr(tensors, "original", None)
            for step in tensors if value is not None else ():
                if isinstance(step, WeightQuantizer):
                    yield step, value.detach()
                    break
                value = step(value)


register_finder("torch", _parametrized)


@torch.no_grad()
def float_weights(model: nn.Module) -> dict[WeightQuantizer, Tensor]:
    """Weight quantizers of ``model`` with the float weight that reaches each, without gradient.

    The weight of a quantizer that owns it (:attr:`WeightQuantizer.owns_weight`) is whatever the host keeps in its
    place. A quantizer whose weight no host knows is left out.
    """
    found: dict[WeightQuantizer, Tensor] = {}
    for find in _finders.values():
        for quantizer, weight in find(model):
            found.setdefault(quantizer, weight.detach())
    return found


@torch.no_grad()
def monitor(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every quantizer and coordinator says about itself now; see :meth:`Quantizer.monitor`.

    Quantizers that are disabled or not calibrated are left out.

    :return: by name, in JSON types: ``kind`` (``"weight"``, ``"activation"``, ``"network"``) and ``values`` by name, to
        six digits. An activation is called ``"NAME (activation)"`` where a weight has the same name.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, part, weight in parts(model):
        whole = isinstance(part, Coordinator)
        numbers = part.monitor() if whole else part.monitor(weight)
        values = {key: float(f"{value:.6g}") for key, value in numbers.items() if math.isfinite(value)}
        out[name] = {"kind": "network" if whole else part.role, "values": values}
    return out


@torch.no_grad()
def network_facts(model: nn.Module) -> dict[str, float]:
    """What the algorithms at work in ``model`` tell of the whole network: see :meth:`Algorithm.network_facts`."""
    from fat_plugins.registry import get_algorithm  # which loads the algorithms, and these import the core

    by_algorithm: dict[str, list[tuple[WeightQuantizer, FrozenTensor]]] = {}
    for quantizer, weight in float_weights(model).items():
        if quantizer.enabled and quantizer.calibrated and quantizer.algorithm:
            by_algorithm.setdefault(quantizer.algorithm, []).append((quantizer, quantizer.freeze(weight)))
    own = {id(p) for _, q in named_quantizers(model) for p in q.parameters()}
    own |= {id(p) for c in coordinators(model) for p in c.parameters()}
    # integers are bookkeeping of a host
    total = sum(p.numel() for p in model.parameters() if id(p) not in own and p.is_floating_point())
    facts: dict[str, float] = {}
    for name, found in by_algorithm.items():
        quantized = sum(frozen.codes.numel() for _, frozen in found)
        facts |= get_algorithm(name).network_facts(found, max(total - quantized, 0))
    return facts


def parts(model: nn.Module) -> Iterator[tuple[str, Quantizer | Coordinator, Tensor | None]]:
    """Every quantizer in use with a name of its own and, for weights, the float weight; then every coordinator."""
    weights, taken = float_weights(model), set()
    for path, quantizer in named_quantizers(model):
        weight = weights.get(quantizer) if isinstance(quantizer, WeightQuantizer) else None
        unknown = weight is None and isinstance(quantizer, WeightQuantizer)
        if not quantizer.enabled or not quantizer.calibrated or unknown:
            continue
        name = quantizer.spec.name or path
        if name in taken:
            name = f"{name} ({quantizer.role})"
        while name in taken:
            name += "'"
        taken.add(name)
        yield name, quantizer, weight
    for coordinator in coordinators(model):
        yield type(coordinator).__name__, coordinator, None


__all__ = ["Finder", "float_weights", "monitor", "network_facts", "parts", "register_finder"]
