"""Quantized weights that are computed once: for all batches of an evaluation, and for all parts of a training batch.

Evaluation: outside of training and without gradient, the output of a weight quantizer is kept and given out again as
long as nothing it depends on has changed. That costs one more copy of the weights, until the next ``train()`` or
``eval()``: every call of these drops what was kept, as do loading, copying and moving to another device. Turn it off
with :func:`set_weight_cache` or the environment variable ``FAT_PLUGINS_WEIGHT_CACHE=0``.

A change is noticed by the version that torch counts for every tensor. Changes through ``.data`` do not count there, so
that on a CPU the sum of the weight and some samples are compared too. Elsewhere that would wait for the device: nothing
is kept there unless :func:`set_weight_cache` says so, and then call ``model.eval()`` again after such a change.

Training: see :func:`accumulate`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fat_plugins.errors import QuantizationError

if TYPE_CHECKING:
    from fat_plugins.quantizer import WeightQuantizer

_SAMPLES = 8
_SCALARS = (bool, int, float, str, type(None))
#: None: on a CPU
_caching: bool | None = {"0": False, "1": True}.get(os.environ.get("FAT_PLUGINS_WEIGHT_CACHE", ""))


def set_weight_cache(on: bool | None) -> None:
    """Whether quantized weights are kept between the batches of an evaluation (default ``None``: on a CPU)."""
    global _caching
    _caching = on if on is None else bool(on)


def get_weight_cache() -> bool | None:
    """Whether quantized weights are kept between the batches of an evaluation; ``None``: on a CPU."""
    return _caching


def _kept_on(device: torch.device) -> bool:
    return device.type == "cpu" if _caching is None else _caching


def _recorded() -> bool:
    """Somebody writes down what runs: he must see the quantizer, not its result."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


# --------------------------------------------------------------------------------------------------------------------
# evaluation
# --------------------------------------------------------------------------------------------------------------------
def _source(weight: Tensor) -> Tensor | None:
    """The parameter that ``weight`` is, or is a view of the whole of; ``None`` for the result of a computation, such as
    a masked weight, which is another tensor in every forward."""
    found: Tensor | None = weight
    if type(weight) is Tensor and weight._is_view():
        found = weight._base
        if found is None or found.shape != weight.shape or found.stride() != weight.stride():
            return None
    # an inference tensor has no version
    return found if type(found) is nn.Parameter and not found.is_inference() else None


def state_of(quantizer: nn.Module) -> tuple[Any, ...]:
    """What the evaluation of a quantizer depends on: its tensors, by identity and version, and its plain attributes.

    Equal as long as nothing has changed; costs some microseconds and no wait for the device.
    """
    return tuple(_state(quantizer))


def _state(module: nn.Module) -> Iterator[Any]:
    for values in (module._parameters.values(), module._buffers.values()):
        for tensor in values:
            if tensor is not None:
                yield id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
    for name, value in module.__dict__.items():
        if type(value) in _SCALARS:
            yield name, value
    for child in module._modules.values():
        if child is not None:
            yield from _state(child)


