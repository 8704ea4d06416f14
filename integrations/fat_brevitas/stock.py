"""``freeze``: a stock Brevitas model that needs none of our code, with the numbers of the trained one."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fat_brevitas.compat import SWAPPED_EXPORT, frozen_act_quant, frozen_weight_quant, no_act_quant, no_weight_quant
from fat_brevitas.modules import Container, container_of, scale_view
from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy
from fat_plugins.errors import ExportError
from fat_plugins.forms import Form, Staircase, SumOfGrids, refuse_nonfinite

#: what Brevitas or a user sets on a proxy, beside what the injector says
_SETTINGS = ("disable_quant", "cache_inference_quant_act", "skip_create_quant_tensor")


def freeze(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace our quantizers by stock Brevitas ones that do the same.

    The quantized values are written into the layers' weights, and every scale becomes the value of a stock
    ``ParameterScaling`` (so it is part of the state dict). What comes out of the model in evaluation does not change by
    a bit, and Brevitas's exporters, its inference mode, GPTQ and the like take it as any model of their own. Training
    state of the algorithms is gone.

    :param model: a model with quantizers of this package; its activation quantizers are calibrated.
    :param inplace: change ``model`` itself instead of a copy.
    :return: the frozen model, in training or evaluation mode as it was.
    :raises ExportError: an activation quantizer is not calibrated, or no stock quantizer holds a form (a staircase, a
        sum of grids); the layer is named, and nothing has changed.
    """
    _refuse_computed_weights(model)  # torch cannot copy them either
    model = model if inplace else deepcopy(model)
    plan = [*_frozen_acts(model), *_frozen_weights(model)]  # everything is checked before anything is changed
    for owner, attribute, proxy, value in plan:
        if value is not None:
            with torch.no_grad():
                owner.weight.copy_(value)
        setattr(owner, attribute, proxy)
    for module in model.modules():
        stock = vars(type(module)).get("brevitas_class")
        if stock is not None:
            module.__class__ = stock  # FATConv2d and the like differ from it by a default argument only
    return model


def _places(model: nn.Module, kind: type) -> list[tuple[str, nn.Module, str, Any]]:
    """Path and module of every layer that has a proxy of a kind, the name of the attribute, the proxy."""
    return [
        (path or "model", owner, attribute, proxy)
        for path, owner in model.named_modules()
        for attribute, proxy in owner._modules.items()
        if isinstance(proxy, kind)
    ]


def _like(proxy: nn.Module, new: nn.Module) -> nn.Module:
    for name in _SETTINGS:
        if hasattr(proxy, name):
            setattr(new, name, getattr(proxy, name))
    return new.train(proxy.training)


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
def _refuse_computed_weights(model: nn.Module) -> None:
    for path, layer, _, _ in _places(model, PluginWeightQuantProxy):
        if not isinstance(layer.weight, nn.Parameter):
            raise ExportError(
                f"{path}: its weight is computed from other parameters (pruning, parametrization); make it permanent "
                "first (torch.nn.utils.prune.remove or parametrize.remove_parametrizations)"
            )


def _frozen_weights(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, Tensor | None]]:
    plan, written = [], {}
    for path, layer, attribute, proxy in _places(model, PluginWeightQuantProxy):
        if proxy.tensor_quant is None:
            injector = no_weight_quant()
            plan.append((layer, attribute, _like(proxy, injector.proxy_class(layer, injector)), None))
            continue
        weight = layer.weight
        frozen = proxy.freeze(weight)
        container = _container(path, "weight", frozen.form)
        value = frozen.form.decode(frozen.codes).to(weight.dtype)
        if weight in written and not torch.equal(written[weight], value):
            raise ExportError(f"{path}: its weight also belongs to another layer, whose quantizer gives other values")
        written[weight] = value
        if SWAPPED_EXPORT and not container.narrow:
            container = _narrow(path, container, int(frozen.form.integers(frozen.codes).min()))
        scale = scale_view(frozen.form.scale.detach().to(weight.dtype), value.ndim, frozen.form.channel_axis)
        injector = frozen_weight_quant(scale, container.bits, container.narrow)
        new = _like(proxy, injector.proxy_class(layer, injector)).to(weight.device)
        if not torch.equal(_tensor(new.tensor_quant(value)), value):
            raise ExportError(f"{path}: {weight.dtype} cannot hold its quantized weight exactly; convert to float32")
        plan.append((layer, attribute, new, value))
    return plan


def _narrow(path: str, container: Container, lowest: int) -> Container:
    """The narrow type that holds the same integers; one bit wider where the lowest one occurs."""
    bits = container.bits + int(lowest <= -(2 ** (container.bits - 1)))
    if bits > container.bits:
        warnings.warn(
            f"{path}: its {container.bits}-bit weights are declared as {bits} bits, without a change of their values: "
            "Brevitas before 0.10.3 exports frozen weights right only if the lowest code is unused",
            RuntimeWarning,
            stacklevel=4,
        )
    return Container(bits, container.signed, True)


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _container(path: str, role: str, form: Form) -> Container:
    container = container_of(form)
    if isinstance(form, (Staircase, SumOfGrids)) or container is None:
        raise ExportError(
            f"{path}: no stock Brevitas quantizer holds the {role}'s {type(form).__name__}; choose a uniform "
            "grid without offset, or export as it is with export_qonnx"
        )
    return container


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
def _frozen_acts(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, None]]:
    plan, made = [], {}
    for path, layer, attribute, proxy in _places(model, PluginActQuantProxy):
        if proxy not in made:
            made[proxy] = _frozen_act(path, layer, proxy)
        elif layer not in made[proxy].tracked_module_list:  # layers that share a quantizer
            made[proxy].add_tracked_module(layer)
        plan.append((layer, attribute, made[proxy], None))
    return plan


def _frozen_act(path: str, layer: nn.Module, proxy: PluginActQuantProxy) -> nn.Module:
    own = proxy.quant_injector
    activation = {name: getattr(own, name) for name in ("act_impl", "passthrough_act") if name in own}
    if proxy.quantizer is None:
        injector = no_act_quant().let(**activation)
        return _like(proxy, injector.proxy_class(layer, injector))
    form = proxy.form()
    if form is None:
        raise ExportError(
            f"{path}: the activation quantizer is not calibrated; run a training batch or Brevitas's calibration_mode "
            "first"
        )
    refuse_nonfinite(form, path)
    container = _container(path, "activation", form)
    if form.scale.numel() > 1:
        raise ExportError(f"{path}: its activation has a scale per channel, which only works for one number of axes")
    scale = form.scale.detach().reshape(())
    injector = frozen_act_quant(scale, container.bits, container.signed, container.narrow).let(**activation)
    return _like(proxy, injector.proxy_class(layer, injector)).to(scale.device)


__all__ = ["freeze"]
