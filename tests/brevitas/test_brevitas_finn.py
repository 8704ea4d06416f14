"""What FINN asks of a QONNX file, checked with qonnx; FINN itself is run by docs/examples/finn_streamline.py."""

from __future__ import annotations

import ast
from pathlib import Path

import fat_brevitas
import numpy as np
import pytest
from brevitas_exports import (
    calibrated,
    chain,
    each_algorithm,
    example,
    export_qonnx,
    load,
    operators,
    test_algorithms,  # noqa: F401
    weight_nodes,
    weight_types,
    widths,
)

DOCS = Path(__file__).parents[2] / "docs"


def attribute(node, name: str):
    """Value of an attribute of a node."""
    from qonnx.custom_op.registry import getCustomOp

    return getCustomOp(node).get_nodeattr(name)


def finn_rules(model) -> None:
    """The rules that docs/finn.md lists."""
    weights = weight_nodes(model)
    for node in model.graph.node:
        if node.op_type not in ("Quant", "BipolarQuant"):
            continue
        consumers = model.find_consumers(node.output[0])
        if node in weights:
            assert consumers is not None and len(consumers) == 1, f"{node.name} has one consumer"
        else:
            assert model.get_initializer(node.input[1]).size == 1, "activations have one scale"
        if node.op_type == "Quant":
            assert not model.get_initializer(node.input[2]).any(), "zero point 0"
            assert attribute(node, "rounding_mode") == "ROUND"
        producer = model.find_producer(node.input[0])
        if producer is not None and producer.op_type == "Relu":
            assert not attribute(node, "signed") and not attribute(node, "narrow"), "unsigned, full range after ReLU"


@each_algorithm
def test_rules_and_types(algorithm, bits, per_channel, tmp_path):
    model, x = chain(algorithm, bits, per_channel)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    finn_rules(file)
    assert weight_types(file) == [f"INT{n}" for n in widths(model)]
    assert "MatMul" in operators(file) and "Gemm" not in operators(file), "a linear layer without bias is a MatMul"
    for node in weight_nodes(file):
        assert file.get_initializer(node.input[1]).size in ((6, 4) if per_channel else (1,))
    after_relu = [n for n in file.graph.node if n.op_type == "Quant" and "Relu" in n.input[0]]
    assert len(after_relu) == 2
    assert {int(file.get_initializer(n.input[3])) for n in after_relu} == {bits}


def test_thresholds(tmp_path):
    model, x = chain("lsq", 3, act=fat_brevitas.act_quant("fat", bit_width=3, levels="power_of_two"))
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    finn_rules(file)
    for node in file.graph.node:
        if node.op_type != "MultiThreshold":
            continue
        assert (attribute(node, "out_scale"), attribute(node, "out_bias")) == (1.0, 0.0)
        thresholds = file.get_initializer(node.input[1])
        assert thresholds.shape[0] == 1 and bool((np.diff(thresholds[0]) >= 0).all())
        steps = thresholds.shape[1]
        assert attribute(node, "out_dtype") == f"UINT{steps.bit_length()}"
        assert file.get_tensor_datatype(node.output[0]).name == f"UINT{steps.bit_length()}"
        # unsigned: 0 and 1 to 64, so 64 steps; signed: -4 to 4
        assert steps in (64, 8)


def test_bipolar(tmp_path, test_algorithms):  # noqa: F811
    model, x = chain("sign", 1, act=fat_brevitas.act_quant("lsq", bit_width=4))
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    finn_rules(file)
    assert weight_types(file) == ["BIPOLAR"] * 3


def test_relu6_is_the_top_of_the_grid(tmp_path):
    import brevitas.nn as qnn

    x = example() * 20
    model = calibrated(qnn.QuantReLU(act_quant=fat_brevitas.act_quant("fat", bit_width=4), calibration_max=6.0), x)
    assert float(model(x).detach().max()) == pytest.approx(6.0, rel=1e-6)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    (node,) = [n for n in file.graph.node if n.op_type == "Quant"]
    assert float(file.get_initializer(node.input[1])) * 15 == pytest.approx(6.0, rel=1e-6)


def test_the_script_is_the_one_that_the_page_describes():
    """It needs FINN to run; at least it is Python, documented, and every stage of the page is in it."""
    text = (DOCS / "examples" / "finn_streamline.py").read_text()
    tree = ast.parse(text)
    stages = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "STAGES")
    page = (DOCS / "finn.md").read_text()
    for key in stages.keys:
        assert key.value in page
    assert "dynamo=False" in text + page
