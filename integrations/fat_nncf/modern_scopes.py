"""Scopes on NNCF 3: node names, module paths and the names that NNCF 2 gave to the same layers, all accepted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from fat_plugins.scopes import ScopeNames, nncf2_path

_INPUT, _OUTPUT, CONST = "nncf_model_input", "nncf_model_output", "nncf_model_const"


class NodeNames(ScopeNames):
    """:class:`~fat_plugins.scopes.ScopeNames` of an NNCF graph.

    :param graph: ``NNCFGraph`` of ``model``.
    """

    def __init__(self, graph: Any, model: nn.Module) -> None:
        super().__init__({})
        self._paths: dict[str, str] = {}
        self._modules = dict(model.named_modules())
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
                names = [node.node_name, *(f"{nncf2_path(self._modules, path, p)}/{op}" for p in ("NNCF", ""))]
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

    def path(self, node_name: str) -> str:
        """Path of the module that runs a node; the node's own name for an operation of the root."""
        return self._paths.get(node_name) or node_name
