"""NNCF 3: the JSON config of NNCF 2 and ``nncf.quantize``'s own style, with the algorithms of this package.

The given model is compressed in place: NNCF's hooks are added to it and its parameters stay the ones that are trained.
A root ``nn.Sequential``, which NNCF 3 cannot wrap, is replaced by an equal module that shares its layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.torch.function_hook import get_hook_storage, is_wrapped
from nncf.torch.function_hook.pruning.magnitude.modules import UnstructuredPruningMask
from nncf.torch.function_hook.pruning.rb.modules import RBPruningMask
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn

from fat_nncf.modern_config import (
    NNCFConfig,
    Plan,
    RangeInit,
    load_config,
    parse_config,
    register_default_init_args,
    steps,
)
from fat_nncf.modern_controller import CompressionStage, Controller, Statistics
from fat_nncf.modern_data import Batches, DatasetBatches, batches_of, device_of, example_from
from fat_nncf.modern_deploy import freeze
from fat_nncf.modern_hooks import COORDINATORS, PluginQuantizer, fold_weights, plugin_hooks, remove_hook
from fat_nncf.modern_init import Pass, adapt_batch_norms, calibrate_activations, calibrate_weights
from fat_nncf.modern_placement import (
    Traced,
    advanced,
    check_weights,
    install,
    layer_quantizers,
    place,
    range_estimator,
    resolve,
    trace,
)
from fat_nncf.modern_sparsity import Sparsity
from fat_nncf.modern_state import check_state, rebuild
from fat_plugins.config import DEFAULT_ALGORITHM, CompressionConfig
from fat_plugins.errors import ConfigError, HostError
from fat_plugins.network import begin, param_groups
from fat_plugins.registry import get_algorithm
from fat_plugins.switching import follow_quantizers

__all__ = [
    "CompressionStage",
    "Controller",
    "NNCFConfig",
    "PluginQuantizer",
    "Statistics",
    "create_compressed_model",
    "freeze",
    "param_groups",
    "quantize",
    "register_default_init_args",
]


class HookableSequential(nn.Sequential):
    """A root ``nn.Sequential`` that NNCF can wrap: its forward leaves out NNCF's hook storage."""

    def forward(self, input: Any) -> Any:
        """Run the layers in order."""
        for name, module in self._modules.items():
            if name not in (ATR_HOOK_STORAGE, COORDINATORS):
                input = module(input)
        return input


