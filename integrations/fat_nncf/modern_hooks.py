"""The module that stands in NNCF 3's hooks and holds a quantizer, and what an exporter puts in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nncf.torch.layer_utils as layer_utils
import torch
from nncf.torch.function_hook import get_hook_storage, is_wrapped
from nncf.torch.function_hook.hook_storage import HookStorage
from nncf.torch.return_types import maybe_get_values_from_torch_return_type, maybe_wrap_to_torch_return_type
from nncf.torch.utils import is_tracing_state, no_jit_trace
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from fat_plugins.errors import CheckpointError, HostError
from fat_plugins.forms import Form, UniformGrid, staircase_steps
from fat_plugins.frozen import FrozenWeight
from fat_plugins.functional import per_channel_view, wide
from fat_plugins.placed import register_finder
from fat_plugins.quantizer import ActivationQuantizer, Quantizer, TensorSpec, WeightQuantizer
from fat_plugins.registry import make_quantizer

#: name of the function that NNCF's graph records for one quantizer: it knows this one, so that whatever walks the graph
#: (``nncf.prune``, ``nncf.strip``) sees a quantizer and not the dozen operations inside
_OP_NAME = "symmetric_quantize"
_CARRIER_BITS = 8
#: attribute of the compressed model that holds the coordinators of algorithms that have one
COORDINATORS = "fat_plugins_coordinators"


def _quantize(x: Tensor, core: Quantizer) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(_quantize, (x,), x, core)
    return _traced(x, core) if is_tracing_state() else core(x)


_quantize.__name__ = _OP_NAME


class PluginQuantizer(nn.Module, layer_utils.StatefulModuleInterface):
    """A hook: the core quantizer in :attr:`core` and where it stands.

    :param core: any quantizer of the registry.
    :param algorithm, params: what makes an equal one (JSON types).
    :param tensor: name of the quantized parameter in the model; ``None`` for activations.
    :param exclusive: nothing but this hook's operations reads that parameter.
    """

    def __init__(
        self,
        core: Quantizer,
        algorithm: str,
        params: dict[str, Any],
        tensor: str | None = None,
        exclusive: bool = True,
        lr_multiplier: float | None = None,
    ) -> None:
        super().__init__()
        self.core = core
        self.algorithm, self.params = algorithm, params
        self.tensor, self.exclusive, self.lr_multiplier = tensor, exclusive, lr_multiplier
        self.observing = False
        if lr_multiplier is not None:
            core.set_lr_multiplier(lr_multiplier)

    def forward(self, x: Any) -> Any:
        """Quantized ``x``; of a named tuple (``torch.max``) its values."""
        values = maybe_get_values_from_torch_return_type(x)
        if self.observing:
            # NNCF looks at every operation in here otherwise, of which a search for a clip has thousands
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self.core.calibrate(values)
            return x
        return maybe_wrap_to_torch_return_type(_quantize(values, self.core), x)

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs, in JSON types."""
        return {
            "algorithm": self.algorithm,
            "spec": self.core.spec.to_dict(),
            "params": self.params,
            "tensor": self.tensor,
            "exclusive": self.exclusive,
            "lr_multiplier": self.lr_multiplier,
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> PluginQuantizer:
        """A hook as it was before its state dict is loaded."""
        core = make_quantizer(state["algorithm"], TensorSpec.from_dict(state["spec"]), state["params"])
        keys = ("tensor", "exclusive", "lr_multiplier")
        return cls(core, state["algorithm"], state["params"], **{k: state[k] for k in keys})

    @property
    def name(self) -> str:
        """Name of the layer, or of the activation."""
        return self.core.spec.name


if hasattr(layer_utils, "COMPRESSION_MODULES"):  # NNCF 3.0 restores registered names only
    layer_utils.COMPRESSION_MODULES.register()(PluginQuantizer)


# --------------------------------------------------------------------------------------------------------------------
# what a tracer sees
# --------------------------------------------------------------------------------------------------------------------
def _traced(x: Tensor, core: Quantizer) -> Tensor:
    """The deployed function in operations that every converter knows; weights become constants."""
    if isinstance(core, WeightQuantizer):
        with no_jit_trace(), torch.no_grad():
            if not core.enabled:
                return x
            frozen = core.freeze(x)
            value, form = frozen.form.decode(frozen.codes).to(x.dtype), frozen.form
        return carry(value, form) if isinstance(form, UniformGrid) else value
    if not core.enabled or not core.calibrated:
        return x
    with no_jit_trace(), torch.no_grad():
        form = core.form()
    return carry(x, form)


def carry(x: Tensor, form: Form) -> Tensor:
    """Equal to ``form.decode(form.encode(x))``.

    A uniform grid is carried on the 8-bit grid of its step, which is what converters turn into integer kernels; any
    other form is a sum of steps.
    """
    if not isinstance(form, UniformGrid) or form.bits > _CARRIER_BITS:
        return _staircase(x, form)
    low, high = (-128, 127) if form.signed else (0, 255)
    narrower = (form.low, form.high) != (low, high)
    with no_jit_trace():  # constants of the trace, sizes included
        scale = form.scale.detach().float()
        step = float(scale) if scale.numel() == 1 else None
        view = per_channel_view(scale, x.ndim, form.channel_axis)
        bottom, top = form.low * view, form.high * view
        zero = torch.zeros(scale.numel(), dtype=torch.int32, device=scale.device)
    if step is not None:
        x = x.clamp(form.low * step, form.high * step) if narrower else x
        return torch.fake_quantize_per_tensor_affine(x, step, 0, low, high)
    x = torch.minimum(torch.maximum(x, bottom), top) if narrower else x
    return torch.fake_quantize_per_channel_affine(x, scale, zero, form.channel_axis, low, high)


def _staircase(x: Tensor, form: Form) -> Tensor:
    with no_jit_trace():
        view = per_channel_view(form.scale.detach(), x.ndim, form.channel_axis)
        steps = [] if isinstance(form, UniformGrid) else staircase_steps(form, x.ndim)
        lowest = form.low if isinstance(form, UniformGrid) else int(form.levels[0])
    r = wide(x) / view
    if isinstance(form, UniformGrid):
        return (torch.round(r.clamp(form.low, form.high)) * view).to(x.dtype)
    y = torch.full_like(r, lowest)
    for threshold, height in steps:
        y = y + (r > threshold).to(r.dtype) * height
    return (y * view).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# hooks of a model
# --------------------------------------------------------------------------------------------------------------------
def storage_of(model: nn.Module) -> HookStorage:
    """The hooks of a compressed model.

    :raises HostError: the model was not compressed.
    """
    if not is_wrapped(model):
        raise HostError(f"{type(model).__name__} is not a compressed model: call create_compressed_model first")
    return get_hook_storage(model)


def plugin_hooks(model: nn.Module) -> dict[PluginQuantizer, list[str]]:
    """Our hooks with all the slots in which each stands."""
    found: dict[PluginQuantizer, list[str]] = {}
    for slot, module in storage_of(model).named_hooks(remove_duplicate=False):
        if isinstance(module, PluginQuantizer):
            found.setdefault(module, []).append(slot)
    return found


def set_hook(storage: HookStorage, slot: str, module: nn.Module) -> None:
    """Put ``module`` in the slot ``kind.key.id``, whatever stands there."""
    kind, key, index = slot.rsplit(".", 2)
    group = getattr(storage, kind)
    if key not in group:
        group[key] = nn.ModuleDict()
    group[key][index] = module


def remove_hook(storage: HookStorage, slot: str) -> None:
    """Empty a slot, and its key when it was the last."""
    kind, key, index = slot.rsplit(".", 2)
    group = getattr(storage, kind)
    del group[key][index]
    if not group[key]:
        del group[key]


def parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``.

    :raises CheckpointError: the model has none.
    """
    owner, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), attribute)
    except AttributeError:
        raise CheckpointError(f"{name}: the model has no such parameter") from None


def masks_on(model: nn.Module, tensor: str) -> list[tuple[str, nn.Module]]:
    """Slots and modules that change a parameter before any operation reads it (sparsity masks)."""
    key = f"{tensor.replace('.', ':')}__0"
    group = get_hook_storage(model).post_hooks
    hooks = group[key].items() if key in group else ()
    return [(f"post_hooks.{key}.{i}", m) for i, m in hooks if not isinstance(m, (PluginQuantizer, FrozenWeight))]


@torch.no_grad()
def quantizer_input(model: nn.Module, hook: PluginQuantizer, slot: str) -> Tensor:
    """The float weight that reaches a weight hook: the parameter behind masks and earlier hooks, evaluated."""
    weight = parameter(model, hook.tensor).detach()
    kind, key, _ = slot.rsplit(".", 2)
    before = [m for _, m in masks_on(model, hook.tensor)] if kind == "pre_hooks" else []
    for module in [*before, *getattr(get_hook_storage(model), kind)[key].values()]:
        if module is hook:
            break
        training = module.training
        weight = module.eval()(weight)
        module.train(training)
    return weight


def float_weights(model: nn.Module) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Weight quantizers of the core with the weights that reach them (see :mod:`fat_plugins.placed`)."""
    for part in model.modules():  # the compressed model may be a part of the given one
        if is_wrapped(part):
            for hook, slots in plugin_hooks(part).items():
                if is_weight(hook):
                    yield hook.core, quantizer_input(part, hook, slots[0])


register_finder("nncf3", float_weights)


def fold_weights(model: nn.Module) -> None:
    """Write quantized values into the parameters that algorithms have taken over (``WeightQuantizer.fold_into``)."""
    for hook in plugin_hooks(model):
        if is_weight(hook) and hook.exclusive:
            hook.core.fold_into(parameter(model, hook.tensor))


def cores(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of the model once."""
    for hook in plugin_hooks(model):
        yield hook.core


def is_weight(hook: PluginQuantizer) -> bool:
    """Whether the hook quantizes a weight."""
    return isinstance(hook.core, WeightQuantizer)


def is_activation(hook: PluginQuantizer) -> bool:
    """Whether the hook quantizes an activation."""
    return isinstance(hook.core, ActivationQuantizer)
