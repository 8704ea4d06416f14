"""Names that go away warn first: helpers for those that have moved, and for functions that have a successor."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from fat_plugins.errors import nearest

F = TypeVar("F", bound=Callable[..., Any])


def warn(old: str, new: str, until: str, stacklevel: int = 2) -> None:
    """Say that ``old`` goes away.

    :param new: what to use in its place.
    :param until: the first version without it.
    :param stacklevel: as for :func:`warnings.warn`, 2 is the caller of this function.
    """
    text = f"{old} is deprecated and will be gone in fat-plugins {until}: use {new}"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel + 1)


def moved(module: str, names: Mapping[str, str], until: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module from which names have moved: they are found, with a warning.

    :param module: ``__name__`` of the old module.
    :param names: from each name to the module where it is now, which is imported when the name is asked for.
    :param until: the first version in which the old place is gone.
    """

    def lookup(name: str) -> Any:
        if name not in names:
            # what looks through modules asks for such names of all of them: no search for those
            hint = "" if name.startswith("__") else nearest(name, names)
            raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")
        warn(f"{module}.{name}", f"{names[name]}.{name}", until)
        return getattr(import_module(names[name]), name)

    return lookup


def deprecated(new: str, until: str) -> Callable[[F], F]:
    """A decorator for a function that has a successor: calls warn, and do what they did.

    :param new, until: as for :func:`warn`.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            warn(f"{function.__module__}.{function.__qualname__}", new, until)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
