"""What a person sees while training runs: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

#: lines that a phase prints where no bar can be drawn
LINES_PER_PHASE = 4


class Phase:
    """One phase of training, as the trainer reports it."""

    def __init__(self, reporter: Reporter, title: str, epochs: int, bar: Progress | None, task: TaskID | None) -> None:
        self._reporter, self._title, self._epochs, self._bar, self._task = reporter, title, epochs, bar, task

    def step(self, epoch: float, loss: float, accuracy: float) -> None:
        """:param epoch: epochs done, with fraction; loss and accuracy (0 to 1) are those of the running epoch."""
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch, values=f"loss {loss:.3f}  train acc {accuracy:6.2%}")

    def epoch(self, done: int, loss: float, accuracy: float, held_out: float) -> None:
        """An epoch is over; ``held_out`` is the accuracy on the validation images."""
        values = f"loss {loss:.3f}  train acc {accuracy:6.2%}  val acc {held_out:6.2%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, values=values)
            return
        every = max(1, self._epochs // LINES_PER_PHASE)
        if done % every == 0 or done == self._epochs:
            self._reporter.say(f"{self._title}: epoch {done}/{self._epochs}  {values}")


class Reporter:
    """Where progress goes.

    :param quiet: print nothing.
    :param console: default: standard error, so that results on standard output stay clean.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line of plain text."""
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, epochs: int) -> Iterator[Phase]:
        """Follow one phase of training."""
        if self.quiet or not self.console.is_terminal:
            yield Phase(self, title, epochs, None, None)
            return
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            TextColumn("epoch {task.completed:.0f}/{task.total}"),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            yield Phase(self, title, epochs, bar, bar.add_task(title, total=epochs, values=""))
