"""Where quantizers go: on the weights of layers, and behind every tensor that integer kernels read.

Follows NNCF's rules, so that one config means the same on both hosts: an activation is quantized once, where it is
produced, if layers, additions, averages and the like read it, directly or through operations that only move values.
The graph is traced and rewritten by Brevitas's own transforms.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import torch
import torch.nn.functional as F
from brevitas.fx import GraphModule, Node
from brevitas.fx.brevitas_tracer import brevitas_symbolic_trace
from brevitas.graph.base import FnToModule, InsertModuleCallAfter, MethodToModule, ModuleToModuleByInstance
from brevitas.graph.equalize import EqualizeGraph
from brevitas.graph.fixed_point import CollapseConsecutiveConcats, MergeBatchNorm
from brevitas.graph.standardize import DuplicateSharedStatelessModule, TorchFunctionalToModule
from brevitas.graph.utils import set_module
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from torch import nn
from torch.nn.utils import prune

from fat_brevitas.compat import float_checkpoint
from fat_brevitas.graph import WEIGHTED, Traced
from fat_brevitas.injectors import act_quant, weight_quant
from fat_plugins.config import DEFAULT_BITS, CompressionConfig
from fat_plugins.errors import FatPluginsError, HostError
from fat_plugins.quantizer import TensorSpec, module_geometry
from fat_plugins.scopes import as_list

#: calls that Brevitas's own list of functions with a module leaves out
_FUNCTIONS = ((torch.relu, nn.ReLU), (torch.relu_, nn.ReLU))
_METHODS = (("relu", nn.ReLU), ("relu_", nn.ReLU))
#: activation functions that become one Brevitas layer together with their quantizer, and the bound on calibration
_FUSED: dict[type, float | None] = {nn.ReLU: None, nn.ReLU6: 6.0}
_EQUALIZE_ITERATIONS = 20


@dataclass
class Site:
    """An activation quantizer to be placed.

    :param node: produces the tensor.
    :param users: nodes that read the quantized tensor.
    :param readers: operations up to the next quantizer or weighted layer.
    :param whole: nothing reads the tensor unquantized.
    """

    node: Node
    users: list[Node]
    readers: list[Node]
    whole: bool


# --------------------------------------------------------------------------------------------------------------------
# tracing
# --------------------------------------------------------------------------------------------------------------------
def detach_pruned(model: nn.Module) -> None:
    """Weights behind torch's pruning masks are results of an operation, which cannot be copied: make them plain."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                setattr(module, name, getattr(module, name).detach())


def trace(model: nn.Module, *, merge_bn: bool, equalize: bool) -> Traced:
    """A traced copy of a float model in evaluation mode, after Brevitas's standard passes.

    :raises HostError: it cannot be traced (names the reason), or holds Brevitas layers already.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantProxyFromInjector):
            raise HostError(f"{type(model).__name__} is quantized already (at {name!r}); give the float model")
    detach_pruned(model)
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    try:
        with warnings.catch_warnings(), _norms_in_one_piece(model):
            # a name of torch's that Brevitas's tracer still uses
            warnings.filterwarnings("ignore", ".treespec.children_specs.", FutureWarning)
            graph = brevitas_symbolic_trace(model)
        _free_names(graph)
        for rewrite in (
            TorchFunctionalToModule(),
            *(FnToModule(function, kind) for function, kind in _FUNCTIONS),
            *(MethodToModule(method, kind) for method, kind in _METHODS),
            DuplicateSharedStatelessModule(),
            CollapseConsecutiveConcats(),
        ):
            graph = rewrite.apply(graph)
        _dropout_to_module(graph)
        if merge_bn:
            graph = MergeBatchNorm().apply(graph)
        if equalize:
            equalized = EqualizeGraph(iterations=_EQUALIZE_ITERATIONS).apply(graph)
            graph = equalized[0] if isinstance(equalized, tuple) else equalized
    except FatPluginsError:
        raise
    except Exception as error:  # whatever the model's own code raises when it meets a tracer
        reason = (str(error).splitlines() or [""])[0]
        raise HostError(
            f"Brevitas cannot trace {type(model).__name__}: {type(error).__name__}: {reason}; build the model from "
            "fat_brevitas's layers instead"
        ) from None
    return Traced(graph, modules)


@contextmanager
def _norms_in_one_piece(model: nn.Module) -> Iterator[None]:
    """A subclass of torch's batch norms is one operation as they are. Tracers know those by where they come from."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.__module__ = nn.BatchNorm2d.__module__
    try:
        yield
    finally:
        for norm in norms:
            del norm.__module__


