"""NNCF 2: the module that stands where NNCF places a quantizer and holds one of ours, and its saved description."""

from __future__ import annotations

from typing import Any

import torch
from nncf.common.quantization.structs import QuantizationScheme, QuantizerConfig
from nncf.torch.dynamic_graph.context import no_nncf_trace
from nncf.torch.dynamic_graph.patch_pytorch import register_operator
from nncf.torch.layer_utils import COMPRESSION_MODULES
from nncf.torch.quantization.layers import QUANTIZATION_MODULES, BaseQuantizer, PTQuantizerSpec
from nncf.torch.quantization.quantize_functions import ExportQuantizeToFakeQuantize
from nncf.torch.utils import no_jit_trace
from torch import Tensor

from fat_plugins.errors import CheckpointError, QuantizationError
from fat_plugins.forms import Form, UniformGrid, staircase_steps
from fat_plugins.functional import per_channel_view
from fat_plugins.network import broadcast_state
from fat_plugins.quantizer import TensorSpec
from fat_plugins.registry import make_quantizer

#: our name in NNCF's registry of quantizer modules, the ``mode`` of a quantization point
MODE = "fat_plugins"


class PluginQuantizerSpec(PTQuantizerSpec):
    """NNCF's description of a quantization point, plus :attr:`plugin`: what builds our quantizer, in JSON types.

    ``plugin`` has ``algorithm``, ``spec`` (:meth:`TensorSpec.to_dict`), ``params``, ``readers`` (names of the nodes
    that read the tensor) and ``from_data`` (calibrate on batches instead of NNCF's ranges).
    """

    plugin: dict[str, Any]

    @classmethod
    def extend(cls, base: PTQuantizerSpec, plugin: dict[str, Any]) -> PluginQuantizerSpec:
        """``base`` with our description; bits and signedness are taken from it."""
        spec = plugin["spec"]
        self = cls(
            num_bits=spec["bits"],
            mode=MODE,
            signedness_to_force=spec["signed"],
            narrow_range=False,
            half_range=False,
            scale_shape=(1,),  # NNCF's bookkeeping only: scales are the algorithm's own
            logarithm_scale=False,
            is_quantized_on_export=base.is_quantized_on_export,
            compression_lr_multiplier=base.compression_lr_multiplier,
        )
        self.plugin = plugin
        return self

    def get_state(self) -> dict[str, Any]:
        """NNCF's state and ours; JSON types."""
        return {**super().get_state(), "plugin": self.plugin}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PluginQuantizerSpec:
        """Inverse of :meth:`get_state`.

        :raises CheckpointError: the state was not written by this package.
        """
        if "plugin" not in state:
            raise CheckpointError("the compression state holds quantizers that fat-plugins did not write")
        return cls.extend(PTQuantizerSpec.from_state(state), state["plugin"])


@register_operator("fat_plugins_quantize")
def plugin_quantize(x: Tensor, core: torch.nn.Module, skip: bool = False) -> Tensor:
    """One operation in NNCF's traced graph, whatever the algorithm computes inside."""
    return x if skip else core(x)


def _along(form: Form, ndim: int) -> Tensor:
    """Scale of a form as FakeQuantize wants it: 1 element, or broadcastable to ``ndim`` dimensions."""
    scale = form.scale.detach()
    return scale.reshape(1) if scale.numel() == 1 else per_channel_view(scale, ndim, form.channel_axis)


def staircase_ops(form: Any, x: Tensor) -> Tensor:
    """A form with free thresholds in plain comparisons, for tracers that know no bucketize."""
    with no_jit_trace():
        lowest, steps = float(form.levels[0]), staircase_steps(form, x.ndim)
        scale = _along(form, x.ndim)
    r = x / scale
    out = torch.full_like(r, lowest)
    for threshold, step in steps:
        out = out + (r > threshold).to(r.dtype) * float(step)
    return out * scale


