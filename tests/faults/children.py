"""``python -m fat_plugins`` in children that are forked from a process that has imported everything.

Importing torch and a host takes longer than the training of a small recipe. So the parent imports them once and starts
no thread; each child then is what a fresh interpreter would be after its imports. Linux and macOS only.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

#: seconds after which a child counts as hanging
TIMEOUT = 180
#: exit code of a child that ended by an exception that nothing caught
TRACEBACK = 70


def warm_up() -> None:
    """Import what the children will need."""
    import fat_plugins.cli_train
    import fat_plugins.recipes.run  # noqa: F401

    for host in ("fat_nncf", "fat_brevitas"):
        if find_spec({"fat_nncf": "nncf", "fat_brevitas": "brevitas"}[host]) is not None:
            __import__(f"{host}.recipe_host")


@dataclass(frozen=True)
class Blow:
    """What happens to a child.

    :param signal: that it gets.
    :param after: seconds after its start; or
    :param write: when it makes this call, counted from 0, of those that write, sync or move a file of the run.
    :param again: seconds until it gets the signal once more.
    """

    signal: int
    after: float | None = None
    write: int | None = None
    again: float | None = None


@dataclass(frozen=True)
class End:
    """How a child ended: exit code (negative: by that signal), seconds, what it printed, calls that wrote files."""

    code: int
    seconds: float
    output: str
    writes: int = 0


class Child:
    """``python -m fat_plugins ARGS`` in ``folder``, started.

    :param name: distinguishes children of one folder.
    :param env: further variables of its environment.
    """

    def __init__(
        self,
        args: Sequence[str],
        folder: Path,
        blow: Blow | None = None,
        name: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        self.args, self.blow = args, blow
        self.output, self.counter = folder / f"output{name}.txt", folder / f"writes{name}.txt"
        self.output.write_text("")  # it may be struck before it opens the file
        self.start = time.monotonic()
        self.number = os.fork()
        if self.number == 0:
            os.environ.update(env or {})
            _become(args, folder, self.output, self.counter, blow)

    def gone(self) -> bool:
        """Whether it has ended; :meth:`wait` tells how."""
        # WNOWAIT: its status stays
        return os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def strike(self) -> None:
        """Do what ``blow`` says, unless it has ended by then."""
        start = self.start
        for delay in (self.blow.after, self.blow.again):
            if delay is None:
                return
            while time.monotonic() < start + delay:
                if self.gone():
                    return
                time.sleep(0.001)
            os.kill(self.number, self.blow.signal)
            start = time.monotonic()

    def wait(self, seconds: float = TIMEOUT) -> End:
        """:raises TimeoutError: it still runs so many seconds from now; it is ended then."""
        end = time.monotonic() + seconds
        while not self.gone():
            if time.monotonic() > end:
                os.kill(self.number, signal.SIGABRT)  # it shows where it hangs
                os.waitpid(self.number, 0)
                raise TimeoutError(f"{' '.join(self.args)} hangs after {self.blow}: {self.output.read_text()}")
            time.sleep(0.002)
        taken = time.monotonic() - self.start
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        writes = int(self.counter.read_text()) if self.counter.exists() else 0
        self.counter.unlink(missing_ok=True)
        return End(code, taken, self.output.read_text(errors="replace"), writes)


def run(args: Sequence[str], folder: Path, blow: Blow | None = None) -> End:
    """A child from its start to its end.

    :raises TimeoutError: it hangs.
    """
    child = Child(args, folder, blow)
    if blow is not None and blow.after is not None:
        child.strike()
    return child.wait()


def _become(args: Sequence[str], folder: Path, output: Path, counter: Path, blow: Blow | None) -> None:
    """Never returns."""
    code = TRACEBACK
    try:
        os.setsid()
        os.chdir(folder)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(target, number)
        faulthandler.enable()
        sys.argv = ["fat-plugins", *args]
        sys.path.append(str(folder))
        calls = _watch_writes(blow)
        try:
            runpy.run_module("fat_plugins", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        counter.write_text(str(len(calls)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch_writes(blow: Blow | None) -> list[str]:
    """Count the calls by which files of a run are written; strike at one of them."""
    from fat_plugins import cli_train
    from fat_plugins.recipes import checkpoint

    cli_train.available = lambda: False  # no page of plots: it takes longer than the training, and holds no state
    calls: list[str] = []

    def due(name: str) -> bool:
        calls.append(name)
        return blow is not None and blow.write == len(calls) - 1

    def strike() -> None:
        os.kill(os.getpid(), blow.signal)
        if blow.again is not None:
            time.sleep(blow.again)
            os.kill(os.getpid(), blow.signal)

    def watched(name: str, real):
        def call(*args, **kwargs):
            if due(name):
                strike()
            return real(*args, **kwargs)

        return call

    def write_bytes(self: Path, data: bytes) -> int:
        if due("write"):
            with open(self, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                strike()
        with open(self, "wb") as file:
            return file.write(data)

    class Os:
        """``os`` as the module under test sees it."""

        def __getattr__(self, name: str):
            return getattr(os, name)

    own = Os()
    own.fsync, own.replace = watched("fsync", os.fsync), watched("replace", os.replace)
    checkpoint.os = own
    checkpoint.Path.write_bytes = write_bytes
    return calls
