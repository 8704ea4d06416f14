"""Scopes of a config: which names of a traced model a string or ``{re}`` pattern means. Hosts supply the names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fat_plugins.errors import ConfigError

#: modules whose class NNCF 2 replaced by one of its own, so that their class reads ``NNCFConv2d`` in its scopes
_WRAPPED_BY_NNCF2 = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def as_list(scopes: Iterable[str] | str | None) -> list[str]:
    """A config allows one scope, a list, or nothing."""
    return [scopes] if isinstance(scopes, str) else list(scopes or [])


class ScopeNames:
    """The names under which a user may know each node of a traced model.

    A scope matches a node when it is one of the node's names, a prefix of one at a component boundary (``"layer1"``,
    ``"ResNet/Sequential[layer1]"``), or ``{re}`` followed by a regular expression found in one of them.

    :param names: node name to all its names.
    """

    def __init__(self, names: dict[str, tuple[str, ...]]) -> None:
        self._names = names

    def _match(self, scope: str, node_name: str) -> bool:
        names = self._names.get(node_name, (node_name,))
        if "{re}" in scope:
            try:
                pattern = re.compile(scope.replace("{re}", ""))
            except re.error as error:
                raise ConfigError(f"scope {scope!r}: not a regular expression: {error}") from None
            return any(pattern.search(name) for name in names)
        return any(name == scope or name.startswith((scope + "/", scope + ".")) for name in names)

    def matches(self, scopes: Iterable[str] | str | None, nodes: Iterable[str]) -> bool:
        """Whether any scope matches any of the ``nodes`` (node names)."""
        nodes = list(nodes)
        return any(self._match(scope, node) for scope in as_list(scopes) for node in nodes)

    def select(self, scopes: Iterable[str] | str | None) -> set[str]:
        """Names of all nodes that the scopes match."""
        return {node for node in self._names if self.matches(scopes, [node])}

    def operations(self) -> set[str]:
        """Names of all nodes that can be matched."""
        return set(self._names)

    def excluded(self, section: Any) -> set[str]:
        """Names of the nodes that ``ignored_scopes`` and ``target_scopes`` of a section, or of all its ``parts``,
        leave out."""
        parts = getattr(section, "parts", (section,))
        left = [self.select(part.ignored_scopes) for part in parts]
        for part, names in zip(parts, left, strict=True):
            if as_list(part.target_scopes):
                names |= self.operations() - self.select(part.target_scopes)
        return set.intersection(*left)

    def check(self, scopes: Iterable[str] | str | None, where: str) -> None:
        """Refuse scopes that match nothing.

        :raises ConfigError: names the scope and the nearest name in the model.
        """
        for scope in as_list(scopes):
            if not isinstance(scope, str):
                raise ConfigError(f"{where}: a scope is a string, got {scope!r}")
            if not self.select(scope):
                names = dict.fromkeys(n for group in self._names.values() for n in group)
                found = difflib.get_close_matches(scope.replace("{re}", ""), names, n=1, cutoff=0.0)
                hint = f"; the nearest is '{found[0]}'" if found else ""
                raise ConfigError(f"{where}: scope {scope!r} matches nothing in the model{hint}")


def nncf2_path(modules: Mapping[str, nn.Module], path: str, prefix: str = "NNCF") -> str:
    """The name that NNCF 2's configs give to a module: ``Net/Sequential[layer1]/NNCFConv2d[0]`` for ``layer1.0``.

    :param modules: the model's modules by dotted path, the model itself under ``""``.
    :param prefix: what NNCF 2 puts before the class names of layers with weights.
    """
    parts, here = [type(modules[""]).__name__], []
    for part in path.split(".") if path else []:
        here.append(part)
        module = modules.get(".".join(here))
        kind = type(module).__name__ if module is not None else "Module"
        parts.append(f"{prefix if isinstance(module, _WRAPPED_BY_NNCF2) else ''}{kind}[{part}]")
    return "/".join(parts)


__all__ = ["ScopeNames", "as_list", "nncf2_path"]
