"""Initialisation of quantizers and batch norms from data, by Brevitas's calibration mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from brevitas.graph.calibrate import calibration_mode
from torch import nn

from fat_brevitas.config import Plan
from fat_brevitas.modules import WeightTensorQuant
from fat_plugins.errors import ConfigError
from fat_plugins.network import in_force
from fat_plugins.quantizer import ROLES, Role
from fat_plugins.switching import each_width

#: batches for weight quantizers that look at the inputs of their layers
INPUT_BATCHES = 4


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model: a dictionary is keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def move(value: Any, device: torch.device) -> Any:
    """Tensors in a structure of dictionaries, tuples and lists to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: move(v, device) for k, v in value.items()}
    return [move(v, device) for v in value] if isinstance(value, (list, tuple)) else value


class Batches:
    """Model inputs, batch by batch, as often as needed.

    :param source: a re-iterable loader of tensors, ``(input, target)`` pairs or dictionaries of keyword arguments.
    :raises ConfigError: it is empty, no iterable, or can be iterated only once.
    """

    def __init__(self, source: Iterable[Any], device: torch.device) -> None:
        self._source, self._device = source, device
        try:
            iterator = iter(source)
        except TypeError:
            raise ConfigError(f"calibration: expected an iterable of batches, got {type(source).__name__}") from None
        if isinstance(source, (torch.Tensor, Mapping)):
            raise ConfigError(f"calibration: expected an iterable of batches, got one {type(source).__name__}")
        if iterator is source:
            raise ConfigError("calibration: it can be iterated only once; give a loader or a list of batches")
        try:
            first = self._inputs(next(iterator))
        except StopIteration:
            raise ConfigError("calibration: it is empty; at least one batch is needed") from None
        while isinstance(first, (Mapping, list, tuple)) and len(first):
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
        #: length of the first axis of the first tensor
        self.size = len(first) if isinstance(first, torch.Tensor) and first.ndim else 1

    def _inputs(self, batch: Any) -> Any:
        return move(batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch, self._device)

    def take(self, count: int) -> Iterator[Any]:
        """The first ``count`` inputs; fewer when the source ends."""
        return (self._inputs(batch) for batch in islice(iter(self._source), count))


def weight_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightTensorQuant]]:
    """Path, layer and quantizing module of every layer whose weight this package quantizes."""
    for name, module in model.named_modules():
        wrapper = getattr(getattr(module, "weight_quant", None), "tensor_quant", None)
        if isinstance(wrapper, WeightTensorQuant):
            yield name, module, wrapper


@torch.no_grad()
def calibrate_weights(model: nn.Module) -> None:
    """Initialise weight quantizers from the weights."""
    for _, layer, wrapper in weight_wrappers(model):
        wrapper.prepare(layer.weight)


def fold_weights(model: nn.Module) -> None:
    """Write quantized values into the parameters that algorithms have taken over (``WeightQuantizer.fold_into``)."""
    for _, layer, wrapper in weight_wrappers(model):
        wrapper.quantizer.fold_into(layer.weight)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches, plan: Plan) -> None:
    """Initialise activation quantizers from data that runs through the float model.

    Modes of all modules are restored.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    hooks = _show_inputs(model)
    try:
        with calibration_mode(model):
            for i, inputs in enumerate(batches.take(plan.range_batches(batches.size))):
                if i == INPUT_BATCHES:
                    _remove(hooks)
                call(model, inputs)
    finally:
        _remove(hooks)
        for module, training in modes.items():
            module.training = training


def _showing(observe: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:  # what a hook returns would replace the input
        # a layer may quantize its own input; what collects statistics must not see it twice
        own, x = getattr(layer, "input_quant", None), inputs[0]
        if own is not None and not layer.training:
            x = own(layer.unpack_input(x))  # a quantizer of Brevitas 0.10 takes no plain tensor while it is disabled
        observe(_plain(x))

    return hook


def _show_inputs(model: nn.Module) -> list[Any]:
    """Layers whose weight quantizer wants its input show it; the hooks that do that."""
    return [
        layer.register_forward_pre_hook(_showing(wrapper.quantizer.observe_input))
        for _, layer, wrapper in weight_wrappers(model)
        if wrapper.quantizer.wants_input
    ]


class Pass:
    """Passes calibration data through the quantized model as it stands, in evaluation mode."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._model, self._batches = model, batches

    @torch.no_grad()
    def __call__(self, samples: int, turns: Sequence[Collection[Role]] = (ROLES,)) -> None:
        """See :class:`fat_plugins.quantizer.Calibration`."""
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        hooks = _show_inputs(self._model)
        try:
            for inputs in self._batches.take(-(-samples // max(self._batches.size, 1))):
                for roles in turns:
                    with in_force(self._model, roles):
                        call(self._model, inputs)
        finally:
            _remove(hooks)
            for module, training in modes.items():
                module.training = training


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()


def _plain(x: Any) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else x.value


@torch.no_grad()
def adapt_batch_norms(model: nn.Module, batches: Batches, plan: Plan) -> None:
    """Running statistics of the quantized model, with each norm's own momentum, as NNCF adapts them.

    Modes of all modules are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    count = plan.bn_batches(batches.size)
    if not norms or not count:
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for norm in norms:
            norm.training = True
        for _ in each_width(model):
            for inputs in batches.take(count):
                call(model, inputs)
    finally:
        for module, training in modes.items():
            module.training = training
