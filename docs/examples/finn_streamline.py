"""FINN's conversion, streamlining and choice of hardware layers for an exported QONNX file, with a check at each stage.

For those who have FINN (see docs/finn.md for versions): put FINN's ``src`` on PYTHONPATH, set FINN_ROOT, then

    python finn_streamline.py model.onnx --output finn_model.onnx

Every stage is executed on the same seeded input and compared with the QONNX file itself. Nothing here needs Vivado or a
board; synthesis starts from the file that is written.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.custom_op.registry import getCustomOp
from qonnx.transformation.base import Transformation
from qonnx.transformation.bipolar_to_xnor import ConvertBipolarMatMulToXnorPopcount
from qonnx.transformation.fold_constants import FoldConstants
from qonnx.transformation.general import (
    GiveReadableTensorNames,
    GiveUniqueNodeNames,
    RemoveStaticGraphInputs,
    RemoveUnusedTensors,
)
from qonnx.transformation.infer_data_layouts import InferDataLayouts
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul
from qonnx.util.cleanup import cleanup_model

#: layout of images until FINN moves the channels to the end
IMAGES = "NCHW"
WEIGHTED = ("MatMul", "Conv", "MVAU", "VVAU", "XnorPopcountMatMul")


class NameLayouts(Transformation):
    """Say the layout of thresholds on images where FINN leaves it open: its hardware layers guess the other one."""

    def apply(self, model: ModelWrapper) -> tuple[ModelWrapper, bool]:
        """One pass is enough."""
        for node in model.get_nodes_by_op_type("MultiThreshold"):
            operation = getCustomOp(node)
            if len(model.get_tensor_shape(node.input[0])) == 4 and not operation.get_nodeattr("data_layout"):
                operation.set_nodeattr("data_layout", IMAGES)
        return model, False


def to_finn() -> list[Transformation]:
    """Brevitas's nodes become FINN's: thresholds, integer weights, and the scales as separate multiplications."""
    from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN

    tidy = [InferShapes(), FoldConstants(), *names(), InferDataTypes(), RemoveStaticGraphInputs()]
    return [ConvertQONNXtoFINN(), *tidy, NameLayouts()]


def streamline() -> list[Transformation]:
    """Scales and batch norms move into the thresholds; convolutions become matrix products."""
    import finn.transformation.streamline.absorb as absorb
    from finn.transformation.streamline import Streamline
    from finn.transformation.streamline.reorder import MakeMaxPoolNHWC

    return [
        Streamline(),
        LowerConvsToMatMul(),
        MakeMaxPoolNHWC(),
        absorb.AbsorbTransposeIntoMultiThreshold(),
        MakeMaxPoolNHWC(),
        absorb.AbsorbConsecutiveTransposes(),
        ConvertBipolarMatMulToXnorPopcount(),
        Streamline(),
        absorb.AbsorbScalarMulAddIntoTopK(),
        InferDataLayouts(),
        RemoveUnusedTensors(),
        *names(),
        InferDataTypes(),
    ]


def hardware_layers() -> list[Transformation]:
    """The operators that FINN has hardware for."""
    import finn.custom_op.fpgadataflow  # noqa: F401  what the layers are looked up in
    import finn.transformation.fpgadataflow.convert_to_hw_layers as hw
    import finn.transformation.streamline.absorb as absorb
    from finn.transformation.move_reshape import RemoveCNVtoFCFlatten

    kinds = (
        "InferBinaryMatrixVectorActivation",
        "InferQuantizedMatrixVectorActivation",
        "InferVectorVectorActivation",
        "InferThresholdingLayer",
        "InferConvInpGen",
        "InferPool",  # one transformation per kind of pooling in older versions
        "InferStreamingMaxPool",
        "InferGlobalAccPoolLayer",
        "InferAddStreamsLayer",
        "InferChannelwiseLinearLayer",
    )
    layers = [getattr(hw, kind)() for kind in kinds if hasattr(hw, kind)]
    return [*layers, RemoveCNVtoFCFlatten(), absorb.AbsorbConsecutiveTransposes(), InferDataTypes(), *names()]


def names() -> list[Transformation]:
    """Readable names."""
    return [GiveUniqueNodeNames(), GiveReadableTensorNames()]


STAGES = {"FINN-ONNX": to_finn, "streamlined": streamline, "hardware layers": hardware_layers}


def execute(model: ModelWrapper, x: np.ndarray) -> np.ndarray:
    """Output of a model with one input and one output."""
    graph = model.graph
    return execute_onnx(model, {graph.input[0].name: x})[graph.output[0].name]


def weight_types(model: ModelWrapper) -> list[str]:
    """Datatype of the constant operand of every weighted node."""
    found = []
    for node in model.graph.node:
        if node.op_type.removesuffix("_hls").removesuffix("_rtl") in WEIGHTED:
            found += [
                model.get_tensor_datatype(i).name for i in node.input[1:2] if model.get_initializer(i) is not None
            ]
    return found


def main() -> int:
    """Run all stages; the exit code tells whether every one agreed with the QONNX file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="QONNX file, exported with dynamo=False")
    parser.add_argument("--output", help="where the model with hardware layers goes")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference, relative to the output")
    arguments = parser.parse_args()

    model = cleanup_model(ModelWrapper(arguments.model))
    shape = model.get_tensor_shape(model.graph.input[0].name)
    x = np.random.default_rng(0).standard_normal([max(n, 1) for n in shape]).astype(np.float32)
    expected, agreed = execute(model, x), True
    print(f"{'stage':16} {'max difference':>14}  weights; operators")
    for name, transformations in STAGES.items():
        try:
            todo = transformations()
        except ImportError as error:  # older versions need a simulator for the last stage
            print(f"{name:16} not run: {error}")
            return 1
        for transformation in todo:
            model = model.transform(transformation)
        difference = np.abs(execute(model, x) - expected).max() / max(np.abs(expected).max(), 1e-30)
        agreed &= bool(difference <= arguments.tolerance)
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(n.op_type for n in model.graph.node).items())
        print(f"{name:16} {difference:14.2e}  {' '.join(weight_types(model))}; {kinds}")
    if arguments.output:
        model.save(arguments.output)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
