"""From a frozen model to a deployed file and what can be said about it: size, kernels, equality, accuracy."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat_plugins.errors import ExportError
from fat_plugins.recipes.hosts import Host
from fat_plugins.recipes.targets import Runner, Target
from fat_plugins.recipes.tasks import CLASSIFICATION, Task


@dataclass
class LayerRow:
    """One quantized tensor of the deployed model.

    :param kind: ``"weight"`` or ``"activation"``.
    :param storage, bytes: how the file holds the weight.
    :param kernel, speed: what ran the layer and whether in ``"int8"`` or ``"float"`` (weights only, where it is known).
    :param compared, differences, ties: integer codes compared between torch and the file, how many differ, and how many
        differ only because the value lies on a rounding threshold (``None``: not verified).
    :param elements: number of codes (weights).
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
    elements: int = 0


@dataclass
class Deployment:
    """One deployed file of one trained model.

    :param path: of the file, within the run directory once it stands in a report.
    :param accuracy: 0 to 1, on the test images, of the file in its runtime; or what the task has in its place.
    :param weights_bytes, float_bytes: size of the weights in the file, and what it would be with every weight in
        float32, as the exporter says.
    :param verified: ``None`` when nothing was compared.
    :param format: name of the target.
    :param file_bytes: size of the whole file (with the weights beside it).
    """

    path: str
    accuracy: float
    weights_bytes: int
    float_bytes: int
    layers: list[LayerRow] = field(default_factory=list)
    verified: bool | None = None
    first_difference: str | None = None
    notes: list[str] = field(default_factory=list)
    format: str = "openvino"
    file_bytes: int = 0

    @property
    def code_bytes(self) -> int:
        """Size of the codes of all quantized weights at their bit widths, whatever the file stores. Without scales."""
        return -(-sum(r.bits * r.elements for r in self.layers if r.kind == "weight") // 8)

    @property
    def float_code_bytes(self) -> int:
        """Size of the same weights in float32."""
        return 4 * sum(r.elements for r in self.layers if r.kind == "weight")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "code_bytes": self.code_bytes}


def versions(host: Host, targets: Iterable[Target] = ()) -> dict[str, str]:
    """Versions of everything that took part in a run."""
    import fat_plugins

    found = {"fat-plugins": fat_plugins.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found.update(host.versions())
    for target in targets:
        found.update(target.versions())
    return found


def accuracy(run: Runner, loader: DataLoader, task: Task = CLASSIFICATION) -> float:
    """Metric of a deployed model: accuracy 0 to 1, or what the task has in its place."""
    score, count = 0.0, 0
    for images, labels in loader:
        outputs = run(images.numpy())
        if not task.fits(outputs.shape, labels.shape):
            raise ExportError(f"the deployed model gives {outputs.shape} for a batch of {len(labels)} images")
        score += float(task.score(torch.tensor(outputs), labels))
        count += len(labels)
    return score / count


def deploy(
    target: Target,
    frozen: nn.Module,
    path: Path,
    example: Tensor,
    test: DataLoader,
    samples: Tensor | None,
    task: Task = CLASSIFICATION,
) -> Deployment:
    """Export a frozen model to ``path`` and measure the result.

    :param samples: images for the comparison of codes, or ``None`` to leave it out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = target.export(frozen, path, example)
    rows = [LayerRow(r.name, r.kind, r.form, r.bits, r.storage, r.bytes, elements=r.elements) for r in report.layers]
    by_name = {r.name: r for r in rows if r.kind == "weight"}
    for kernel in target.kernels(path):
        if kernel.name in by_name:
            by_name[kernel.name].kernel, by_name[kernel.name].speed = kernel.kernel, kernel.speed
    deployment = Deployment(
        str(path),
        accuracy(target.runner(path), test, task),
        report.weights_bytes,
        report.float_bytes,
        rows,
        notes=report.notes,
        format=target.name,
        file_bytes=target.size(path),
    )
    if samples is not None:
        _add_comparison(deployment, target.verify(frozen, path, samples))
    return deployment


def _add_comparison(deployment: Deployment, report: Any) -> None:
    """Write the numbers of a verifier's report into the rows of a deployment."""
    rows = {(r.kind, r.name): r for r in deployment.layers}
    checks = [("weight", c.name, c.elements, c.differences, 0) for c in report.weights]
    checks += [("activation", c.name, c.elements, c.all_differences, c.ties + c.input_ties) for c in report.activations]
    for kind, name, compared, differences, ties in checks:
        row = rows.get((kind, name))
        if row is not None:
            row.compared, row.differences, row.ties = compared, differences, ties
    deployment.verified, deployment.first_difference = report.ok, report.first_difference
