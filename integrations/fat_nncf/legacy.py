"""NNCF 2 (2.14 to 2.19): makes every algorithm of the registry known to NNCF's own JSON config and builders."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from traceback import walk_tb
from typing import Any, NoReturn

import torch
from nncf import NNCFConfig
from nncf.api.compression import CompressionStage
from nncf.config.schema import NNCF_CONFIG_SCHEMA, REF_VS_ALGO_SCHEMA
from nncf.torch import composite_compression, initialization, model_creation, register_default_init_args
from nncf.torch import create_compressed_model as nncf_create_compressed_model
from nncf.torch.algo_selector import PT_COMPRESSION_ALGORITHMS
from nncf.torch.composite_compression import PTCompositeCompressionAlgorithmController
from nncf.torch.exporter import PTExporter

from fat_nncf.legacy_builder import PluginBuilder
from fat_nncf.legacy_controller import PluginController
from fat_nncf.legacy_placement import plugin_sections
from fat_nncf.legacy_quantizer import PluginQuantizer
from fat_nncf.legacy_strip import copy_without_controller, freeze
from fat_plugins.config import CompressionConfig, is_plugin_section, json_schema
from fat_plugins.errors import ConfigError, FatPluginsError, HostError, unknown
from fat_plugins.mixed import parse_sections
from fat_plugins.registry import Algorithm, algorithms

NNCF_QUANTIZATION = "quantization"


def quantize(*_args: Any, **_kwargs: Any) -> NoReturn:
    """NNCF 3 only.

    :raises HostError: always.
    """
    raise HostError(
        "fat_nncf.quantize needs NNCF 3 (pip install 'fat-plugins[nncf]'); on NNCF 2 use create_compressed_model with "
        "a JSON config"
    )


@wraps(nncf_create_compressed_model)
def create_compressed_model(model: torch.nn.Module, config: NNCFConfig, *args: Any, **kwargs: Any) -> Any:
    """NNCF's own function, with one line for a model that it cannot trace.

    :raises HostError: the model's forward fails on the input that NNCF traces with.
    """
    modules = set(model.modules())
    try:
        return nncf_create_compressed_model(model, config, *args, **kwargs)
    except FatPluginsError:
        raise
    except Exception as error:
        if not _raised_in_forward(error, modules):
            raise
        text = (str(error).splitlines() or [""])[0]
        raise HostError(f"NNCF cannot trace {type(model).__name__}: {type(error).__name__}: {text}") from error


def _raised_in_forward(error: Exception, modules: set[torch.nn.Module]) -> bool:
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(f.f_code.co_name == "forward" and f.f_locals.get("self") in modules for f in frames)


# --------------------------------------------------------------------------------------------------------------------
# the JSON config
# --------------------------------------------------------------------------------------------------------------------
def _check_sections(config: Any) -> None:
    """Our one-line errors for our sections; what is not ours is left to NNCF.

    :raises ConfigError: a bad section of ours, an unknown algorithm whose name is close to one of ours, or two
        algorithms that both quantize.
    """
    compression = config.get("compression") if isinstance(config, dict) else None
    sections = compression if isinstance(compression, list) else [compression]
    quantizing: list[str] = []
    for i, section in enumerate(sections):
        name = section.get("algorithm") if isinstance(section, dict) else None
        if not isinstance(name, str):
            continue
        where = f"compression[{i}]" if isinstance(compression, list) else "compression"
        if is_plugin_section(section):
            if "precision" in CompressionConfig.parse(section, where).initializer:
                raise ConfigError(
                    f"{where}.initializer.precision: bit widths are not searched; set weights.bits, activations.bits "
                    "or scope_overrides"
                )
        elif name not in REF_VS_ALGO_SCHEMA:
            message = unknown("algorithm", name, {*REF_VS_ALGO_SCHEMA, *algorithms()})
            if any(f"did you mean '{own}'" in message for own in algorithms()):
                raise ConfigError(f"{where}.algorithm: {message}")
        if is_plugin_section(section) or name == NNCF_QUANTIZATION:
            quantizing.append(name)
    if isinstance(config, dict) and len(own := plugin_sections(config)) > 1:
        parse_sections(own)
    if NNCF_QUANTIZATION in quantizing and len(set(quantizing)) > 1:
        raise ConfigError(
            f"compression: {' and '.join(map(repr, quantizing))} both quantize; keep one of them and use "
            "scope_overrides for layers that need another algorithm"
        )


def _relaxed_schema(algorithm: type[Algorithm]) -> dict[str, Any]:
    """The generated schema as NNCF may see it: names and descriptions. Types and allowed values are checked before,
    by the models that the schema comes from, whose errors name the place."""
    schema = json_schema(algorithm)
    properties = {
        key: {k: v for k, v in value.items() if k in ("description", "default")}
        for key, value in schema["properties"].items()
    }
    properties["algorithm"] = schema["properties"]["algorithm"]
    # NNCF's own rules hold for what is NNCF's own
    properties["initializer"] = REF_VS_ALGO_SCHEMA[NNCF_QUANTIZATION]["properties"]["initializer"]
    return {
        "type": "object",
        "description": schema.get("description", ""),
        "properties": properties,
        "required": ["algorithm"],
        "additionalProperties": True,
    }


def _choices(node: Any) -> list[list[dict[str, str]]]:
    """The lists of alternatives for one algorithm's section inside the schema of ``compression``."""
    if isinstance(node, list):
        return [found for item in node for found in _choices(item)]
    if not isinstance(node, dict):
        return []
    options = node.get("oneOf", [])
    if options and all(str(o.get("$ref", "")).startswith("#/$defs/") for o in options):
        return [options]
    return [found for value in node.values() for found in _choices(value)]


