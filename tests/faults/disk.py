"""A disk that fails: at one call, or from one call on."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fat_plugins.recipes import checkpoint


@contextmanager
def failing(at: int | None = None, code: int = errno.ENOSPC, for_good: bool = False) -> Iterator[list[str]]:
    """Calls by which files of a run are written raise ``OSError`` at the call of that number, counted from 0.

    What a call writes is half written then.

    :param at: ``None`` only counts.
    :param for_good: so do all calls after it.
    :return: names of the calls, those that failed among them.
    """
    calls: list[str] = []

    def due(name: str) -> bool:
        calls.append(name)
        number = len(calls) - 1
        return at is not None and (number >= at if for_good else number == at)

    def watched(name: str, real):
        def call(*args, **kwargs):
            if due(name):
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    def write_bytes(self: Path, data: bytes) -> int:
        bad = due("write")
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2] if bad else data)
        if bad:
            raise OSError(code, os.strerror(code))
        return len(data)

    class Os:
        """``os`` as the module under test sees it."""

        def __getattr__(self, name: str):
            return getattr(os, name)

    own = Os()
    for name in ("fsync", "replace", "open"):
        setattr(own, name, watched(name, getattr(os, name)))

    class Temporary:
        mkstemp = staticmethod(watched("mkstemp", tempfile.mkstemp))

    kept = checkpoint.os, checkpoint.tempfile, checkpoint.Path
    own_path = type("OwnPath", (type(Path()),), {"write_bytes": write_bytes, "chmod": watched("chmod", Path.chmod)})
    checkpoint.os, checkpoint.tempfile, checkpoint.Path = own, Temporary, own_path
    try:
        yield calls
    finally:
        checkpoint.os, checkpoint.tempfile, checkpoint.Path = kept