def _free_names(graph: GraphModule) -> None:
    """Brevitas names a module after the node of a function; no module of the model may have that name already."""
    taken = dict(graph.named_modules())
    for node in graph.graph.nodes:
        while node.op in ("call_function", "call_method") and node.name in taken:
            # not registered for the node: the tracer's name for it would come back
            node.name = graph.graph._graph_namespace.create_name(f"{node.name}_op", None)


def _dropout_to_module(graph: GraphModule) -> None:
    """A traced ``F.dropout(x, training=self.training)`` holds the mode of the trace; a module follows the model's."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.dropout:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            set_module(graph, nn.Dropout(p), node.name)
            node.op, node.target, node.args, node.kwargs = "call_module", node.name, node.args[:1], {}
    graph.recompile()


# --------------------------------------------------------------------------------------------------------------------
# sites of activation quantizers
# --------------------------------------------------------------------------------------------------------------------
class Placement:
    """Which tensors of a traced model a config quantizes.

    :raises ConfigError: a scope matches nothing, or ``target_scopes`` names a layer that cannot be quantized.
    """

    def __init__(self, traced: Traced, config: CompressionConfig) -> None:
        self.traced, self.config = traced, config
        self._check_scopes()
        self.excluded = traced.names.excluded(config)
        self._demand = self._demands()
        self.sites = list(self._sites())
        self._find_readers()

    def _check_scopes(self) -> None:
        config, names = self.config, self.traced.names
        if config.validate_scopes is False:
            return
        for part in config.parts:
            sections = {"": part, ".weights": part.weights, ".activations": part.activations}
            for name, section in sections.items():
                for key in ("ignored_scopes", "target_scopes"):
                    names.check(getattr(section, key), f"{part.where}{name}.{key}")
            for group in ("weights", "activations"):
                for scope in getattr(part.scope_overrides, group):
                    names.check(scope, f"{part.where}.scope_overrides.{group}")

    def _takes_integers(self, node: Node) -> bool:
        if node.op == "output":
            return self.config.quantize_outputs
        return node.name not in self.excluded and self.traced.is_quantizable(node)

    def _users(self, node: Node) -> list[Node]:
        return [u for u in node.users if not self.traced.is_shape(u)]

    def _demands(self) -> dict[Node, str]:
        """How many readers of each tensor want it quantized, through what only moves values: all, some or none."""
        demand: dict[Node, str] = {}
        for node in reversed(self.traced.nodes):
            wishes = {self._wish(u, demand) for u in self._users(node)}
            demand[node] = "none" if wishes <= {"none"} else "all" if wishes == {"all"} else "some"
        return demand

    def _wish(self, user: Node, demand: dict[Node, str]) -> str:
        if self._takes_integers(user):
            return "all"
        return demand[user] if self.traced.is_agnostic(user) else "none"

    def _sites(self) -> Iterator[Site]:
        for node in self.traced.nodes:
            producer = node.op in ("placeholder", "call_module", "call_function", "call_method")
            if not producer or self.traced.is_agnostic(node) or self.traced.gives_no_tensor(node):
                continue
            if node.op == "placeholder" and not self.config.quantize_inputs:
                continue
            pending = [node]
            while pending:  # behind a fork of which one branch stays float
                here = pending.pop()
                users = [u for u in self._users(here) if self._wish(u, self._demand) == "all"]
                if users:
                    yield Site(here, users, [], self._demand[here] == "all")
                pending += [u for u in self._users(here) if self._wish(u, self._demand) == "some"]

    def _find_readers(self) -> None:
        quantized = {(s.node, u) for s in self.sites for u in s.users}
        behind = {s.node for s in self.sites if s.whole}
        for site in self.sites:
            found: dict[Node, None] = {}
            pending = list(site.users)
            while pending:
                node = pending.pop(0)
                if node in found or node.op == "output":
                    continue
                found[node] = None
                if not self.traced.is_weighted(node) and node not in behind:
                    pending += [u for u in self._users(node) if (node, u) not in quantized]
            site.readers = list(found)

    # -- what quantizes them -----------------------------------------------------------------------------------------
    def weight(self, node: Node) -> type | None:
        """Brevitas quantizer of a layer's weight, ``None`` when it stays float."""
        names = self.traced.names

        def matches(scope: str) -> bool:
            return names.matches(scope, [node.name])

        if node.name in self.excluded or self.config.leaves_out("weight", matches):
            return None
        module = self.traced.module(node)
        kept = isinstance(getattr(module, "weight_mask", None), torch.Tensor)
        spec = TensorSpec("weight", DEFAULT_BITS, name=node.target, shape=tuple(module.weight.shape),
                          channel_axis=1 if "Transpose" in type(module).__name__ else 0,
                          followed_by_norm=self.traced.followed_by_norm(node), keep_zeros=kept,
                          **module_geometry(module))  # fmt: skip
        edge = self.traced.weight_edge(node)
        done = self.config.resolve(spec, matches, edge)
        if done is None:
            return None
        algorithm, spec, params = done
        return weight_quant(
            algorithm, bit_width=spec.bits, scaling_per_output_channel=spec.per_channel, name=spec.name,
            keep_zeros=kept, followed_by_norm=spec.followed_by_norm, **params,
        )  # fmt: skip

    def activation(self, site: Site, path: str, **attributes: Any) -> type | None:
        """Brevitas quantizer of an activation, ``None`` when it stays float.

        :param path: of the module that will hold it.
        """
        own = site.node.target if site.node.op == "call_module" else site.node.name
        nodes = [n.name for n in site.readers] + ([site.node.name] if site.node.op == "placeholder" else [])

        def matches(scope: str) -> bool:
            return self._matches(scope, nodes, own)

        if self.config.leaves_out("activation", matches):
            return None
        edge = self.traced.activation_edge(site.readers)
        spec = TensorSpec("activation", DEFAULT_BITS, name=path, channel_axis=1)
        done = self.config.resolve(spec, matches, edge)
        if done is None:
            return None
        algorithm, spec, params = done
        return act_quant(
            algorithm, bit_width=spec.bits, signed=spec.signed, scaling_per_output_channel=spec.per_channel,
            name=path, **attributes, **params,
        )  # fmt: skip

    def _matches(self, scopes: Iterable[str] | str | None, nodes: list[str], own: str | None) -> bool:
        """By the operations that read the tensor, as on NNCF, or by the very name of what produces it."""
        return own in as_list(scopes) or self.traced.names.matches(scopes, nodes)