# --------------------------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------------------------
def _torchscript_export(original: Callable[..., Any]) -> Callable[..., Any]:
    """Before 2.18 NNCF leaves the choice of exporter to torch, whose new default cannot trace NNCF's models."""

    @wraps(original)
    def call(self: PTExporter, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        export = torch.onnx.export
        ours = any(isinstance(m, PluginQuantizer) for m in model.modules())
        if not ours or "dynamo" not in inspect.signature(export).parameters:
            return original(self, model, *args, **kwargs)

        def with_torchscript(*a: Any, **k: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
                return export(*a, **{"dynamo": False, **k})

        torch.onnx.export = with_torchscript
        try:
            return original(self, model, *args, **kwargs)
        finally:
            torch.onnx.export = export

    return call


# --------------------------------------------------------------------------------------------------------------------
# several algorithms
# --------------------------------------------------------------------------------------------------------------------
def _quantizers_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Our weights are folded before other algorithms clean up: pruning clears input channels whose activations are
    zero anyway, which would change the statistics that an algorithm takes over the whole weight."""

    @wraps(original)
    def strip(self: PTCompositeCompressionAlgorithmController, do_copy: bool = True, *args: Any, **kwargs: Any) -> Any:
        children, model = self._child_ctrls, self._model
        ours = [c for c in children if isinstance(c, PluginController)]
        if not ours:
            return original(self, do_copy, *args, **kwargs)
        self._child_ctrls = ours + [c for c in children if c not in ours]
        self._model = copy_without_controller(model) if do_copy else model
        try:
            return original(self, False, *args, **kwargs)
        finally:
            self._child_ctrls, self._model = children, model

    return strip


def _one_builder(original: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    """All our sections of a list are the work of one builder, that of the first: a tensor is quantized once."""

    @wraps(original)
    def names(config: Any) -> list[str]:
        found = original(config)
        ours = [name for name in found if name in algorithms()]
        return [name for i, name in enumerate(found) if name not in ours or i == found.index(ours[0])]

    return names


# --------------------------------------------------------------------------------------------------------------------
# registration
# --------------------------------------------------------------------------------------------------------------------
def register() -> None:
    """Register every algorithm with NNCF. Runs on import; doing it again changes nothing."""
    for name, algorithm in algorithms().items():
        if name in PT_COMPRESSION_ALGORITHMS.registry_dict:
            continue
        builder = type(f"{algorithm.__name__}Builder", (PluginBuilder,), {"__doc__": algorithm.title})
        PT_COMPRESSION_ALGORITHMS.register(name)(builder)
        REF_VS_ALGO_SCHEMA[name] = _relaxed_schema(algorithm)
        seen: set[int] = set()
        for options in _choices(NNCF_CONFIG_SCHEMA["properties"]["compression"]):
            if id(options) not in seen:  # some versions use one list in both branches
                seen.add(id(options))
                options.append({"$ref": f"#/$defs/{name}"})
    if not getattr(NNCFConfig.validate, "checks_plugins", False):
        NNCFConfig.validate = staticmethod(_with_check(NNCFConfig.validate))
        initialization.wrap_dataloader_for_init = _with_first_batch(initialization.wrap_dataloader_for_init)
        # the one type in NNCF's checkpoints that torch's safe loader does not know
        torch.serialization.add_safe_globals([CompressionStage])
        for module in (model_creation, composite_compression):
            module.extract_algorithm_names = _one_builder(module.extract_algorithm_names)
        composite = PTCompositeCompressionAlgorithmController
        composite.strip = _quantizers_first(composite.strip)
        PTExporter._torch_export_call = _torchscript_export(PTExporter._torch_export_call)


def _with_check(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(original)
    def validate(loaded_json: dict[str, Any]) -> None:
        _check_sections(loaded_json)
        original(loaded_json)

    validate.checks_plugins = True
    return validate


def _with_first_batch(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(original)
    def wrap(data_loader: Any) -> Any:
        try:
            return original(data_loader)
        except StopIteration:  # NNCF looks at the first batch
            raise ConfigError("the loader of register_default_init_args gives no batch to calibrate on") from None

    return wrap


register()

__all__ = ["NNCFConfig", "create_compressed_model", "freeze", "quantize", "register", "register_default_init_args"]
