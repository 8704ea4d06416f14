"""Where quantizers go on NNCF 3: NNCF's own placement at 8 bits on a copy, each point then given to an algorithm."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import nncf
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    StatisticsCollectorParameters,
    StatisticsType,
)
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.pruning.prune_model import OPERATORS_WITH_WEIGHTS_METATYPES
from nncf.torch.model_graph_manager import get_const_node, get_weight_channel_axes
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import nn

from fat_nncf.graph import LayerMap
from fat_nncf.modern_config import RangeInit, steps
from fat_nncf.modern_data import Batches
from fat_nncf.modern_hooks import PluginQuantizer, parameter, plugin_hooks, set_hook
from fat_nncf.modern_scopes import CONST, NodeNames
from fat_plugins.config import DEFAULT_BITS, CompressionConfig
from fat_plugins.errors import HostError, QuantizationError
from fat_plugins.quantizer import LayerQuantizers, TensorSpec, conv_geometry
from fat_plugins.registry import get_algorithm

_INPUT, _OUTPUT = "nncf_model_input", "nncf_model_output"
_OVERFLOW_BITS = 7
_BIAS_PORT = 2


@dataclass
class Point:
    """One quantizer that NNCF placed.

    :param slots: hook slots that share it.
    :param tensor: name of the quantized parameter, or ``None`` for an activation.
    :param range: lowest and highest value that NNCF collected.
    """

    slots: list[str]
    nodes: list[str]
    tensor: str | None = None
    ports: list[int] = field(default_factory=list)
    range: tuple[float, float] = (0.0, 0.0)


@dataclass
class Traced:
    """A wrapped model with its graph."""

    model: nn.Module
    graph: Any
    names: NodeNames
    layers: LayerMap


def weight_of(graph: Any, node: Any, port: int) -> str | None:
    """Name of the parameter that reaches an input port, through masks; ``None`` when an activation does."""
    if port not in node.metatype.weight_port_ids or port not in node.layer_attributes.constant_port_ids:
        try:
            found = get_const_node(node, port, graph) if port in node.metatype.weight_port_ids else None
        except nncf.InternalError:
            found = None
    else:
        found = get_const_node(node, port, graph)
    return found.node_name if found is not None else None


def is_weighted(graph: Any, node: Any) -> bool:
    """Whether a node is a layer with a weight of its own."""
    if node.metatype not in OPERATORS_WITH_WEIGHTS_METATYPES:
        return False
    return any(weight_of(graph, node, port) for port in node.metatype.weight_port_ids)


def trace(model: nn.Module, example: Any) -> Traced:
    """Wrap and trace a model, in evaluation mode.

    :raises HostError: NNCF cannot trace it, or it holds no layer with weights.
    """
    modes = {m: m.training for m in model.modules()}
    try:
        wrap_model(model)
        model.eval()
        with torch.no_grad():
            graph = build_nncf_graph(model, example)
    except Exception as error:  # whatever the user's forward raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HostError(f"NNCF cannot trace {type(model).__name__}: {type(error).__name__}: {reason}") from None
    finally:
        for module, training in modes.items():
            module.training = training
    layers = LayerMap(graph, lambda node: is_weighted(graph, node))
    if not layers.names:
        raise HostError(f"NNCF found no layer with weights in {type(model).__name__}: nothing to quantize")
    return Traced(model, graph, NodeNames(graph, model), layers)


def check_weights(traced: Traced, ignored: set[str]) -> None:
    """Refuse weights that hold NaN or infinite values before NNCF stumbles over them.

    :raises QuantizationError: names the parameter.
    """
    for name in traced.layers.names:
        if name in ignored:
            continue
        node = traced.graph.get_node_by_name(name)
        for port in node.metatype.weight_port_ids:
            tensor = weight_of(traced.graph, node, port)
            if tensor is not None and not bool(torch.isfinite(parameter(traced.model, tensor)).all()):
                raise QuantizationError(f"{tensor}: the weight holds NaN or infinite values")


# --------------------------------------------------------------------------------------------------------------------
# NNCF's placement
# --------------------------------------------------------------------------------------------------------------------
def range_estimator(init: RangeInit) -> RangeEstimatorParameters:
    """NNCF 3's spelling of NNCF 2's range initialisers.

    NNCF 2 pools all samples for a percentile; NNCF 3 averages the percentiles of batches.
    """
    low: dict[str, Any] = {"statistics_type": StatisticsType.MIN, "aggregator_type": AggregatorType.MIN}
    high: dict[str, Any] = {"statistics_type": StatisticsType.MAX, "aggregator_type": AggregatorType.MAX}
    if init.kind in ("mixed_min_max", "mean_min_max"):
        high["aggregator_type"] = AggregatorType.MEAN
    if init.kind == "mean_min_max":
        low["aggregator_type"] = AggregatorType.MEAN
    if init.kind in ("percentile", "mean_percentile"):
        low = {"statistics_type": StatisticsType.QUANTILE, "aggregator_type": AggregatorType.MEAN,
               "quantile_outlier_prob": init.low / 100}  # fmt: skip
        high = {**low, "quantile_outlier_prob": 1 - init.high / 100}
    return RangeEstimatorParameters(StatisticsCollectorParameters(**low), StatisticsCollectorParameters(**high))


def advanced(
    config: CompressionConfig, base: AdvancedQuantizationParameters | None = None
) -> AdvancedQuantizationParameters:
    """NNCF's expert settings such that the weights of the model stay what they are."""
    return dataclasses.replace(
        base or AdvancedQuantizationParameters(),
        quantize_outputs=config.quantize_outputs,
        disable_bias_correction=True,
        disable_channel_alignment=True,
        smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    )


