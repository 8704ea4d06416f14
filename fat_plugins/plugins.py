"""Classes by name, found through entry points: algorithms, and the other kinds of what papers bring."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar

from pydantic import ValidationError

from fat_plugins.errors import ConfigError, unknown
from fat_plugins.explain import explain
from fat_plugins.quantizer import Params


class Plugin:
    """What an entry point names: its options, validated in one way for all kinds."""

    name: ClassVar[str]
    Params: ClassVar[type[Params]] = Params

    @classmethod
    def parse_params(cls, params: dict[str, Any] | None, where: str = "params") -> Params:
        """Validate the options.

        :raises ConfigError: unknown key or bad value, with the key's path.
        """
        try:
            return cls.Params.model_validate(params or {})
        except ValidationError as error:
            raise ConfigError(explain(error, cls.Params, where)) from None


@cache
def load_group(group: str, base: type, kind: str) -> tuple[dict[str, type], dict[str, str]]:
    """Usable classes of an entry-point group by name, and why the others are not.

    :param group: such as ``"fat_plugins.algorithms"``.
    :param base: what each must derive from; its ``name`` must be that of its entry point.
    :param kind: what one of them is called in messages.
    """
    found: dict[str, type] = {}
    broken: dict[str, str] = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        where = f"entry point {point.name} = {point.value}"
        try:
            loaded = point.load()
        except Exception as error:  # somebody else's package: it must not take the others down
            broken[point.name] = f"{where} cannot be loaded: {type(error).__name__}: {error}"
            continue
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            broken[point.name] = f"{where} is not a fat_plugins {base.__name__}"
        elif loaded.name != point.name:
            broken[point.name] = f"{where} calls itself '{loaded.name}'"
        elif found.get(point.name, loaded) is not loaded:
            one = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
            broken[point.name] = f"{where}: another installed package has {one} of this name"
        else:
            found[point.name] = loaded
    for name, reason in broken.items():
        found.pop(name, None)
        warnings.warn(f"{kind} '{name}' is left out: {reason}", RuntimeWarning, stacklevel=4)
    return found, broken


def named(loaded: tuple[dict[str, type], dict[str, str]], kind: str, name: str) -> type:
    """The class called ``name``.

    :param loaded: what :func:`load_group` found.
    :raises ConfigError: unknown name, with the nearest valid one, or a class that cannot be loaded.
    """
    known, broken = loaded
    if name in broken:
        raise ConfigError(f"{kind} '{name}': {broken[name]}")
    if name not in known:
        raise ConfigError(unknown(kind, name, known))
    return known[name]
