"""Deployed forms: what is left of a quantizer after training. Integer codes and how to read them, nothing else.

An exporter reads these classes and never sees an algorithm. Every form is a frozen dataclass whose ``encode`` and
``decode`` are exact: ``decode(encode(x))`` is the value that the trained quantizer gives in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fat_plugins.errors import ConfigError, QuantizationError
from fat_plugins.functional import level_index, per_channel_view, uniform_codes

#: how many sums :meth:`SumOfGrids.encode` looks through for the nearest one
_MOST_SUMS = 2**16


def _scale_view(form: UniformGrid | Codebook | Staircase, ndim: int) -> Tensor:
    return per_channel_view(form.scale, ndim, form.channel_axis)


def _refuse_nan(x: Tensor) -> None:
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # a graph cannot branch on data
    if not tracing and bool(torch.isnan(x).any()):
        raise QuantizationError("cannot encode a tensor that holds NaN values")


def refuse_nonfinite(form: Form, name: str) -> None:
    """What is about to be deployed must be finite.

    :raises QuantizationError: a scale of ``form`` is not; ``name`` says whose it is.
    """
    parts = form.parts if isinstance(form, SumOfGrids) else (form,)
    if not all(bool(torch.isfinite(part.scale).all()) for part in parts):
        raise QuantizationError(
            f"{name}: the scale holds NaN or infinite values; training has diverged, lower the learning rate"
        )


def _check_scale(scale: Tensor) -> None:
    if scale.ndim != 1 or not scale.is_floating_point():
        raise ConfigError(f"a form's scale must be a 1-d float tensor, got {tuple(scale.shape)} {scale.dtype}")


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """``value = code * scale`` with codes ``low .. high`` (zero point 0, ties to even).

    :param bits: width of the codes, sign included.
    :param signed: codes reach below zero.
    :param narrow: signed codes without the lowest one, ``-(2^(b-1) - 1) .. 2^(b-1) - 1``.
    :param scale: 1-d tensor, one element or one per channel.
    :param channel_axis: the axis that a per-channel scale runs along.
    """

    bits: int
    signed: bool
    narrow: bool
    scale: Tensor
    channel_axis: int = 0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    @property
    def low(self) -> int:
        """Lowest code."""
        return (-(2 ** (self.bits - 1)) + int(self.narrow)) if self.signed else 0

    @property
    def high(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1 - int(self.narrow)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes (int32) of ``x``, same shape.

        :raises QuantizationError: ``x`` holds NaN, which has no code.
        """
        _refuse_nan(x)
        return uniform_codes(x, _scale_view(self, x.ndim), self.low, self.high).to(torch.int32)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the target computes with; here the codes themselves."""
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of ``codes``, same shape, dtype of the scale."""
        return codes.to(self.scale.dtype) * _scale_view(self, codes.ndim)

    def ties(self, x: Tensor) -> Tensor:
        """Distance of ``x`` to the nearest rounding threshold, in steps (for tie guards)."""
        r = (x.double() / _scale_view(self, x.ndim).double()).clamp(self.low, self.high)
        return (r - torch.floor(r) - 0.5).abs()


@dataclass(frozen=True, eq=False)
class Codebook:
    """``value = levels[code] * scale``; ``levels`` ascending integers, nearest level wins, a tie goes to the lower.

    :param bits: width of a code (an index into ``levels``), at least ``ceil(log2(len(levels)))``.
    :param levels: 1-d int64 tensor; the integers that the target computes with.
    :param scale: 1-d tensor, one element or one per channel.
    """

    bits: int
    levels: Tensor
    scale: Tensor
    channel_axis: int = 0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.levels.dtype != torch.int64 or self.levels.ndim != 1 or not bool((self.levels.diff() > 0).all()):
            raise ConfigError("a codebook needs ascending int64 levels")
        if self.levels.numel() > 2**self.bits:
            raise ConfigError(f"{self.levels.numel()} levels do not fit {self.bits}-bit codes")

    @property
    def thresholds(self) -> Tensor:
        """Midpoints between the levels, in units of the scale (float64)."""
        levels = self.levels.double()
        return (levels[1:] + levels[:-1]) / 2

    def encode(self, x: Tensor) -> Tensor:
        """Indices (int32) of the nearest levels of ``x``, same shape; NaN is refused as in :class:`UniformGrid`."""
        _refuse_nan(x)
        return level_index(x, _scale_view(self, x.ndim), self.thresholds).to(torch.int32)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the target computes with."""
        return self.levels[codes.long()]

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of ``codes``, same shape, dtype of the scale."""
        return self.integers(codes).to(self.scale.dtype) * _scale_view(self, codes.ndim)

    def ties(self, x: Tensor) -> Tensor:
        """Distance of ``x`` to the nearest threshold, in steps."""
        return _threshold_distance(x, _scale_view(self, x.ndim), self.thresholds)


