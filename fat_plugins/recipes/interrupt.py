"""Ctrl-C and SIGTERM: at once where nothing is lost, after the step and a checkpoint while a model is in training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was told to stop.

    :ivar signal: number of the signal; a process that it ends has exit code 128 + that.
    :ivar directory: of the run, once that is known.
    :ivar at_once: it was told so twice, and did not wait for the end of a step: what is in memory may be half done.
    """

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal, self.at_once = int(number), at_once
        self.directory: Path | None = None


class Interrupts:
    """Remembers a signal while it is held back.

    :ivar pending: number of the signal that waits, or ``None``.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._depth = 0

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Handle SIGINT and SIGTERM meanwhile. Does nothing in a thread other than the main one."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._depth and self.pending is None:
            self.pending = number
        else:  # whoever asks twice does not want to wait
            raise Interrupted(number, at_once=bool(self._depth))

    @contextmanager
    def held(self) -> Iterator[None]:
        """A first signal only becomes :attr:`pending` within this block; a second one raises :class:`Interrupted`."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