def _samples(weight: Tensor) -> list[float]:
    """The sum and a few of the numbers in memory. Not from a device, which would have to be waited for."""
    if weight.device.type != "cpu":
        return []
    weight, count = weight.detach(), weight.numel()
    found = [float(weight.sum())]
    dense = sum((n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True)) + 1 == count
    some = min(count, _SAMPLES)
    return found + torch.as_strided(weight, (some,), (count // some,)).tolist() if dense else found


def _key(quantizer: nn.Module, weight: Tensor) -> tuple[Any, ...]:
    kind = weight.device.type
    return (
        weight.data_ptr(), weight._version, weight.dtype, weight.device, weight.stride(), *_samples(weight),
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), *_state(quantizer),
    )  # fmt: skip


class _Entry(NamedTuple):
    source: weakref.ref[Tensor]
    key: tuple[Any, ...]
    value: Tensor
    version: int  # of the value: a host may write into it


class Kept:
    """What evaluation computes from a weight and the state of its quantizer, with that which it was computed from.

    A copy is empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def drop(self) -> None:
        """Forget the output."""
        self._entry = None

    def get(self, compute: Callable[[Tensor], Tensor], quantizer: nn.Module, weight: Tensor) -> Tensor:
        """``compute(weight)``, as it was kept or computed now. To be called in evaluation without gradient only."""
        source = _source(weight) if _kept_on(weight.device) and not _recorded() else None
        if source is None:
            self._entry = None
            return compute(weight)
        entry = self._entry
        if (
            entry is not None
            and entry.source() is source
            and entry.key == _key(quantizer, source)
            and entry.value._version == entry.version
        ):
            return entry.value.detach()  # an object of its own: NNCF 2 turns what passes through it into another class
        with torch.inference_mode(False), torch.no_grad():  # in which tensors have versions
            value = compute(weight)
        if type(value) is Tensor:
            # a quantizer may renew its buffers while it runs
            self._entry = _Entry(weakref.ref(source), _key(quantizer, source), value, value._version)
        return value.detach()


# --------------------------------------------------------------------------------------------------------------------
# parts of a training batch
# --------------------------------------------------------------------------------------------------------------------
def _origin(weight: Tensor) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The parameters that ``weight`` is computed from (itself, or that behind a mask and the mask's own), and how."""
    if weight.grad_fn is None:
        source = _source(weight)
        return () if source is None else (source,), ()
    found, names, seen, ahead = [], [], set(), [weight.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        ahead += [following for following, _ in node.next_functions]
    return tuple(found), tuple(names)


class _Part(NamedTuple):
    out: Tensor
    leaf: Tensor
    read: tuple[Tensor, ...]
    versions: tuple[int, ...]


class Shared:
    """The quantized weight of one optimizer step: computed for the first part of the batch, given to all."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Any, ...], _Part] = {}  # a quantizer may serve several layers

    def get(self, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        """A leaf that gathers the gradients of all parts; the plain output where nothing can be shared.

        :raises QuantizationError: weight or quantizer have changed since the first part, or a
            DistributedDataParallel is at work.
        """
        whole = tuple(weight.shape) == quantizer.spec.shape
        leaves, how = _origin(weight) if whole and not _recorded() else ((), ())
        if not leaves:
            return quantizer.compute(weight)
        name = quantizer.spec.name or "weight"
        if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise QuantizationError(
                f"{name}: accumulate() cannot share quantized weights under DistributedDataParallel, which would "
                "average gradients before they are there; use its no_sync() alone"
            )
        key = (quantizer.active_bits, *how, *(id(leaf) for leaf in leaves))
        part = self._parts.get(key)
        if part is None:
            out = quantizer.compute(weight)
            read = (*leaves, *quantizer.parameters())
            leaf = out.detach().requires_grad_(out.requires_grad)
            part = self._parts[key] = _Part(out, leaf, read, tuple(t._version for t in read))
        elif part.versions != tuple(t._version for t in part.read):
            raise QuantizationError(f"{name}: its weight has changed inside accumulate(); step the optimizer after it")
        # an object of its own: NNCF 2 turns what passes through it into another class
        return part.leaf.view_as(part.leaf)

    def pending(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs with their graphs, and the gradients that have come for them."""
        for part in self._parts.values():
            if part.leaf.grad is not None:
                yield part.out, part.leaf.grad


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Quantize every weight once for all the parts of a batch whose gradients are summed::

        optimizer.zero_grad()
        with fat_plugins.accumulate(model):
            for images, labels in parts:
                (criterion(model(images), labels) / len(parts)).backward()
        optimizer.step()

    The gradients are those of the plain way, since what a quantizer does to a gradient is linear; a stochastic
    algorithm draws one sample for all parts instead of one for each. They reach the weights and the quantizers'
    parameters at the end of the ``with`` block: unscale, clip and step after it. Costs the memory of one more copy of
    the weights and of their gradients, and what the quantizers save, through all parts.

    Applies to forwards in training mode with gradient. Nothing is passed back if the block ends by an exception.

    :raises QuantizationError: one stands inside another; weights changed within; a DistributedDataParallel is at work.
    """
    from fat_plugins.quantizer import WeightQuantizer  # which imports this module

    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    if any(q.shared is not None for q in quantizers):
        raise QuantizationError("accumulate(): the model is inside another accumulate() already")
    for quantizer in quantizers:
        quantizer.shared = Shared()
    try:
        yield
        pending = [found for q in quantizers for found in q.shared.pending()]
        if pending:
            outputs, gradients = zip(*pending, strict=True)
            torch.autograd.backward(outputs, gradients)
    finally:
        for quantizer in quantizers:
            quantizer.shared = None


__all__ = ["Kept", "Shared", "accumulate", "get_weight_cache", "set_weight_cache", "state_of"]
