"""fat-plugins for NNCF: ``import fat_nncf`` makes every algorithm of the registry known to the installed NNCF.

The names below are the same on both generations of NNCF. On NNCF 2 the first three are NNCF's own (with one
clearer error), so scripts that import them from ``nncf`` and ``nncf.torch`` stay as they are.

:raises HostError: NNCF is absent, its version is unsupported, or it was imported before in a way that excludes us.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fat_nncf.versions import generation
from fat_plugins.network import param_groups

#: 2 (NNCF's own create_compressed_model and JSON config) or 3 (function hooks)
GENERATION = generation()

if GENERATION == 2:
    from fat_nncf.legacy import NNCFConfig, create_compressed_model, freeze, quantize, register_default_init_args
else:
    from fat_nncf.modern import NNCFConfig, create_compressed_model, freeze, quantize, register_default_init_args


def _later(name: str) -> Any:
    """A function of :mod:`fat_nncf.export`, which is imported with its exporters on first use."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("fat_nncf.export"), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"See :func:`fat_nncf.export.{name}`."
    return call


export_openvino, verify_openvino = _later("export_openvino"), _later("verify_openvino")
export_qonnx, verify_qonnx = _later("export_qonnx"), _later("verify_qonnx")
export_onnx, verify_onnx = _later("export_onnx"), _later("verify_onnx")

__all__ = [
    "GENERATION",
    "NNCFConfig",
    "create_compressed_model",
    "export_onnx",
    "export_openvino",
    "export_qonnx",
    "freeze",
    "param_groups",
    "quantize",
    "register_default_init_args",
    "verify_onnx",
    "verify_openvino",
    "verify_qonnx",
]
