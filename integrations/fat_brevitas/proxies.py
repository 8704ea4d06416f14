"""Own proxy types. Brevitas finds export handlers by the exact type of a proxy, so these select ours; and they keep a
quantizer's parameters when Brevitas rebuilds it (``load_state_dict``, ``merge_bn``, graph conversions)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fat_brevitas.build import build_activation, build_weight, weight_spec
from fat_brevitas.compat import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from fat_brevitas.modules import ActTensorQuant, WeightTensorQuant
from fat_plugins.errors import QuantizationError
from fat_plugins.forms import Form
from fat_plugins.placed import register_finder
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, WeightQuantizer


def _on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


class _Plugin:
    """What both proxies tell Brevitas alike.

    They register our export handlers at the moment when an exporter looks for one; no exporter is imported for it.
    """

    @property
    def rounding_mode(self) -> str:
        """To the nearest, ties to even; weights in front of an exported node are quantized already."""
        return "ROUND"

    @property
    def is_groupwise(self) -> bool:
        """No algorithm here has groups."""
        return False

    @property
    def input_view_impl(self) -> nn.Module:
        """No reshaping."""
        return nn.Identity()

    @property
    def export_handler(self) -> nn.Module | None:
        """What writes this proxy during an export. Brevitas asks for it before it looks one up."""
        found = self.__dict__.get("_modules", {}).get("export_handler")
        if found is None:
            from fat_brevitas.handlers import register

            register()
        return found

    @export_handler.setter
    def export_handler(self, handler: None) -> None:
        pass  # a handler is a module, which torch stores before it looks for setters


class PluginWeightQuantProxy(_Plugin, WeightQuantProxyFromInjector):
    """Weight proxy around :class:`~fat_brevitas.modules.WeightTensorQuant`."""

    tensor_quant: WeightTensorQuant | None
    _loading = False

    # Brevitas computes these from the injector; here the deployed form decides
    @property
    def is_signed(self) -> bool:
        """Weights always are."""
        return True

    @is_signed.setter
    def is_signed(self, value: Any) -> None:
        pass

    @property
    def cache_class(self) -> Any:
        """Makes what Brevitas stores of a quantized weight in its inference mode."""
        return self._cached

    @cache_class.setter
    def cache_class(self, value: Any) -> None:
        self._stock_cache = value

    def _cached(self, out: Any, metadata_only: bool) -> Any:
        # a form without a single scale comes as a plain tensor, which has nothing that Brevitas would ask for
        return None if isinstance(out, Tensor) else self._stock_cache(out, metadata_only=metadata_only)

    @property
    def is_narrow_range(self) -> bool | None:
        """Whether the lowest code is unused; ``None`` before the first forward."""
        container = self.tensor_quant.container if self.tensor_quant is not None else None
        return None if container is None else container.narrow

    @property
    def quantizer(self) -> WeightQuantizer | None:
        """The core quantizer, ``None`` for ``quant_type='FP'``."""
        return None if self.tensor_quant is None else self.tensor_quant.quantizer

    def init_tensor_quant(self, preserve_state_dict: bool = False) -> None:
        """Build the quantizer, or keep the one that is there, whose parameters may be in an optimizer already.

        After a rebuild that is not part of loading a checkpoint the weights may be others (a batch norm was merged):
        the quantizer initialises itself from them again, in place.
        """
        weights = self.tracked_parameter_list
        if not weights:
            return
        self.quant_injector = self.quant_injector.let(tracked_parameter_list=weights)
        old = self.tensor_quant
        keep = old is not None and weight_spec(self, self.quant_injector) == old.quantizer.spec
        if not keep or (_on_meta(old) and not weights[0].is_meta):
            self.tensor_quant = build_weight(self, self.quant_injector)
            if self.tensor_quant is not None:
                self.tensor_quant.to(weights[0].device).train(self.training)
                for weight in weights:
                    self.quantizer.fold_into(weight)
        elif not weights[0].is_meta:
            old.to(weights[0].device)
            if not (self._loading or preserve_state_dict):
                old.reset()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._loading = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._loading = False

    def freeze(self, weight: Tensor) -> FrozenTensor:
        """Codes and deployed form of ``weight``."""
        self.tensor_quant.prepare(weight)
        return self.quantizer.freeze(weight)

    def create_quant_tensor(self, qt_args: tuple) -> Any:
        """Brevitas's tensor with scale, or the plain one of a form that no single scale describes."""
        return qt_args[0] if qt_args[1] is None else super().create_quant_tensor(qt_args)


