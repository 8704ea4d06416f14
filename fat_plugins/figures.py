"""Figures that quantizers and coordinators offer for reports: plain numbers, drawn by whoever shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

#: an image of more rows or columns is averaged down to these
MOST_ROWS, MOST_COLUMNS = 96, 192


@dataclass(frozen=True)
class Figure:
    """One figure. Make it with :meth:`image`, :meth:`curve` or :meth:`bars`; it holds JSON types only.

    Figures of one ``title`` are shown side by side, one for each layer.

    :param x: positions of a curve, or names of bars.
    :param series: values over ``x`` by name (curves and bars).
    :param rows: values of an image, row by row from the top.
    :param limits: range of the values where it is known beforehand, such as probabilities: ``(0, 1)``.
    """

    title: str
    kind: Literal["image", "curve", "bars"]
    x_label: str = ""
    y_label: str = ""
    x: list[Any] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    rows: list[list[float]] = field(default_factory=list)
    limits: tuple[float, float] | None = None

    @classmethod
    def image(
        cls, title: str, values: Tensor, x_label: str, y_label: str, limits: tuple[float, float] | None = None
    ) -> Figure:
        """An image of a 2-d tensor, first row on top; large ones are averaged down."""
        small = values.detach().float().cpu()
        size = min(small.shape[0], MOST_ROWS), min(small.shape[1], MOST_COLUMNS)
        if size != tuple(small.shape):
            small = torch.nn.functional.adaptive_avg_pool2d(small[None, None], size)[0, 0]
        return cls(title, "image", x_label, y_label, rows=[_numbers(row) for row in small], limits=limits)

    @classmethod
    def curve(
        cls,
        title: str,
        x: Sequence[float] | Tensor,
        series: Mapping[str, Sequence[float] | Tensor],
        x_label: str,
        y_label: str,
        limits: tuple[float, float] | None = None,
    ) -> Figure:
        """Lines over common positions."""
        lines = {name: _numbers(y) for name, y in series.items()}
        return cls(title, "curve", x_label, y_label, x=_numbers(x), series=lines, limits=limits)

    @classmethod
    def bars(
        cls,
        title: str,
        names: Sequence[str],
        series: Mapping[str, Sequence[float] | Tensor],
        x_label: str,
        y_label: str,
        limits: tuple[float, float] | None = None,
    ) -> Figure:
        """Groups of bars, one group for each name."""
        bars = {name: _numbers(y) for name, y in series.items()}
        return cls(title, "bars", x_label, y_label, x=[str(n) for n in names], series=bars, limits=limits)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def _numbers(values: Sequence[float] | Tensor) -> list[float]:
    """Six digits, which no picture shows; what is not finite counts as zero, which JSON can hold."""
    numbers = values.detach().double().cpu().flatten().tolist() if isinstance(values, Tensor) else map(float, values)
    return [float(f"{v:.6g}") if math.isfinite(v) else 0.0 for v in numbers]


__all__ = ["Figure"]
