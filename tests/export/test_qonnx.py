"""QONNX: what stands in the file, what qonnx makes of it, and that every integer code is torch's."""

import io
import os
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnx_cases as cases
from frozen_nets import Layer, Net, Single, activation_grid, build, codebook, powers, staircase
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.custom_op.registry import getCustomOp
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.util.cleanup import cleanup_model

from fat_plugins import ExportError, TensorSpec, get_algorithm
from fat_plugins.export import _onnx_graph, qonnx
from fat_plugins.forms import Codebook, Staircase, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight

STANDARD = {"Conv", "ConvTranspose", "MatMul", "BatchNormalization", "Relu", "Add", "Mul", "MaxPool", "ReduceMean"}


def datatypes(path):
    """Integer datatype of every weight after qonnx's own cleanup and inference, by how often it occurs."""
    model = cleanup_model(ModelWrapper(str(path)), override_inpsize=1).transform(InferDataTypes())
    found = Counter()
    for node in model.graph.node:
        if node.op_type in ("Quant", "BipolarQuant") and model.get_initializer(node.input[0]) is not None:
            found[getCustomOp(node).get_integer_datatype(model).name] += 1
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_net(bits, tmp_path):
    path, model = tmp_path / "m.onnx", build(Net, bits)
    report, _ = cases.exact(qonnx, model, path, torch.randn(4, 3, 12, 12))
    assert Counter(cases.operations(path)) == {
        "Quant": 12, "Conv": 5, "BatchNormalization": 5, "Relu": 5, "Add": 2, "MatMul": 1, "MaxPool": 1, "ReduceMean": 1
    }  # fmt: skip
    assert datatypes(path) == Counter({"INT8": 2, f"INT{bits}": 4} if bits != 8 else {"INT8": 6})
    proto, entries = cases.written(path)
    names = {n.name for n in proto.graph.node}
    assert {"stem", "block.full", "block.grouped", "head"} <= names
    tensors = {n.output[0]: n for n in proto.graph.node}
    assert tensors["block.full.weight"].domain == "qonnx.custom_op.general"
    assert [e["name"] for e in entries if e["kind"] == "weight"] == [
        "stem", "block.full", "block.depthwise", "block.point", "block.grouped", "head"
    ]  # fmt: skip
    assert report.weights_bytes == os.path.getsize(path)
    assert {r.storage for r in report.layers if r.kind == "weight"} == {"f32"} and report.notes == []
    assert report.to_dict()["onnx"] and report.format == "QONNX"
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert model.stem.quantize_weight.name == "stem"  # the model is as it was


def test_activations_follow_the_rules_of_finn(tmp_path):
    path = tmp_path / "m.onnx"
    qonnx.export(build(Net), path, torch.randn(1, 3, 12, 12), dynamic_batch=False)
    model = ModelWrapper(str(path))
    maker = {n.output[0]: n for n in model.graph.node}
    behind_relu = 0
    for node in model.graph.node:
        if node.op_type != "Quant":
            continue
        op = getCustomOp(node)
        scale, zero = model.get_initializer(node.input[1]), model.get_initializer(node.input[2])
        assert zero == 0 and op.get_nodeattr("rounding_mode") == "ROUND"
        assert len(model.find_consumers(node.output[0])) == 1
        if model.get_initializer(node.input[0]) is None:
            assert scale.ndim == 0
            if node.input[0] in maker and maker[node.input[0]].op_type == "Relu":
                assert (op.get_nodeattr("signed"), op.get_nodeattr("narrow")) == (0, 0)
                behind_relu += 1
    assert behind_relu == 2  # others stand behind an addition, a pool, a mean


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_layers(kind, per_channel, tmp_path):
    for bits, model, x in cases.layers(kind, per_channel):
        cases.exact(qonnx, model, tmp_path / "m.onnx", x)
        assert datatypes(tmp_path / "m.onnx") == {f"INT{bits}": 1}
        assert set(cases.operations(tmp_path / "m.onnx")) <= STANDARD | {"Quant"}


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 4), (4, 8), (5, 16)])
def test_powers_of_two_take_the_width_of_their_largest(bits, width, tmp_path):
    model = build(Single, "layer", 8, 8, form=lambda w: codebook(w, bits, powers(2 ** (bits - 1) - 1, True)))
    cases.exact(qonnx, model, tmp_path / "m.onnx", torch.randn(2, 8, 5, 5))
    assert datatypes(tmp_path / "m.onnx") == {f"INT{width}": 1}


