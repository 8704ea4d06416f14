"""Deployment of a model compressed on NNCF 3: frozen copies for exporters, stripped models, ONNX."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat_nncf.modern_hooks import (
    COORDINATORS,
    PluginQuantizer,
    fold_weights,
    is_weight,
    masks_on,
    parameter,
    plugin_hooks,
    quantizer_input,
    remove_hook,
    set_hook,
    storage_of,
)
from fat_plugins.errors import ExportError
from fat_plugins.forms import UniformGrid, refuse_nonfinite
from fat_plugins.frozen import FrozenActivation, FrozenWeight


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """A copy of a compressed model with integer codes in the place of our weight quantizers.

    Sparsity masks are part of the codes. An activation quantizer that was never calibrated stays an identity that
    exporters refuse by name. The copy is in evaluation mode.

    :raises HostError: the model was not compressed.
    :raises QuantizationError: a weight holds NaN or infinite values.
    """
    clone = copy.deepcopy(model).eval()
    storage = storage_of(clone)
    fold_weights(clone)
    masked: set[str] = set()
    replaced: list[tuple[list[str], nn.Module]] = []
    for hook, slots in plugin_hooks(clone).items():
        if is_weight(hook):
            frozen = hook.core.freeze(quantizer_input(clone, hook, slots[0]))
            replaced.append((slots, FrozenWeight(frozen.codes, frozen.form, hook.name)))
            masked.add(hook.tensor)
        else:
            form = hook.core.form() if hook.core.calibrated else None
            replaced.append((slots, FrozenActivation(form, hook.name)))
    for slots, module in replaced:
        for slot in slots:
            set_hook(storage, slot, module.eval())
    for tensor in masked:
        _bake_masks(clone, tensor)
    clone._modules.pop(COORDINATORS, None)
    return clone


def _bake_masks(model: nn.Module, tensor: str) -> None:
    """Apply a parameter's masks to its data, for whoever reads it beside the frozen weight, and take them away."""
    data = parameter(model, tensor)
    for slot, mask in masks_on(model, tensor):
        data.data = mask.eval()(data.data)
        remove_hook(storage_of(model), slot)


def torch_fake_quantize(form: UniformGrid, name: str) -> nn.Module:
    """A uniform form as torch's own FakeQuantize, with fixed step and without observer."""
    fake = torch.ao.quantization.FakeQuantize(
        observer=torch.ao.quantization.MinMaxObserver,
        quant_min=form.low,
        quant_max=form.high,
        dtype=torch.qint8 if form.signed else torch.quint8,
        qscheme=torch.per_tensor_symmetric if form.signed else torch.per_tensor_affine,
    )
    fake.scale.resize_(1).copy_(form.scale.detach().cpu())
    fake.zero_point.resize_(1).zero_()
    fake.disable_observer()
    fake.to(form.scale.device)
    fake.name = name
    return fake


@torch.no_grad()
def strip(model: nn.Module, do_copy: bool = True) -> nn.Module:
    """The model without our code: quantized weights in the float parameters, activations as torch's FakeQuantize.

    Forms that are no uniform grid stay as ``FrozenActivation``; a weight that something else reads in float stays as
    ``FrozenWeight``. The result is in evaluation mode.

    :param do_copy: leave ``model`` as it is.
    """
    clone = copy.deepcopy(model) if do_copy else model
    clone.eval()
    storage = storage_of(clone)
    folded = []
    for hook, slots in plugin_hooks(clone).items():
        if is_weight(hook):
            frozen = hook.core.freeze(quantizer_input(clone, hook, slots[0]))
            if hook.exclusive:
                folded.append((hook, slots, frozen.form.decode(frozen.codes)))
            else:
                for slot in slots:
                    set_hook(storage, slot, FrozenWeight(frozen.codes, frozen.form, hook.name).eval())
            continue
        _strip_activation(storage, hook, slots)
    for hook, slots, value in folded:
        _bake_masks(clone, hook.tensor)
        data = parameter(clone, hook.tensor)
        data.data = value.to(data.dtype)
        for slot in slots:
            remove_hook(storage, slot)
    clone._modules.pop(COORDINATORS, None)
    return clone


def _strip_activation(storage: Any, hook: PluginQuantizer, slots: list[str]) -> None:
    form = hook.core.form() if hook.core.calibrated else None
    if form is not None:
        refuse_nonfinite(form, hook.name)
    if isinstance(form, UniformGrid) and form.bits <= 8:
        module = torch_fake_quantize(form, hook.name)
    elif form is not None:
        module = FrozenActivation(form, hook.name)
    else:
        module = None
    for slot in slots:
        if module is None:
            remove_hook(storage, slot)
        else:
            set_hook(storage, slot, module.eval())


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: Any,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    opset: int | None = None,
) -> None:
    """Write ONNX with standard operators: uniform grids as Clip, QuantizeLinear and DequantizeLinear at 8 bits.

    :raises ExportError: the folder does not exist, or cannot be written.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such directory")
    if not os.access(folder, os.W_OK):
        raise ExportError(f"{folder}: the directory cannot be written")
    if path.is_dir():
        raise ExportError(f"{path}: is a directory, not a file name")
    clone = copy.deepcopy(model).eval()
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    args = args if isinstance(args, tuple) else (args,)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    os.close(handle)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # the other exporter cannot look through NNCF's hooks
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                clone, args, temporary, kwargs=kwargs or None, input_names=input_names, output_names=output_names,
                opset_version=opset or 17, dynamo=False,
            )  # fmt: skip
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except ImportError as error:
        raise ExportError(f"ONNX export needs {error.name}: pip install onnx") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
