"""Deployed forms: what is left of a quantizer after training. Integer codes and how to read them, nothing else.

An exporter reads these classes and never sees an algorithm. Every form is a frozen dataclass whose ``encode`` and
``decode`` are exact: ``decode(encode(x))`` is the value that the trained quantizer gives in evaluation mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fat_plugins.errors import ConfigError, QuantizationError
from fat_plugins.functional import level_index, per_channel_view, uniform_codes


def _scale_view(form: UniformGrid | Codebook | Staircase, ndim: int) -> Tensor:
    return per_channel_view(form.scale, ndim, form.channel_axis)


def _refuse_nan(x: Tensor) -> None:
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # a graph cannot branch on data
    if not tracing and bool(torch.isnan(x).any()):
        raise QuantizationError("cannot encode a tensor that holds NaN values")


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

    Thresholds need not be midpoints. ``levels`` are ascending integers, ``thresholds`` ascending floats (one fewer).
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
        if self.thresholds.numel() != self.levels.numel() - 1 or not bool((self.thresholds.diff() > 0).all()):
            raise ConfigError("a staircase needs one ascending threshold between each two levels")

    def encode(self, x: Tensor) -> Tensor:
        """Indices (int32) of the levels of ``x``, same shape; NaN is refused as in :class:`UniformGrid`."""
        _refuse_nan(x)
        return level_index(x, _scale_view(self, x.ndim), self.thresholds).to(torch.int32)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the target computes with."""
        return self.levels[codes.long()]

    def decode(self, codes: Tensor) -> Tensor:
        """Real values of ``codes``, same shape, dtype of the scale."""
        return self.integers(codes).to(self.scale.dtype) * _scale_view(self, codes.ndim)

    def ties(self, x: Tensor) -> Tensor:
        """Distance of ``x`` to the nearest threshold, in units of the scale."""
        return _threshold_distance(x, _scale_view(self, x.ndim), self.thresholds)


def _threshold_distance(x: Tensor, scale: Tensor, thresholds: Tensor) -> Tensor:
    r = x.double() / scale.double()
    t = thresholds.double().to(r.device)
    above = torch.bucketize(r.contiguous(), t).clamp(max=t.numel() - 1)
    below = (above - 1).clamp(min=0)
    return torch.minimum((r - t[above]).abs(), (r - t[below]).abs())


Form = UniformGrid | Codebook | Staircase

_KINDS: dict[str, type] = {"uniform": UniformGrid, "codebook": Codebook, "staircase": Staircase}


def form_kind(form: Form) -> str:
    """Name of the form's class as written to files."""
    return next(name for name, cls in _KINDS.items() if type(form) is cls)


def form_to_dict(form: Form) -> dict[str, Any]:
    """JSON-ready description of a form; :func:`form_from_dict` reads it back exactly (float32 survives as float64)."""
    out: dict[str, Any] = {"kind": form_kind(form)}
    for name, value in vars(form).items():
        out[name] = value.detach().cpu().tolist() if isinstance(value, Tensor) else value
    return out


def form_from_dict(data: dict[str, Any]) -> Form:
    """Rebuild a form.

    :raises ConfigError: unknown kind or missing fields.
    """
    data = dict(data)
    kind = data.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"unknown deployed form {kind!r}; allowed: {', '.join(_KINDS)}")
    dtypes = {"scale": torch.float32, "levels": torch.int64, "thresholds": torch.float64}
    try:
        return _KINDS[kind](**{k: torch.tensor(v, dtype=dtypes[k]) if k in dtypes else v for k, v in data.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"deployed form {kind!r}: {error}") from None
