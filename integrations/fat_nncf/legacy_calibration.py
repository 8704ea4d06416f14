"""NNCF 2: the weights as our quantizers see them, and how quantizers are initialised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from nncf.torch.initialization import SimpleDataLoaderRunner
from nncf.torch.layer_utils import ProxyModule
from nncf.torch.module_operations import UpdateParameter, UpdateParameterList
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.utils import training_mode_switcher
from torch import Tensor, nn

from fat_nncf.legacy_quantizer import PluginQuantizer
from fat_plugins.network import in_force
from fat_plugins.placed import register_finder
from fat_plugins.quantizer import ROLES, Role, WeightQuantizer

#: batches of the registered loader that algorithms calibrated by data see at most
DATA_BATCHES = 8


def quantized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, PluginQuantizer]]:
    """Every layer whose weight we quantize: the layer, the key of the operation in it, the quantizer."""
    for module in model.modules():
        if isinstance(ops := getattr(module, "pre_ops", None), nn.ModuleDict):
            for key, op in ops.items():
                if isinstance(getattr(op, "op", None), PluginQuantizer):
                    yield module, key, op.op


def operand(module: nn.Module, quantizer: PluginQuantizer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as they reach the quantizer: after the masks of other algorithms, in evaluation mode."""
    proxy = ProxyModule(module)
    with torch.no_grad():
        for op in module.pre_ops.values():
            if getattr(op, "op", None) is quantizer:
                break
            if isinstance(op, (UpdateParameter, UpdateParameterList)):
                with training_mode_switcher(op, is_training=False):
                    op(proxy, None)
    return proxy.weight.detach(), getattr(proxy, "bias", None)


def float_weights(model: nn.Module) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Weight quantizers of the core with the weights that reach them (see :mod:`fat_plugins.placed`)."""
    for module, _, quantizer in quantized_layers(model):
        yield quantizer.core, operand(module, quantizer)[0]


register_finder("nncf2", float_weights)


def calibrate_weights(model: nn.Module) -> None:
    """Initialise every weight quantizer from the weight that reaches it."""
    for module, _, quantizer in quantized_layers(model):
        quantizer.core.calibrate(operand(module, quantizer)[0])


def _showing(observe: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:  # what a hook returns would replace the input
        observe(args[0].detach())

    return hook


@contextmanager
def _showing_inputs(model: nn.Module) -> Iterator[None]:
    """Layers whose weight quantizer wants its input show it."""
    hooks = [
        module.register_forward_pre_hook(_showing(quantizer.core.observe_input))
        for module, _, quantizer in quantized_layers(model)
        if quantizer.core.wants_input
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Turns(SimpleDataLoaderRunner):
    """Runs every batch once for each entry of ``turns``."""

    def __init__(self, model: NNCFNetwork, device: str, turns: Sequence[Collection[Role]]) -> None:
        super().__init__(model, device)
        self._turns = turns

    def _infer_batch(self, args_kwargs_tuple: Any, device: Any) -> None:
        for roles in self._turns:
            with in_force(self.model, roles):
                super()._infer_batch(args_kwargs_tuple, device)


class Pass:
    """Passes the registered loader's data through the quantized model as it stands, in evaluation mode."""

    def __init__(self, model: NNCFNetwork, range_init_params: Any) -> None:
        self._model, self._params = model, range_init_params

    def __call__(self, samples: int, turns: Sequence[Collection[Role]] = (ROLES,)) -> None:
        """See :class:`fat_plugins.quantizer.Calibration`."""
        loader = self._params.init_range_data_loader
        steps = min(len(loader), -(-samples // max(loader.batch_size or 1, 1)))
        runner = _Turns(self._model, self._params.device, turns)
        runner.progressbar_description = "Collecting statistics"
        with _showing_inputs(self._model), training_mode_switcher(self._model, is_training=False), torch.no_grad():
            runner.run(loader, steps)


def fold_weights(model: nn.Module) -> None:
    """Write quantized values into the parameters that algorithms have taken over (``WeightQuantizer.fold_into``)."""
    for module, _, quantizer in quantized_layers(model):
        quantizer.core.fold_into(module.weight)


@contextmanager
def _observing(model: nn.Module, quantizers: list[PluginQuantizer]) -> Iterator[None]:
    """The float network runs; ``quantizers`` watch, and layers whose weight quantizer wants its input show it."""
    others = [m for m in model.modules() if isinstance(m, PluginQuantizer) and m.is_enabled_quantization()]
    for quantizer in others:
        quantizer.disable_quantization()
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        with _showing_inputs(model):
            yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
        for quantizer in others:
            quantizer.enable_quantization()


def calibrate_on_data(model: NNCFNetwork, range_init_params: Any) -> None:
    """Show batches of the registered loader to the quantizers that are calibrated by data."""
    quantizers = [m for m in model.modules() if isinstance(m, PluginQuantizer) and m.from_data]
    if not quantizers and not any(q.core.wants_input for _, _, q in quantized_layers(model)):
        return
    for quantizer in quantizers:
        quantizer.core.reset_calibration()
    runner = SimpleDataLoaderRunner(model, range_init_params.device)
    runner.progressbar_description = "Calibrating quantizers"
    steps = min(DATA_BATCHES, range_init_params.get_max_num_init_steps())
    with _observing(model, quantizers), training_mode_switcher(model, is_training=False):
        runner.run(range_init_params.init_range_data_loader, steps)