def test_forms(tmp_path):
    path, model = tmp_path / "m.onnx", build(cases.Forms)
    with pytest.warns(UserWarning, match="bases: a sum of 2 grids"):
        report, verdict = cases.exact(qonnx, model, path, torch.randn(4, 3, 8, 8))
    assert datatypes(path) == {"INT4": 1, "BIPOLAR": 7, "INT2": 3, "INT3": 2}
    assert set(cases.operations(path)) <= STANDARD | {"Quant", "BipolarQuant", "MultiThreshold"}
    assert [r.name for r in report.layers if "sum of 2" in r.note] == ["bases", "up", "rest", "hidden", "head"]
    counts = Counter(cases.operations(path))
    assert (counts["Conv"], counts["ConvTranspose"], counts["MatMul"]) == (7, 2, 4)
    assert {w.name for w in verdict.weights} == {"pot", "binary", "bases", "up", "rest", "one", "hidden", "head"}
    assert verdict.activations[3].layers == ["bases"]  # the parts and their sum are one layer


def test_cleanup_changes_nothing(tmp_path):
    """What qonnx and FINN run first on a file."""
    path, x = tmp_path / "m.onnx", torch.randn(1, 3, 12, 12)
    for model in (build(Net), build(cases.Forms)):
        with pytest.warns(UserWarning) if isinstance(model, cases.Forms) else nullcontext():
            qonnx.export(model, path, x, dynamic_batch=False)
        before = qonnx.execute(path, [x.numpy()])[0]
        clean = cleanup_model(ModelWrapper(str(path)))
        clean.save(str(tmp_path / "clean.onnx"))
        after = qonnx.execute(tmp_path / "clean.onnx", [x.numpy()])[0]
        assert np.array_equal(before, after)
        with pytest.raises(ExportError, match="verify the file as it was exported"):
            qonnx.verify(model, tmp_path / "clean.onnx", x)


def test_containers(tmp_path):
    """Integers that hold a set of levels: bits, sign, narrow range."""
    wanted = {
        (-4, -2, -1, 0, 1, 2, 4): ("INT4", 1),
        (-1, 0, 1): ("INT2", 1),
        (-8, 0, 1): ("INT4", 0),
        (0, 1, 2, 4): ("UINT3", 0),
        (-3, 3): ("INT3", 1),
    }
    for levels, (name, narrow) in wanted.items():
        table = torch.tensor(levels)
        model = build(Single, "l", 3, 4, form=lambda w, t=table: Codebook(3, t, torch.tensor([0.11]), 0))
        cases.exact(qonnx, model, tmp_path / "m.onnx", torch.randn(2, 3, 5, 5))
        assert datatypes(tmp_path / "m.onnx") == {name: 1}
        wrapper = ModelWrapper(str(tmp_path / "m.onnx"))
        weight = next(n for n in wrapper.graph.node if n.output[0] == "l.weight")
        assert getCustomOp(weight).get_nodeattr("narrow") == narrow


SCALE = [0.1, 0.37, 3.0, 1e-3]