def place(
    traced: Traced, batches: Batches, ignored: nncf.IgnoredScope, settings: AdvancedQuantizationParameters,
    *, samples: int, preset: str | None = None, target_device: Any = "ANY", model_type: Any = None,
) -> list[Point]:  # fmt: skip
    """Let NNCF quantize a copy at its 8 bits and read off where its quantizers stand.

    :raises HostError: NNCF refuses the model, or places nothing.
    """
    count = steps(samples, batches.batch_size) if batches.real else 1
    length = batches.length()
    device = target_device if isinstance(target_device, nncf.TargetDevice) else nncf.TargetDevice(target_device)
    modes = {m: m.training for m in traced.model.modules()}
    try:
        quantized = nncf.quantize(
            traced.model.eval(), batches.dataset(), preset=None if preset is None else nncf.QuantizationPreset(preset),
            target_device=device, subset_size=max(1, min(count, length) if length else count),
            fast_bias_correction=True, model_type=model_type, ignored_scope=ignored, advanced_parameters=settings,
        )  # fmt: skip
    except (QuantizationError, HostError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise HostError(
            f"NNCF cannot quantize {type(traced.model).__name__}: {type(error).__name__}: {reason}"
        ) from None
    finally:
        for module, training in modes.items():
            module.training = training
    points: dict[Any, Point] = {}
    for slot, module in get_hook_storage(quantized).named_hooks(remove_duplicate=False):
        if not isinstance(module, BaseQuantizer):
            continue
        kind, op, port = decode_hook_name(slot)
        node = traced.graph.get_node_by_name(op)
        if kind == "pre_hooks":
            tensor = weight_of(traced.graph, node, port)
        else:
            tensor = op if node.node_type == CONST else None
        # operations that share a parameter share its quantizer, as they do on NNCF 2
        point = points.setdefault(tensor or module, Point([], [], tensor, range=_range(module)))
        point.slots.append(slot)
        point.nodes.append(op)
        point.ports.append(port)
    if not points:
        raise HostError("NNCF placed no quantizer: every layer is ignored")
    return list(points.values())


def _range(module: BaseQuantizer) -> tuple[float, float]:
    with torch.no_grad():
        if isinstance(module, SymmetricQuantizer):
            high = float(module.scale.abs().max()) + module.eps
            return (-high if module.signed else 0.0), high
        low = module.input_low
        return float(low.min()), float((low + module.input_range.abs()).max()) + module.eps


# --------------------------------------------------------------------------------------------------------------------
# ours in the place of NNCF's
# --------------------------------------------------------------------------------------------------------------------
def _readers(traced: Traced, point: Point, occupied: set[tuple[str, str, int]]) -> list[str]:
    """Operations that an activation quantizer feeds: up to the next quantizer or weighted layer, nearest first."""
    graph, weighted = traced.graph, set(traced.layers.names)
    found: dict[str, None] = {}
    pending: list[Any] = []

    def leave(node: Any) -> None:
        for edge in graph.get_output_edges(node):
            if ("pre_hooks", edge.to_node.node_name, edge.input_port_id) not in occupied:
                enter(edge.to_node)

    def enter(node: Any) -> None:
        name = node.node_name
        if name in found or node.node_type == _OUTPUT:
            return
        found[name] = None
        if name not in weighted and ("post_hooks", name, 0) not in occupied:
            pending.append(node)

    for slot, name in zip(point.slots, point.nodes, strict=True):
        node = graph.get_node_by_name(name)
        if slot.startswith("pre_hooks"):
            enter(node)
        else:
            leave(node)
    while pending:  # not recursive: networks are deep
        leave(pending.pop(0))
    return list(found)


def _activation_spec(traced: Traced, readers: list[str]) -> TensorSpec:
    layers = [n for n in traced.layers.names if n in set(readers)]
    reader = traced.names.path(layers[0]) if layers else readers[0] if readers else "the output"
    return TensorSpec("activation", DEFAULT_BITS, name=f"input of {reader}", channel_axis=1)


def _weight_spec(traced: Traced, point: Point, keep_zeros: bool) -> TensorSpec:
    node = traced.graph.get_node_by_name(point.nodes[0])
    weight = parameter(traced.model, point.tensor)
    axes = (0,) if node.node_type == CONST else get_weight_channel_axes(node.metatype, weight.ndim, point.ports[0])
    layers = [n for n in point.nodes if n in traced.layers.position]
    norm = node.node_type != CONST and all(traced.layers.followed_by_norm(n) for n in layers)
    return TensorSpec("weight", DEFAULT_BITS, name=point.tensor.removesuffix(".weight"), shape=tuple(weight.shape),
                      channel_axis=axes[0] if axes else 0, followed_by_norm=norm, keep_zeros=keep_zeros,
                      **_geometry(node, tuple(weight.shape[2:])))  # fmt: skip


def _geometry(node: Any, kernel: tuple[int, ...]) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution, from the arguments of its call."""
    attributes = node.layer_attributes
    name = getattr(getattr(attributes, "func", None), "__name__", "")
    if not name.startswith("conv"):
        return {}
    plain, transposed = ("padding", "dilation", "groups"), ("padding", "output_padding", "groups", "dilation")
    names = ("input", "weight", "bias", "stride", *(transposed if "transpose" in name else plain))
    given = {**dict(zip(names, attributes.op_args, strict=False)), **attributes.op_kwargs}
    return conv_geometry(kernel, **{k: v for k, v in given.items() if k in ("stride", *plain)})


def resolve(
    traced: Traced, points: list[Point], config: CompressionConfig, *, keep_zeros: bool, lr_multiplier: float | None
) -> list[tuple[Point, PluginQuantizer]]:
    """The hook for each point; points that stay float are left out."""
    occupied = {decode_hook_name(s) for p in points if p.tensor is None for s in p.slots}
    resolved = []
    for point in points:
        if point.tensor is not None:
            role, nodes = "weight", point.nodes
            edges = {traced.layers.weight_edge(n) for n in nodes}
            edge = next((e for e in ("first", "last") if e in edges), None)
            spec = _weight_spec(traced, point, keep_zeros)
        else:
            if not config.quantize_inputs and _at_input(traced, point):
                continue
            role, nodes = "activation", _readers(traced, point, occupied)
            edge = traced.layers.activation_edge(nodes)
            spec = _activation_spec(traced, nodes)
            nodes += [n for n in point.nodes if traced.graph.get_node_by_name(n).node_type == _INPUT]

        def matches(scope: str, nodes: list[str] = nodes) -> bool:
            return traced.names.matches(scope, nodes)

        if config.leaves_out(role, matches):
            continue
        done = config.resolve(spec, matches, edge)
        if done is None:
            continue
        algorithm, spec, params = done
        if role == "weight" and spec.bits == 8 and _overflows(config, edge):
            spec = dataclasses.replace(spec, bits=_OVERFLOW_BITS)
        core = get_algorithm(algorithm).make(spec, params).to(_device(traced.model))
        exclusive = role == "activation" or _exclusive(traced, point)
        if not exclusive and core.owns_weight:
            raise QuantizationError(
                f"{spec.name}: operations that are not quantized read this weight too, and '{algorithm}' leaves no "
                "float weight; quantize them all, or choose another algorithm"
            )
        resolved.append((point, PluginQuantizer(core, algorithm, params, point.tensor, exclusive, lr_multiplier)))
    if not resolved:
        raise HostError("nothing to quantize: the scopes of the config leave no tensor")
    return resolved


def _overflows(config: CompressionConfig, edge: str | None) -> bool:
    return config.overflow_fix == "enable" or (config.overflow_fix == "first_layer_only" and edge == "first")


def _at_input(traced: Traced, point: Point) -> bool:
    """Whether the quantizer reads the network's input itself."""
    for slot, name, port in zip(point.slots, point.nodes, point.ports, strict=True):
        node = traced.graph.get_node_by_name(name)
        if slot.startswith("pre_hooks"):
            before = [e.from_node for e in traced.graph.get_input_edges(node) if e.input_port_id == port]
            if any(b.node_type == _INPUT for b in before):
                return True
        elif node.node_type == _INPUT:
            return True
    return False


def _exclusive(traced: Traced, point: Point) -> bool:
    """Whether every operation that reads the parameter has this quantizer."""
    readers: set[str] = set()
    stack = [traced.graph.get_node_by_name(point.tensor)]
    while stack:
        for node in traced.graph.get_next_nodes(stack.pop()):
            if node.node_type in ("apply_magnitude_binary_mask", "apply_rb_binary_mask"):
                stack.append(node)
            else:
                readers.add(node.node_name)
    return readers <= set(point.nodes) or point.nodes == [point.tensor]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def install(traced: Traced, resolved: list[tuple[Point, PluginQuantizer]]) -> None:
    """Put the hooks into the slots that NNCF chose, on the user's own model."""
    storage = get_hook_storage(traced.model)
    names: Counter[tuple[str, str]] = Counter()
    for point, hook in resolved:
        key = (hook.core.role, hook.name)
        names[key] += 1
        if names[key] > 1:  # exporters tell quantizers apart by their names
            hook.core.spec = dataclasses.replace(hook.core.spec, name=f"{hook.name} ({names[key]})")
        hook.train(traced.model.training)
        for slot in point.slots:
            set_hook(storage, slot, hook)


def layer_quantizers(traced: Traced, algorithm: str) -> list[LayerQuantizers]:
    """What a coordinator of ``algorithm`` sees: layers in execution order with the quantizers of weight and input."""
    hooks = plugin_hooks(traced.model)
    occupied = {decode_hook_name(s) for h, slots in hooks.items() if h.tensor is None for s in slots}
    inputs: dict[str, PluginQuantizer] = {}
    weights: dict[str, PluginQuantizer] = {}
    for hook, slots in hooks.items():
        nodes = [decode_hook_name(s)[1] for s in slots]
        if hook.tensor is None:
            for consumer in _readers(traced, Point(slots, nodes), occupied):
                inputs.setdefault(consumer, hook)
        else:
            weights.update({node: hook for node in nodes})
    found: dict[PluginQuantizer, LayerQuantizers] = {}
    for name in traced.layers.names:
        hook = weights.get(name)
        if hook is None or hook.algorithm != algorithm or hook in found:
            continue
        before = inputs.get(name)
        found[hook] = LayerQuantizers(
            hook.name, hook.core, before.core if before is not None and before.algorithm == algorithm else None,
            _parameters(traced, hook.tensor, name),
        )  # fmt: skip
    return list(found.values())


def _parameters(traced: Traced, tensor: str, operation: str) -> dict[str, nn.Parameter]:
    """Weight and, where the layer has one, bias by their names in the model."""
    found = {tensor: parameter(traced.model, tensor)}
    node = traced.graph.get_node_by_name(operation)
    if _BIAS_PORT in node.layer_attributes.constant_port_ids:
        bias = get_const_node(node, _BIAS_PORT, traced.graph)
        if bias is not None:
            found[bias.node_name] = parameter(traced.model, bias.node_name)
    return found
