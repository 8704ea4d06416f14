"""Frozen quantizers: what a host adapter puts in the place of its quantizers before a model is exported.

Each calls one custom operator: ``fat_plugins::decode_weight``, ``fat_plugins::decode_sum`` (a weight that is a sum of
grids) or ``fat_plugins::quantize_activation``. So an exporter recognises them in any traced graph by the operator
alone, without looking at modules or wrappers of a host. The operators run eagerly, under ``torch.jit.trace`` and under
``torch.export``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.forms import Form, SumOfGrids, UniformGrid, form_on_cpu, lowest_code
from fat_plugins.functional import level_index, per_channel_view, uniform_codes

#: in the operators' arguments an empty tensor of levels means a uniform grid
_NONE = 0


def _decode(codes: Tensor, scale: Tensor, levels: Tensor, axis: int) -> Tensor:
    integers = levels[codes.long()] if levels.numel() > _NONE else codes
    return integers.to(scale.dtype) * per_channel_view(scale, codes.ndim, axis)


# schemas are written out: torch 2.4 does not read postponed annotations
@torch.library.custom_op(
    "fat_plugins::decode_weight",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor levels, int bits, int low, int axis, str name) -> Tensor",
)
def decode_weight(codes: Tensor, scale: Tensor, levels: Tensor, bits: int, low: int, axis: int, name: str) -> Tensor:
    """Weight (dtype of ``scale``) of integer codes.

    :param codes: integer codes, shape of the weight.
    :param scale: 1-d, one element or one per channel along ``axis``.
    :param levels: 1-d integers that the codes index, or empty for a uniform grid.
    :param bits, low: width of the codes and the lowest one (0 where codes are indices).
    :param name: name of the layer.
    """
    return _decode(codes, scale, levels, axis)


@decode_weight.register_fake
def _(codes, scale, levels, bits, low, axis, name):
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op(
    "fat_plugins::decode_sum",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor levels, str layout, int axis, str name) -> Tensor",
)
def decode_sum(codes: Tensor, scale: Tensor, levels: Tensor, layout: str, axis: int, name: str) -> Tensor:
    """Weight (dtype of ``scale``) of packed codes: the sum of its parts.

    :param codes: packed integer codes, shape of the weight.
    :param scale, levels: those of all parts, one after the other (1-d).
    :param layout: four numbers per part, with spaces between: bits, lowest code, elements of its scale and of its
        levels. Text, because the tracer records no lists.
    :param name: name of the layer.
    """
    total, shift, at, level = None, 0, 0, 0
    packed, numbers = codes.long(), [int(n) for n in layout.split()]
    for i in range(0, len(numbers), 4):
        bits, low, channels, count = numbers[i : i + 4]
        part = ((packed >> shift) & (2**bits - 1)) + low
        value = _decode(part, scale[at : at + channels], levels[level : level + count], axis)
        total = value if total is None else total + value
        shift, at, level = shift + bits, at + channels, level + count
    return total


@decode_sum.register_fake
def _(codes, scale, levels, layout, axis, name):
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op(
    "fat_plugins::quantize_activation",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor levels, Tensor thresholds, int low, int high, int axis, str name) "
    "-> Tensor",
)
def quantize_activation(
    x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, low: int, high: int, axis: int, name: str
) -> Tensor:
    """The deployed function of one activation quantizer, same shape and dtype as ``x``.

    :param scale: 1-d, one element or one per channel along ``axis``.
    :param levels, thresholds: of a staircase (ascending, in units of the scale; thresholds of one row per
        channel along ``axis`` are 2-d), or empty for a uniform grid.
    :param low, high: bounds of the codes of a uniform grid.
    :param name: name of the quantizer.
    """
    view = per_channel_view(scale, x.ndim, axis)
    if levels.numel() > _NONE:
        codes = level_index(x, view, thresholds, axis)
    else:
        codes = uniform_codes(x, view, low, high)
    return _decode(codes, scale, levels, axis).to(x.dtype)


@quantize_activation.register_fake
def _(x, scale, levels, thresholds, low, high, axis, name):
    return torch.empty_like(x)


def _levels(form: Form) -> Tensor:
    return torch.zeros(0, dtype=torch.int64) if isinstance(form, UniformGrid) else form.levels.detach().clone()


class FrozenWeight(nn.Module):
    """Ignores the float weight that the host passes and returns the decoded codes.

    :param codes: int32, shape of the weight.
    :param form: how to read them.
    :param name: name of the layer; an exporter's reports, graph nodes and errors use it.
    """

    def __init__(self, codes: Tensor, form: Form, name: str = "") -> None:
        super().__init__()
        self.form, self.name = form_on_cpu(form), name
        parts = form.parts if isinstance(form, SumOfGrids) else (form,)
        self.register_buffer("codes", codes.detach().to(torch.int32))
        self.register_buffer("scale", torch.cat([p.scale.detach() for p in parts]))
        self.register_buffer("levels", torch.cat([_levels(p) for p in parts]).to(self.scale.device))

    def forward(self, weight: Tensor) -> Tensor:
        form, tensors = self.form, (self.codes, self.scale, self.levels)
        if isinstance(form, SumOfGrids):
            layout = " ".join(f"{p.bits} {lowest_code(p)} {p.scale.numel()} {_levels(p).numel()}" for p in form.parts)
            decoded = torch.ops.fat_plugins.decode_sum(*tensors, layout, form.channel_axis, self.name)
        else:
            decoded = torch.ops.fat_plugins.decode_weight(
                *tensors, form.bits, lowest_code(form), form.channel_axis, self.name
            )
        return decoded if decoded.dtype == weight.dtype else decoded.to(weight.dtype)


class FrozenActivation(nn.Module):
    """Applies a deployed activation form.

    :param form: the form; ``None`` stands for a quantizer that was never calibrated, which runs as the identity and
        which exporters refuse by name.
    :param name: name of the quantizer; an exporter's reports, graph nodes and errors use it.
    """

    def __init__(self, form: Form | None, name: str = "") -> None:
        super().__init__()
        if isinstance(form, SumOfGrids):
            raise ExportError(f"{name}: a sum of grids cannot hold activations; use a uniform grid or a staircase")
        self.form, self.name = form and form_on_cpu(form), name
        if form is not None:
            uniform = isinstance(form, UniformGrid)
            thresholds = torch.zeros(0, dtype=torch.float64) if uniform else form.thresholds.detach().double().clone()
            self.low, self.high = (form.low, form.high) if uniform else (0, 0)
            self.register_buffer("scale", form.scale.detach().clone())
            self.register_buffer("levels", _levels(form))
            self.register_buffer("thresholds", thresholds)

    def forward(self, x: Tensor) -> Tensor:
        if self.form is None:
            return x
        return torch.ops.fat_plugins.quantize_activation(
            x, self.scale, self.levels, self.thresholds, self.low, self.high, self.form.channel_axis, self.name
        )


def frozen_modules(model: nn.Module) -> Iterator[FrozenWeight | FrozenActivation]:
    """Every frozen quantizer inside ``model``, each one once.

    :raises ExportError: there is none, one has no name, or two of a kind share a name.
    """
    found = [m for m in model.modules() if isinstance(m, (FrozenWeight, FrozenActivation))]
    if not found:
        raise ExportError("the model holds no frozen quantizer: freeze it first")
    seen: set[tuple[type, str]] = set()
    for module in found:
        if not module.name:
            raise ExportError(f"a {type(module).__name__} has no name")
        if (type(module), module.name) in seen:
            raise ExportError(f"two {type(module).__name__} modules are named {module.name!r}")
        seen.add((type(module), module.name))
    yield from found


__all__ = ["FrozenActivation", "FrozenWeight", "decode_sum", "decode_weight", "frozen_modules", "quantize_activation"]
