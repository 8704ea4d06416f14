"""``fat_brevitas.quantize``: a whole float model by the config that NNCF users know."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from brevitas.fx import GraphModule
from torch import nn

from fat_brevitas.calibration import (
    Batches,
    Pass,
    adapt_batch_norms,
    calibrate,
    calibrate_weights,
    call,
    device_of,
    fold_weights,
    move,
)
from fat_brevitas.config import Plan, parse_config
from fat_brevitas.coordinators import COORDINATORS, attach, layers_of_graph
from fat_brevitas.placement import Placement, detach_pruned, install, trace
from fat_plugins.errors import CheckpointError, ConfigError, HostError
from fat_plugins.network import begin, coordinators, named_quantizers
from fat_plugins.scopes import as_list
from fat_plugins.switching import follow_quantizers

_FORMAT = 1


class QuantizedModel(GraphModule):
    """A traced model with Brevitas layers, which knows what made it. Parameters keep the paths of the float model."""

    def __init__(self, root: nn.Module, graph: Any, class_name: str = "QuantizedModel") -> None:
        super().__init__(root, graph, class_name)
        #: see :func:`compression_state`
        self.compression_state: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        # torch copies only what the graph calls
        detach_pruned(self)
        clone = super().__deepcopy__(memo)
        clone.compression_state = copy.deepcopy(self.compression_state)
        if COORDINATORS in self._modules:
            clone.add_module(COORDINATORS, copy.deepcopy(self._modules[COORDINATORS], memo))
        return clone


def quantize(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    calibration: Iterable[Any] | None = None,
    *,
    example_input: Any = None,
    merge_bn: bool = False,
    equalize: bool = False,
) -> nn.Module:
    """Quantize a float model by a config. The model itself stays as it is; the copy that comes back is to be trained.

    Convolutions and linear layers become Brevitas's layers, ReLU and ReLU6 become ``QuantReLU``, other tensors get a
    ``QuantIdentity``, in the places where NNCF quantizes. Modules keep their paths; an inserted ``QuantIdentity`` is
    called ``<producer>_quant``. Build the optimizer from the result.

    :param config: a ``compression`` section, a whole NNCF config with one, or the path of a JSON file with either.
        Scopes are module paths (``"layer1.0"``), ``{re}`` patterns or NNCF's names; an activation is named by what
        reads it, as on NNCF, or by its producer's own path.
    :param calibration: a loader or list of batches, tensors or ``(input, target)`` pairs, that initialises activation
        quantizers and adapts batch norms. ``None``: the first training batch initialises activations, and batch norms
        stay as they are. Weights are always initialised at once.
    :param example_input: an input (tensor, tuple or dictionary); the traced model is then checked to give the same
        output as the model.
    :param merge_bn: fold batch norms into the layers in front of them, by Brevitas's transform.
    :param equalize: balance weight ranges across layers, by Brevitas's transform.
    :return: quantized copy in the mode (training or evaluation) of ``model``.
    :raises ConfigError: a wrong key or value, a scope that matches nothing, or what only NNCF can do.
    :raises HostError: the model cannot be traced (it branches on data), or nothing is left to quantize.
    """
    plan = parse_config(config)
    detach_pruned(model)
    device = device_of(model)
    batches = None if calibration is None else Batches(calibration, device)
    traced = trace(model, merge_bn=merge_bn, equalize=equalize)
    if example_input is not None:
        _same_output(model, traced.model, move(example_input, device), equal=not (merge_bn or equalize))
    placement = Placement(traced, plan.config)
    _unsupported(placement)
    install(placement)
    result = QuantizedModel(traced.model, traced.model.graph, type(model).__name__).to(device)
    if not any(True for _ in named_quantizers(result)):
        raise HostError("nothing to quantize: the scopes of the config leave no tensor")
    follow_quantizers(result)
    attach(result, layers_of_graph(result), batches)
    if plan.lr_multiplier is not None:
        for _, quantizer in named_quantizers(result):
            quantizer.set_lr_multiplier(plan.lr_multiplier)
    result.compression_state = _state(result, plan, merge_bn)
    calibrate_weights(result)
    if batches is not None:
        calibrate(result, batches, plan)
        begin(result)
        adapt_batch_norms(result, batches, plan)
    fold_weights(result)
    return result.train(model.training)


@torch.no_grad()
def _same_output(model: nn.Module, traced: nn.Module, example: Any, equal: bool) -> None:
    training = {m: m.training for m in model.modules()}
    try:
        wanted, found = (_first_tensor(call(m.eval(), example)) for m in (model, traced))
    finally:
        for module, mode in training.items():
            module.training = mode
    same = torch.equal(wanted, found) if equal else torch.allclose(wanted, found, rtol=1e-3, atol=1e-4)
    if not same:
        raise HostError(
            f"the traced {type(model).__name__} gives another output than the model (its forward depends on data or "
            "on state that tracing fixes); build it from fat_brevitas's layers instead"
        )


def _first_tensor(value: Any) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def _unsupported(placement: Placement) -> None:
    """Layers that stay float: an error when the config names them as targets, else one warning."""
    traced, config = placement.traced, placement.config
    left = traced.unsupported()
    for place, scopes in (
        named
        for part in config.parts
        for named in (
            (f"{part.where}.target_scopes", part.target_scopes),
            (f"{part.where}.weights.target_scopes", part.weights.target_scopes),
        )
    ):
        for node in left:
            if as_list(scopes) and traced.names.matches(scopes, [node.name]):
                raise ConfigError(f"{place}: {traced.describe(node)} cannot be quantized on Brevitas")
    left = [n for n in left if n.name not in placement.excluded]
    if left:
        names = ", ".join(dict.fromkeys(traced.describe(n) for n in left))
        warnings.warn(f"these layers have weights that stay float: {names}", UserWarning, stacklevel=3)


# --------------------------------------------------------------------------------------------------------------------
# state
# --------------------------------------------------------------------------------------------------------------------
def _state(model: nn.Module, plan: Plan, merge_bn: bool) -> dict[str, Any]:
    names = [f"{q.role} {q.spec.name}" for _, q in named_quantizers(model)]
    return {"format": _FORMAT, "compression": plan.section, "merge_bn": merge_bn, "quantizers": names}


def rebuild(model: nn.Module, state: Mapping[str, Any], calibration: Iterable[Any] | None = None) -> nn.Module:
    """The same quantizers on a fresh float model; load the state dict of the quantized model afterwards.

    :param state: ``compression_state`` of the model that :func:`quantize` gave, in JSON types.
    :param calibration: batches for algorithms that look at data while they train; nothing is initialised from them.
    :raises CheckpointError: it is no such state, or the model is another one.
    """
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT or "compression" not in state:
        raise CheckpointError("compression_state: this is no state of a model that fat_brevitas quantized")
    result = quantize(model, {"compression": state["compression"]}, merge_bn=bool(state.get("merge_bn")))
    if calibration is not None:
        for coordinator in coordinators(result):
            coordinator.set_calibration(Pass(result, Batches(calibration, device_of(result))))
    differing = sorted(set(state.get("quantizers", ())) ^ set(result.compression_state["quantizers"]))
    if differing:
        raise CheckpointError(f"compression_state: the model is another one; it differs in {differing[0]!r}")
    return result
