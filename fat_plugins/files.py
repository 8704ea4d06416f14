"""Text and JSON from files that may hold anything: bounded, strict, and one line for what is wrong with them."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from fat_plugins.errors import ConfigError, FatPluginsError, shown

#: no honest config is larger; keeps a wrong file name from filling the memory
MAX_BYTES = 1_000_000
#: the same of results, which have a row for every layer and epoch
MAX_RESULTS = 100_000_000
MAX_DEPTH = 50
#: longer numbers mean nothing, and take Python longer than their length
MAX_DIGITS = 400


def is_file(path: Path) -> bool:
    """Whether a name stands for an ordinary file; names that no file can have do not."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a NUL in it
        return False


def is_folder(path: Path) -> bool:
    """Whether a name stands for a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: Path, where: str = "", error: type[FatPluginsError] = ConfigError, limit: int = MAX_BYTES) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    :param where: what messages call the file; default: its path.
    :param limit: in bytes.
    :raises FatPluginsError: of the class ``error``: no such file, not an ordinary one, too large, not UTF-8.
    """
    where = where or str(path)
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise error(f"{where}: is a directory, expected a file")
        if not stat.S_ISREG(about.st_mode):
            raise error(f"{where}: not an ordinary file")
        if about.st_size > limit:
            raise error(f"{where}: larger than {limit} bytes, the most that is read")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{where}: not a text file (UTF-8)") from None
    except OSError as problem:
        raise error(f"{where}: {problem.strerror or problem}") from None
    except FatPluginsError:
        raise
    except ValueError as problem:  # a NUL in the name
        raise error(f"{where}: {problem}") from None


class _Refused(ValueError):
    """Something that JSON's grammar allows and no config has."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"key {shown(key)} occurs twice")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number {shown(text)}; only finite numbers are allowed")
    return value


def parse_json(text: str, where: str, error: type[FatPluginsError] = ConfigError) -> Any:
    """Strict JSON: no key twice, no NaN or Infinity, no more than ``MAX_DEPTH`` levels.

    :param where: of the text, for messages.
    :raises FatPluginsError: of the class ``error``, with the line where it is known.
    """
    try:
        tree = json.loads(
            text, object_pairs_hook=_once, parse_int=_integer, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as problem:
        raise error(f"{where}: line {problem.lineno}: not JSON: {problem.msg}") from None
    except RecursionError:
        raise error(f"{where}: nested too deeply; allowed: {MAX_DEPTH} levels") from None
    except _Refused as problem:
        raise error(f"{where}: {problem}") from None
    check_tree(tree, where, error)
    return tree


def check_tree(tree: Any, where: str, error: type[FatPluginsError] = ConfigError) -> None:
    """Refuse what is nested too deeply, and text that is no Unicode (halves of characters).

    :raises FatPluginsError: of the class ``error``.
    """
    level = [tree]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise error(f"{where}: {shown(value)} is not Unicode text") from None
        if not below:
            return
        level = below
    raise error(f"{where}: nested too deeply; allowed: {MAX_DEPTH} levels")
