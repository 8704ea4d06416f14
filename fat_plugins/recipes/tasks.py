"""What a network is for: its loss, the number by which it is judged, and how a batch of outputs is scored.

Everything that trains, evaluates or reports asks the task of the data set; what stands in files under ``accuracy`` is
the task's number, whatever it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss

from fat_plugins.errors import CheckpointError, ConfigError, unknown

#: a smaller mean squared error counts as this one: 100 dB of values between 0 and 1
_LEAST_ERROR = 1e-10


@dataclass(frozen=True)
class Metric:
    """A number by which networks are compared, and how people read it.

    :param name: within a sentence; ``short``: in a line of progress.
    :param unit: behind the number; ``difference``: behind the difference of two.
    :param factor: what is stored times this is shown.
    :param gap: between number and unit in a terminal (pages always have one).
    """

    name: str
    short: str
    unit: str
    difference: str
    factor: float = 1.0
    gap: str = " "
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """At the beginning of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float) -> str:
        """``98.64%`` or ``31.20 dB``, for a terminal."""
        return f"{self.factor * value:.2f}{self.gap}{self.unit}"

    def mean(self, values: Sequence[float]) -> str:
        """Mean, and the lowest and highest when there are several."""
        text = self.text(mean(values))
        return text if len(values) == 1 else f"{text} ({self.text(min(values))} to {self.text(max(values))})"


ACCURACY = Metric("accuracy", "acc", "%", "pp", factor=100.0, gap="")
PSNR = Metric("PSNR", "PSNR", "dB", "dB")


class Task:
    """Base of the tasks. A target is what a data set gives beside an image: a label, or another image."""

    name: ClassVar[str]
    metric: ClassVar[Metric]

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """Over the images of a batch, shape ().

        :param smoothing: label smoothing, 0 to 1.
        :param reduction: ``"mean"`` or ``"sum"``.
        """
        raise NotImplementedError

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The metric, summed over the images of a batch, shape (), without gradient."""
        raise NotImplementedError

    def fits(self, outputs: Sequence[int], targets: Sequence[int]) -> bool:
        """Whether outputs of this shape can be scored against targets of that."""
        raise NotImplementedError

    def check_training(self, *, smoothing: float, distillation: bool) -> None:
        """Refuse what belongs to another task.

        :raises ConfigError: one line with the key.
        """

    def facts(self) -> dict[str, str]:
        """What has to be said in a report beside the number; nothing for accuracies, which need no words."""
        return {}


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy and accuracy; targets are labels, int64, N."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[Metric] = ACCURACY

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        return cross_entropy(outputs, targets, label_smoothing=smoothing, reduction=reduction)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().argmax(1) == targets).sum()

    def fits(self, outputs: Sequence[int], targets: Sequence[int]) -> bool:
        return tuple(outputs[:1]) == tuple(targets)


@dataclass(frozen=True)
class SuperResolution(Task):
    """L1 loss and PSNR; targets are the larger images, N x C x sH x sW.

    :param shave: pixels at each border that the PSNR leaves out (the scale, as is usual).
    :param low, high: range of the pixels; outputs are clipped to it before they are scored.
    """

    shave: int = 0
    low: float = 0.0
    high: float = 1.0
    name: ClassVar[str] = "super_resolution"
    metric: ClassVar[Metric] = PSNR

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        mean = l1_loss(outputs, targets)
        return mean if reduction == "mean" else mean * len(targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Decibels of every image, of the mean squared error over all of its pixels and channels."""
        kept = slice(self.shave, -self.shave or None)
        apart = (outputs.detach().float().clamp(self.low, self.high) - targets)[..., kept, kept]
        error = apart.square().flatten(1).mean(1) / (self.high - self.low) ** 2
        return -10 * error.clamp_min(_LEAST_ERROR).log10().sum()

    def fits(self, outputs: Sequence[int], targets: Sequence[int]) -> bool:
        return tuple(outputs) == tuple(targets)

    def check_training(self, *, smoothing: float, distillation: bool) -> None:
        if smoothing:
            raise ConfigError(f"label_smoothing: {smoothing:g}; allowed: 0, the data have images in place of labels")
        if distillation:
            raise ConfigError("distillation: learns from logits; the data have images in place of labels")

    def facts(self) -> dict[str, str]:
        border = f", without {self.shave} pixels at each border" if self.shave else ""
        return {"PSNR": f"mean over the test images, all channels{border}"}


CLASSIFICATION = Classification()
#: the metric of every task, for reports of runs
METRICS: dict[str, Metric] = {task.name: task.metric for task in (Classification, SuperResolution)}


def metric_of(task: Any, where: str) -> Metric:
    """The metric of a task that a file names.

    :raises CheckpointError: it names none.
    """
    if not isinstance(task, str) or task not in METRICS:
        raise CheckpointError(f"{where}: {unknown('task', str(task), METRICS)}")
    return METRICS[task]


__all__ = [
    "ACCURACY",
    "CLASSIFICATION",
    "METRICS",
    "PSNR",
    "Classification",
    "Metric",
    "SuperResolution",
    "Task",
    "metric_of",
]
