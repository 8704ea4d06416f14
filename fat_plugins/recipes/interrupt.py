"""Ctrl-C and SIGTERM: at once where nothing is lost, after the step and a checkpoint while a model is in training."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: seconds after the first :class:`Interrupted` in which no other is raised: what is in progress is cleared up
_QUIET = 1.0


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

    :ivar pending: number of the signal that came, or ``None``.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._depth = 0
        self._raised: float | None = None

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
        waits = self._depth and self.pending is None
        # also when it is raised: Python drops an exception that meets a destructor, and the next check finds this
        self.pending = number
        if waits or (self._raised is not None and time.monotonic() - self._raised < _QUIET):
            return
        self._raised = time.monotonic()
        raise Interrupted(number, at_once=bool(self._depth))  # whoever asks twice does not want to wait

    def swallowed(self) -> Interrupted | None:
        """An :class:`Interrupted` for the one that was raised, where code of others made another exception of it."""
        return None if self._raised is None or self.pending is None else Interrupted(self.pending)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A first signal only becomes :attr:`pending` within this block; a second one raises :class:`Interrupted`."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within a block of :meth:`held`: here a signal acts at once, also one that has been waiting.

        :raises Interrupted: there is one.
        """
        depth = self._depth
        try:
            self._depth = 0
            if self.pending is not None:
                raise Interrupted(self.pending)
            yield
        finally:
            self._depth = depth
