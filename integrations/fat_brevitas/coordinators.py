"""Coordinators of algorithms that act on the whole network, for traced models and for models that are built by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from brevitas.fx import GraphModule, Node
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fat_brevitas.calibration import (
    INPUT_BATCHES,
    Batches,
    Pass,
    calibrate_weights,
    call,
    device_of,
    fold_weights,
    weight_wrappers,
)
from fat_brevitas.modules import ActTensorQuant, WeightTensorQuant
from fat_plugins.errors import HostError
from fat_plugins.network import begin, coordinators, named_quantizers
from fat_plugins.quantizer import LayerQuantizers, Quantizer
from fat_plugins.registry import get_algorithm

#: module that holds coordinators, so that state dicts have them
COORDINATORS = "fat_plugins_coordinators"
#: attribute of a tensor: the activation quantizer that it comes from, through whatever has no weight
_SOURCE = "_fat_plugins_source"


def attach(model: nn.Module, layers: Iterable[LayerQuantizers], batches: Batches | None) -> None:
    """Give the model the coordinators of its algorithms.

    :param layers: in execution order.
    :param batches: the data of coordinators that look at data.
    """
    members: dict[str, list[LayerQuantizers]] = {}
    for layer in layers:
        members.setdefault(layer.weight.algorithm, []).append(layer)
    found = nn.ModuleDict()
    for name, own in members.items():
        coordinator = get_algorithm(name).make_coordinator(own)
        if coordinator is not None:
            found[name] = coordinator.to(device_of(model)).train(model.training)
            if batches is not None:
                coordinator.set_calibration(Pass(model, batches))
    if found:
        model.add_module(COORDINATORS, found)
    for _, _, wrapper in weight_wrappers(model):
        wrapper.coordinated = True


def attach_by_hand(model: nn.Module, calibration: Iterable[Any] | None) -> None:
    """:func:`attach` for layers that the user placed: their order is that of a forward, whose data also initialises
    quantizers that have not seen any. Where the model has its coordinators, they only get the data.

    :param calibration: a loader or list of batches; needed as soon as an algorithm has a coordinator.
    :raises HostError: it is missing, or the model cannot hold coordinators.
    """
    batches = None if calibration is None else Batches(calibration, device_of(model))
    present = list(coordinators(model))
    if present:
        for coordinator in present if batches is not None else ():
            coordinator.set_calibration(Pass(model, batches))
        return
    names = {q.algorithm for _, q in named_quantizers(model) if q.role == "weight"}
    names = sorted(name for name in names if get_algorithm(name).coordinator is not None)
    if not names:
        return
    if batches is None:
        raise HostError(
            f"'{names[0]}' acts on the whole network and needs data: Controller(model, calibration) with a loader or "
            "a list of batches"
        )
    if isinstance(model, nn.Sequential):
        raise HostError(
            f"'{names[0]}' acts on the whole network, which an nn.Sequential cannot hold: put it in a module"
        )
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            calibrate_weights(model.eval())
            if not all(q.calibrated for _, q in named_quantizers(model)):
                with calibration_mode(model):
                    for inputs in batches.take(INPUT_BATCHES):
                        call(model, inputs)
            layers = _layers_of_forward(model.eval(), next(iter(batches.take(1))))
    finally:
        for module, training in modes.items():
            module.training = training
    attach(model, layers, batches)
    begin(model)
    fold_weights(model)


def _layer(name: str, layer: nn.Module, weight: Quantizer, before: Quantizer | None) -> LayerQuantizers:
    if before is not None and before.algorithm != weight.algorithm:
        before = None
    parameters = dict(layer.named_parameters(recurse=False))
    own = {f"{name}.weight": parameters.get("weight", parameters.get("weight_orig"))}
    own |= {f"{name}.bias": parameters["bias"]} if parameters.get("bias") is not None else {}
    return LayerQuantizers(name, weight, before, own)


# --------------------------------------------------------------------------------------------------------------------
# traced models
# --------------------------------------------------------------------------------------------------------------------
def layers_of_graph(model: GraphModule) -> Iterator[LayerQuantizers]:
    """Layers in the order of the graph, each with the quantizer of its input."""
    seen: set[int] = set()
    for node in model.graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        wrapper = getattr(getattr(layer, "weight_quant", None), "tensor_quant", None)
        if isinstance(wrapper, WeightTensorQuant) and id(wrapper) not in seen:
            seen.add(id(wrapper))
            yield _layer(node.target, layer, wrapper.quantizer, _input_quantizer(model, node))


def _quantizer_of(module: nn.Module | None) -> Quantizer | None:
    """The activation quantizer inside a Brevitas activation layer."""
    found = getattr(getattr(module, "act_quant", None), "act_tensor_quant", None)
    return found.quantizer if isinstance(found, ActTensorQuant) else None


def _input_quantizer(model: GraphModule, node: Node) -> Quantizer | None:
    """The quantizer of a layer's input: the nearest one upstream, through what has a single input."""
    while len(node.all_input_nodes) >= 1:
        node = node.all_input_nodes[0]
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        found = _quantizer_of(module)
        if found is not None:
            return found
        if hasattr(module, "weight_quant"):
            return None
    return None


# --------------------------------------------------------------------------------------------------------------------
# models built by hand, which need not be traceable
# --------------------------------------------------------------------------------------------------------------------
def _value(x: Any) -> Tensor | None:
    """The tensor in a tensor or in Brevitas's quantized one."""
    x = getattr(x, "value", x)
    return x if isinstance(x, Tensor) else None


class _Follow(TorchFunctionMode):
    """Results come from where the first tensor among the arguments comes from."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        result = _value(out)
        if result is not None:
            first = next((t for t in map(_value, args) if t is not None), None)
            source = getattr(first, _SOURCE, None)
            if source is not None and result is not first:
                setattr(result, _SOURCE, source)
        return out


def _layers_of_forward(model: nn.Module, inputs: Any) -> list[LayerQuantizers]:
    found: dict[int, LayerQuantizers] = {}
    hooks = []

    def reads(name: str, wrapper: WeightTensorQuant):
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # a layer may quantize its own input
            own = getattr(getattr(layer, "input_quant", None), "act_tensor_quant", None)
            before = own.quantizer if isinstance(own, ActTensorQuant) else getattr(_value(args[0]), _SOURCE, None)
            found.setdefault(id(wrapper), _layer(name, layer, wrapper.quantizer, before))

        return hook

    def gives(source: Quantizer | None):
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            if _value(out) is not None:
                setattr(_value(out), _SOURCE, source)

        return hook

    for name, layer, wrapper in weight_wrappers(model):
        hooks.append(layer.register_forward_pre_hook(reads(name, wrapper)))
    for layer in model.modules():
        own = _quantizer_of(layer)
        if own is not None or hasattr(layer, "weight_quant"):
            hooks.append(layer.register_forward_hook(gives(own)))
    try:
        with _Follow():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())
