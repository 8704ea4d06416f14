"""NNCF 2: taking our quantizers out of a model, for deployment (strip) or for an exporter (freeze)."""

from __future__ import annotations

import copy

import torch
from nncf.torch.graph.transformations.commands import ExtraCompressionModuleType
from nncf.torch.nncf_network import NNCFNetwork
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from fat_nncf.legacy_calibration import fold_weights, operand, quantized_layers
from fat_nncf.legacy_quantizer import PluginQuantizer
from fat_plugins.errors import HostError
from fat_plugins.forms import Form, UniformGrid, refuse_nonfinite
from fat_plugins.frozen import FrozenActivation, FrozenWeight

#: name of the coordinators inside the model, so that its state dict holds their state
COORDINATORS = "fat_plugins_coordinators"


def activation_quantizers(model: NNCFNetwork) -> nn.ModuleDict:
    """NNCF's store of activation quantizers (empty when there is none)."""
    kind = ExtraCompressionModuleType.EXTERNAL_QUANTIZER
    if not model.nncf.is_compression_module_registered(kind):
        return nn.ModuleDict()
    return model.nncf.get_compression_modules_by_type(kind)


def _bake(module: nn.Module, key: str, quantizer: PluginQuantizer) -> None:
    """Write the masks of other algorithms into the parameters and remove their operations."""
    weight, bias = operand(module, quantizer)
    module.weight.data = weight.clone()
    if isinstance(bias, torch.Tensor):
        module.bias.data = bias.detach().clone()
    for earlier in list(module.pre_ops):
        if earlier == key:
            break
        module.remove_pre_forward_operation(earlier)


def to_torch(form: Form, name: str) -> nn.Module:
    """torch's FakeQuantize for a uniform grid, our frozen quantizer for other forms."""
    if not isinstance(form, UniformGrid):
        return FrozenActivation(form, name)
    per_channel = form.scale.numel() > 1
    module = FakeQuantize(
        observer=PerChannelMinMaxObserver if per_channel else MinMaxObserver,
        quant_min=form.low,
        quant_max=form.high,
        dtype=torch.qint8 if form.signed else torch.quint8,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
    )
    module.scale = form.scale.detach().clone()
    module.zero_point = torch.zeros_like(module.scale, dtype=torch.int32)
    module.ch_axis = form.channel_axis if per_channel else -1
    module.disable_observer()
    return module


@torch.no_grad()
def strip_in_place(model: NNCFNetwork) -> None:
    """Fold weights into the parameters, turn activation quantizers into modules without training state.

    :raises QuantizationError: an activation quantizer was never calibrated, or a weight or scale is not finite.
    """
    layers = list(quantized_layers(model))
    activations = activation_quantizers(model)
    # everything that can fail first: a model is stripped whole or not at all
    forms = {
        key: quantizer.form() if quantizer.is_enabled_quantization() else None
        for key, quantizer in activations.items()
        if isinstance(quantizer, PluginQuantizer)
    }
    for key, form in forms.items():
        if form is not None:
            refuse_nonfinite(form, activations[key].spec.name)
    folded = []
    for module, key, quantizer in layers:
        codes, form = quantizer.core.freeze(operand(module, quantizer)[0])
        folded.append((module, key, quantizer, form.decode(codes)))
    for module, key, quantizer, weight in folded:
        if quantizer.is_enabled_quantization():
            _bake(module, key, quantizer)
            module.weight.data = weight.to(module.weight.dtype)
        module.remove_pre_forward_operation(key)
    for key, form in forms.items():
        device = activations[key].core.status.device
        name = activations[key].spec.name
        activations[key] = nn.Identity() if form is None else to_torch(form, name).to(device)
        activations[key].eval()
    _drop_coordinators(model)


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in evaluation mode, its quantizers replaced by frozen ones, ready for tracing.

    Masks of sparsity and pruning algorithms are part of the codes. Quantizers that the user disabled are left out;
    activations that were never calibrated become frozen quantizers without a form, which exporters refuse by name.

    :param model: a model from ``create_compressed_model``; it is left untouched.
    :raises HostError: the model holds no quantizer of this package.
    :raises QuantizationError: a weight is not finite.
    """
    if not any(isinstance(m, PluginQuantizer) for m in model.modules()):
        raise HostError("the model holds no quantizer of fat-plugins: pass the one that create_compressed_model gave")
    model = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    frozen = copy_without_controller(model)
    frozen.eval()
    fold_weights(frozen)
    for module, key, quantizer in list(quantized_layers(frozen)):
        if quantizer.is_enabled_quantization():
            codes, form = quantizer.core.freeze(operand(module, quantizer)[0])
            _bake(module, key, quantizer)
            module.pre_ops[key].op = FrozenWeight(codes, form, quantizer.spec.name)
        else:
            module.remove_pre_forward_operation(key)
    activations = activation_quantizers(frozen)
    for key, quantizer in list(activations.items()):
        if not isinstance(quantizer, PluginQuantizer):
            continue
        if quantizer.is_enabled_quantization():
            form = quantizer.core.form() if quantizer.calibrated else None
            activations[key] = FrozenActivation(form, quantizer.spec.name).eval()
        else:
            activations[key] = nn.Identity()
    _drop_coordinators(frozen)
    return frozen


def copy_without_controller(model: NNCFNetwork) -> NNCFNetwork:
    """Deep copy without the controller, which drags data loaders along, and after training with rb_sparsity holds
    tensors that torch refuses to copy."""
    controller, model.nncf.compression_controller = model.nncf.compression_controller, None
    try:
        return copy.deepcopy(model)
    finally:
        model.nncf.compression_controller = controller


def _drop_coordinators(model: NNCFNetwork) -> None:
    if hasattr(model.nncf, COORDINATORS):
        delattr(model.nncf, COORDINATORS)
