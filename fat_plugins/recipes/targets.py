"""What a recipe can be deployed to. A target is one kind of file and the runtime that executes it; a recipe names
formats, each of which stands for one or more targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fat_plugins.errors import ConfigError, ExportError, unknown

#: from a batch of inputs to the model's first output
Runner = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Target:
    """One kind of deployed file; ``export``, ``verify`` and ``execute`` come from a module of the core.

    :param name: what reports and the command line call it.
    :param runtime: what executes it, in headings.
    :param file: name within a run's ``export`` directory.
    :param module: import path of the exporter.
    :param packages: what has to be installed for export, comparison and execution.
    :param extra: extra of this distribution that installs them.
    :param packed: the file holds weight codes at their true width, so its size is what a user gains.
    """

    name: str
    runtime: str
    file: str
    module: str
    packages: tuple[str, ...]
    extra: str
    packed: bool = False

    @property
    def suffix(self) -> str:
        """Suffix of its files."""
        return Path(self.file).suffix

    def require(self) -> None:
        """:raises ExportError: a package is missing, with the command that installs it."""
        for package in self.packages:
            if find_spec(package) is None:
                raise ExportError(
                    f"export.format {self.name}: {package} is not installed: pip install 'fat-plugins[{self.extra}]'"
                )

    def versions(self) -> dict[str, str]:
        """Versions of its packages."""
        return {package: _version(package) for package in self.packages}

    def export(self, frozen: nn.Module, path: Path, example: Tensor) -> Any:
        """Write the file of a frozen model; returns the exporter's report."""
        return import_module(self.module).export(frozen, path, example)

    def verify(self, frozen: nn.Module, path: Path, samples: Tensor) -> Any:
        """Compare integer codes of a frozen model and its file; returns the verifier's report."""
        return import_module(self.module).verify(frozen, path, samples)

    def runner(self, path: Path) -> Runner:
        """Runs the file on batches of inputs."""
        execute = import_module(self.module).execute
        return lambda images: execute(path, [images])[0]

    def kernels(self, path: Path) -> list[Any]:
        """What ran each quantized layer (``name``, ``kernel``, ``speed``), where the runtime tells."""
        return []

    def size(self, path: Path) -> int:
        """Bytes of everything that belongs to the file."""
        return path.stat().st_size


class OpenVINOTarget(Target):
    """OpenVINO IR on the CPU device, floats at full precision."""

    def verify(self, frozen: nn.Module, path: Path, samples: Tensor) -> Any:
        from fat_plugins.export.verify import verify

        return verify(frozen, path, samples)

    def runner(self, path: Path) -> Runner:
        import openvino

        from fat_plugins.export._ov import exact

        compiled = openvino.Core().compile_model(str(path), "CPU", exact("CPU"))
        return lambda images: next(iter(compiled([images]).values()))

    def kernels(self, path: Path) -> list[Any]:
        return import_module(self.module).kernels(path)

    def size(self, path: Path) -> int:
        return path.stat().st_size + path.with_suffix(".bin").stat().st_size


OPENVINO = OpenVINOTarget(
    "openvino", "OpenVINO", "model.xml", "fat_plugins.export.openvino", ("openvino",), "openvino", packed=True
)
QONNX = Target("qonnx", "qonnx", "model.onnx", "fat_plugins.export.qonnx", ("onnx", "qonnx"), "qonnx")
#: standard ONNX with QuantizeLinear and DequantizeLinear
ONNX = Target("onnx", "ONNX Runtime", "model_qdq.onnx", "fat_plugins.export.onnx", ("onnx", "onnxruntime"), "onnx")

TARGETS = {target.name: target for target in (OPENVINO, QONNX, ONNX)}
#: what a recipe may name; the target that a format is called after comes first
FORMATS: dict[str, tuple[str, ...]] = {"openvino": ("openvino",), "qonnx": ("qonnx", "onnx"), "onnx": ("onnx",)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a build under another distribution name, e.g. onnxruntime-gpu
        return str(getattr(import_module(package), "__version__", "unknown"))


def targets_of(formats: Iterable[str]) -> list[Target]:
    """Targets of a recipe's formats, each one once."""
    return [TARGETS[name] for name in dict.fromkeys(name for f in formats for name in FORMATS[f])]


def choose(formats: Iterable[str], wanted: str | None, path: Path | None) -> list[Target]:
    """Targets that a command means.

    :param formats: those of the recipe.
    :param wanted: a format given by name, or ``None``.
    :param path: a file given by the user, which is of one target only.
    :raises ConfigError: unknown format, or a file name that leaves the target open.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise ConfigError(f"--format: {unknown('format', wanted, FORMATS)}")
        return [TARGETS[wanted]] if path is not None else targets_of([wanted])
    own = targets_of(formats)
    if path is None:
        return own
    # the recipe's own targets first, and among these the one whose file is called like that
    for candidates in (own, list(TARGETS.values())):
        fitting = [t for t in candidates if t.suffix == path.suffix]
        if len(fitting) > 1:
            fitting = [t for t in fitting if t.file == path.name] or fitting
        if len(fitting) == 1:
            return fitting
        if fitting:
            names = ", ".join(t.name for t in fitting)
            raise ConfigError(f"{path}: the suffix fits several formats: add --format; allowed: {names}")
    suffixes = ", ".join(sorted({t.suffix for t in TARGETS.values()}))
    raise ConfigError(f"{path}: no format has files that end in {path.suffix!r}; allowed: {suffixes}")
