"""What a frozen model computes: multiply-accumulates of every layer, and which quantizers its operands come from.

Seen from torch's dispatcher, where the models of all hosts are the same few operators; nothing is told by names of
modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: operators of matrix products: position of the operand that comes first (the other one follows)
_PRODUCTS = {"convolution": 0, "_convolution": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
#: operators whose result holds nothing but values of their input
_MOVERS = frozenset(
    "view _unsafe_view reshape permute transpose t flatten squeeze unsqueeze expand slice select split chunk unbind "
    "cat stack clone contiguous detach alias relu relu_ hardtanh clamp clamp_min max_pool2d max_pool2d_with_indices "
    "max_pool3d_with_indices upsample_nearest2d pixel_shuffle channel_shuffle constant_pad_nd _to_copy to dropout "
    "native_dropout index index_select repeat roll as_strided lift_fresh view_as split_with_sizes".split()
)


@dataclass
class LayerCost:
    """One layer that multiplies by a quantized weight.

    :param name: of the frozen weight.
    :param macs: multiply-accumulates for one sample of the batch.
    :param input: name of the frozen activation that gives the input, ``None`` where it is not quantized.
    :param output_shape: without the batch.
    """

    name: str
    macs: int
    input: str | None
    output_shape: tuple[int, ...]


@dataclass
class Costs:
    """What :func:`trace` finds.

    :param layers: in the order in which they run.
    :param float_macs: multiply-accumulates for one sample with weights that are not quantized.
    """

    layers: list[LayerCost]
    float_macs: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs([])
        # tensors by id, kept alive so that no id is used twice: name of the weight or activation
        self._weights: dict[int, str] = {}
        self._inputs: dict[int, str] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        space, name = func._schema.name.split("::")
        if space == "fat_plugins":
            labels = self._inputs if name == "quantize_activation" else self._weights
            self._label(labels, out, args[-1])
        elif name in _PRODUCTS:
            self._product(func, args, kwargs, out, _PRODUCTS[name])
        elif name in _MOVERS:
            tensors = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            for labels in (self._weights, self._inputs):
                found = {labels.get(id(t)) for t in tensors}
                if len(found) == 1 and None not in found:  # several sources are no single grid
                    self._label(labels, out, found.pop())
        return out

    def _label(self, labels: dict[int, str], out: Any, name: str) -> None:
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, Tensor):
                labels[id(tensor)] = name
                self._alive.append(tensor)

    def _product(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Tensor, at: int) -> None:
        flops = flop_registry.get(func.overloadpacket)
        macs = int(flops(*args, **kwargs, out_val=out)) // 2 if flops is not None else 0
        first, second = args[at], args[at + 1]
        if id(first) in self._weights:
            first, second = second, first
        weight = self._weights.get(id(second))
        if weight is None:
            self.costs.float_macs += macs
            return
        known = next((row for row in self.costs.layers if row.name == weight), None)
        if known is None:
            source = self._inputs.get(id(first))
            self.costs.layers.append(LayerCost(weight, macs, source, tuple(out.shape[1:])))
        else:  # the weight is used several times
            known.macs += macs


@torch.no_grad()
def trace(frozen: nn.Module, example: Tensor) -> Costs:
    """Run a frozen model on one batch and count.

    :param example: a batch; all numbers are per sample.
    """
    watch = _Watch()
    with watch:
        frozen(example)
    batch = max(len(example), 1)
    for layer in watch.costs.layers:
        layer.macs //= batch
    watch.costs.float_macs //= batch
    return watch.costs


__all__ = ["Costs", "LayerCost", "trace"]
