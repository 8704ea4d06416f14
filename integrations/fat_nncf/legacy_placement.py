"""NNCF 2: from NNCF's 8-bit placement to what each point is quantized with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from nncf.common.quantization.quantizer_setup import SingleConfigQuantizerSetup
from nncf.common.scopes import matches_any
from nncf.torch.graph.operator_metatypes import OPERATORS_WITH_WEIGHTS_METATYPES
from nncf.torch.nncf_network import NNCFNetwork

from fat_nncf.graph import LayerMap
from fat_plugins.config import CompressionConfig, is_plugin_section
from fat_plugins.errors import ConfigError, QuantizationError, nearest
from fat_plugins.quantizer import TensorSpec, module_geometry
from fat_plugins.registry import get_algorithm
from fat_plugins.scopes import as_list

#: NNCF's algorithms that set weights to zero
_ZEROING = ("sparsity", "pruning")


def placement_section(config: CompressionConfig) -> dict[str, Any]:
    """The section as NNCF's own quantizer generator may see it: where, never how, so that every device accepts it."""

    def scopes(section: Any) -> dict[str, Any]:
        found = {key: getattr(section, key) for key in ("ignored_scopes", "target_scopes")}
        return {k: [v] if isinstance(v, str) else list(v) for k, v in found.items() if v is not None}

    section: dict[str, Any] = {
        "algorithm": config.algorithm,
        "initializer": config.initializer,
        "quantize_inputs": config.quantize_inputs,
        "quantize_outputs": config.quantize_outputs,
        # NNCF would halve the range of 8-bit weights by default, for processors without VNNI
        "overflow_fix": config.overflow_fix or "disable",
        **scopes(config),
        "weights": scopes(config.weights),
        "activations": scopes(config.activations),
    }
    if config.activations.unified_scale_ops is not None:
        section["activations"]["unified_scale_ops"] = config.activations.unified_scale_ops
    for key in ("preset", "compression_lr_multiplier", "export_to_onnx_standard_ops", "validate_scopes"):
        value = getattr(config, key)
        if value is not None:
            section[key] = value
    return section


def is_weighted(node: Any) -> bool:
    """Whether a node of the original graph is a convolution, linear or embedding layer."""
    return node.metatype in OPERATORS_WITH_WEIGHTS_METATYPES and "Norm" not in node.metatype.__name__


