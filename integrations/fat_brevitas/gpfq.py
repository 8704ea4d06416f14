"""Brevitas's own GPFQ with the alphabets and modes of ours, for models of Brevitas's stock layers.

Brevitas runs the networks, layer by layer, and gathers the products of their inputs; what a layer's weight becomes is
decided here. Such a layer then has a finished ``gpfq`` quantizer, as ``fat_brevitas.quantize`` would have placed it, so
that every exporter of this package takes it.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from brevitas.graph import gpfq as stock
from brevitas.graph.utils import is_conv_transposed
from torch import nn

from fat_brevitas.compat import VERSION
from fat_brevitas.injectors import weight_quant
from fat_plugins.algorithms._gpfq import Pairs
from fat_plugins.algorithms.gpfq import to_rows
from fat_plugins.errors import ConfigError, HostError, unknown

#: options of our GPFQ that are not Brevitas's business: it chooses inputs, patches and order of layers
OPTIONS = ("alphabet", "radius", "mode", "lambda_", "act_order", "seed")


class GreedyPath(stock.GPFQ):
    """One layer: Brevitas's sums, our path.

    :param bits, per_channel, options: of the quantizer that the layer gets.
    """

    def __init__(self, *args: Any, bits: int, per_channel: bool, options: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_conv_transposed(self.layer):
            raise HostError(
                f"{self.name}: Brevitas's GPFQ has no transposed convolutions; fat_brevitas.quantize has them"
            )
        attributes = {"bit_width": bits, "scaling_per_output_channel": per_channel, "name": self.name, **options}
        self._injector = weight_quant("gpfq", **attributes)

    @torch.no_grad()
    def single_layer_update(self) -> None:
        """Give the layer its quantizer, with the codes of the path."""
        weight = self.layer.weight_orig.detach().to(self.layer.weight.device, torch.float32)
        proxy = self._injector.proxy_class(self.layer, self._injector)
        quantizer = proxy.quantizer
        quantizer.reset_calibration()
        quantizer.calibrate(weight)
        rows = to_rows(weight.double(), quantizer.spec)
        quantizer.follow(Pairs.from_products(rows, self.H, self.G))
        del self.H, self.G
        quantizer.fold_into(self.layer.weight)
        proxy.tensor_quant.coordinated = True  # nothing is left to do for a coordinator
        self.layer.weight_quant = proxy.to(self.layer.weight.device).train(self.layer.training)


class gpfq_mode(stock.gpfq_mode):
    """``brevitas.graph.gpfq.gpfq_mode``, used in the same way.

    :param bits: width of the weights.
    :param per_channel: one step per output channel.
    :param options: ``alphabet``, ``radius``, ``mode``, ``lambda_``, ``act_order`` and ``seed`` of the algorithm
        ``gpfq``; everything else goes to Brevitas's class (``use_quant_activations``, ...).
    :raises ConfigError: an option or width that the algorithm does not have.
    :raises HostError: this version of Brevitas has no place for another rule, or a layer is a transposed convolution.
    """

    def __init__(self, model: nn.Module, bits: int = 4, per_channel: bool = False, **options: Any) -> None:
        known = inspect.signature(stock.gpfq_mode.__init__).parameters
        if "algorithm_impl" not in known:
            raise HostError(
                f"the GPFQ of Brevitas {VERSION} cannot be extended; use Brevitas 0.12 or newer, or "
                "fat_brevitas.quantize with the algorithm 'gpfq'"
            )
        taken = ("self", "model", "algorithm_impl", "create_weight_orig")
        allowed = [*OPTIONS, *(name for name in known if name not in (*taken, *OPTIONS))]
        for name in options:
            if name not in allowed:
                raise ConfigError(unknown("option of gpfq_mode", name, allowed))
        own = {name: options.pop(name) for name in OPTIONS if name in options}
        rule = partial(GreedyPath, bits=bits, per_channel=per_channel, options=own)
        super().__init__(model, algorithm_impl=rule, **options)


__all__ = ["GreedyPath", "gpfq_mode"]
