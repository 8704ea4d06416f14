"""Everything that differs between the supported versions of Brevitas, and the check that one is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.fx

from fat_plugins.errors import HostError
from fat_plugins.versions import BREVITAS


def brevitas_version() -> tuple[int, ...]:
    """Version of the installed Brevitas as ``(major, minor, patch)``, found without importing it. One that is
    newer than those tested gives a warning.

    :raises HostError: Brevitas is absent or outside the supported range.
    """
    try:
        text = version("brevitas")
    except PackageNotFoundError:
        raise HostError(f"fat_brevitas needs Brevitas: {BREVITAS.install}") from None
    return BREVITAS.check(text)


VERSION = brevitas_version()

if VERSION < (0, 13, 1) and not hasattr(torch.Tensor, "rename"):
    # named tensors left torch in 2.13; Brevitas up to 0.13.0 calls this on every input, only to drop the names
    torch.Tensor.rename = lambda self, *names, **renames: self
if VERSION < (0, 12) and not hasattr(torch.fx.Node, "_Node__update_args_kwargs"):
    # newer torch dropped the mangled name, by which Brevitas up to 0.11 calls it when it rewires a graph
    torch.fx.Node._Node__update_args_kwargs = lambda self, *arguments: self._update_args_kwargs(*arguments)

try:
    import brevitas.config
    from brevitas.inject import ExtendedInjector
    from brevitas.inject.enum import QuantType
    from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
    from brevitas.quant_tensor import QuantTensor
except ImportError as error:
    raise HostError(f"brevitas {'.'.join(map(str, VERSION))} cannot be imported: {error}") from error

#: the QONNX export of stock weights swaps "signed" and "narrow", so that only signed narrow ones come out right
SWAPPED_EXPORT = VERSION < (0, 10, 3)

__all__ = [
    "SWAPPED_EXPORT",
    "VERSION",
    "ActQuantProxyFromInjector",
    "ExtendedInjector",
    "QuantTensor",
    "QuantType",
    "WeightQuantProxyFromInjector",
    "float_checkpoint",
    "frozen_act_quant",
    "frozen_weight_quant",
    "ignore_missing_keys",
    "int_quant_tensor",
    "loaded_export_managers",
    "no_act_quant",
    "no_weight_quant",
    "ordered_arguments",
]


def ignore_missing_keys() -> bool:
    """Whether the user lets float checkpoints into quantized models (``BREVITAS_IGNORE_MISSING_KEYS``)."""
    return bool(brevitas.config.IGNORE_MISSING_KEYS)


@contextmanager
def float_checkpoint() -> Iterator[None]:
    """Lets a float layer's state dict into a quantized layer while Brevitas replaces the one by the other."""
    before = brevitas.config.IGNORE_MISSING_KEYS
    brevitas.config.IGNORE_MISSING_KEYS = True
    try:
        yield
    finally:
        brevitas.config.IGNORE_MISSING_KEYS = before


#: Brevitas's export managers that write proxies one by one: module and class
_EXPORT_MANAGERS = {
    "qonnx": ("brevitas.export.onnx.qonnx.manager", "QONNXManager"),
    "onnx_qcdq": ("brevitas.export.onnx.standard.qcdq.manager", "StdQCDQONNXManager"),
    "torch_qcdq": ("brevitas.export.torch.qcdq.manager", "TorchQCDQManager"),
    "inference": ("brevitas.export.inference.manager", "InferenceManager"),  # from 0.11 on
}


def loaded_export_managers() -> Iterator[tuple[str, type]]:
    """Name and class of the export managers that somebody imported. The dynamo variants inherit from these."""
    for target, (module, name) in _EXPORT_MANAGERS.items():
        manager = getattr(sys.modules.get(module), name, None)
        if manager is not None:
            yield target, manager


def int_quant_tensor(
    value: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bit_width: torch.Tensor, signed: bool
) -> QuantTensor:
    """Brevitas's tensor of integers with a scale, in evaluation mode."""
    import brevitas.quant_tensor

    kind = getattr(brevitas.quant_tensor, "IntQuantTensor", QuantTensor)  # one class for all up to 0.10
    return kind(value, scale, zero_point, bit_width, signed, False)


def ordered_arguments(handler: torch.nn.Module) -> None:
    """Put the arguments of a stock QONNX handler in the order in which it passes them on.

    See :data:`SWAPPED_EXPORT`.
    """
    arguments = getattr(handler, "symbolic_kwargs", None) or {}
    if "narrow_range" in arguments and "signed" in arguments:
        names = ("scale", "zero_point", "bit_width", "narrow_range", "signed", "rounding_mode")
        handler.symbolic_kwargs = {name: arguments[name] for name in names}


def no_weight_quant() -> type:
    """Brevitas's own quantizer that does nothing to a weight."""
    from brevitas.quant.none import NoneWeightQuant

    return NoneWeightQuant


def no_act_quant() -> type:
    """Brevitas's own quantizer that does nothing to an activation."""
    from brevitas.quant.none import NoneActQuant

    return NoneActQuant


def _fixed_scale(stock: type, scale: torch.Tensor, **attributes: object) -> type:
    """A stock quantizer whose scale is given, not derived from a range.

    An integer threshold of 1 makes it exactly ``scale``; Brevitas otherwise computes ``(7 * scale) / 7``, which may be
    the neighbouring number.
    """
    from brevitas.core.utils import SingleArgStatelessBuffer

    fixed = {"scaling_impl_type": "parameter", "scaling_init": scale.clone(), "scaling_shape": tuple(scale.shape)}
    return stock.let(**fixed, scaling_min_val=None, int_scaling_impl=SingleArgStatelessBuffer(1.0), **attributes)


def frozen_weight_quant(scale: torch.Tensor, bits: int, narrow: bool) -> type:
    """A stock Brevitas weight quantizer with a scale of a shape that broadcasts to the weight; 1 bit is -1 and +1."""
    from brevitas.quant.binary import SignedBinaryWeightPerTensorConst
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

    if bits == 1:
        return _fixed_scale(SignedBinaryWeightPerTensorConst, scale, scaling_per_output_channel=scale.ndim > 0)
    stock = Int8WeightPerChannelFloat if scale.ndim else Int8WeightPerTensorFloat
    return _fixed_scale(stock, scale, bit_width=bits, narrow_range=narrow)


def frozen_act_quant(scale: torch.Tensor, bits: int, signed: bool, narrow: bool) -> type:
    """A stock Brevitas activation quantizer with a scalar scale."""
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

    stock = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    return _fixed_scale(stock, scale, bit_width=bits, narrow_range=narrow)
