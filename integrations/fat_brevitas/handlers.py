"""How Brevitas's own exporters write our quantizers: QONNX, QCDQ in ONNX and in torch, and the inference mode.

Brevitas looks handlers up by the exact type of a proxy, so ours join the ``handlers`` of its export managers, when an
exporter first asks (:func:`register`). They hand the deployed weight, which is quantized already, to Brevitas's stock
handlers; from 0.12.1 on those write the raw float weight of a layer, which is right only for quantizers that do
nothing but divide, round and clamp.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fat_brevitas.compat import (
    ActQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
    int_quant_tensor,
    loaded_export_managers,
    ordered_arguments,
)
from fat_brevitas.modules import Container, Quantized, container_of, scale_view
from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy
from fat_plugins.errors import ExportError, FatPluginsError
from fat_plugins.export.common import threshold_table
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid, grids

#: targets whose tensors are 8-bit integers at most, with one scale
_EIGHT_BIT = {"onnx_qcdq": "export_onnx_qcdq", "torch_qcdq": "export_torch_qcdq"}
_DOMAIN = "qonnx.custom_op.general"
_registered: set[type] = set()


def register() -> None:
    """Add our handlers to every export manager of Brevitas that is imported. Cheap when there is nothing to do."""
    for target, manager in loaded_export_managers():
        if manager in _registered:
            continue
        if target == "inference":
            manager.handlers += [WeightInferenceHandler, ActInferenceHandler]
        else:
            weight = _stock(manager, WeightQuantProxyFromInjector)
            act = _stock(manager, ActQuantProxyFromInjector)
            manager.handlers += [
                type(f"Plugin{weight.__name__}", (WeightHandler,), {"stock": weight}),
                type(f"Plugin{act.__name__}", (_QONNXActMixin if target == "qonnx" else _ActMixin, act), {}),
            ]
            _refuse_early(manager, target)
        _registered.add(manager)


def _stock(manager: type, proxy: type) -> type:
    """The manager's handler of a stock proxy."""
    return next(handler for handler in manager.handlers if getattr(handler, "handled_layer", None) is proxy)


