"""``python -m fat_plugins`` in children that are forked from a process that has imported everything.

Importing torch and a host takes longer than the training of a small recipe. So the parent imports them once and starts
no thread; each child then is what a fresh interpreter would be after its imports. Linux and macOS only.
"""

from __future__ import annotations

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


def run(args: Sequence[str], folder: Path, blow: Blow | None = None) -> End:
    """``python -m fat_plugins ARGS`` in ``folder``.

    :raises TimeoutError: it hangs.
    """
    output, counter = folder / "output.txt", folder / "writes.txt"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(args, folder, output, counter, blow)
    if blow is not None and blow.after is not None:
        _strike(child, blow, start)
    status = _wait(child, start + TIMEOUT)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise TimeoutError(f"{' '.join(args)} hangs after {blow}: {output.read_text()}")
    writes = int(counter.read_text()) if counter.exists() else 0
    counter.unlink(missing_ok=True)
    return End(os.waitstatus_to_exitcode(status), time.monotonic() - start, output.read_text(errors="replace"), writes)


def _wait(child: int, until: float) -> int | None:
    """Status of the child, ``None`` if it still runs then."""
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    return None


def _strike(child: int, blow: Blow, start: float) -> None:
    for delay in (blow.after, blow.again):
        if delay is None:
            return
        end = (start if delay is blow.after else time.monotonic()) + delay
        while time.monotonic() < end:
            # WNOWAIT: it stays for _wait to find
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.001)
        os.kill(child, blow.signal)


def _become(args: Sequence[str], folder: Path, output: Path, counter: Path, blow: Blow | None) -> None:
    """Never returns."""
    code = TRACEBACK
    try:
        os.setsid()
        os.chdir(folder)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(target, number)
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
