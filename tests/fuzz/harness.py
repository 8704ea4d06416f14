"""Runs one bad input and judges what the program made of it.

An input is refused with one line, or it is taken because it is valid. A traceback, a message of several lines, a hang,
memory without bound, a changed file, a started process, a connection and an import of something that a file names are
defects.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from mutate import CANARY

from fat_plugins.errors import FatPluginsError

#: seconds of the clock and of the processor that one input may take; megabytes by which it may raise the peak of memory
CLOCK, PROCESSOR, MEMORY = 60, 10.0, 700
#: longest message
LENGTH = 1500
REFUSED, ACCEPTED, DEFECT = "refused", "accepted", "defect"


@dataclass
class Case:
    """One input.

    :param what: what is wrong with it.
    :param run: hands it to the program; raises what the program raises, or returns the exit code of a command, of which
        standard output and standard error are then judged.
    :param bad, names, hint: see :class:`mutate.Damage`.
    :param folder: nothing may change in it when the input is refused.
    :param writes: where else the program may write.
    """

    what: str
    run: Callable[[], int | None]
    bad: bool = False
    names: tuple[str, ...] = ()
    hint: str | None = None
    folder: Path | None = None
    writes: Path | None = None


@dataclass
class Verdict:
    """What came of an input: ``status`` is refused, accepted or defect."""

    status: str
    message: str = ""
    seconds: float = 0.0


class Hang(BaseException):
    """The time of an input is over; no handler of the program may swallow it."""


# --------------------------------------------------------------------------------------------------------------------
# what no input may cause
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _Watch:
    folders: tuple[Path, ...] = ()
    seen: list[str] | None = None


_watch = _Watch()
_NEVER = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect",
          "socket.getaddrinfo", "urllib.Request", "webbrowser.open", "ctypes.dlopen_of_a_file")  # fmt: skip
#: files that Python, OpenVINO and matplotlib write for themselves
_OF_OTHERS = ("__pycache__", os.devnull, "/intel/", "/.cache/", "/matplotlib")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _audit(event: str, args: tuple) -> None:
    if _watch.seen is None:
        return
    if event in _NEVER:
        _watch.seen.append(f"{event} {args!r:.100}")
    elif event == "import" and CANARY in str(args[0]):
        _watch.seen.append(f"import of {args[0]}")
    elif event == "open" and isinstance(args[2], int) and args[2] & _WRITING and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        inside = any(path.startswith(f"{f.resolve()}{os.sep}") for f in _watch.folders)
        if not inside and not any(part in path for part in _OF_OTHERS):
            _watch.seen.append(f"opened for writing: {path}")


sys.addaudithook(_audit)


@contextmanager
def watched(*folders: Path | None) -> Iterator[list[str]]:
    """What happens inside that must not. In the folders the program may write."""
    _watch.folders, _watch.seen = tuple(f for f in folders if f is not None), []
    try:
        yield _watch.seen
    finally:
        _watch.seen = None


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path | None) -> dict[str, tuple]:
    """All names in a folder with what tells whether they were touched."""
    found = {}
    for root, folders, files in os.walk(folder) if folder is not None else ():
        for name in (*folders, *files):
            path = os.path.join(root, name)
            about = os.lstat(path)
            size = about.st_size if name in files else 0
            found[path] = (about.st_ino, size, about.st_mtime_ns if name in files else 0, about.st_mode)
    return found


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------------------------------------
# judging
# --------------------------------------------------------------------------------------------------------------------
def faults_of(message: str, case: Case) -> Iterator[str]:
    """What is wrong with a message."""
    if not message.strip():
        yield "an empty message"
    if not all(c.isprintable() for c in message):
        yield "characters that are not printable in the message"
    if len(message) > LENGTH:
        yield f"a message of {len(message)} characters"
    if " at 0x" in message or "object at" in message:
        yield "an address of memory in the message"
    if case.names and not any(name and name in message for name in case.names):
        yield f"the message names none of {case.names}"
    if (
        case.hint is not None
        and f"did you mean '{case.hint}'?" not in message
        and f"nearest is '{case.hint}'" not in message
    ):
        yield f"the message does not offer {case.hint!r}"


def _of_command(code: int, out: str, err: str, case: Case) -> tuple[str, str, list[str]]:
    """Status, message and faults of a command that ended by itself."""
    if code == 0:
        return ACCEPTED, "", []
    faults = []
    if code not in (1, 2):
        faults.append(f"exit code {code}")
    lines = err.splitlines()
    if code == 2 and out:
        faults.append(f"an error, and on standard output {out[:100]!r}")
    if len(lines) != 1 or not lines[0].startswith(("error: ", "failed: ")):
        faults.append(f"standard error is not one line: {err[:300]!r}")
    message = lines[-1].partition(": ")[2] if lines else ""
    return REFUSED, message, [*faults, *faults_of(message, case)]


def judge(case: Case) -> Verdict:
    """Run an input and say what came of it."""
    before, peak = snapshot(case.folder), _megabytes()
    clock, processor = time.perf_counter(), time.process_time()
    out, err = io.StringIO(), io.StringIO()
    status, message, faults = ACCEPTED, "", []
    with watched(case.folder, case.writes) as seen:
        try:
            with limited(CLOCK), redirect_stdout(out), redirect_stderr(err):
                code = case.run()
            if code is not None:
                status, message, faults = _of_command(code, out.getvalue(), err.getvalue(), case)
        except FatPluginsError as error:
            status, message = REFUSED, str(error)
            faults = list(faults_of(message, case))
        except Hang:
            status, faults = REFUSED, [f"a hang of more than {CLOCK} s"]
        except MemoryError:
            status, faults = REFUSED, ["out of memory"]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            status = REFUSED
            last = [f for f in traceback.extract_tb(error.__traceback__) if "fuzz" not in f.filename]
            places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(last[-4:]))
            faults = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({places})"]
    used = time.process_time() - processor
    faults += [f"it caused: {what}" for what in seen]
    if status == ACCEPTED and case.bad:
        faults.append("it was accepted")
    if status == REFUSED and snapshot(case.folder) != before:
        after = snapshot(case.folder)
        changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        faults.append(f"files changed: {changed[:3]}")
    if used > PROCESSOR:
        faults.append(f"it took {used:.1f} s of the processor")
    if _megabytes() - peak > MEMORY:
        faults.append(f"it took {_megabytes() - peak:.0f} MB of memory")
    seconds = time.perf_counter() - clock
    return (
        Verdict(DEFECT, f"{'; '.join(faults)} | {message[:300]}", seconds)
        if faults
        else Verdict(status, message, seconds)
    )


@dataclass
class Tally:
    """Counts of one kind of input."""

    refused: int = 0
    accepted: int = 0
    defects: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, verdict: Verdict, name: str) -> None:
        self.slowest = max(self.slowest, (verdict.seconds, name))
        if verdict.status == DEFECT:
            self.defects.append(f"{name}: {verdict.message}")
        elif verdict.status == REFUSED:
            self.refused += 1
        else:
            self.accepted += 1
