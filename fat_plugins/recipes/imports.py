"""Functions of the user's own that a recipe names as ``module:function``; imported with permission only."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from fat_plugins.errors import ConfigError, nearest, shown

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_allowed: set[str] = set()


def allow(*modules: str) -> None:
    """Permit modules, and what is inside packages of that name, for the rest of this process.

    :raises ConfigError: not the name of a module.
    """
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"--allow-import: {module!r} is not the name of a module, such as my_package.data")
    _allowed.update(modules)


def allowed() -> list[str]:
    """Modules that :func:`allow` has permitted."""
    return sorted(_allowed)


def check_name(name: str, key: str) -> None:
    """Refuse what is not ``module:function``; nothing is imported.

    :raises ConfigError: one line with the key.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key}: expected 'module:function', got {shown(name)}")


def load(name: str, key: str) -> Callable[..., Any]:
    """The function called ``name``.

    :param key: of the recipe, for messages.
    :raises ConfigError: not permitted, no such module or function.
    """
    check_name(name, key)
    module, _, function = name.partition(":")
    if not _permitted(module):
        raise ConfigError(
            f"{key}: the recipe wants to run code of module {module!r}; if you trust it, add --allow-import {module}"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script does not look there
    try:
        found = import_module(module)
    except ImportError as error:
        raise ConfigError(f"{key}: cannot import {module!r}: {error}") from None
    except SyntaxError as error:
        raise ConfigError(f"{key}: cannot import {module!r}: {error.filename}:{error.lineno}: {error.msg}") from None
    target = getattr(found, function, None)
    if not callable(target):
        raise ConfigError(f"{key}: module {module!r} has no function {function!r}{nearest(function, vars(found))}")
    home = getattr(target, "__module__", None) or module
    if not _permitted(home):  # what it imports itself, such as subprocess.run, is not the user's
        raise ConfigError(f"{key}: {name!r} is of module {home!r}; if you trust it, add --allow-import {home}")
    return target


def call(name: str, key: str, options: dict[str, Any], **given: Any) -> Any:
    """What the function called ``name`` returns.

    :param options: keyword arguments of the recipe's, ``given``: ours.
    :raises ConfigError: as :func:`load`; the function does not take these arguments.
    """
    function = load(name, key)
    try:
        signature(function).bind(**given, **options)
    except TypeError as error:
        raise ConfigError(f"{key}: {name} does not take these options: {error}") from None
    except ValueError:  # a function without a signature, such as one of C
        pass
    return function(**given, **options)


def _permitted(module: str) -> bool:
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in _allowed for i in range(len(parts)))
