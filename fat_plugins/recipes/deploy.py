"""From a trained model to the deployed file and what can be said about it: size, kernels, equality, accuracy."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat_plugins.errors import ExportError
from fat_plugins.recipes.hosts import Host


@dataclass
class LayerRow:
    """One quantized tensor of the deployed model.

    :param kind: ``"weight"`` or ``"activation"``.
    :param kernel, speed: what ran the layer and whether in ``"int8"`` or ``"float"`` (weights only).
    :param compared, differences, ties: integer codes compared between torch and the file, how many differ, and how many
        differ only because the value lies on a rounding threshold (``None``: not verified).
    """

    name: str
    kind: str
    form: str
    bits: int
    storage: str = ""
    bytes: int = 0
    kernel: str = ""
    speed: str = ""
    compared: int | None = None
    differences: int | None = None
    ties: int | None = None


@dataclass
class Deployment:
    """The deployed model of one trained one.

    :param path: of the ``.xml``, within the run directory once it stands in a report.
    :param weights_bytes, float_bytes: size of the ``.bin``, and what it would be with every weight in float32.
    :param verified: ``None`` when nothing was compared.
    """

    path: str
    accuracy: float
    weights_bytes: int
    float_bytes: int
    layers: list[LayerRow] = field(default_factory=list)
    verified: bool | None = None
    first_difference: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than float32 weights."""
        return self.float_bytes / self.weights_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def require_openvino() -> None:
    """:raises ExportError: OpenVINO is not installed, said before any time is spent on training."""
    if importlib.util.find_spec("openvino") is None:
        raise ExportError("OpenVINO is not installed: pip install 'fat-plugins[openvino]'")


def versions(host: Host) -> dict[str, str]:
    """Versions of everything that took part in a run."""
    import fat_plugins

    found = {"fat-plugins": fat_plugins.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found.update(host.versions())
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        found["openvino"] = openvino.__version__.split("-")[0]
    return found


def openvino_accuracy(path: Path, loader: DataLoader) -> float:
    """Accuracy (0 to 1) of an exported model on OpenVINO's CPU device, floats at full precision."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    correct = count = 0
    for images, labels in loader:
        logits = next(iter(compiled([images.numpy()]).values()))
        correct += int((np.argmax(logits, 1) == labels.numpy()).sum())
        count += len(labels)
    return correct / count


def verify_model(host: Host, model: nn.Module, path: Path, samples: Tensor) -> Any:
    """Compare the integer codes of ``model`` with those of the file at ``path``; returns the verifier's report."""
    from fat_plugins.export.verify import verify

    return verify(host.freeze(model), path, samples)


def deploy(
    host: Host, model: nn.Module, path: Path, example: Tensor, test: DataLoader, samples: Tensor | None
) -> Deployment:
    """Export ``model`` to ``path`` and measure the result.

    :param samples: images for the comparison of codes, or ``None`` to leave it out.
    """
    from fat_plugins.export.openvino import kernels

    path.parent.mkdir(parents=True, exist_ok=True)
    report = host.export(model, path, example)
    rows = [LayerRow(r.name, r.kind, r.form, r.bits, r.storage, r.bytes) for r in report.layers]
    by_name = {r.name: r for r in rows if r.kind == "weight"}
    for kernel in kernels(path):
        if kernel.name in by_name:
            by_name[kernel.name].kernel, by_name[kernel.name].speed = kernel.kernel, kernel.speed
    deployment = Deployment(
        str(path), openvino_accuracy(path, test), report.weights_bytes, report.float_bytes, rows, notes=report.notes
    )
    if samples is not None:
        _add_comparison(deployment, verify_model(host, model, path, samples))
    return deployment


def _add_comparison(deployment: Deployment, report: Any) -> None:
    """Write the numbers of a verifier's report into the rows of a deployment."""
    rows = {(r.kind, r.name): r for r in deployment.layers}
    checks = [("weight", c.name, c.elements, c.differences, 0) for c in report.weights]
    checks += [
        ("activation", c.name, c.elements, c.differences + c.input_differences, c.ties + c.input_ties)
        for c in report.activations
    ]
    for kind, name, compared, differences, ties in checks:
        row = rows.get((kind, name))
        if row is not None:
            row.compared, row.differences, row.ties = compared, differences, ties
    deployment.verified, deployment.first_difference = report.ok, report.first_difference
