"""One model at several bit widths: which they are, and how it is switched from one to another.

Switching is generic: it sets every quantizer that has several :attr:`~fat_plugins.quantizer.Quantizer.widths`, whatever
its algorithm, and every switchable batch norm. Quantizers of one width, such as those of first and last layers at 8
bits, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fat_plugins.errors import QuantizationError
from fat_plugins.quantizer import Quantizer, check_width
from fat_plugins.switchable_norms import SwitchableNorm


def _parts(model: nn.Module) -> tuple[dict[str, Quantizer], dict[str, SwitchableNorm]]:
    """Quantizers of several widths, and switchable norms, by their paths in ``model``."""
    quantizers, norms = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and len(module.widths) > 1:
            quantizers[name] = module
        elif isinstance(module, SwitchableNorm):
            norms[name] = module
    return quantizers, norms


def widths(model: nn.Module) -> tuple[int, ...]:
    """The bit widths, descending, that :func:`set_active_bits` can switch ``model`` to: those that all its quantizers
    of several widths have, and all its switchable norms. Empty where no quantizer has several."""
    quantizers, norms = _parts(model)
    found = [set(part.widths) for part in (*quantizers.values(), *norms.values())]
    return tuple(sorted(set.intersection(*found), reverse=True)) if quantizers else ()


def set_active_bits(model: nn.Module, bits: int) -> None:
    """Compute at ``bits`` from now on, without any training: weights, activations and batch norms alike.

    The width is a mode, like ``train()`` and ``eval()``: no state dict holds it, and a model that is built or rebuilt
    stands at the widths of its config.

    :raises QuantizationError: no quantizer of ``model`` has several widths, or ``bits`` is none of
        :func:`widths`; nothing is switched then.
    """
    quantizers, norms = _parts(model)
    if not quantizers:
        raise QuantizationError(f"set_active_bits: no quantizer of this {type(model).__name__} has several bit widths")
    check_width(bits, widths(model), "set_active_bits: the model")
    for part in (*quantizers.values(), *norms.values()):
        part.set_active_bits(bits)


@contextmanager
def at_bits(model: nn.Module, bits: int) -> Iterator[None]:
    """``model`` computes at ``bits`` meanwhile; every part returns to the width that it had.

    :raises QuantizationError: see :func:`set_active_bits`.
    """
    before: list[tuple[Any, int]] = [(p, p.active_bits) for parts in _parts(model) for p in parts.values()]
    set_active_bits(model, bits)
    try:
        yield
    finally:
        for part, active in before:
            part.set_active_bits(active)


def each_width(model: nn.Module) -> Iterator[int | None]:
    """Once for every width of ``model``, which computes at it meanwhile; once, with ``None``, where it has only one::

        optimizer.zero_grad()
        for bits in fat_plugins.each_width(model):
            (criterion(model(images), labels) / count).backward()
        optimizer.step()

    Afterwards every part has the width that it had.
    """
    several = widths(model)
    if not several:
        yield None
    for bits in several:
        with at_bits(model, bits):
            yield bits


def follow_quantizers(model: nn.Module) -> None:
    """Bring switchable norms to the width that the quantizers of several widths have. Adapters call this when they have
    placed or rebuilt quantizers; a model without such quantizers, or without such norms, stays as it is.

    :raises QuantizationError: weights and activations have different widths, of which a norm could follow one only; or
        a norm does not have theirs.
    """
    quantizers, norms = _parts(model)
    if not quantizers or not norms:
        return
    active = sorted({q.active_bits for q in quantizers.values()})
    if len(active) > 1:
        raise QuantizationError(
            f"switchable norms follow one bit width, but quantizers stand at {active}; give weights and activations "
            "the same bits, or those that do not switch a bit_set of one width"
        )
    for name, norm in norms.items():
        check_width(active[0], norm.widths, name)
        norm.set_active_bits(active[0])


__all__ = ["at_bits", "each_width", "follow_quantizers", "set_active_bits", "widths"]
