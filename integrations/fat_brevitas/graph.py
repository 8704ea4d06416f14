"""The traced model as placement sees it: what each node does, its names, layers at the edges of the network."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from brevitas.fx import GraphModule, Node
from torch import nn

from fat_brevitas.layers import KINDS
from fat_plugins.scopes import ScopeNames, nncf2_path

#: torch class of a layer to the name of its Brevitas class
WEIGHTED = {getattr(nn, kind): kind for kind in KINDS}
#: modules with weights that this package leaves alone
UNSUPPORTED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag, nn.Bilinear,
               nn.LazyLinear, *WEIGHTED)  # fmt: skip
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
#: every norm that absorbs the scale of what it reads
NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)

# What works on integer codes as they are, so that a quantizer may stand before or behind it.
_AGNOSTIC_MODULES = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.Flatten, nn.Unflatten,
                     nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.padding._ConstantPadNd,
                     nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
                     nn.ChannelShuffle)  # fmt: skip
_AGNOSTIC_FUNCTIONS = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
                       torch.chunk, torch.split, torch.max, torch.min, torch.amax, torch.amin, torch.tile, F.dropout,
                       F.pad, operator.getitem, F.max_pool1d, F.max_pool2d, F.max_pool3d}  # fmt: skip
_AGNOSTIC_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "contiguous",
                     "chunk", "split", "expand", "repeat", "max", "min", "amax", "amin", "t", "clone"}  # fmt: skip
# What has integer kernels that need quantized inputs, beside the weighted layers.
_QUANTIZABLE_MODULES = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.LayerNorm,
                        nn.PixelShuffle)  # fmt: skip
_MEAN = {torch.mean, "mean"}
_BINARY = {operator.add, operator.iadd, torch.add, "add", "add_", operator.mul, operator.imul, torch.mul, "mul", "mul_",
           operator.truediv, operator.itruediv, torch.div, "div", "div_", operator.matmul, torch.matmul, torch.bmm,
           "matmul", "bmm"}  # fmt: skip
_GIVE_TUPLES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
_TUPLE_FUNCTIONS = {torch.topk, torch.sort, torch.unbind, torch.std_mean, torch.var_mean, "topk", "sort", "unbind"}
#: reads the shape, not the values
_SHAPE_ONLY = {"size", "dim", "numel", "type", "ndimension", getattr}
_WEIGHTED_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
                       F.linear, F.bilinear, F.embedding}  # fmt: skip
#: words of NNCF's names for operations
_NNCF_WORDS = {"ConvTranspose1d": "conv_transpose1d", "ConvTranspose2d": "conv_transpose2d",
               "ConvTranspose3d": "conv_transpose3d", "LayerNorm": "layer_norm", "MaxPool2d": "max_pool2d",
               "AvgPool2d": "avg_pool2d", "add": "__add__", "mul": "__mul__", "iadd": "__iadd__"}  # fmt: skip


class Traced:
    """A traced float model.

    :param model: what Brevitas's tracer and its passes gave.
    :param modules: modules of the model before it was traced, by path; the root under ``""``.
    """

    def __init__(self, model: GraphModule, modules: dict[str, nn.Module]) -> None:
        self.model, self._float_modules = model, modules
        self.nodes: list[Node] = list(model.graph.nodes)
        self.weighted = [n for n in self.nodes if type(self.module(n)) in WEIGHTED]
        self._weighted = set(self.weighted)
        self.names = ScopeNames(self._node_names())
        self._first = self._without(self.nodes, lambda n: n.all_input_nodes)
        self._last = self._without(reversed(self.nodes), lambda n: n.users)

    # -- what a node is ----------------------------------------------------------------------------------------------
    def module(self, node: Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def path(self, node: Node) -> str:
        """Path of the module that a node calls, or in whose forward it stands; empty for the root."""
        if node.op == "call_module":
            return node.target
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        # torch's tracer writes (path, class), Brevitas's own the class only
        path, entry = next(reversed(stack.items()))
        return entry[0] if isinstance(entry, tuple) else path

    def is_weighted(self, node: Node) -> bool:
        """A layer that this package can quantize."""
        return node in self._weighted

    def is_shape(self, node: Node) -> bool:
        """Gives no tensor, or reads only the shape of one."""
        return node.op in ("call_function", "call_method") and node.target in _SHAPE_ONLY

    def is_agnostic(self, node: Node) -> bool:
        """Moves or selects values and changes none."""
        if node.op == "call_module":
            return isinstance(self.module(node), _AGNOSTIC_MODULES)
        if node.target is operator.getitem and self._gives_tuple(node.args[0]):
            return False  # what it picks is a tensor of its own
        known = _AGNOSTIC_FUNCTIONS if node.op == "call_function" else _AGNOSTIC_METHODS
        return node.op in ("call_function", "call_method") and node.target in known

    def _gives_tuple(self, node: Node) -> bool:
        return isinstance(self.module(node), _GIVE_TUPLES) or node.target in _TUPLE_FUNCTIONS

    def gives_no_tensor(self, node: Node) -> bool:
        """Its output cannot be quantized: a tuple, whose parts are picked later, or a shape."""
        return self.is_shape(node) or self._gives_tuple(node)

    def is_quantizable(self, node: Node) -> bool:
        """Runs on integers when its inputs are quantized."""
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, _BATCH_NORMS):  # behind a weighted layer it becomes a part of that layer
                return not any(self.is_weighted(p) for p in node.all_input_nodes)
            return self.is_weighted(node) or isinstance(module, _QUANTIZABLE_MODULES)
        if node.op not in ("call_function", "call_method"):
            return False
        return node.target in _MEAN or (node.target in _BINARY and len(node.all_input_nodes) > 1)

    def unsupported(self) -> list[Node]:
        """Operations with weights that stay float: recurrent layers, attention, embeddings, functional calls,
        subclasses and parametrized layers."""
        return [
            n
            for n in self.nodes
            if (isinstance(self.module(n), UNSUPPORTED) and not self.is_weighted(n))
            or (n.op == "call_function" and n.target in _WEIGHTED_FUNCTIONS)
        ]

    def describe(self, node: Node) -> str:
        """``lstm (LSTM)``, ``conv2d (function)``."""
        module = self.module(node)
        return f"{node.target} ({type(module).__name__})" if module is not None else f"{node.name} (function)"

    # -- where it stands ---------------------------------------------------------------------------------------------
    def _without(self, order: Any, neighbours: Any) -> set[Node]:
        """Weighted nodes that no weighted node precedes in the direction of ``neighbours``."""
        reached: dict[Node, bool] = {}
        found = set()
        for node in order:
            reached[node] = any(reached[n] or n in self._weighted for n in neighbours(node))
            if node in self._weighted and not reached[node]:
                found.add(node)
        return found

    def weight_edge(self, node: Node) -> str | None:
        """``"first"``, ``"last"`` or ``None``; a network of one layer counts as first."""
        return "first" if node in self._first else "last" if node in self._last else None

    def activation_edge(self, readers: list[Node]) -> str | None:
        """Edge of an activation quantizer by the weighted layers among its readers."""
        edges = {self.weight_edge(n) for n in readers if n in self._weighted}
        if not edges:
            return "plain"
        return edges.pop() if len(edges) == 1 else None

    def followed_by_norm(self, node: Node) -> bool:
        """Whether every reader of a layer's output is a normalisation, which absorbs the scale of the weights."""
        return bool(node.users) and all(isinstance(self.module(u), NORMS) for u in node.users)

    # -- names -------------------------------------------------------------------------------------------------------
    def _node_names(self) -> dict[str, tuple[str, ...]]:
        """Names of each node: path, fx name, and those that both generations of NNCF give to the operation."""
        names: dict[str, tuple[str, ...]] = {}
        calls: Counter[tuple[str, str]] = Counter()
        for node in self.nodes:
            if node.op in ("placeholder", "output"):
                word = "nncf_model_input" if node.op == "placeholder" else "nncf_model_output"
                index = calls["", word]
                calls["", word] += 1
                names[node.name] = (node.name, f"{word}_{index}", f"/{word}_{index}")
                continue
            path, word = self.path(node), self._word(node)
            # a functional call that a pass made a module of stands where it was called
            owner = path if path in self._float_modules else path.rpartition(".")[0]
            index = calls[owner, word]
            calls[owner, word] += 1
            known = [f"{nncf2_path(self._float_modules, owner, p)}/{word}_{index}" for p in ("NNCF", "")]
            known += [f"{owner.replace('.', '/')}/{word}/{index}", node.name, *([path] if path else [])]
            names[node.name] = tuple(dict.fromkeys(known))
        return names

    def _word(self, node: Node) -> str:
        module = self.module(node)
        if module is None:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "op")
            return _NNCF_WORDS.get(name, name)
        if isinstance(module, _BATCH_NORMS):  # subclasses too
            return "batch_norm"
        return _NNCF_WORDS.get(type(module).__name__, type(module).__name__.lower())
