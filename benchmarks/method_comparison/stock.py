"""The hosts' own quantizers at low widths, on the same layers as ours: 8 bits at the edges of the network."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def brevitas_stock(model: nn.Module, bits: int, loader: DataLoader, example: Tensor) -> nn.Module:
    """Brevitas's learned scales (``PARAMETER_FROM_STATS``), where ``fat_brevitas.quantize`` puts quantizers."""
    import fat_brevitas
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
    from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy

    section = {"algorithm": "lsq", "weights": {"bits": bits}, "activations": {"bits": bits}}
    quantized = fat_brevitas.quantize(model, section, loader, example_input=example)
    for layer in list(quantized.modules()):
        weight, act = getattr(layer, "weight_quant", None), getattr(layer, "act_quant", None)
        if isinstance(weight, PluginWeightQuantProxy):
            own = Int8WeightPerTensorFloat.let(
                bit_width=weight.quantizer.spec.bits, scaling_impl_type="parameter_from_stats"
            )
            layer.weight_quant = own.proxy_class(layer, own)
        if isinstance(act, PluginActQuantProxy):
            kind = Int8ActPerTensorFloat if act.is_signed else Uint8ActPerTensorFloat
            own = kind.let(bit_width=act.quantizer.spec.bits)
            if "act_impl" in act.quant_injector:
                own = own.let(act_impl=type(act.quant_injector.act_impl), passthrough_act=True)
            layer.act_quant = own.proxy_class(layer, own)
    with torch.no_grad(), calibration_mode(quantized):
        for images, _ in loader:
            quantized(images)
    return quantized


def nncf_stock(model: nn.Module, bits: int, loader: DataLoader, example: Tensor) -> nn.Module:
    """NNCF 3's symmetric quantizers with learned scales, placed by ``nncf.quantize`` and narrowed afterwards."""
    import fat_nncf
    import nncf
    from nncf.torch.function_hook import get_hook_storage
    from nncf.torch.quantization.layers import BaseQuantizer

    section: dict[str, Any] = {
        "input_info": {"sample_size": list(example.shape)},
        "compression": {"algorithm": "lsq", "weights": {"bits": bits}, "activations": {"bits": bits}},
    }
    config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(section), loader)
    ours = fat_nncf.create_compressed_model(deepcopy(model), config)[1]
    widths = {slot: hook.core.spec.bits for slot, hook in get_hook_storage(ours).named_hooks() if hasattr(hook, "core")}
    plain = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, disable_channel_alignment=True)
    quantized = nncf.quantize(
        model, nncf.Dataset(loader, lambda batch: batch[0]), advanced_parameters=plain, fast_bias_correction=True
    )
    for slot, hook in get_hook_storage(quantized).named_hooks():
        if isinstance(hook, BaseQuantizer) and widths.get(slot, 8) != 8:
            hook.num_bits = widths[slot]
            hook.set_levels()
    return quantized
