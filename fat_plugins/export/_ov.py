"""What differs between OpenVINO versions, and how packed constants are made. Imports OpenVINO on first use only."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np

from fat_plugins.errors import ExportError
from fat_plugins.export.packing import Storage, pack
from fat_plugins.versions import OPENVINO

#: element types that older versions cannot write to a file, and the first version seen to do it
_WRITABLE_FROM = {"u2": (2025, 4), "u3": (2025, 4)}


@lru_cache(maxsize=1)
def openvino() -> Any:
    """The ``openvino`` module. A version newer than those tested gives a warning.

    :raises ExportError: it is not installed, or its version is outside the supported range.
    """
    try:
        module = importlib.import_module("openvino")
    except ImportError:
        raise ExportError("OpenVINO is not installed: pip install 'openvino>=2024.6,<2027'") from None
    OPENVINO.check(str(module.__version__))
    return module


@lru_cache(maxsize=1)
def opset() -> Any:
    """Node factories."""
    name = "openvino.opset13" if version() >= (2025, 0) else "openvino.runtime.opset13"
    openvino()
    return importlib.import_module(name)


def exact(device: str) -> dict[str, str]:
    """Settings under which a device computes floats as torch does; integer kernels are chosen all the same.

    Without the second one the CPU plugin quantizes the inputs of float matrix products with packed weights, by a rule
    of its own.
    """
    cpu = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if device.startswith("CPU") else {}
    return {"INFERENCE_PRECISION_HINT": "f32", **cpu}


def version() -> tuple[int, int]:
    """Installed version as ``(year, minor)``."""
    major, minor = openvino().__version__.split(".")[:2]
    return int(major), int(minor)


def storage_types() -> set[str]:
    """Element types that the installed version can write and read back."""
    types = {"u1", "u2", "u3", "u4", "i4", "u8", "i8", "i16", "i32"}
    return {t for t in types if version() >= _WRITABLE_FROM.get(t, (0, 0))}


_MINI_IR = """<?xml version="1.0"?>
<net name="c" version="11"><layers>
<layer id="0" name="c" type="Const" version="opset1">
<data element_type="{element}" shape="{shape}" offset="0" size="{size}"/>
<output><port id="0" precision="{upper}">{dims}</port></output></layer>
<layer id="1" name="r" type="Result" version="opset1">
<input><port id="0" precision="{upper}">{dims}</port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


def packed_constant(stored: np.ndarray, storage: Storage) -> Any:
    """Constant node of a packed type.

    The Python bindings of some versions have no name for u2 and u3 although the library reads and writes them, so the
    node is taken from an IR of one constant.
    """
    packed = pack(stored, storage.element)
    text = _MINI_IR.format(
        element=storage.element,
        upper=storage.element.upper(),
        shape=",".join(map(str, stored.shape)),
        size=packed.nbytes,
        dims="".join(f"<dim>{d}</dim>" for d in stored.shape),
    )
    model = openvino().Core().read_model(text.encode(), openvino().Tensor(packed.copy()))
    return model.get_results()[0].input_value(0).get_node()


def any_value(value: Any) -> Any:
    """Python value of an entry of ``rt_info`` (``OVAny`` or already plain)."""
    return value.value if hasattr(value, "value") else value


def scalar(value: float, dtype: Any = np.float32) -> Any:
    """Scalar constant."""
    return opset().constant(np.asarray(value, dtype=dtype))


def copy_with(node: Any, inputs: list[Any]) -> Any:
    """A new node of the kind and attributes of ``node`` (a convolution or matmul) that reads ``inputs``."""
    name = "openvino.utils.node_factory" if version() >= (2025, 0) else "openvino.runtime.utils.node_factory"
    factory = importlib.import_module(name).NodeFactory(node.get_type_info().version_id)
    return factory.create(node.get_type_name(), inputs, node.get_attributes())