def _wrappable(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise HostError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise HostError("NNCF 3 cannot hook into a TorchScript module; give the Python model it was made from")
    if is_wrapped(model) and any(isinstance(m, PluginQuantizer) for m in model.modules()):
        raise HostError(f"{type(model).__name__} is compressed already; give the original model")
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        root = HookableSequential()
        for name, module in model.named_children():
            root.add_module(name, module)
        root.training = model.training
        return root
    return model


@contextmanager
def _undone_on_error(model: nn.Module):
    """Take our hooks off again when compression fails, so that the user's model is what it was."""
    before = {s for s, _ in get_hook_storage(model).named_hooks()} if is_wrapped(model) else None
    try:
        yield
    except BaseException:
        model._modules.pop(COORDINATORS, None)
        if is_wrapped(model):
            storage = get_hook_storage(model)
            for slot in [s for s, _ in storage.named_hooks(remove_duplicate=False) if s not in (before or ())]:
                remove_hook(storage, slot)
            if before is None:
                for name in ("forward", "_replicate_for_data_parallel"):
                    model.__dict__.pop(name, None)
                delattr(model, ATR_HOOK_STORAGE)
        raise


def create_compressed_model(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    compression_state: Mapping[str, Any] | None = None,
    dump_graphs: bool = False,
) -> tuple[Controller, nn.Module]:
    """NNCF 2's function on NNCF 3: compress a model as a JSON config says.

    Quantizers stand where ``nncf.quantize`` puts them. Weights are initialised from the weights behind sparsity masks,
    activations from the loader of :func:`register_default_init_args`; then batch norms are adapted. Without a loader
    the activation quantizers stay identities, with a warning.

    :param model: compressed in place (a root ``nn.Sequential`` is replaced, its layers are shared).
    :param config: path of a JSON file, dictionary, or :class:`NNCFConfig`.
    :param compression_state: of :meth:`Controller.get_compression_state`; nothing is initialised then, and the tensors
        come with ``model.load_state_dict``.
    :param dump_graphs: NNCF 2's debugging aid; ignored.
    :return: controller and compressed model.
    :raises ConfigError: the config is wrong, or asks for what NNCF 3 cannot do.
    :raises HostError: NNCF cannot trace or quantize the model.
    :raises CheckpointError: the state belongs to another model.
    :raises QuantizationError: a weight holds NaN or infinite values.
    """
    config = load_config(config)
    plan = parse_config(config)
    model = _wrappable(model)
    device = device_of(model)
    with _undone_on_error(model):
        if compression_state is not None:
            return _resume(model, plan, check_state(compression_state), config), model
        batches = batches_of(config, plan.inputs, device)
        if not batches.real:
            warnings.warn(
                "no data loader is registered (register_default_init_args): activation quantizers stay uncalibrated, "
                "which means identity, and batch norms are not adapted",
                stacklevel=2,
            )
        traced = trace(model, batches.example)
        ignored = _check_scopes(traced, plan)
        check_weights(traced, ignored)
        sparsity = _sparsify(traced, plan, batches.example)
        if sparsity is not None:
            traced = trace(model, batches.example)
        settings = advanced(plan.config)
        settings.activations_range_estimator_params = range_estimator(plan.range)
        settings.batchwise_statistics = batches.batch_size > 1 and plan.range.kind in ("mixed_min_max", "mean_min_max")
        points = place(
            traced, batches, nncf.IgnoredScope(names=sorted(ignored), validate=False), settings,
            samples=plan.range.samples, preset=plan.config.preset, target_device=plan.target_device,
        )  # fmt: skip
        resolved = resolve(traced, points, plan.config, keep_zeros=_has_masks(model), lr_multiplier=plan.lr_multiplier)
        install(traced, resolved)
        follow_quantizers(model)
        calibrate_weights(model, resolved)
        _add_coordinators(traced, batches)
        if batches.real and plan.range.samples:
            calibrate_activations(model, resolved, batches, ranges_first=plan.range.explicit)
        if batches.real:
            begin(model)
        if batches.real and plan.range.samples:
            adapt_batch_norms(model, batches, steps(plan.bn_samples, batches.batch_size))
        return _controller(traced, plan, sparsity, batches), model


def _check_scopes(traced: Traced, plan: Plan) -> set[str]:
    """Refuse scopes that match nothing; names of the operations that stay float by the section's own scopes."""
    config, names = plan.config, traced.names
    if config.validate_scopes is not False:
        for where, scopes in _scopes_of(config):
            names.check(scopes, where)
    if plan.sparsity is not None:
        for key in ("ignored_scopes", "target_scopes"):
            names.check(getattr(plan.sparsity, key), f"{plan.sparsity.algorithm}.{key}")
    return names.excluded(config)


def _scopes_of(config: CompressionConfig) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for part in config.parts:
        where = part.where
        found += [(f"{where}.{key}", getattr(part, key)) for key in ("ignored_scopes", "target_scopes")]
        for group in ("weights", "activations"):
            section = getattr(part, group)
            found += [(f"{where}.{group}.{k}", getattr(section, k)) for k in ("ignored_scopes", "target_scopes")]
            found += [(f"{where}.scope_overrides.{group}", s) for s in getattr(part.scope_overrides, group)]
    return found


def _sparsify(traced: Traced, plan: Plan, example: Any) -> Sparsity | None:
    if plan.sparsity is None:
        return None
    if _has_masks(traced.model):
        raise ConfigError(f"{plan.sparsity.algorithm}: the model holds masks of nncf.prune already")
    sparsity = Sparsity(plan.sparsity, traced.model)
    sparsity.attach(traced.names.excluded(plan.sparsity), example)
    return sparsity


def _has_masks(model: nn.Module) -> bool:
    return any(isinstance(m, (UnstructuredPruningMask, RBPruningMask)) for m in model.modules())


def _resume(model: nn.Module, plan: Plan, state: Mapping[str, Any], config: Mapping[str, Any]) -> Controller:
    batches = batches_of(config, plan.inputs, device_of(model))
    traced = trace(model, batches.example)
    rebuild(traced, state)
    follow_quantizers(model)
    sparsity = Sparsity(plan.sparsity, model) if plan.sparsity is not None else None
    if sparsity is not None and not _has_masks(model):
        raise ConfigError(f"{plan.sparsity.algorithm}: the compression state was saved without masks")
    if sparsity is not None:
        sparsity.resume(-1)
    _add_coordinators(traced, batches)
    controller = _controller(traced, plan, sparsity, batches)
    controller.load_state(state)
    return controller


def _controller(traced: Traced, plan: Plan, sparsity: Sparsity | None, batches: Batches) -> Controller:
    example = example_from(plan.inputs, device_of(traced.model))
    fold_weights(traced.model)
    example = batches.example if example is None else example
    return Controller(traced.model, plan.config.algorithm, example, sparsity)


def _add_coordinators(traced: Traced, batches: Batches) -> None:
    """One for each algorithm in use that has one, over its layers in execution order; its state goes with the model."""
    found = nn.ModuleDict()
    for name in dict.fromkeys(hook.algorithm for hook in plugin_hooks(traced.model)):
        if get_algorithm(name).coordinator is not None:
            found[name] = get_algorithm(name).make_coordinator(layer_quantizers(traced, name))
            found[name].to(device_of(traced.model)).train(traced.model.training)
            if batches.real:
                found[name].set_calibration(Pass(traced.model, batches))
    if found:
        traced.model.add_module(COORDINATORS, found)


def quantize(
    model: nn.Module,
    calibration_dataset: nncf.Dataset,
    algorithm: str = DEFAULT_ALGORITHM,
    weights: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    *,
    first_layer: int | str = 8,
    last_layer: int | str = 8,
    scope_overrides: Mapping[str, Any] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    preset: Any = None,
    target_device: Any = "ANY",
    subset_size: int = 300,
    model_type: Any = None,
    advanced_parameters: Any = None,
    batchnorm_adaptation_steps: int = 0,
) -> nn.Module:
    """``nncf.quantize`` with an algorithm of this package: returns a quantized copy, ready for training.

    The algorithm's loss is ``fat_plugins.regularization(model)``, its schedule ``fat_plugins.set_progress(model, ...)``
    and its optimizer wishes ``fat_nncf.param_groups(model, lr)``.

    :param calibration_dataset: ``nncf.Dataset`` of model inputs.
    :param weights, activations: as in the JSON config, e.g. ``{"bits": 4}``.
    :param params: options of the algorithm.
    :param first_layer, last_layer: a width, ``"float"`` or ``"same"``.
    :param ignored_scope: ``nncf.IgnoredScope``; what it names stays float.
    :param subset_size: number of items of the dataset that are looked at.
    :param advanced_parameters: ``nncf.AdvancedQuantizationParameters``; what would change the weights is switched off.
    :param batchnorm_adaptation_steps: items for ``nncf.batch_norm_adaptation`` afterwards; FAT gains from some.
    :raises ConfigError, HostError, QuantizationError: as :func:`create_compressed_model`.
    """
    section = {
        "algorithm": algorithm, "weights": dict(weights or {}), "activations": dict(activations or {}),
        "params": dict(params or {}), "first_layer": first_layer, "last_layer": last_layer,
        "scope_overrides": copy.deepcopy(dict(scope_overrides or {})),
    }  # fmt: skip
    config = CompressionConfig.parse(section, "quantize")
    if type(subset_size) is not int or subset_size < 1:
        raise ConfigError(f"subset_size: expected a positive integer, got {subset_size!r}")
    model = _wrappable(copy.deepcopy(model))
    batches = DatasetBatches(calibration_dataset, device_of(model))
    traced = trace(model, batches.example)
    for where, scopes in _scopes_of(config):
        traced.names.check(scopes, where)
    check_weights(traced, _ignored_by(traced, ignored_scope))
    settings = advanced(config, advanced_parameters)
    if advanced_parameters is None:
        settings.activations_range_estimator_params = range_estimator(RangeInit())
    points = place(
        traced, batches, ignored_scope or nncf.IgnoredScope(), settings, samples=subset_size * batches.batch_size,
        preset=getattr(preset, "value", preset), target_device=target_device, model_type=model_type,
    )  # fmt: skip
    resolved = resolve(traced, points, config, keep_zeros=_has_masks(model), lr_multiplier=None)
    install(traced, resolved)
    follow_quantizers(model)
    _add_coordinators(traced, batches)
    calibrate_weights(model, resolved)
    calibrate_activations(model, resolved, batches, ranges_first=False)
    begin(model)
    adapt_batch_norms(model, batches, batchnorm_adaptation_steps)
    fold_weights(model)
    return model


def _ignored_by(traced: Traced, scope: nncf.IgnoredScope | None) -> set[str]:
    """Node names that NNCF's own scope object leaves out.

    :raises ConfigError: it matches nothing.
    """
    if scope is None:
        return set()
    from nncf.scopes import get_ignored_node_names_from_ignored_scope

    try:
        return set(get_ignored_node_names_from_ignored_scope(scope, traced.graph, strict=scope.validate))
    except Exception as error:
        raise ConfigError(f"ignored_scope: {' '.join(str(error).split())}") from None
