"""A plain torch training loop whose whole state can be saved after any step.

It knows quantizers only through ``param_groups`` and a host's controller.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat_plugins.errors import CheckpointError, FatPluginsError
from fat_plugins.norms import has_noise, reestimate_batch_norms
from fat_plugins.recipes.checkpoint import cpu_state, load_state
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.hooks import Part
from fat_plugins.recipes.interrupt import Interrupted, Interrupts
from fat_plugins.recipes.optim import check_state, lr_factor, make_optimizer
from fat_plugins.recipes.parts import Precision
from fat_plugins.recipes.progress import Phase, Reporter
from fat_plugins.recipes.schema import TrainSection
from fat_plugins.recipes.sealed import contents_of, refuse_nan
from fat_plugins.recipes.state import Saving, random_state, seed_everything, set_random_state
from fat_plugins.recipes.tasks import CLASSIFICATION, Task
from fat_plugins.recipes.world import World
from fat_plugins.switching import each_width

#: steps between two readings of the running loss, each of which waits for the device
READ_EVERY = 10


@dataclass(frozen=True)
class EpochRecord:
    """Numbers of one epoch; ``accuracy`` is the task's metric: accuracies 0 to 1, PSNR in dB.

    :param values: what parts add, JSON types.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; without ``values`` when there are none."""
        return {k: v for k, v in asdict(self).items() if k != "values" or v}


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, world: World | None = None, task: Task = CLASSIFICATION
) -> tuple[float, float]:
    """Mean loss and metric of the task (cross-entropy, and accuracy 0 to 1) in evaluation mode; the mode is restored.

    :param world: processes that share the batches; default: this one sees them all.
    """
    training, device, world = model.training, device_of(model), world or World()
    model.eval()
    # summed loss and score (correct answers), images
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for i, (images, labels) in enumerate(loader):
        if i % world.size != world.rank:
            continue
        images, labels = images.to(device), labels.to(device)
        outputs = model(images)
        totals[0] += task.loss(outputs, labels, reduction="sum").double()
        totals[1] += task.score(outputs, labels)
        totals[2] += len(labels)
    model.train(training)
    loss, score, count = world.sum(totals).tolist()
    if count == 0:
        raise FatPluginsError("evaluation: the data loader gives no batch")
    return loss / count, score / count


class Trainer:
    """One phase of training, in place. What it does depends on the model's weights, the section and ``seed`` only.

    Everything that changes on the way is in :meth:`state_dict`. A trainer of an equal model that loads it goes on as if
    nothing had happened, bit for bit on a CPU.

    :param batch_size: images per step and process.
    :param controller: a host's; its loss joins and its schedule is driven.
    :param parts: what else takes part, in this order.
    :param saving: when to save the state; default: never.
    :param max_steps: optimizer steps at most, for trying something out; epochs are planned accordingly.
    :ivar epoch, step: where training stands: epochs done, and steps done in the one that is running.
    :ivar records: one for each epoch done.
    :ivar before: validation loss and accuracy before the first step, where there is a controller.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        section: TrainSection,
        *,
        batch_size: int,
        seed: int,
        controller: Any = None,
        parts: Sequence[Part] = (),
        reporter: Reporter | None = None,
        title: str = "training",
        world: World | None = None,
        saving: Saving | None = None,
        interrupts: Interrupts | None = None,
        max_steps: int | None = None,
    ) -> None:
        self.model, self.data, self.section, self.controller = model, data, section, controller
        self.batch_size, self.seed, self.parts, self.title = batch_size, seed, list(parts), title
        self.world, self.saving = world or World(), saving
        self.reporter, self.interrupts = reporter or Reporter(quiet=True), interrupts or Interrupts()
        self.device = device_of(model)
        self._loader = data.training_loader(batch_size, seed, rank=self.world.rank, world=self.world.size)
        self.steps = len(self._loader)
        self.total_steps = section.epochs * self.steps
        if max_steps is not None:
            self.total_steps = min(self.total_steps, max_steps)
        self.epochs = -(-self.total_steps // self.steps)
        self.optimizer = make_optimizer(model, section.optimizer)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.precision = Precision(section.amp, self.device)
        self.epoch = self.step = 0
        self.records: list[EpochRecord] = []
        self.before: dict[str, float] | None = None
        # summed loss and score (correct answers) and images of this epoch and process
        self._totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        # random numbers to go on with: of a state that was loaded, or of the end of the steps while it is evaluated
        self._random: dict[str, Any] | None = None
        self._resumed = False
        self._forward: nn.Module = model

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything: tensors and JSON types, nested. All processes of a world must call it at the same step."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        optimizer = self.optimizer
        groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
        own = {"random": self._random or random_state(), "totals": self._totals}
        scheduler = self.controller.scheduler.get_state() if self.controller is not None else None
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": cpu_state(self.model),
            "optimizer": {"groups": groups, "state": {names[id(p)]: s for p, s in optimizer.state.items()}},
            "precision": self.precision.state_dict(),
            "scheduler": scheduler,
            "parts": {part.name: part.state_dict() for part in self.parts},
            "records": [r.to_dict() for r in self.records],
            "before": self.before,
            "processes": self.world.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any], where: str = "training state") -> None:
        """Go on where :meth:`state_dict` was taken. The model must have been built in the same way.

        :raises CheckpointError: the state is of another model, of other parts or of another number of processes.
        """
        with contents_of(where):
            refuse_nan(state, where)
            self._load(state, where)

    def _load(self, state: dict[str, Any], where: str) -> None:
        if len(state["processes"]) != self.world.size:
            raise CheckpointError(
                f"{where}: saved by {len(state['processes'])} processes, these are {self.world.size}; go on with as "
                "many"
            )
        missing = {part.name for part in self.parts} ^ set(state["parts"])
        if missing:
            raise CheckpointError(f"{where}: its parts are not those of this training; it differs in {min(missing)!r}")
        load_state(self.model, state["model"], where)
        self._load_optimizer(state["optimizer"], where)
        self.precision.load_state_dict(state["precision"])
        if self.controller is not None:
            self.controller.scheduler.load_state(state["scheduler"])
        for part in self.parts:
            part.load_state_dict(state["parts"][part.name])
        self.epoch, self.step, self.before = state["epoch"], state["step"], state["before"]
        if self.epoch not in range(self.epochs + 1) or self.step not in range(self.steps + 1):
            raise CheckpointError(f"{where}: epoch {self.epoch}, step {self.step} is no moment of this training")
        self.records = [EpochRecord(**r) for r in state["records"]]
        own = state["processes"][self.world.rank]
        self._totals.copy_(own["totals"])
        set_random_state(own["random"])  # used later; that it can be is found out now
        self._random, self._resumed = own["random"], True

    def _load_optimizer(self, state: dict[str, Any], where: str) -> None:
        """Groups and moments by the names of the parameters: an algorithm's groups may depend on how far it is."""
        parameters = dict(self.model.named_parameters())
        named = {name for g in state["groups"] for name in g["params"]} | set(state["state"])
        if named - set(parameters):
            raise CheckpointError(f"{where}: belongs to another model: it trains {min(named - set(parameters))!r}")
        order = [name for g in state["groups"] for name in g["params"]]
        empty = [{**g, "params": [parameters[name] for name in g["params"]]} for g in state["groups"]]
        self.optimizer.param_groups.clear()
        for group in empty:
            self.optimizer.add_param_group(group)
        # torch's own function brings moments to the device of their parameter
        numbers = {name: i for i, name in enumerate(order)}
        groups = [{**g, "params": [numbers[name] for name in g["params"]]} for g in state["groups"]]
        self.optimizer.load_state_dict(
            {"state": {numbers[name]: s for name, s in state["state"].items()}, "param_groups": groups}
        )
        check_state(self.optimizer, where)

    # -- the loop ----------------------------------------------------------------------------------------------------
    def run(self) -> list[EpochRecord]:
        """Train from where it stands to the end; returns one record for each epoch.

        :raises FatPluginsError: the loss became NaN or infinite.
        :raises Interrupted: a signal came; the state was saved.
        """
        if not self._resumed:
            # every process draws its own numbers, the first one those of a training without others
            seed_everything(self.seed + self.world.rank)
            self._announce()
            if self.controller is not None:
                self.before = self._held_out_before()
                self.reporter.event("before_training", phase=self.title, **self.before)
        self._forward = self.world.parallel(self.model)
        with self.reporter.phase(self.title, self.epochs, self.steps, self.epoch, self.data.task.metric) as phase:
            while self.epoch < self.epochs:
                try:
                    # several processes can only stop together, at a step on which they agree
                    with self.interrupts.held() if self.world.size > 1 else nullcontext():
                        self._train_epoch(phase)
                        self._stop_if_asked()
                        self._end_epoch(phase)
                        self._stop_if_asked()
                except Interrupted as stop:
                    if self.saving is not None and not stop.at_once:
                        self.saving.save(self)
                    raise
        if self._random is not None:  # of a training that was over
            set_random_state(self._random)
            self._random = None
        self._forward = self.model
        self.model.eval()
        for part in self.parts:
            part.finish(self.model)
        return self.records

    def _announce(self) -> None:
        """Tell a scheduler how long training will be, if it has room for that (some schedules need it)."""
        if self.controller is None:
            return
        scheduler = self.controller.scheduler
        # NNCF 2 drives several algorithms through one scheduler that knows theirs
        for each in (scheduler, *getattr(scheduler, "child_schedulers", ())):
            for name, value in (("total_epochs", self.epochs), ("total_steps", self.total_steps)):
                if hasattr(each, name):
                    setattr(each, name, value)

    def _held_out(self) -> tuple[float, float]:
        return evaluate(self.model, self.data.validation_loader(), self.world, self.data.task)

    def _held_out_before(self) -> dict[str, float | None]:
        loss, accuracy = self._held_out()
        return {"validation_loss": loss if math.isfinite(loss) else None, "validation_accuracy": accuracy}

    def _train_epoch(self, phase: Phase) -> None:
        """The steps of an epoch that are left. A signal waits for the end of a step."""
        until = min(self.steps, self.total_steps - self.epoch * self.steps)
        with self.interrupts.held():
            self.model.train()
            if self.controller is not None and self.step == 0:
                self.controller.scheduler.epoch_step()
            if self._random is not None:
                set_random_state(self._random)
                self._random = None
            batches = iter(self._loader.begin(self.epoch, self.step))
            for images, labels in islice(batches, until - self.step):
                self._one_step(images.to(self.device), labels.to(self.device))
                self.step += 1
                if self.step % READ_EVERY == 1 or self.step == until:
                    loss, correct, count = self._totals.tolist()
                    phase.step(self.epoch, self.step, loss / count, correct / count, round(count) * self.world.size)
                if self.step < until:
                    self._save_or_stop()
            self._random = random_state()  # the evaluation may draw some

    def _one_step(self, images: Tensor, labels: Tensor) -> None:
        factor = lr_factor(self.section.schedule, self.epochs, self.epoch + self.step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.controller is not None:
            self.controller.scheduler.step()
        for part in self.parts:
            part.before_step(self)
        self.optimizer.zero_grad(set_to_none=True)
        count = self.section.accumulate
        passes = next((p for part in self.parts if (p := part.passes(self)) is not None), [nullcontext()])
        for each in passes:
            with each:
                for some_images, some_labels in zip(images.chunk(count), labels.chunk(count), strict=True):
                    totals = self._gradients(some_images, some_labels, len(labels) * len(passes))
                    self._totals += totals / len(passes)
        self.precision.step(self.optimizer, self.section.clip_norm)
        for part in self.parts:
            part.after_step(self)

    def _gradients(self, images: Tensor, labels: Tensor, whole: int) -> Tensor:
        """Add the gradients of a part of a batch of ``whole`` images (of all passes).

        :return: summed loss, score and images (float64), without waiting for the device.
        """
        with self.precision.autocast():
            logits = self._forward(images)
        logits = logits.float()
        loss = self.data.task.loss(logits, labels, float(self.section.label_smoothing))
        if self.controller is not None:
            loss = loss + self.controller.loss()
        for part in self.parts:
            if (term := part.loss(self, images, labels, logits)) is not None:
                loss = loss + term
        self.precision.backward(loss * (len(labels) / whole))
        score = self.data.task.score(logits, labels).double()
        count = torch.full_like(score, len(labels))
        return torch.stack([loss.detach().double() * len(labels), score, count])

    def _stop_if_asked(self) -> None:
        if self.world.any(self.interrupts.pending is not None):
            raise Interrupted(self.interrupts.pending or signal.SIGTERM)

    def _save_or_stop(self) -> None:
        """Between two steps: end if a signal came, or save the state if it is time to."""
        # asking other processes at every step would cost too much
        asking = self.world.size == 1 or self.step % READ_EVERY == 0
        if asking:
            self._stop_if_asked()
        if self.saving is None:
            return
        due = self.saving.by_step(self.epoch * self.steps + self.step)
        if due or (asking and self.world.any(self.saving.by_time())):
            self.saving.save(self)

    def _end_epoch(self, phase: Phase) -> None:
        """Evaluate, let parts see the result, save. A signal acts while the held-out images are looked at, or waits:
        what parts do to the model and to themselves is done whole or not at all."""
        with self.interrupts.held():
            record = self._evaluated_epoch()
            phase.epoch(record)
            self.records.append(record)
            self.epoch, self.step, self._random = self.epoch + 1, 0, None
            self._totals.zero_()
            if self.saving is not None:
                self.saving.save(self)

    def _evaluated_epoch(self) -> EpochRecord:
        self.world.same_buffers(self.model)
        loss, correct, count = self.world.sum(self._totals.clone()).tolist()
        if not math.isfinite(loss):
            raise FatPluginsError(
                f"{self.title}: the loss is {loss / count} in epoch {self.epoch + 1}; lower the learning rate"
            )
        lr = self.optimizer.param_groups[0]["initial_lr"]
        lr *= lr_factor(self.section.schedule, self.epochs, self.epoch)
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.evaluated(self.model))
            if self.parts:  # which may have brought statistics of this process only
                self.world.same_buffers(self.model)
            # several processes can only stop together
            with self.interrupts.released() if self.world.size == 1 else nullcontext():
                anew = self.section.reestimate_norms
                if anew is True or (anew == "auto" and has_noise(self.model)):
                    for _ in each_width(self.model):
                        batches = self.data.calibration_loader(self.batch_size * self.world.size)
                        reestimate_batch_norms(self.model, batches, self.section.norm_batches)
                held_out = self._held_out()
            if not math.isfinite(held_out[0]):  # the last step of the epoch may have been the one that was too large
                raise FatPluginsError(
                    f"{self.title}: the validation loss is {held_out[0]} after epoch {self.epoch + 1}; lower the "
                    "learning rate"
                )
            record = EpochRecord(self.epoch, lr, loss / count, correct / count, *held_out)
            for part in self.parts:
                part.after_epoch(self, record)
        return record


class _OnEpoch(Part):
    name = "on_epoch"

    def __init__(self, call: Callable[[EpochRecord], None]) -> None:
        self.call = call

    def after_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        self.call(record)


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
    """Train ``model`` in place, for those who need neither checkpoints nor parts. See :class:`Trainer`.

    :param on_epoch: called after every epoch.
    :raises FatPluginsError: the loss became NaN or infinite.
    """
    parts = [_OnEpoch(on_epoch)] if on_epoch is not None else []
    trainer = Trainer(
        model, data, section, batch_size=batch_size, seed=seed, controller=controller, parts=parts, reporter=reporter,
        title=title,
    )  # fmt: skip
    return trainer.run()