def plugin_sections(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Our sections of a whole config, each with its place."""
    compression = config.get("compression", [])
    many = isinstance(compression, list)
    return [
        (f"compression[{i}]" if many else "compression", section)
        for i, section in enumerate(compression if many else [compression])
        if isinstance(section, dict) and is_plugin_section(section)
    ]


def excluded(config: CompressionConfig, node_names: Iterable[str]) -> list[str]:
    """Operations that no section of a list takes."""

    def left_out(part: CompressionConfig, name: str) -> bool:
        targets = as_list(part.target_scopes)
        ignored = any(matches_any(name, scope) for scope in as_list(part.ignored_scopes))
        return ignored or bool(targets and not any(matches_any(name, scope) for scope in targets))

    return [name for name in node_names if all(left_out(part, name) for part in config.parts)]


def check_scopes(config: CompressionConfig, node_names: Iterable[str]) -> None:
    """Refuse scopes that name nothing, which NNCF checks at the top of the section only.

    :raises ConfigError: a scope that matches no operation, or a broken regular expression.
    """
    names = list(node_names)
    groups: dict[str, Any] = {}
    for part in config.parts:
        where = part.where
        groups.update({f"{where}.{k}": getattr(part, k) for k in ("ignored_scopes", "target_scopes")})
        for group in ("weights", "activations"):
            section = getattr(part, group)
            groups.update({f"{where}.{group}.{k}": getattr(section, k) for k in ("ignored_scopes", "target_scopes")})
            groups[f"{where}.scope_overrides.{group}"] = list(getattr(part.scope_overrides, group))
    for place, scopes in groups.items():
        for scope in [scopes] if isinstance(scopes, str) else scopes or []:
            try:
                matched = any(matches_any(name, scope) for name in names)
            except re.error as error:
                raise ConfigError(f"{place}: {scope!r} is not a regular expression: {error}") from None
            if not matched:
                raise ConfigError(f"{place}: {scope!r} matches no operation of the model{nearest(scope, names)}")


def keeps_zeros(config: dict[str, Any], own: str) -> bool:
    """Whether another algorithm of the NNCF config sets weights to zero."""
    compression = config.get("compression", [])
    sections = compression if isinstance(compression, list) else [compression]
    return any(part in s["algorithm"] for s in sections if s["algorithm"] != own for part in _ZEROING)


class Plan(NamedTuple):
    """What quantizes one tensor, and the names of the nodes that read it (the layer itself for weights)."""

    algorithm: str
    spec: TensorSpec
    params: dict[str, Any]
    readers: list[str]

    def state(self, half_range: bool, explicit_range: bool) -> dict[str, Any]:
        """JSON types, as stored with the model.

        :param half_range: NNCF's ``overflow_fix`` asked for 7 of 8 bits.
        :param explicit_range: the config has its own ``initializer.range``.
        """
        spec = replace(self.spec, bits=7) if half_range and self.spec.bits == 8 else self.spec
        by_data = spec.role == "activation" and get_algorithm(self.algorithm).activation_quantizer.calibration == "data"
        return {
            "algorithm": self.algorithm,
            "spec": spec.to_dict(),
            "params": self.params,
            "readers": self.readers,
            "from_data": by_data and not explicit_range,
        }


class Placement:
    """Resolves the points of NNCF's setup against our section.

    :param model: the model as NNCF wrapped it.
    :param config: our section.
    :param keep_zeros: weights that other algorithms set to zero stay zero.
    """

    def __init__(self, model: NNCFNetwork, config: CompressionConfig, keep_zeros: bool) -> None:
        self.model, self.config, self.keep_zeros = model, config, keep_zeros
        self.graph = model.nncf.get_original_graph()
        self.layers = LayerMap(self.graph, is_weighted)
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._taken: Counter[str] = Counter()

    def module(self, node_name: str) -> torch.nn.Module:
        """The module that runs a node."""
        return self.model.nncf.get_containing_module(node_name)

    def path(self, node_name: str) -> str:
        """Module path of a weighted layer (``"features.0"``), the name that users know."""
        return self._paths.get(id(self.module(node_name)), node_name)

    def _unique(self, name: str) -> str:
        """Names identify quantizers in reports and exports: a second ``input of add`` becomes ``input of add (2)``."""
        self._taken[name] += 1
        return name if self._taken[name] == 1 else f"{name} ({self._taken[name]})"

    def resolve(self, setup: SingleConfigQuantizerSetup) -> dict[int, Plan]:
        """The plan of every point by id; points that stay float are discarded from ``setup``.

        :raises ConfigError: a tensor that the algorithm cannot quantize.
        :raises QuantizationError: a weight with NaN or infinite values.
        """
        self._release_weights_from_unified_groups(setup)
        plans: dict[int, Plan | None] = {}
        for ids in self._weight_groups(setup).values():
            plans.update(dict.fromkeys(ids, self._weight_plan(setup, ids)))
        for ids in self._activation_groups(setup):
            plans.update(dict.fromkeys(ids, self._activation_plan(setup, ids)))
        for point_id in [i for i, plan in plans.items() if plan is None]:
            setup.discard(point_id, keep_shared_input_qps=True)
        setup.unified_scale_groups = {g: ids for g, ids in setup.unified_scale_groups.items() if ids}
        return {i: plan for i, plan in plans.items() if plan is not None}

    @staticmethod
    def _release_weights_from_unified_groups(setup: SingleConfigQuantizerSetup) -> None:
        # a weight (an embedding table) has its own codes; one scale for it and activations would not be ours to share
        for point_id, point in setup.quantization_points.items():
            if point.is_weight_quantization_point() and setup.get_unified_scale_group_id(point_id) is not None:
                setup.remove_unified_scale_from_point(point_id)

    def _weight_groups(self, setup: SingleConfigQuantizerSetup) -> dict[int, list[int]]:
        """Point ids by module: a module that is called several times has several points and one weight."""
        groups: dict[int, list[int]] = {}
        for point_id, point in setup.quantization_points.items():
            if point.is_weight_quantization_point():
                groups.setdefault(id(self.module(point.insertion_point.target_node_name)), []).append(point_id)
        return groups

    def _activation_groups(self, setup: SingleConfigQuantizerSetup) -> list[list[int]]:
        """Point ids that share one quantizer."""
        unified = [sorted(ids) for ids in setup.unified_scale_groups.values()]
        taken = {i for ids in unified for i in ids}
        single = [
            [i] for i, p in setup.quantization_points.items() if p.is_activation_quantization_point() and i not in taken
        ]
        return unified + single

    def _weight_plan(self, setup: SingleConfigQuantizerSetup, ids: list[int]) -> Plan | None:
        nodes = [setup.quantization_points[i].insertion_point.target_node_name for i in ids]
        module, name = self.module(nodes[0]), self.path(nodes[0])
        weight = module.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise QuantizationError(f"{name}: weight holds NaN or infinite values")
        edges = {self.layers.weight_edge(n) for n in nodes}
        spec = TensorSpec(
            role="weight",
            bits=8,
            name=name,
            shape=tuple(weight.shape),
            channel_axis=1 if getattr(module, "transposed", False) else 0,
            followed_by_norm=all(self.layers.followed_by_norm(n) for n in nodes),
            keep_zeros=self.keep_zeros,
            **module_geometry(module),
        )
        edge = next((e for e in ("first", "last") if e in edges), None)
        resolved = self._resolve(spec, nodes, edge)
        return resolved and Plan(*resolved, nodes)

    def _activation_plan(self, setup: SingleConfigQuantizerSetup, ids: list[int]) -> Plan | None:
        points = [setup.quantization_points[i] for i in ids]
        consumers = [n for p in points for n in p.directly_quantized_operator_node_names]
        layers = sorted((n for n in consumers if n in self.layers.names), key=self.layers.position.__getitem__)
        signs = {p.qconfig.signedness_to_force for p in points}
        reader = self.path(layers[0]) if layers else (consumers or ["the output"])[0]
        spec = TensorSpec(
            role="activation",
            bits=8,
            name=self._unique(f"input of {reader}"),
            channel_axis=1,
            signed=signs.pop() if len(signs) == 1 else None,
        )
        resolved = self._resolve(spec, consumers, self.layers.activation_edge(consumers))
        return resolved and Plan(*resolved, consumers)

    def _resolve(self, spec: TensorSpec, node_names: list[str], edge: Any) -> Any:
        # NNCF matches the overrides of activations with the operations that read them
        return self.config.resolve(spec, lambda scope: any(matches_any(n, scope) for n in node_names), edge)