@dataclass(frozen=True, eq=False)
class Staircase:
    """``value = levels[i] * scale``, ``i`` = how many ``thresholds`` lie strictly below ``x / scale``.

    Thresholds need not be midpoints. ``levels`` are ascending integers, ``thresholds`` ascending floats (one fewer),
    1-d, or 2-d with one row for each channel along ``channel_axis``.
    """

    bits: int
    levels: Tensor
    thresholds: Tensor
    scale: Tensor
    channel_axis: int = 1

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.levels.dtype != torch.int64 or not bool((self.levels.diff() > 0).all()):
            raise ConfigError("a staircase needs ascending int64 levels")
        steps = self.thresholds.shape[-1] if self.thresholds.ndim in (1, 2) and self.thresholds.numel() else -1
        if steps != self.levels.numel() - 1 or not bool((self.thresholds.diff() > 0).all()):
            raise ConfigError("a staircase needs one ascending threshold between each two levels")
        if self.thresholds.ndim == 2 and self.scale.numel() not in (1, len(self.thresholds)):
            raise ConfigError(
                f"a staircase of {len(self.thresholds)} channels cannot have {self.scale.numel()} scales; allowed: 1 "
                f"or {len(self.thresholds)}"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Indices (int32) of the levels of ``x``, same shape; NaN is refused as in :class:`UniformGrid`."""
        _refuse_nan(x)
        return level_index(x, _scale_view(self, x.ndim), self.thresholds, self.channel_axis).to(torch.int32)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the target computes with."""
        return self.levels[codes.long()]

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of ``codes``, same shape, dtype of the scale."""
        return self.integers(codes).to(self.scale.dtype) * _scale_view(self, codes.ndim)

    def ties(self, x: Tensor) -> Tensor:
        """Distance of ``x`` to the nearest threshold, in units of the scale."""
        return _threshold_distance(x, _scale_view(self, x.ndim), self.thresholds, self.channel_axis)

    @property
    def channels(self) -> int:
        """Channels that scale or thresholds tell apart; 1 for one function of the whole tensor."""
        return max(self.scale.numel(), len(self.thresholds) if self.thresholds.ndim == 2 else 1)


def _threshold_distance(x: Tensor, scale: Tensor, thresholds: Tensor, axis: int = 1) -> Tensor:
    r = x.double() / scale.double()
    t = thresholds.double().to(r.device)
    if t.ndim == 2:
        return torch.stack([(r - per_channel_view(step, r.ndim, axis)).abs() for step in t.unbind(1)]).amin(0)
    above = torch.bucketize(r.contiguous(), t).clamp(max=t.numel() - 1)
    below = (above - 1).clamp(min=0)
    return torch.minimum((r - t[above]).abs(), (r - t[below]).abs())


@dataclass(frozen=True, eq=False)
class SumOfGrids:
    """``value = sum of the parts' values``; each part is a grid with a scale of its own. For weights only.

    A code packs the codes of all parts, the first part in the lowest bits, each counted from the lowest code of its
    part (so the fields are never negative).

    :param parts: two or more grids, added in this order; per-channel scales run along one axis.
    :param allowed: the packed codes that may occur (ascending 1-d int64), ``None`` for all of them.
    """

    parts: tuple[UniformGrid | Codebook, ...]
    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if len(self.parts) < 2 or not all(isinstance(p, (UniformGrid, Codebook)) for p in self.parts):
            raise ConfigError("a sum of grids needs two or more parts, each a UniformGrid or a Codebook")
        vectors = [p for p in self.parts if p.scale.numel() > 1]
        if len({(p.scale.numel(), p.channel_axis) for p in vectors}) > 1:
            raise ConfigError("the parts of a sum of grids need the same channels along the same axis")
        if self.bits > 31:
            raise ConfigError(f"a sum of grids of {self.bits} bits does not fit a code; allowed: 31 bits")
        allowed = self.allowed
        if allowed is not None:
            if allowed.dtype != torch.int64 or allowed.ndim != 1 or not allowed.numel():
                raise ConfigError("the allowed codes of a sum of grids must be a 1-d int64 tensor, not empty")
            fields = [(allowed >> shift) & (2**part.bits - 1) for part, shift in self._fields()]
            inside = all(bool((f < _count(p)).all()) for f, p in zip(fields, self.parts, strict=True))
            if not bool((allowed.diff() > 0).all()) or int(allowed[0]) < 0 or allowed[-1] >> self.bits or not inside:
                raise ConfigError("the allowed codes of a sum of grids must ascend and pack codes of its parts")

    @property
    def bits(self) -> int:
        """Width of a packed code: the bits of all parts."""
        return sum(p.bits for p in self.parts)

    @property
    def channel_axis(self) -> int:
        """The axis that per-channel scales run along."""
        return max(self.parts, key=lambda p: p.scale.numel()).channel_axis

    @property
    def scale(self) -> Tensor:
        """Scale of the first part that has one per channel, else of the first part: its length is that of the form."""
        return max(self.parts, key=lambda p: p.scale.numel()).scale

    def _fields(self) -> list[tuple[UniformGrid | Codebook, int]]:
        """Every part and the bit where its field begins."""
        return [(part, sum(p.bits for p in self.parts[:i])) for i, part in enumerate(self.parts)]

    def pack(self, codes: Sequence[Tensor]) -> Tensor:
        """Packed codes (int32) from the codes of every part (integers, same shapes).

        :raises QuantizationError: a code that its part does not have.
        """
        out = torch.zeros_like(codes[0], dtype=torch.int64)
        for (part, shift), code in zip(self._fields(), codes, strict=True):
            field = code.long() - lowest_code(part)
            if bool((field < 0).any()) or bool((field >= _count(part)).any()):
                found = f"{int(code.min())} .. {int(code.max())}"
                low = lowest_code(part)
                raise QuantizationError(f"codes {found} of a part; allowed: {low} .. {low + _count(part) - 1}")
            out |= field << shift
        return out.to(torch.int32)

    def split(self, codes: Tensor) -> list[Tensor]:
        """Codes of every part (int32, same shape as ``codes``); the inverse of :meth:`pack`."""
        fields = [(codes.long() >> shift) & (2**part.bits - 1) for part, shift in self._fields()]
        return [(f + lowest_code(p)).to(torch.int32) for f, p in zip(fields, self.parts, strict=True)]

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of ``codes``, same shape, dtype of the scales."""
        first, *rest = (part.decode(code) for part, code in zip(self.parts, self.split(codes), strict=True))
        for value in rest:
            first = first + value
        return first

    def encode(self, x: Tensor) -> Tensor:
        """Codes (int32) of the nearest sums, same shape; a tie goes to the lower sum, equal sums to the lowest code.

        :raises QuantizationError: ``x`` holds NaN, or there are more than 65536 sums to look through.
        """
        _refuse_nan(x)
        channels, axis = max(p.scale.numel() for p in self.parts), self.channel_axis
        codes = self._every_code(x.device)
        table = codes.reshape(1, -1).expand(channels, -1)
        by_row = replace(self, parts=[replace(p, channel_axis=0) for p in self.parts], allowed=None)
        values, order = by_row.decode(table).double().sort(dim=1, stable=True)
        moved = x.movedim(axis, 0) if channels > 1 else x
        rows = moved.reshape(channels, -1).double().contiguous()
        above = torch.searchsorted(values, rows).clamp(max=codes.numel() - 1)
        below = (above - 1).clamp(min=0)
        low, high = values.gather(1, below), values.gather(1, above)
        chosen = torch.where(rows - low <= high - rows, low, high)
        first = order.gather(1, torch.searchsorted(values, chosen.contiguous()))
        out = codes[first].reshape(moved.shape)
        return (out.movedim(0, axis) if channels > 1 else out).to(torch.int32)

    def _every_code(self, device: torch.device) -> Tensor:
        """Ascending packed codes of all sums."""
        count = math.prod(_count(p) for p in self.parts) if self.allowed is None else self.allowed.numel()
        if count > _MOST_SUMS:
            raise QuantizationError(f"{count} sums are too many to find the nearest one; allowed: {_MOST_SUMS}")
        if self.allowed is not None:
            return self.allowed.to(device)
        out = torch.zeros(1, dtype=torch.int64, device=device)
        for part, shift in self._fields():
            out = (out + (torch.arange(_count(part), device=device) << shift).reshape(-1, 1)).reshape(-1)
        return out


def lowest_code(part: UniformGrid | Codebook | Staircase) -> int:
    """Lowest code of a form; 0 where codes are indices."""
    return part.low if isinstance(part, UniformGrid) else 0


def _count(part: UniformGrid | Codebook) -> int:
    return part.high - part.low + 1 if isinstance(part, UniformGrid) else part.levels.numel()


Form = UniformGrid | Codebook | Staircase | SumOfGrids

_KINDS: dict[str, type] = {
    "uniform": UniformGrid,
    "codebook": Codebook,
    "staircase": Staircase,
    "sum": SumOfGrids,
}


def grids(form: Form, codes: Tensor) -> list[tuple[UniformGrid | Codebook | Staircase, Tensor]]:
    """The grids whose values add up to the tensor, each with its own codes: one, or the parts of a sum."""
    return list(zip(form.parts, form.split(codes), strict=True)) if isinstance(form, SumOfGrids) else [(form, codes)]


def form_on_cpu(form: Form) -> Form:
    """The form with every tensor detached and on the CPU."""
    fields: dict[str, Any] = {k: v.detach().cpu() for k, v in vars(form).items() if isinstance(v, Tensor)}
    if isinstance(form, SumOfGrids):
        fields["parts"] = [form_on_cpu(p) for p in form.parts]
    return replace(form, **fields)


def staircase_steps(form: Staircase, ndim: int) -> list[tuple[float | Tensor, int]]:
    """Thresholds in units of the scale and heights of the steps, for tracers that know plain comparisons only; a
    threshold per channel comes as a float32 tensor that broadcasts to ``ndim`` dimensions."""
    heights = form.levels.diff().tolist()
    if form.thresholds.ndim == 1:
        return list(zip(form.thresholds.tolist(), heights, strict=True))
    columns = form.thresholds.detach().float().unbind(1)
    return [(per_channel_view(t, ndim, form.channel_axis), h) for t, h in zip(columns, heights, strict=True)]


def form_kind(form: Form) -> str:
    """Name of the form's class as written to files."""
    return next(name for name, cls in _KINDS.items() if type(form) is cls)


def form_to_dict(form: Form) -> dict[str, Any]:
    """JSON-ready description of a form; :func:`form_from_dict` reads it back exactly (float32 survives as float64)."""
    out: dict[str, Any] = {"kind": form_kind(form)}
    for name, value in vars(form).items():
        out[name] = value.detach().cpu().tolist() if isinstance(value, Tensor) else value
    if isinstance(form, SumOfGrids):
        out["parts"] = [form_to_dict(p) for p in form.parts]
    return out


def form_from_dict(data: dict[str, Any]) -> Form:
    """Rebuild a form.

    :raises ConfigError: unknown kind or missing fields.
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"unknown deployed form {kind!r}; allowed: {', '.join(_KINDS)}")
    dtypes = {"scale": torch.float32, "levels": torch.int64, "thresholds": torch.float64, "allowed": torch.int64}
    try:
        if "parts" in data:
            data["parts"] = [form_from_dict(p) for p in data["parts"]]
        tensors = {k: torch.tensor(v, dtype=dtypes[k]) for k, v in data.items() if k in dtypes and v is not None}
        return _KINDS[kind](**{**data, **tensors})
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"deployed form {kind!r}: {error}") from None