class _Fused(nn.Module):
    """Activation function, then quantizer; in Python, as the quantizer is (Brevitas's own may be TorchScript)."""

    def __init__(self, activation_impl: nn.Module, tensor_quant: nn.Module) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = tensor_quant

    def forward(self, x: Tensor) -> Any:
        return self.tensor_quant(self.activation_impl(x))


class PluginActQuantProxy(_Plugin, ActQuantProxyFromInjector):
    """Activation proxy around :class:`~fat_brevitas.modules.ActTensorQuant`."""

    @property
    def is_signed(self) -> bool | None:
        """Whether codes reach below zero (calibration may decide that)."""
        return None if self.quantizer is None else self.quantizer.signed

    @is_signed.setter
    def is_signed(self, value: Any) -> None:
        pass

    @property
    def is_narrow_range(self) -> bool | None:
        """Whether the end of the plain integer range is unused."""
        quantizer = self.quantizer
        calibrated = quantizer is not None and quantizer.calibrated
        return getattr(quantizer.nominal_form(), "narrow", False) if calibrated else None

    @property
    def act_tensor_quant(self) -> ActTensorQuant | None:
        """The module that quantizes, ``None`` for ``quant_type='FP'``."""
        fused = self.fused_activation_quant_proxy
        return fused.tensor_quant if fused is not None and isinstance(fused.tensor_quant, ActTensorQuant) else None

    @property
    def quantizer(self) -> ActivationQuantizer | None:
        """The core quantizer, ``None`` for ``quant_type='FP'``."""
        # asked for by the base class before anything is built
        fused = self._modules.get("fused_activation_quant_proxy")
        found = getattr(fused, "tensor_quant", None)
        return found.quantizer if isinstance(found, ActTensorQuant) else None

    def form(self) -> Form | None:
        """The deployed form, ``None`` before calibration."""
        quantizer = self.quantizer
        return quantizer.form() if quantizer is not None and quantizer.calibrated else None

    def init_tensor_quant(self, *args: Any, **kwargs: Any) -> None:
        """Build the quantizer, or keep the one that is there, whose parameters may be in an optimizer already."""
        if self.quantizer is not None and not _on_meta(self.quantizer):
            return
        tensor_quant = build_activation(self, self.quant_injector)
        self.is_quant_enabled = tensor_quant is not None
        act_impl = self.quant_injector.act_impl if "act_impl" in self.quant_injector else None
        # a quantizer clamps as Hardtanh does, with a bound that is learned
        if act_impl is not None and not (isinstance(act_impl, nn.Hardtanh) and tensor_quant is not None):
            self.fused_activation_quant_proxy = _Fused(act_impl, tensor_quant or _Nothing())
        elif tensor_quant is not None:
            self.fused_activation_quant_proxy = _Fused(nn.Identity(), tensor_quant)
        else:
            self.fused_activation_quant_proxy = None
        self.train(self.training)

    def forward(self, x: Any) -> Any:
        quantizer = self.quantizer
        if quantizer is not None and not quantizer.calibrated and not self.training and self.is_quant_enabled:
            if any(getattr(m, "return_quant_tensor", False) for m in self.tracked_module_list):
                raise QuantizationError(
                    f"{quantizer.spec.name}: not calibrated, so there is no scale to return: run a training batch or "
                    "Brevitas's calibration_mode first"
                )
        if self.export_mode and self.is_quant_enabled and getattr(self.export_handler, "absorbs_activation", False):
            return self._without_activation(x)
        return super().forward(x)

    def _without_activation(self, x: Any) -> Any:
        """Thresholds above zero are a ReLU themselves, and FINN has no layer for one in front of them."""
        fused = self.fused_activation_quant_proxy
        activation = fused.activation_impl
        if isinstance(activation, nn.ReLU):
            fused.activation_impl = nn.Identity()
        try:
            return super().forward(x)
        finally:
            fused.activation_impl = activation


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None, None, None]:
        return x, None, None, None


def float_weights(model: nn.Module) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Weight quantizers of the core with the weights that reach them (see :mod:`fat_plugins.placed`)."""
    for module in model.modules():
        if isinstance(module, PluginWeightQuantProxy) and module.quantizer is not None and module.tracked_module_list:
            yield module.quantizer, module.tracked_module_list[0].weight


register_finder("brevitas", float_weights)


__all__ = ["PluginActQuantProxy", "PluginWeightQuantProxy"]