@pytest.mark.parametrize("scale", SCALE)
def test_uniform_codes_at_ties(scale, tmp_path):
    for bits, signed, narrow in (
        (1, False, False),
        (1, True, False),  # -1 and 0: no Quant node, whose signed bit means -1 and 1
        (2, True, True),
        (3, True, False),
        (4, False, False),
        (8, True, True),
    ):
        form = UniformGrid(bits, signed, narrow, torch.tensor([scale]))
        x = cases.near_thresholds(form, np.arange(form.low - 2, form.high + 2) + 0.5)
        cases.assert_codes(qonnx, form, x, tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("levels", [[0, 1, 2, 4], [-4, -2, -1, 0, 1, 2, 4], [-3, -1, 1, 3], [0, 1]])
def test_staircase_codes_at_ties(levels, scale, tmp_path):
    levels = torch.tensor(levels)
    thresholds = levels[:-1].double() + levels.diff() * torch.linspace(0.21, 0.63, len(levels) - 1).double()
    form = Staircase(3, levels, thresholds, torch.tensor([scale]))
    cases.assert_codes(qonnx, form, cases.near_thresholds(form, thresholds), tmp_path / "m.onnx")
    (steps,) = [n for n in cases.written(tmp_path / "m.onnx")[0].graph.node if n.op_type == "MultiThreshold"]
    assert {a.name: a.f for a in steps.attribute if a.type == 1} == {"out_scale": 1, "out_bias": 0}
    assert set(cases.operations(tmp_path / "m.onnx")) <= {"MultiThreshold", "Add", "Mul"}


def test_wide_staircases_stay_small(tmp_path):
    """Powers of two of 4 bits span 2^14 steps: one threshold each, not one per step."""
    levels = powers(15, False)
    form = Staircase(4, levels, levels[:-1].double() + levels.diff().double() / 2, torch.tensor([3 / 2**14]))
    with pytest.warns(UserWarning, match=r"act: levels 0 \.\. 16384 take more than 255 thresholds"):
        cases.assert_codes(qonnx, form, cases.near_thresholds(form, form.thresholds), tmp_path / "m.onnx")
    assert os.path.getsize(tmp_path / "m.onnx") < 20_000
    model = build(Single, "l", 3, 4, activation=form)
    with pytest.warns(UserWarning, match="more than 255"):
        cases.exact(qonnx, model, tmp_path / "m.onnx", torch.rand(4, 3, 8, 8) * 4)


def test_per_channel_activations(tmp_path):
    scale = torch.tensor([0.1, 0.37, 2.0])
    for form in (
        UniformGrid(4, True, True, scale, 1),
        Staircase(3, powers(3, True), powers(3, True)[:-1].double() + 0.4, scale, 1),
    ):
        thresholds = np.arange(-8, 8) + 0.5 if isinstance(form, UniformGrid) else form.thresholds
        with pytest.warns(UserWarning, match="one scale per channel"):
            cases.assert_codes(qonnx, form, cases.near_thresholds(form, thresholds), tmp_path / "m.onnx")


def test_shared_weights_have_one_reader_each(tmp_path):
    path, model = tmp_path / "m.onnx", build(cases.Shared)
    _, verdict = cases.exact(qonnx, model, path, torch.randn(2, 4, 6, 6))
    assert [w.name for w in verdict.weights] == ["shared", "shared#2", "again", "again#2", "again#3"]
    proto, _ = cases.written(path)
    quants = [n for n in proto.graph.node if n.op_type == "Quant"]
    readers = Counter(name for n in proto.graph.node for name in n.input)
    weights = [n for n in quants if n.output[0].endswith("weight")]
    assert len(weights) == 5 and all(readers[n.output[0]] == 1 and readers[n.input[0]] == 1 for n in weights)
    assert Counter(n.op_type for n in proto.graph.node)["Conv"] == 5


@pytest.mark.parametrize("kind", cases.ODD)
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_odd_models(kind, dynamic_batch, tmp_path):
    path, model = tmp_path / "m.onnx", build(kind)
    qonnx.export(model, path, torch.randn(2, 3, 8, 8), dynamic_batch=dynamic_batch)
    verdict = qonnx.verify(model, path, torch.randn(4, 3, 8, 8))
    assert verdict.ok, verdict.detail
    names = ["output0", "output1"] if kind is cases.Reshaped else ["output"]
    assert [o.name.partition("_")[0] for o in verdict.outputs] == names and all(o.elements for o in verdict.outputs)


def test_sequences(tmp_path):
    cases.exact(qonnx, build(cases.Sequence), tmp_path / "m.onnx", torch.randn(2, 5, 6))
    assert "Gemm" not in cases.operations(tmp_path / "m.onnx")


class Clipped(nn.Module):
    """ReLU6 in front of a quantizer that reaches to ``reach``."""

    def __init__(self, reach, steps=False):
        super().__init__()
        form = staircase(3, powers(3, False), reach) if steps else activation_grid(4, reach=reach)
        self.act, self.last = FrozenActivation(form, "act"), Layer("last", 3, 4, activation=None, norm=False)

    def forward(self, x):
        return self.last(self.act(F.relu6(x)))


@pytest.mark.parametrize("steps", [False, True])
def test_relu6(steps, tmp_path):
    path, x = tmp_path / "m.onnx", torch.randn(4, 3, 5, 5) * 6
    cases.exact(qonnx, build(Clipped, 4.0, steps), path, x)
    assert "Clip" not in cases.operations(path) and Counter(cases.operations(path))["Relu"] == 2
    with pytest.warns(UserWarning, match="act: a Clip stays in front of it"):
        cases.exact(qonnx, build(Clipped, 9.0, steps), path, x)
    assert "Clip" in cases.operations(path)


def test_weights_are_quantized_already(tmp_path):
    """A reader that takes the constants as they are must not be wrong (Brevitas 0.12 and later writes floats here)."""
    path, model = tmp_path / "m.onnx", build(Net)
    qonnx.export(model, path, torch.randn(1, 3, 12, 12))
    proto, _ = cases.written(path)
    values = {t.name: cases.onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for layer in (model.full, model.grouped):
        module = layer.quantize_weight
        assert np.array_equal(values[f"{module.name}.weight.values"], module.form.decode(module.codes).numpy())


def test_fixed_batch(tmp_path):
    path, model, x = tmp_path / "m.onnx", build(Net), torch.randn(4, 3, 12, 12)
    qonnx.export(model, path, x[:2], dynamic_batch=False)
    assert qonnx.verify(model, path, x).ok
    np.testing.assert_allclose(qonnx.execute(path, [x.numpy()])[0], model(x).detach().numpy(), atol=1e-4)
    with pytest.raises(ExportError, match="fixed batch of 2; 3 samples"):
        qonnx.verify(model, path, x[:3])


# --------------------------------------------------------------------------------------------------------------------
# faults
# --------------------------------------------------------------------------------------------------------------------
def flip_one(array):
    flat = array.reshape(-1)
    flat[np.abs(flat).argmax()] *= -1
    return array


@pytest.mark.parametrize(
    ("tensor", "change", "first"),
    [
        ("block.depthwise.weight.values", flip_one, "block.depthwise"),
        ("block.depthwise.weight.scale", cases.grown, "block.depthwise"),
        ("block.grouped.weight.values", flip_one, "block.grouped"),
        ("block.point.input.scale", cases.grown, "block.point.input"),
        ("block.point.input.bits", lambda bits: bits - 1, "block.point.input"),
        ("n.full.norm.bias", lambda bias: bias + 0.3, "block.depthwise, block.full"),  # their sum is what differs
    ],
)
def test_tampering_is_found(tensor, change, first, tmp_path):
    path = tmp_path / "m.onnx"

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = Net()

        def forward(self, x):
            return self.n(x)

    model = build(Outer)
    qonnx.export(model, path, torch.randn(1, 3, 12, 12))
    cases.tamper(path, tensor, change)
    verdict = qonnx.verify(model, path, torch.randn(4, 3, 12, 12))
    assert not verdict.ok and verdict.first_difference == first, verdict.detail
    assert verdict.to_dict()["runtime"] == "qonnx" and verdict.to_dict()["qonnx"]


def test_tampered_threshold_is_found(tmp_path):
    path, model = tmp_path / "m.onnx", build(Single, "l", 3, 4, activation=staircase(3, powers(3, False)))
    x = torch.linspace(0, 3, 3 * 1024).reshape(4, 3, 16, 16)
    qonnx.export(model, path, x[:1])
    cases.tamper(path, "l.input.thresholds", lambda t: t * 1.02)
    assert qonnx.verify(model, path, x).first_difference == "l.input"


def test_errors_leave_no_file(tmp_path, monkeypatch):
    model, x, path = build(Net), torch.randn(1, 3, 12, 12), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"m\.xml: a model in QONNX is written to a path that ends in \.onnx"):
        qonnx.export(model, tmp_path / "m.xml", x)
    with pytest.raises(ExportError, match=r"gone does not exist"):
        qonnx.export(model, tmp_path / "gone" / "m.onnx", x)
    with pytest.raises(ExportError, match="freeze it first"):
        qonnx.export(nn.Conv2d(3, 4, 3), path, x)
    with pytest.raises(ExportError, match="act: the activation quantizer was never calibrated"):
        qonnx.export(cases.Only(None), path, x)
    live = nn.Sequential(get_algorithm("lsq").make_activation(TensorSpec("activation", 4, "a")), model)
    with pytest.raises(ExportError, match="0: still a training quantizer"):
        qonnx.export(live, path, x)
    with pytest.raises(ExportError, match="torch cannot export the model to ONNX"):
        qonnx.export(model, path, torch.randn(1, 5, 12, 12))
    dead = build(Single, "dead", 3, 4, form=lambda w: Codebook(1, cases.BIPOLAR, torch.zeros(1), 0))
    with pytest.raises(ExportError, match=r"dead\.weight: the scale of a weight must be positive"):
        qonnx.export(dead, path, x)
    assert os.listdir(tmp_path) == []

    path.write_text("old")
    monkeypatch.setattr(os, "replace", _refuse)
    with pytest.raises(ExportError, match=r"m\.onnx: cannot be written: no space left"):
        qonnx.export(model, path, x)
    assert os.listdir(tmp_path) == ["m.onnx"] and path.read_text() == "old"


def _refuse(*_):
    raise OSError("no space left")


def test_the_exporter_leaves_torch_as_it_was(tmp_path):
    """After an export, also one that failed, the custom operators have no ONNX meaning again."""
    model, x = build(Net), torch.randn(1, 3, 12, 12)
    qonnx.export(model, tmp_path / "m.onnx", x)
    with pytest.raises(ExportError):
        qonnx.export(model, tmp_path / "m.onnx", torch.randn(1, 5, 12, 12))
    assert [m.name for m in model.modules() if isinstance(m, FrozenWeight)][:2] == ["stem", "block.full"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with warnings.catch_warnings(), pytest.raises((RuntimeError, ValueError)):
        warnings.simplefilter("ignore")  # torch about its own exporter; its message differs between versions
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False, opset_version=13)


def test_verify_refuses(tmp_path):
    model, x, path = build(Net), torch.randn(2, 3, 12, 12), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="no such file"):
        qonnx.verify(model, path, x)
    path.write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="onnx cannot read it"):
        qonnx.verify(model, path, x)
    foreign = cases.onnx.helper.make_graph([], "g", [], [])
    cases.onnx.save(cases.onnx.helper.make_model(foreign), str(path))
    with pytest.raises(ExportError, match="was not written by fat-plugins"):
        qonnx.verify(model, path, x)
    qonnx.export(model, path, x)
    with pytest.raises(ExportError, match=r"layer\.input: this activation is not in the ONNX file"):
        qonnx.verify(build(Single, "layer", 3, 4), path, x)
    with pytest.raises(ExportError, match=r"block\.full\.input: 3 bits in torch, 4 in the ONNX file"):
        qonnx.verify(build(Net, 3), path, x)
    with pytest.raises(ExportError, match="qonnx refuses the inputs"):
        qonnx.execute(path, [x.numpy()[:, :2]])
    with pytest.raises(ExportError, match="the model has 1, got 2"):
        qonnx.execute(path, [x.numpy(), x.numpy()])


