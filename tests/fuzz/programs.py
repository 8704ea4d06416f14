"""The program, made ready to be fed with thousands of inputs in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

#: where parts that the tests of recipes share lie
RECIPES = Path(__file__).parents[1] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES.parent)]

from toy_host import ToyHost  # noqa: E402

from fat_plugins import cli  # noqa: E402
from fat_plugins.recipes import hosts, loaded, run, targets  # noqa: E402


def command(*args: Any) -> int:
    """A command of ``fat-plugins``; returns its exit code."""
    try:
        cli.app([str(a) for a in args])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    raise AssertionError("a command always exits")


def _host(name: str) -> Any:
    """Hosts of the package without their framework; any other name as it is."""
    return ToyHost() if name in ("nncf", "brevitas") else hosts.get_host(name)


def _begin(*args: Any) -> Any:
    """What a valid recipe reaches: nothing is trained."""
    raise SystemExit(0)


@contextmanager
def without_hosts() -> Iterator[None]:
    """No host and no runtime is needed."""
    with ExitStack() as stack:
        for owner, name, value in (
            (run, "get_host", _host),
            (loaded, "get_host", _host),
            (targets.Target, "require", lambda self: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def begin_training(*args: Any) -> int:
    """``train``, which ends with code 0 where it would make the directory of the run."""
    with mock.patch.object(run, "_directory", _begin):
        return command("train", *args)
