"""A plain torch training loop. It knows quantizers only through ``param_groups`` and a host's controller."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fat_plugins.errors import FatPluginsError
from fat_plugins.norms import has_noise, reestimate_batch_norms
from fat_plugins.quantizer import param_groups
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.progress import Reporter
from fat_plugins.recipes.schema import OptimizerSection, ScheduleSection, TrainSection

#: steps between two readings of the running loss, each of which waits for the device
READ_EVERY = 10
#: batches that batch norms see again before an evaluation, where quantizers train with noise
NORM_BATCHES = 32


@dataclass(frozen=True)
class EpochRecord:
    """Numbers of one epoch (accuracies 0 to 1)."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Optimizer over the groups that the algorithms ask for."""
    groups = param_groups(model, float(section.lr), float(section.weight_decay))
    if section.name == "sgd":
        momentum = 0.9 if section.momentum is None else float(section.momentum)
        return torch.optim.SGD(groups, lr=section.lr, momentum=momentum, nesterov=section.nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[section.name]
    return kind(groups, lr=section.lr)


def lr_factor(section: ScheduleSection, epochs: int, epoch: float) -> float:
    """Factor on every learning rate after ``epoch`` epochs (with fraction) of ``epochs``."""
    warmup = float(section.warmup_epochs)
    if epoch < warmup:
        return (epoch + 1e-3) / (warmup + 1e-3)
    if section.name == "cosine":
        done = (epoch - warmup) / max(epochs - warmup, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if section.name == "multistep":
        return float(section.gamma) ** bisect_right(sorted(section.milestones), epoch)
    return 1.0


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0 to 1) in evaluation mode; the mode is restored."""
    training, device = model.training, device_of(model)
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss += cross_entropy(logits, labels, reduction="sum").double()
        correct += (logits.argmax(1) == labels).sum()
        count += len(labels)
    model.train(training)
    if count == 0:
        raise FatPluginsError("evaluation: the data loader gives no batch")
    return float(loss) / count, int(correct) / count


def fit(
    model: nn.Module,
    data: Data,
    section: TrainSection,
    *,
    batch_size: int,
    seed: int,
    controller: Any = None,
    reporter: Reporter | None = None,
    title: str = "training",
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train ``model`` in place; the result depends on its weights, the section and ``seed`` only.

    :param controller: a host's; its loss joins and its schedule is driven.
    :param on_epoch: called after every epoch, for checkpoints.
    :raises FatPluginsError: the loss became NaN or infinite.
    """
    reporter = reporter or Reporter(quiet=True)
    torch.manual_seed(seed)
    loader = data.training_loader(batch_size, seed)
    validation = data.validation_loader()
    optimizer = make_optimizer(model, section.optimizer)
    base = [group["lr"] for group in optimizer.param_groups]
    device, steps = device_of(model), len(loader)
    records: list[EpochRecord] = []
    if controller is not None:
        _announce(controller.scheduler, section.epochs, steps)
    with reporter.phase(title, section.epochs) as phase:
        for epoch in range(section.epochs):
            model.train()
            if controller is not None:
                controller.scheduler.epoch_step()
            totals = torch.zeros(2, dtype=torch.float64, device=device)
            count = 0
            for step, (images, labels) in enumerate(loader):
                factor = lr_factor(section.schedule, section.epochs, epoch + step / steps)
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * factor
                images, labels = images.to(device), labels.to(device)
                totals += _train_step(model, images, labels, optimizer, section, controller)
                count += len(labels)
                if step % READ_EVERY == 0:
                    phase.step(epoch + step / steps, *(totals / count).tolist())
            train_loss, train_accuracy = (totals / count).tolist()
            if not math.isfinite(train_loss):
                raise FatPluginsError(
                    f"{title}: the loss is {train_loss} in epoch {epoch + 1}; lower the learning rate"
                )
            if has_noise(model):  # the norms' statistics are those of the noisy network
                reestimate_batch_norms(model, data.calibration_loader(batch_size), NORM_BATCHES)
            lr = base[0] * lr_factor(section.schedule, section.epochs, epoch)
            record = EpochRecord(epoch, lr, train_loss, train_accuracy, *evaluate(model, validation))
            records.append(record)
            phase.epoch(epoch + 1, train_loss, train_accuracy, record.validation_accuracy)
            if on_epoch is not None:
                on_epoch(record)
    model.eval()
    return records


def _announce(scheduler: Any, epochs: int, steps: int) -> None:
    """Tell a scheduler how long training will be, if it has room for that (schedules of some algorithms need it)."""
    for name, value in (("total_epochs", epochs), ("total_steps", epochs * steps)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)


def _train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    section: TrainSection,
    controller: Any,
) -> Tensor:
    """One optimizer step; returns summed loss and correct answers (float64, shape 2) without waiting for them."""
    if controller is not None:
        controller.scheduler.step()
    logits = model(images)
    loss = cross_entropy(logits, labels, label_smoothing=float(section.label_smoothing))
    total = loss if controller is None else loss + controller.loss()
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    correct = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([total.detach().double() * len(labels), correct.double()])
