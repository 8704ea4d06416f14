"""What a person sees while training runs: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fat_plugins.recipes.logs import Log
from fat_plugins.recipes.tasks import ACCURACY, Metric

if TYPE_CHECKING:
    from fat_plugins.recipes.trainer import EpochRecord

#: lines that a phase prints where no bar can be drawn
LINES_PER_PHASE = 4


class Phase:
    """One phase of training, as the trainer reports it.

    :param epochs, steps: planned, and optimizer steps per epoch.
    :param done: epochs that an earlier run did.
    :param metric: how the task's number is shown.
    """

    def __init__(
        self,
        reporter: Reporter,
        title: str,
        epochs: int,
        steps: int,
        done: int,
        bar: Progress | None = None,
        task: TaskID | None = None,
        metric: Metric = ACCURACY,
    ) -> None:
        self._reporter, self._title, self._epochs, self._steps, self._done = reporter, title, epochs, steps, done
        self._bar, self._task, self._metric = bar, task, metric
        self._start = time.monotonic()
        #: epoch, images and time of its first reading: the first step of a phase is not like the others
        self._begun: tuple[int, int, float] | None = None
        self._speed: float | None = None

    def step(self, epoch: int, step: int, loss: float, accuracy: float, images: int) -> None:
        """Steps of an epoch are done.

        :param epoch, step: epochs done, and steps of this one.
        :param loss, accuracy: mean over this epoch; the second is the metric (accuracy 0 to 1).
        :param images: images of this epoch so far, of all processes.
        """
        now = time.monotonic()
        if self._begun is None or self._begun[0] != epoch:
            self._begun = (epoch, images, now)
        elif now > self._begun[2]:
            self._speed = (images - self._begun[1]) / (now - self._begun[2])
        if self._bar is not None:
            values = f"loss {loss:.3f}  train {self._judged(accuracy)}{self._images_per_second()}"
            self._bar.update(self._task, completed=epoch + step / self._steps, values=values)

    def _judged(self, value: float) -> str:
        return f"{self._metric.short} {self._metric.text(value):>6}"

    def _images_per_second(self) -> str:
        return "" if self._speed is None else f"  {self._speed:,.0f} images/s"

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""
        done, seconds = record.epoch + 1, time.monotonic() - self._start
        speed = None if self._speed is None else round(self._speed, 1)
        fields = {**record.to_dict(), "images_per_second": speed}
        if self._metric != ACCURACY:
            fields["metric"] = self._metric.name
        self._reporter.event("epoch", phase=self._title, epochs=self._epochs, **fields)
        values = (
            f"loss {record.train_loss:.3f}  train {self._judged(record.train_accuracy)}  "
            f"val {self._judged(record.validation_accuracy)}{self._images_per_second()}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=values)
            return
        every = max(1, self._epochs // LINES_PER_PHASE)
        if done % every == 0 or done == self._epochs:
            left = round(seconds / (done - self._done) * (self._epochs - done))
            values += f"  {timedelta(seconds=left)} left" if left else ""
            self._reporter.say(f"{self._title}: epoch {done}/{self._epochs}  {values}")


class Reporter:
    """Where progress goes.

    :param quiet: print nothing.
    :param console: default: standard error, so that results on standard output stay clean.
    :param logs: receive every event, also when quiet.
    :ivar about: what is being trained (algorithm, seed, stage), part of every event until it is replaced.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None, logs: Sequence[Log] = ()) -> None:
        self.console = console or Console(stderr=True)
        self.quiet, self.logs = quiet, list(logs)
        self.about: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """One line of plain text."""
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, kind: str, **fields: Any) -> None:
        """Something for the logs, see :class:`fat_plugins.recipes.logs.Log`."""
        for log in self.logs:
            log.event(kind, {**self.about, **fields})

    def close(self) -> None:
        """Close the logs."""
        for log in self.logs:
            log.close()

    @contextmanager
    def phase(self, title: str, epochs: int, steps: int, done: int = 0, metric: Metric = ACCURACY) -> Iterator[Phase]:
        """Follow one phase of training; parameters as of :class:`Phase`."""
        self.event("stage", phase=title, epochs=epochs, steps_per_epoch=steps, epochs_done=done)
        if self.quiet or not self.console.is_terminal:
            yield Phase(self, title, epochs, steps, done, metric=metric)
            return
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            TextColumn("epoch {task.completed:.0f}/{task.total}"),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=epochs, completed=done, values="")
            yield Phase(self, title, epochs, steps, done, bar, task, metric)