@COMPRESSION_MODULES.register()
@QUANTIZATION_MODULES.register(MODE)
class PluginQuantizer(BaseQuantizer):
    """NNCF's quantizer interface around a quantizer of the core, :attr:`core`."""

    def __init__(self, qspec: PluginQuantizerSpec) -> None:
        super().__init__(qspec)
        plugin = qspec.plugin
        self.core = make_quantizer(plugin["algorithm"], TensorSpec.from_dict(plugin["spec"]), plugin["params"])
        self.algorithm: str = plugin["algorithm"]
        self.readers: list[str] = plugin["readers"]
        self.from_data: bool = plugin["from_data"]
        self.observing = False
        # mirror of the buffer ``enabled``: reading the buffer in every forward would synchronise with the device
        self._on = True
        self._frozen_gradients: list[torch.nn.Parameter] = []
        if qspec.compression_lr_multiplier is not None:
            self.core.set_lr_multiplier(qspec.compression_lr_multiplier)
        self.set_levels()

    # -- state -------------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> TensorSpec:
        """What the quantizer knows about its tensor."""
        return self.core.spec

    @property
    def is_weight(self) -> bool:
        """Whether a weight is quantized (an activation otherwise)."""
        return self.core.role == "weight"

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer was initialised; an activation is left as it is until then."""
        return self.core.calibrated

    def is_enabled_quantization(self) -> bool:
        return self._on

    def enable_quantization(self) -> None:
        super().enable_quantization()
        self._on = self.core.enabled = True

    def disable_quantization(self) -> None:
        super().disable_quantization()
        self._on = self.core.enabled = False

    def enable_gradients(self) -> None:
        for parameter in self._frozen_gradients:
            parameter.requires_grad = True
        self._frozen_gradients = []

    def disable_gradients(self) -> None:
        self._frozen_gradients += [p for p in self.core.parameters() if p.requires_grad]
        for parameter in self._frozen_gradients:
            parameter.requires_grad = False

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._on = self.core.enabled = bool(self.enabled[0])

    def broadcast_initialized_params(self, src: int = 0) -> None:
        super().broadcast_initialized_params(src)
        broadcast_state(self.core, src)

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> PluginQuantizer:
        return cls(PluginQuantizerSpec.from_state(state))

    # -- what NNCF asks about a quantizer ----------------------------------------------------------------------------
    @property
    def num_bits(self) -> int:
        """The width in force, which an algorithm may have learned; that of the specification while NNCF builds us."""
        return self.core.bits if "core" in self._modules else BaseQuantizer.num_bits.fget(self)

    @num_bits.setter
    def num_bits(self, bits: int) -> None:
        BaseQuantizer.num_bits.fset(self, bits)

    @property
    def signed(self) -> bool:
        return self.core.signed

    @property
    def per_channel(self) -> bool:
        # only the deployed form knows; asked for statistics, not in the forward pass
        if not self.is_weight:
            return False
        return self.core.freeze(torch.ones(self.spec.shape, device=self.core.status.device)).form.scale.numel() > 1

    def set_levels(self) -> None:
        bits, signed = self.core.bits, self.signed
        self.level_low, self.level_high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def get_trainable_params(self) -> dict[str, Tensor]:
        return dict(self.core.named_parameters())

    def get_quantizer_config(self) -> QuantizerConfig:
        return QuantizerConfig(self.core.bits, QuantizationScheme.SYMMETRIC, self.signed, self.per_channel)

    def _apply_minmax_init(self, min_values: Tensor, max_values: Tensor, log_module_name: str | None = None) -> None:
        # weights are calibrated from the weight itself, once the masks of other algorithms are in place
        if not self.is_weight and not self.from_data:
            self.core.calibrate_range(float(min_values.min()), float(max_values.max()))
            self.set_levels()

    # -- forward and export ------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        # a disabled core is the identity, of which its hooks are told
        return super().forward(x) if self._on or self.observing else self.core(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if self.observing:
            with no_nncf_trace():
                self.core.calibrate(x)
            return x
        return super()._forward_impl(x)

    def quantize(self, x: Tensor, execute_traced_op_as_identity: bool = False) -> Tensor:
        return plugin_quantize(x, self.core, execute_traced_op_as_identity)

    def form(self, weight: Tensor | None = None) -> Form:
        """The deployed form.

        :param weight: the float weight, for weight quantizers.
        :raises QuantizationError: an activation quantizer that was never calibrated.
        """
        if self.is_weight:
            return self.core.freeze(weight).form
        self.require_calibrated()
        return self.core.form()

    def require_calibrated(self) -> None:
        """:raises QuantizationError: the quantizer was never initialised."""
        if not self.calibrated:
            raise QuantizationError(
                f"{self.spec.name}: not calibrated; register a loader with register_default_init_args before "
                "create_compressed_model, call compression_ctrl.init_range(...), or load a checkpoint"
            )

    def run_export_quantization(self, x: Tensor) -> Tensor:
        """What a tracer sees: constants for weights, FakeQuantize for uniform grids, comparisons for the rest."""
        with torch.no_grad():
            with no_jit_trace():
                if self.is_weight:
                    codes, form = self.core.freeze(x)
                    x = form.decode(codes).to(x.dtype)
                else:
                    form = self.form()
            if not isinstance(form, UniformGrid):
                return x if self.is_weight else staircase_ops(form, x)
            with no_jit_trace():
                first, last = self._carrier(form)
                low, high = (_along(form, x.ndim) * bound for bound in (first, last))
                axis = form.channel_axis if form.scale.numel() > 1 else None
                scale = form.scale.detach() if axis is not None else form.scale.detach().reshape(())
                zero = torch.zeros_like(scale, dtype=torch.int32)
                ends = float(form.low * scale.max()), float(form.high * scale.max())
            if not self.is_weight and (first, last) != (form.low, form.high):
                x = torch.clamp(x, *ends)
            return ExportQuantizeToFakeQuantize.apply(
                x, last - first + 1, low, high, low, high, scale, zero, first, last, axis
            )

    def _carrier(self, form: UniformGrid) -> tuple[int, int]:
        """The codes of the FakeQuantize that carries ``form`` without changing a value.

        OpenVINO packs a FakeQuantize of up to 16 levels over a constant into 4-bit codes and swaps neighbours doing so,
        and computes activations on 255 levels inexactly (both seen in 2024.6 and 2025.4).
        """
        if self.is_weight:
            return (-127, 127) if form.bits < 8 else (form.low, form.high)
        return (-128, 127) if form.signed else (form.low, form.high)

    def _get_input_low_input_high(self) -> tuple[Tensor, Tensor]:
        form = self._uniform_activation()
        return form.scale.detach() * form.low, form.scale.detach() * form.high

    def _prepare_export_quantization(self, x: Tensor) -> tuple[Tensor, int, int, Tensor, Tensor]:
        form = self._uniform_activation()
        return x, form.high, form.low, *self._get_input_low_input_high()

    def get_parameters_for_torch_fq(self) -> tuple[int, int, Tensor, Tensor]:
        form = self._uniform_activation()
        return form.low, form.high, form.scale.detach(), torch.zeros_like(form.scale, dtype=torch.int32)

    def _uniform_activation(self) -> UniformGrid:
        form = None if self.is_weight else self.form()
        if not isinstance(form, UniformGrid):
            raise QuantizationError(f"{self.spec.name}: not a uniform activation grid, torch has no such FakeQuantize")
        return form

    def extra_repr(self) -> str:
        return f"bit={self.core.bits}"
