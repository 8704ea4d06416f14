"""fat-plugins for NNCF: ``import fat_nncf`` makes every algorithm of the registry known to the installed NNCF.

The names below are the same on both generations of NNCF. On NNCF 2 the first three are NNCF's own (with one
clearer error), so scripts that import them from ``nncf`` and ``nncf.torch`` stay as they are.

:raises HostError: NNCF is absent, its version is unsupported, or it was imported before in a way that excludes us.
"""

from __future__ import annotations

from typing import Any

from fat_nncf.versions import generation
from fat_plugins.quantizer import param_groups

#: 2 (NNCF's own create_compressed_model and JSON config) or 3 (function hooks)
GENERATION = generation()

if GENERATION == 2:
    from fat_nncf.legacy import NNCFConfig, create_compressed_model, freeze, quantize, register_default_init_args
else:
    from fat_nncf.modern import NNCFConfig, create_compressed_model, freeze, quantize, register_default_init_args


def export_openvino(*args: Any, **kwargs: Any) -> Any:
    """Write an OpenVINO IR; see :func:`fat_nncf.export.export_openvino`, imported only now (it needs openvino)."""
    from fat_nncf.export import export_openvino as write

    return write(*args, **kwargs)


def verify_openvino(*args: Any, **kwargs: Any) -> Any:
    """Compare an IR with the model, code by code; see :func:`fat_nncf.export.verify_openvino`."""
    from fat_nncf.export import verify_openvino as check

    return check(*args, **kwargs)


__all__ = [
    "GENERATION",
    "NNCFConfig",
    "create_compressed_model",
    "export_openvino",
    "freeze",
    "param_groups",
    "quantize",
    "register_default_init_args",
    "verify_openvino",
]
