"""From a Brevitas model to plain torch layers with frozen quantizers, the only thing that the core's exporters read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.nn.quant_layer import QuantNonLinearActLayer, QuantWeightBiasInputOutputLayer
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fat_brevitas.calibration import call, device_of, move
from fat_brevitas.layers import KINDS
from fat_brevitas.placement import detach_pruned
from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy
from fat_plugins.errors import ExportError
from fat_plugins.forms import Codebook, Form, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight
from fat_plugins.quantizer import Coordinator, FrozenTensor

#: Brevitas layers of old versions that only move values
_MOVERS = (nn.MaxPool1d, nn.MaxPool2d, nn.Dropout)
_PROBE_POINTS = 2001


class FrozenLayer(nn.Module):
    """A layer between the frozen quantizers of its input and its output."""

    def __init__(self, before: nn.Module, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.after(self.layer(self.before(x), *args))


class FrozenAdd(nn.Module):
    """Brevitas's ``QuantEltwiseAdd``: one quantizer for both inputs."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.after(self.before(x) + self.before(other))


def frozen(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Copy in evaluation mode, in which every Brevitas layer is a plain torch layer with frozen quantizers.

    It gives the evaluation output of ``model`` bit for bit. Layers with Brevitas's own integer quantizers are
    converted too, when these are static, symmetric and round to nearest. Names are module paths.

    :param example_input: an input (tensor, tuple or dictionary), needed only for biases whose quantizer takes the
        scale of the layer's input, such as ``Int32Bias``.
    :raises ExportError: one line that names the layer or quantizer that has no plain equal.
    """
    detach_pruned(model)
    clone = copy.deepcopy(model).eval()
    for name, module in list(clone.named_children()):
        if isinstance(module, nn.ModuleDict) and any(isinstance(m, Coordinator) for m in module.values()):
            delattr(clone, name)
    with torch.no_grad():
        biases = {} if example_input is None else _recorded_biases(clone, move(example_input, device_of(clone)))
        _Converter(biases).convert(clone)
    return clone


def _recorded_biases(model: nn.Module, example: Any) -> dict[nn.Module, Tensor]:
    """Quantized bias of each layer in a run on an example."""
    found: dict[nn.Module, Tensor] = {}
    hooks = []
    for layer in model.modules():
        proxy = getattr(layer, "bias_quant", None)
        if isinstance(proxy, QuantProxyFromInjector) and proxy.is_quant_enabled:
            keep = lambda _m, _i, out, layer=layer: found.__setitem__(layer, _value(out).clone())  # noqa: E731
            hooks.append(proxy.register_forward_hook(keep))
    try:
        if hooks:
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _value(quantized: Any) -> Tensor:
    return quantized if type(quantized) is Tensor or isinstance(quantized, nn.Parameter) else quantized.value


class _Converter:
    def __init__(self, biases: dict[nn.Module, Tensor]) -> None:
        self._biases = biases
        self._activations: dict[nn.Module, nn.Module] = {}

    def convert(self, model: nn.Module) -> None:
        """Replace all Brevitas layers inside ``model``.

        :raises ExportError: the model itself is one.
        """
        if self._kind(model, "model") is not None:
            raise ExportError(f"a lone {type(model).__name__} cannot be frozen: put it into an nn.Sequential")
        made: dict[nn.Module, nn.Module] = {}
        for parent, key, path, module in list(_children(model, "")):
            if module not in made:
                convert = self._kind(module, path)
                made[module] = module if convert is None else convert(module, path).eval()
            parent._modules[key] = made[module]

    def _kind(self, module: nn.Module, path: str) -> Callable[[Any, str], nn.Module] | None:
        """What converts a module; ``None`` for one that stays."""
        if isinstance(module, QuantWeightBiasInputOutputLayer):
            return self._layer
        if isinstance(module, QuantNonLinearActLayer):
            return self._activation_layer
        if isinstance(module, qnn.QuantEltwiseAdd):
            return lambda m, p: FrozenAdd(self._quantizer(m.input_quant, p, "input_quant"),
                                          self._quantizer(m.output_quant, p, "output_quant"))  # fmt: skip
        if not _of_brevitas(module):
            return None
        if isinstance(module, _MOVERS):
            return _plain_mover
        raise ExportError(f"{path}: a {type(module).__name__} has no plain torch equal that can be exported")

    # -- layers ------------------------------------------------------------------------------------------------------
    def _layer(self, layer: Any, path: str) -> nn.Module:
        kind = next((k for k in KINDS if isinstance(layer, getattr(nn, k))), None)
        if kind is None or getattr(layer, "is_same_padded_strided", False) or layer.weight is None:
            how = " with padding 'same' and a stride" if kind is not None else ""
            raise ExportError(f"{path}: a {type(layer).__name__}{how} has no plain torch equal that can be exported")
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(layer, None)  # the weight behind the mask, as the next forward would make it
        frozen_weight = self._weight(layer, path)
        weight, bias = layer.weight.detach(), self._bias(layer, path)
        plain = _plain_layer(getattr(nn, kind), layer, bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        if frozen_weight is not None:
            holder = FrozenWeight(*frozen_weight, name=path)
            parametrize.register_parametrization(plain, "weight", holder, unsafe=True)
        return self._between(layer, plain, "output_quant", path)

    def _activation_layer(self, layer: Any, path: str) -> nn.Module:
        fused = layer.act_quant.fused_activation_quant_proxy
        function = nn.Identity() if fused is None else _plain_function(fused.activation_impl)
        return self._between(layer, function, "act_quant", path)

    def _between(self, layer: Any, inner: nn.Module, after: str, path: str) -> nn.Module:
        first = self._quantizer(layer.input_quant, path, "input_quant")
        last = self._quantizer(getattr(layer, after), path, "" if after == "act_quant" else after)
        if isinstance(first, nn.Identity) and isinstance(last, nn.Identity):
            return inner
        if isinstance(first, nn.Identity) and _is_identity(inner):
            return last
        return FrozenLayer(first, inner, last)

    # -- weights and biases ------------------------------------------------------------------------------------------
    def _weight(self, layer: Any, path: str) -> FrozenTensor | None:
        proxy = layer.weight_quant
        if not proxy.is_quant_enabled:
            return None
        if isinstance(proxy, PluginWeightQuantProxy):
            return proxy.freeze(layer.weight) if proxy.quantizer.enabled else None
        try:
            quantized = layer.quant_weight()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ExportError(f"{path}: its {type(proxy).__name__} gives no weight by itself: {reason}") from None
        form = _uniform(quantized, proxy, layer.weight.shape[layer.output_channel_dim], layer.output_channel_dim)
        if isinstance(form, str):
            raise ExportError(f"{path}: the weight quantizer {type(proxy).__name__} {form}")
        codes = form.encode(quantized.value)
        if not torch.equal(form.decode(codes), quantized.value):
            raise ExportError(f"{path}: the weight quantizer {type(proxy).__name__} gives no scaled integers")
        return FrozenTensor(codes, form)

    def _bias(self, layer: Any, path: str) -> Tensor | None:
        if layer.bias is None:
            return None
        proxy = layer.bias_quant
        if not proxy.is_quant_enabled:
            return layer.bias.detach()
        if layer in self._biases:
            return self._biases[layer]
        if proxy.requires_input_scale or getattr(proxy, "requires_input_bit_width", False):
            raise ExportError(
                f"{path}: its bias quantizer takes the scale of the layer's input: give an example_input, or use a "
                "bias_quant with a scale of its own"
            )
        return _value(proxy(layer.bias, None, None)).detach()

    # -- activations -------------------------------------------------------------------------------------------------
    def _quantizer(self, proxy: Any, path: str, suffix: str) -> nn.Module:
        """Frozen quantizer of an activation proxy; the identity for one that does nothing."""
        if not proxy.is_quant_enabled or proxy.fused_activation_quant_proxy is None:
            return nn.Identity()
        if proxy not in self._activations:  # a proxy may be shared by layers
            name = f"{path}.{suffix}" if suffix else path
            if isinstance(proxy, PluginActQuantProxy):
                form = proxy.form() if proxy.quantizer.enabled else None
            else:
                form = _stock_activation(proxy, name)
            self._activations[proxy] = FrozenActivation(form, name)
        return self._activations[proxy]


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, key, path, child) of all modules outside Brevitas's layers, whose insides go with them."""
    for key, child in module._modules.items():
        if child is not None:
            path = f"{prefix}{key}"
            yield module, key, path, child
            if not _of_brevitas(child):
                yield from _children(child, f"{path}.")


def _of_brevitas(module: nn.Module) -> bool:
    return any(kind.__module__.startswith(("brevitas.nn", "brevitas.proxy")) for kind in type(module).__mro__)


def _is_identity(module: nn.Module) -> bool:
    return type(module).__name__ in ("Identity", "_Identity")


def _plain_function(function: nn.Module) -> nn.Module:
    """An activation function without Brevitas's own subclass of it."""
    plain = next((kind for kind in (nn.Sigmoid, nn.Tanh) if isinstance(function, kind)), None)
    if plain is not None:
        return plain()
    return nn.Identity() if _is_identity(function) else copy.deepcopy(function)


def _plain_mover(module: Any, path: str) -> nn.Module:
    if isinstance(module, nn.Dropout):
        return nn.Dropout(module.p)
    kind = nn.MaxPool2d if isinstance(module, nn.MaxPool2d) else nn.MaxPool1d
    return kind(module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode)


def _plain_layer(kind: type[nn.Module], layer: Any, bias: bool) -> nn.Module:
    if kind is nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    if "Transpose" in kind.__name__:
        options["output_padding"] = layer.output_padding
    return kind(**options, bias=bias, device="meta")


# --------------------------------------------------------------------------------------------------------------------
# Brevitas's own quantizers
# --------------------------------------------------------------------------------------------------------------------
def _uniform(quantized: Any, proxy: Any, channels: int, axis: int) -> Form | str:
    """The grid that a tensor of Brevitas lies on, or why there is none."""
    scale, zero_point, bits = (getattr(quantized, key, None) for key in ("scale", "zero_point", "bit_width"))
    if scale is None or bits is None:
        return "gives no integers"
    if zero_point is not None and bool((zero_point != 0).any()):
        return "has a zero point; allowed: symmetric quantizers"
    if scale.numel() not in (1, channels):
        return f"has {scale.numel()} scales; allowed: one, or one per channel"
    flat, width = scale.detach().reshape(-1), int(bits)
    if width == 1:
        return Codebook(1, torch.tensor([-1, 1]), flat, axis)
    return UniformGrid(width, bool(quantized.signed), bool(proxy.is_narrow_range), flat, axis)


def _stock_activation(proxy: Any, name: str) -> Form:
    where = f"{name}: the activation quantizer {type(proxy).__name__}"
    tensor_quant = proxy.fused_activation_quant_proxy.tensor_quant
    try:
        quantized = proxy(torch.zeros((), device=device_of(proxy)))
    except Exception as error:
        raise ExportError(f"{where} has no scale of its own: {(str(error).splitlines() or [''])[0]}") from None
    scale = getattr(quantized, "scale", None)
    channels = 1 if scale is None else scale.numel()
    form = _uniform(quantized, proxy, channels, 1)
    if isinstance(form, str):
        raise ExportError(f"{where} {form}")
    # whatever is configured inside (rounding, statistics at run time, levels): it has to behave like the form
    top = 2**form.bits * float(scale.abs().max()) * 1.5
    for reach in (top, top / 7):
        probe = torch.linspace(-reach, reach, _PROBE_POINTS, dtype=scale.dtype, device=scale.device)
        probe = probe.expand(1, channels, _PROBE_POINTS).contiguous()
        if scale.ndim > 1:  # per channel: as many dimensions as Brevitas's scale broadcasts to
            probe = probe.reshape(1, channels, _PROBE_POINTS, *([1] * (scale.ndim - 3)))
        if not torch.equal(tensor_quant(probe)[0], FrozenActivation(form, name)(probe)):
            raise ExportError(f"{where} is no static grid with rounding to nearest, so it cannot be exported")
    return form


__all__ = ["FrozenAdd", "FrozenLayer", "frozen"]