def _refuse_early(manager: type, target: str) -> None:
    """Let the manager look at the whole model before it changes anything; Brevitas does not clean up after errors."""
    dry_run = manager._cache_inp_out.__func__  # a forward pass between the search for handlers and the export mode

    def _cache_inp_out(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            check_model(model, target)
            dry_run(cls, model, *args, **kwargs)
        except FatPluginsError:
            manager.set_export_mode(model, False)  # drops the handlers, which another exporter would find otherwise
            raise

    manager._cache_inp_out = classmethod(_cache_inp_out)


def check_model(model: nn.Module, target: str) -> None:
    """Refuse what a target cannot hold.

    :param target: ``"qonnx"``, ``"onnx_qcdq"`` or ``"torch_qcdq"``.
    :raises ExportError: an activation quantizer that is not calibrated, or a form outside the target, with the layer.
    """
    for path, module in model.named_modules():
        layer = path.rpartition(".")[0] or "model"
        if type(module) is PluginWeightQuantProxy and module.is_quant_enabled:
            for tracked in module.tracked_module_list:
                _check_form(layer, "weight", module.freeze(tracked.weight).form, target)
        elif type(module) is PluginActQuantProxy and module.is_quant_enabled:
            form = module.form()
            if form is None:
                raise ExportError(
                    f"{layer}: the activation quantizer is not calibrated; run a training batch or Brevitas's "
                    "calibration_mode before the export"
                )
            _check_form(layer, "activation", form, target)


def _check_form(layer: str, role: str, form: Form, target: str) -> None:
    if target not in _EIGHT_BIT:
        return
    kind, container = type(form).__name__, container_of(form)
    if isinstance(form, Staircase):
        reason = "thresholds of its own have no QuantizeLinear; choose a symmetric uniform grid"
    elif container is None:
        reason = "no single scale times integers holds it; choose an algorithm or mode with one grid"
    elif container.bits == 1:
        reason = "QuantizeLinear has no 1-bit type in Brevitas; choose 2 bits or more"
    elif container.bits > 8:
        reason = f"its integers need {container.bits} bits and 8 is the most; choose fewer bits or uniform levels"
    else:
        return
    raise ExportError(f"{layer}: {_EIGHT_BIT[target]} cannot write the {role}'s {kind}: {reason}, or export_qonnx")


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
class _DeployedProxy:
    """All that a stock handler reads of a weight proxy and its layer, for one grid of one deployed weight."""

    is_quant_enabled = True
    is_groupwise = False
    rounding_mode = "ROUND"

    def __init__(self, value: Tensor, grid: UniformGrid | Codebook, container: Container) -> None:
        self.is_signed, self.is_narrow_range = container.signed, container.narrow
        scale = scale_view(grid.scale.to(value.dtype), value.ndim, grid.channel_axis)
        zero, bits = torch.zeros_like(scale.reshape(-1)[0]), torch.full_like(scale.reshape(-1)[0], container.bits)
        self._quantized = int_quant_tensor(value, scale, zero, bits, container.signed)
        self.weight = value
        self.tracked_module_list = [self]

    def quant_weight(self) -> Any:
        return self._quantized

    def bit_width(self) -> Tensor:
        return self._quantized.bit_width


def _layer_of(layers: list[nn.Module], weight: Tensor) -> int:
    """Which layer's weight a handler was given. Brevitas hands out a view, and traced tensors have no address."""
    if len(layers) == 1:
        return 0
    storage = weight.untyped_storage()._cdata
    for i, layer in enumerate(layers):
        if layer.weight.untyped_storage()._cdata == storage:
            return i
    raise ExportError("a weight quantizer that several layers share was called with a weight that is none of theirs")


class WeightHandler(nn.Module):
    """Writes the deployed weight of each layer through stock handlers; a sum of grids as the sum of their outputs.

    (``fat_brevitas.export_qonnx`` writes a sum of grids as sums of convolutions, whose weights FINN accepts.)
    """

    handled_layer = PluginWeightQuantProxy
    stock: ClassVar[type]

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[nn.Module] = []
        self._parts: list[list[tuple[nn.Module, Tensor]]] = []

    def prepare_for_export(self, proxy: PluginWeightQuantProxy) -> None:
        """Freeze the weight of every layer that the proxy serves."""
        if not proxy.is_quant_enabled:
            return
        self._layers = list(proxy.tracked_module_list)
        self._parts = [[self._part(layer, *part) for part in _deployed(proxy, layer)] for layer in self._layers]

    def _part(self, layer: nn.Module, grid: UniformGrid | Codebook, codes: Tensor) -> tuple[nn.Module, Tensor]:
        value = grid.decode(codes).to(layer.weight.dtype)
        handler = self.stock()
        handler.prepare_for_export(_DeployedProxy(value, grid, container_of(grid)))
        ordered_arguments(handler)
        return handler, value

    def attach_debug_info(self, proxy: PluginWeightQuantProxy) -> None:
        """Brevitas's markers around exported tensors."""
        for parts in self._parts:
            for handler, _ in parts:
                handler.attach_debug_info(proxy)

    def forward(self, x: Tensor) -> Quantized:
        first, *rest = (handler(value) for handler, value in self._parts[_layer_of(self._layers, x)])
        if not rest:
            return first
        return sum((part[0] for part in rest), first[0]), None, None, None


def _deployed(proxy: PluginWeightQuantProxy, layer: nn.Module) -> list[tuple[Any, Tensor]]:
    frozen = proxy.freeze(layer.weight)
    return grids(frozen.form, frozen.codes)


class WeightInferenceHandler(nn.Module):
    """``quant_inference_mode``: the quantizer itself, or each layer's stored weight with ``cache_quant_weight``."""

    handled_layer = PluginWeightQuantProxy

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[nn.Module] = []
        self._cached: list[Quantized] = []
        self._quantize: Any = None

    def prepare_for_export(self, proxy: PluginWeightQuantProxy) -> None:
        """Quantize once if the mode was asked to."""
        if not proxy.is_quant_enabled:
            return
        # in a tuple, so that it is not registered twice
        self._quantize = (proxy.tensor_quant,)
        self._layers = list(proxy.tracked_module_list)
        if proxy.cache_inference_quant_weight and not proxy.cache_inference_quant_weight_metadata_only:
            with torch.no_grad():
                self._cached = [proxy.tensor_quant(layer.weight) for layer in self._layers]

    def attach_debug_info(self, proxy: PluginWeightQuantProxy) -> None:
        """Nothing to mark."""

    def inner_forward(self, x: Tensor) -> Quantized:
        """Quantize; Brevitas compiles this."""
        return self._quantize[0](x)

    def forward(self, x: Tensor) -> Quantized:
        return self._cached[_layer_of(self._layers, x)] if self._cached else self.inner_forward(x)


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class ActInferenceHandler(nn.Module):
    """``quant_inference_mode``: the quantizer itself."""

    handled_layer = PluginActQuantProxy
    #: see PluginActQuantProxy.forward
    absorbs_activation = False

    def __init__(self) -> None:
        super().__init__()
        self._quantize: Any = None

    def prepare_for_export(self, proxy: PluginActQuantProxy) -> None:
        """Remember the quantizer."""
        self._quantize = (proxy.act_tensor_quant,)

    def attach_debug_info(self, proxy: PluginActQuantProxy) -> None:
        """Nothing to mark."""

    def forward(self, x: Tensor) -> Quantized:
        return self._quantize[0](x)


class _ActMixin:
    """A stock handler reads all that it needs from the proxy."""

    handled_layer = PluginActQuantProxy
    absorbs_activation = False
    _disabled = False

    def prepare_for_export(self, proxy: PluginActQuantProxy) -> None:
        self._disabled = not proxy.is_quant_enabled
        super().prepare_for_export(proxy)

    def symbolic_execution(self, x: Tensor) -> tuple:
        # Brevitas up to 0.10 also asks the handlers of quantizers that are switched off
        return (x, None, None, None) if self._disabled else super().symbolic_execution(x)


class _QONNXActMixin(_ActMixin):
    """Uniform grids as ``Quant``, staircases as ``MultiThreshold``."""

    staircase: MultiThreshold | None = None

    def prepare_for_export(self, proxy: PluginActQuantProxy) -> None:
        form = proxy.form() if proxy.is_quant_enabled else None
        if not isinstance(form, Staircase):
            super().prepare_for_export(proxy)
            return
        self.staircase = MultiThreshold(form)
        self.absorbs_activation = self.staircase.positive

    def symbolic_execution(self, x: Tensor) -> Quantized:
        return super().symbolic_execution(x) if self.staircase is None else self.staircase(x)


class MultiThreshold:
    """A staircase as QONNX holds it: how many thresholds the input reaches, times the scale.

    ``x >= T`` of QONNX gives the code of ``form.encode`` for every float32 input. An integer step of k between two
    levels is k equal thresholds; a lowest level below zero is added to the count.
    """

    def __init__(self, form: Staircase) -> None:
        rises = form.levels.diff().cpu().numpy()
        reached = np.nextafter(threshold_table(form), np.float32(np.inf))
        self.thresholds = torch.from_numpy(np.repeat(reached, rises, axis=1))
        self.dtype = f"UINT{int(rises.sum()).bit_length()}"
        self.lowest = int(form.levels[0])
        self.positive = self.lowest >= 0 and bool((self.thresholds > 0).all())
        self.form, self.container = form, container_of(form)

    def __call__(self, x: Tensor) -> Quantized:
        device, dtype = x.device, x.dtype
        scale = scale_view(self.form.scale.to(device, dtype), x.ndim, self.form.channel_axis)
        thresholds = self.thresholds.to(device)
        if torch.onnx.is_in_onnx_export() and not torch.jit.is_tracing():
            attributes = {"out_dtype": self.dtype, "out_scale": 1.0, "out_bias": 0.0, "data_layout": "NCHW"}
            count = torch.onnx.ops.symbolic(
                f"{_DOMAIN}::MultiThreshold", (x, thresholds), attributes, dtype=dtype, shape=x.shape, version=2
            )
        else:
            count = _MultiThresholdFn.apply(x, thresholds, self.dtype)
        levels = count + float(self.lowest) if self.lowest else count
        return levels * scale, scale, torch.zeros_like(scale), torch.full_like(scale, self.container.bits)


class _MultiThresholdFn(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, thresholds: Any, out_dtype: str) -> Any:
        out = g.op(
            f"{_DOMAIN}::MultiThreshold",
            x,
            thresholds,
            out_dtype_s=out_dtype,
            out_scale_f=1.0,
            out_bias_f=0.0,
            data_layout_s="NCHW",
        )
        out.setType(x.type())
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, thresholds: Tensor, out_dtype: str) -> Tensor:
        rows = thresholds.reshape(thresholds.shape[0], *[1] * max(x.ndim - 2, 0), thresholds.shape[1])
        return (x.unsqueeze(-1) >= rows).sum(-1).to(x.dtype)


__all__ = ["MultiThreshold", "WeightHandler", "check_model", "register"]
