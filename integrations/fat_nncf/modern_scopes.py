"""Scopes on NNCF 3: node names, module paths and the names that NNCF 2 gave to the same layers, all accepted."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
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
_INPUT, _OUTPUT, CONST = "nncf_model_input", "nncf_model_output", "nncf_model_const"


def as_list(scopes: Iterable[str] | str | None) -> list[str]:
    """NNCF allows one scope, a list, or nothing."""
    return [scopes] if isinstance(scopes, str) else list(scopes or [])


class NodeNames:
    """The names under which a user may know each node of a traced model.

    A scope matches a node when it is one of the node's names, a prefix of one at a component boundary (``"layer1"``,
    ``"ResNet/Sequential[layer1]"``), or ``{re}`` followed by a regular expression found in one of them.

    :param graph: ``NNCFGraph`` of ``model``.
    """

    def __init__(self, graph: Any, model: nn.Module) -> None:
        self._names: dict[str, tuple[str, ...]] = {}
        self._paths: dict[str, str] = {}
        self._modules = dict(model.named_modules())
        self._root = type(model).__name__
        calls: dict[tuple[str, str], int] = defaultdict(int)
        counts: dict[str, int] = defaultdict(int)
        for node in graph.topological_sort():
            if node.node_type in (_INPUT, _OUTPUT):
                index = counts[node.node_type]
                counts[node.node_type] += 1
                self._names[node.node_name] = (node.node_name, f"/{node.node_type}_{index}")
            elif node.node_type != CONST:
                path = self._module_path(graph, node)
                self._paths[node.node_name] = path
                index = calls[path, node.node_type]
                calls[path, node.node_type] += 1
                op = f"{node.node_type}_{index}"
                names = [node.node_name, f"{self._nncf2(path, 'NNCF')}/{op}", f"{self._nncf2(path, '')}/{op}"]
                if path:
                    names.append(path)
                self._names[node.node_name] = tuple(dict.fromkeys(names))

    def _module_path(self, graph: Any, node: Any) -> str:
        """Dotted path of the module that runs ``node``; its parameters tell it best (NNCF leaves out ModuleLists)."""
        for previous in graph.get_previous_nodes(node):
            if previous.node_type == CONST:
                owner = previous.node_name.rpartition(".")[0]
                if owner in self._modules:
                    return owner
        return ".".join(node.node_name.split("/")[:-2])

    def _nncf2(self, path: str, prefix: str) -> str:
        """``Net/Sequential[layer1]/NNCFConv2d[0]`` for the module path ``layer1.0``."""
        parts, here = [self._root], []
        for part in path.split(".") if path else []:
            here.append(part)
            module = self._modules.get(".".join(here))
            kind = type(module).__name__ if module is not None else "Module"
            parts.append(f"{prefix if isinstance(module, _WRAPPED_BY_NNCF2) else ''}{kind}[{part}]")
        return "/".join(parts)

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

    def path(self, node_name: str) -> str:
        """Path of the module that runs a node; the node's own name for an operation of the root."""
        return self._paths.get(node_name) or node_name

    def operations(self) -> set[str]:
        """Names of all nodes that can be matched."""
        return set(self._names)

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