@pytest.mark.parametrize("package", ["onnx", "qonnx"])
def test_missing_packages(package, tmp_path, monkeypatch):
    model, x, path = build(Net), torch.randn(1, 3, 12, 12), tmp_path / "m.onnx"
    real = _onnx_graph.importlib.import_module

    def absent(name, *args):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(_onnx_graph.importlib, "import_module", absent)
    message = rf"^{package} is not installed: pip install 'fat-plugins\[qonnx\]'$"
    if package == "qonnx":  # not needed to write
        qonnx.export(model, path, x)
        with pytest.raises(ExportError, match=message):
            qonnx.execute(path, [x.numpy()])
        with pytest.raises(ExportError, match=message):
            qonnx.verify(model, path, x)
    else:
        with pytest.raises(ExportError, match=message):
            qonnx.export(model, path, x)
        assert os.listdir(tmp_path) == []


def test_powers_of_two_need_four_bits(tmp_path):
    path, model = tmp_path / "m.onnx", build(Single, "l", 3, 4, form=cases.powers_of_two)
    qonnx.export(model, path, torch.randn(1, 3, 5, 5))
    weight = next(n for n in ModelWrapper(str(path)).graph.node if n.output[0] == "l.weight")
    assert ModelWrapper(str(path)).get_initializer(weight.input[3]) == 4
