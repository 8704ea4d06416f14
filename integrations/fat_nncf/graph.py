"""What both NNCF generations ask of an ``NNCFGraph``: edge layers, batch norms behind a layer, scope matching."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

Edge = Literal["first", "last", "plain"]


class LayerMap:
    """Weighted layers of a graph in execution order, and which of them stand at its edges.

    :param graph: an ``NNCFGraph``.
    :param is_weighted: whether a node is a convolution, linear layer or the like with a weight of its own.
    """

    def __init__(self, graph: Any, is_weighted: Callable[[Any], bool]) -> None:
        self.graph = graph
        order = graph.topological_sort()
        weighted = {n.node_id for n in order if is_weighted(n)}
        self.names: list[str] = [n.node_name for n in order if n.node_id in weighted]
        #: position in execution order
        self.position: dict[str, int] = {n.node_name: i for i, n in enumerate(order)}
        self.first = self._without(order, weighted, graph.get_previous_nodes)
        self.last = self._without(list(reversed(order)), weighted, graph.get_next_nodes)

    @staticmethod
    def _without(order: list[Any], weighted: set[int], neighbours: Callable[[Any], list[Any]]) -> set[str]:
        """Names of the weighted nodes that no weighted node precedes (in the direction of ``neighbours``)."""
        reached: dict[int, bool] = {}
        found = set()
        for node in order:
            behind = any(reached[n.node_id] or n.node_id in weighted for n in neighbours(node))
            reached[node.node_id] = behind
            if node.node_id in weighted and not behind:
                found.add(node.node_name)
        return found

    def weight_edge(self, name: str) -> Edge | None:
        """Edge of a weighted layer; a network of one layer counts as first."""
        return "first" if name in self.first else "last" if name in self.last else None

    def activation_edge(self, consumers: Iterable[str]) -> Edge | None:
        """Edge of an activation quantizer by the weighted layers among its ``consumers`` (node names)."""
        weighted = [c for c in consumers if c in self._weighted_set]
        if not weighted:
            return "plain"
        edges = {self.weight_edge(c) for c in weighted}
        return edges.pop() if len(edges) == 1 else None

    @property
    def _weighted_set(self) -> set[str]:
        return set(self.names)

    def followed_by_norm(self, name: str) -> bool:
        """Whether every reader of the layer's output is a normalisation, which absorbs the scale of the weights."""
        readers = self.graph.get_next_nodes(self.graph.get_node_by_name(name))
        return bool(readers) and all("Norm" in r.metatype.__name__ for r in readers)