# --------------------------------------------------------------------------------------------------------------------
# rewriting
# --------------------------------------------------------------------------------------------------------------------
def install(placement: Placement) -> None:
    """Replace layers and activation functions by Brevitas's, and insert ``QuantIdentity`` where no function stands."""
    traced = placement.traced
    model = traced.model
    calls = [n.target for n in traced.nodes if n.op == "call_module"]
    with float_checkpoint():
        for node in traced.weighted:
            module = traced.module(node)
            if type(module) in WEIGHTED:  # once for a layer that is called twice
                quantizer = placement.weight(node)
                if quantizer is not None:
                    _replace_layer(model, module, node.target, quantizer)
        for site in placement.sites:
            _install_activation(placement, site, calls)
    model.recompile()


def _replace_layer(model: GraphModule, module: nn.Module, path: str, quantizer: type) -> None:
    mask = getattr(module, "weight_mask", None)
    if mask is not None:
        prune.remove(module, "weight")
    weight, bias = module.weight, module.bias
    kind = getattr(qnn, f"Quant{WEIGHTED[type(module)]}")
    ModuleToModuleByInstance(module, kind, weight_quant=quantizer).apply(model)
    layer = model.get_submodule(path)
    layer.weight = weight  # the parameters that the copy of the model has, tied ones included
    if bias is not None:
        layer.bias = bias
    if mask is not None:
        prune.custom_from_mask(layer, "weight", mask)
    layer.train(model.training)


def _install_activation(placement: Placement, site: Site, calls: list[str]) -> None:
    traced, model, node = placement.traced, placement.traced.model, site.node
    module = traced.module(node)
    if site.whole and type(module) in _FUSED and calls.count(node.target) == 1:
        ceiling = _FUSED[type(module)]
        quantizer = placement.activation(site, node.target, **({} if ceiling is None else {"calibration_max": ceiling}))
        if quantizer is not None:
            ModuleToModuleByInstance(module, qnn.QuantReLU, act_quant=quantizer).apply(model)
        return
    path = _free_path(model, traced, node)
    quantizer = placement.activation(site, path)
    if quantizer is not None:
        set_module(model, qnn.QuantIdentity(act_quant=quantizer), path)
        others = [u for u in node.users if u not in site.users]
        InsertModuleCallAfter(path, node, others).apply(model)


def _free_path(model: GraphModule, traced: Traced, node: Node) -> str:
    """Path for a ``QuantIdentity`` behind ``node``, beside the module that the node belongs to."""
    owner = traced.path(node)
    base = node.target if node.op == "call_module" else f"{owner}.{node.name}" if owner else node.name
    taken, path, count = dict(model.named_modules()), f"{base}_quant", 1
    while path in taken or hasattr(model, path):
        count += 1
        path = f"{base}_quant_{count}"
    return path
