"""What all exporters share: checks before anything is written, reports, names, exact thresholds."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.forms import Staircase
from fat_plugins.frozen import frozen_modules
from fat_plugins.network import named_quantizers

#: buffers of batch norms
_STATISTICS = ("running_mean", "running_var")


# --------------------------------------------------------------------------------------------------------------------
# reports
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class LayerReport:
    """One quantized tensor of the written model.

    :param kind: ``"weight"`` or ``"activation"``.
    :param form: kind of the deployed form.
    :param bits: width of the codes; ``storage`` is the element type that holds them in the file (weights).
    :param elements, bytes: number of codes and their size in the file (0 for activations).
    :param note: what runs or is stored wider than asked, and why.
    """

    name: str
    kind: str
    form: str
    bits: int
    elements: int = 0
    bytes: int = 0
    storage: str = ""
    note: str = ""


@dataclass
class ExportReport:
    """What an exporter wrote. Sizes in bytes.

    :param format: kind of file.
    :param weights_bytes: size of the file that holds the weights.
    :param float_bytes: size that the same file would have with every weight in float32.
    :param versions: versions of the packages that wrote it, by name; each is a key of its own in the JSON.
    """

    path: str
    format: str
    weights_bytes: int
    float_bytes: int
    versions: dict[str, str]
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Everything that is wider or slower than asked, one line per layer."""
        return [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return with_versions(asdict(self))

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def with_versions(data: dict[str, Any]) -> dict[str, Any]:
    """A report's dictionary with each version as a key of its own."""
    return {**{k: v for k, v in data.items() if k != "versions"}, **data["versions"]}


def warn_of_notes(report: ExportReport, depth: int = 3) -> None:
    """One warning, addressed to the caller of the exporter, when something is wider or slower than asked."""
    if report.notes:
        more = f" (and {len(report.notes) - 1} more, see the report's notes)" if len(report.notes) > 1 else ""
        warnings.warn(f"{report.notes[0]}{more}", stacklevel=depth)


# --------------------------------------------------------------------------------------------------------------------
# checks
# --------------------------------------------------------------------------------------------------------------------
def check_path(path: str | os.PathLike, suffix: str, what: str, also: tuple[str, ...] = ()) -> Path:
    """The path to write, checked before anything is converted.

    :param suffix: how it has to end; ``what`` is written there.
    :param also: suffixes of the files beside it.
    :raises ExportError: wrong suffix, no such directory, or no permission to write.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ExportError(f"{path}: {what} is written to a path that ends in {suffix}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the directory {path.parent} does not exist")
    if any(p.is_dir() for p in (path, *(path.with_suffix(s) for s in also))):
        raise ExportError(f"{path}: is a directory")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path}: the directory {path.parent} cannot be written to")
    return path


def as_inputs(example_input: Any) -> tuple[Tensor, ...]:
    """Inputs of a model as a tuple of tensors.

    :raises ExportError: anything but a tensor or a sequence of tensors.
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ExportError(f"example_input must be a tensor or a tuple of tensors, got {type(example_input).__name__}")
    return tuple(inputs)


def on_device(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``inputs`` where the frozen model is."""
    device = next(frozen_modules(model)).scale.device
    return tuple(x.to(device) for x in inputs)


def check_model(model: nn.Module) -> None:
    """Refuse a model that no exporter can write.

    :raises ExportError: training quantizers are left, nothing is frozen, a quantizer has no usable scale, or a
        parameter or statistic holds NaN.
    """
    live = [name for name, _ in named_quantizers(model)]
    if live:
        raise ExportError(f"{live[0]}: still a training quantizer ({len(live)} in the model): freeze the model first")
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith(_STATISTICS))]
    for name, tensor in tensors:
        if bool(torch.isnan(tensor).any()):
            raise ExportError(f"{name}: holds NaN: training has diverged, lower the learning rate")
    for module in frozen_modules(model):
        if module.form is None:
            raise ExportError(f"{module.name}: the activation quantizer was never calibrated")
        if not bool(torch.isfinite(module.scale).all()):
            raise ExportError(f"{module.name}: the scale is not finite")
        if bool(torch.isnan(getattr(module, "thresholds", module.scale)).any()):
            raise ExportError(f"{module.name}: the thresholds hold NaN")
        # an activation range of zero width crashes some versions of OpenVINO's CPU plugin
        if not hasattr(module, "codes") and not bool((module.scale > 0).all()):
            raise ExportError(f"{module.name}: the scale of an activation must be positive")


# --------------------------------------------------------------------------------------------------------------------
# small helpers
# --------------------------------------------------------------------------------------------------------------------
def unique(name: str, kind: str, taken: set[tuple[str, str]]) -> str:
    """``name``, or ``name#2``, ``name#3``... for a module that is called several times."""
    candidate, n = name, 1
    while (kind, candidate) in taken:
        n += 1
        candidate = f"{name}#{n}"
    taken.add((kind, candidate))
    return candidate


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """An exported file is taken apart inside; whatever a damaged one leads to is an error of the file.

    :raises ExportError: names the file.
    """
    try:
        yield
    except (ExportError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"{path}: damaged, or not as it was exported ({what})") from error


def first_line(error: Exception) -> str:
    """The line of another package's exception that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = ("Check", "Exception from", "Traceback")
    return next((line for line in lines if not line.startswith(noise)), type(error).__name__)


def threshold_table(form: Staircase) -> np.ndarray:
    """For every channel (one row for all where they agree) and step the largest float32 input below the step:
    ``x > it`` in float32 is the very comparison that torch makes after dividing by the scale."""
    scale = form.scale.detach().cpu().float().numpy().reshape(-1)
    steps = form.thresholds.detach().cpu().double()
    return np.stack([largest_below(t, scale) for t in steps.reshape(-1, steps.shape[-1]).T], axis=1)


def largest_below(threshold: float | Tensor, scale: np.ndarray) -> np.ndarray:
    """The largest float32 ``x`` with ``x / scale <= threshold`` in torch's float32 arithmetic, so that ``x > it`` is
    the very comparison that torch makes after the division."""
    t = torch.as_tensor(threshold, dtype=torch.float64).float().numpy()
    x = (t * scale).astype(np.float32)
    for _ in range(8):
        x = np.where(x / scale > t, np.nextafter(x, np.float32(-np.inf)), x)
    for _ in range(8):
        up = np.nextafter(x, np.float32(np.inf))
        x = np.where(up / scale <= t, up, x)
    return x.astype(np.float32)
