"""Standard ONNX with integer weights and QuantizeLinear: what stands in the file, and that ONNX Runtime gives torch's
codes."""

import io
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnx_cases as cases
from frozen_nets import Layer, Net, Single, build, powers

from fat_plugins import ExportError
from fat_plugins.export import _onnx_graph, onnx
from fat_plugins.forms import Codebook, Staircase, UniformGrid
from fat_plugins.frozen import FrozenActivation

STANDARD = {"Conv", "ConvTranspose", "MatMul", "BatchNormalization", "Relu", "Add", "MaxPool", "ReduceMean"}
INTEGER = {"QuantizeLinear", "DequantizeLinear", "Clip"}


def constants(path):
    """Initializers by name."""
    return {t.name: cases.onnx.numpy_helper.to_array(t) for t in cases.written(path)[0].graph.initializer}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_net(bits, tmp_path):
    path, model = tmp_path / "m.onnx", build(Net, bits)
    report, verdict = cases.exact(onnx, model, path, torch.randn(4, 3, 12, 12))
    wanted = {"QuantizeLinear": 6, "DequantizeLinear": 12, "Clip": 3 if bits == 8 else 7, "Conv": 5, "MatMul": 1}
    found = Counter(cases.operations(path))
    assert {k: found[k] for k in wanted} == wanted and set(found) <= STANDARD | INTEGER
    assert {n.domain for n in cases.written(path)[0].graph.node} == {""}
    values = constants(path)
    for layer in (model.stem, model.full, model.grouped):
        module = layer.quantize_weight
        stored = values[f"{module.name}.weight.integers"]
        assert stored.dtype == np.int8 and np.array_equal(stored, module.codes.numpy())
    assert values["block.grouped.weight.scale"].shape == (32,) and values["stem.weight.scale"].shape == ()
    weights = [r for r in report.layers if r.kind == "weight"]
    assert {r.storage for r in weights} == {"i8"} and all(r.bytes == r.elements for r in weights)
    # codes, scales, batch norms, names: about a quarter of the floats
    assert report.weights_bytes == os.path.getsize(path) < report.float_bytes
    assert report.float_bytes - report.weights_bytes == 3 * sum(r.elements for r in weights)
    assert report.notes == []
    assert verdict.versions == {"onnxruntime": onnxruntime.__version__} and verdict.runtime == "ONNX Runtime"
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_layers(kind, per_channel, tmp_path):
    for _, model, x in cases.layers(kind, per_channel):
        cases.exact(onnx, model, tmp_path / "m.onnx", x)


def test_forms(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.warns(UserWarning, match="bases: a sum of 2 grids"):
        report, _ = cases.exact(onnx, build(cases.Forms), path, torch.randn(4, 3, 8, 8))
    counts = Counter(cases.operations(path))
    assert (counts["Conv"], counts["ConvTranspose"], counts["MatMul"]) == (7, 2, 4)
    assert {r.storage for r in report.layers if "sum of 2" in r.note} == {"i8+i8"}
    values = constants(path)
    assert set(np.unique(values["pot.weight.integers"])) <= {-4, -2, -1, 0, 1, 2, 4}
    assert set(np.unique(values["binary.weight.integers"])) == {-1, 1}


def test_shared_weights(tmp_path):
    _, verdict = cases.exact(onnx, build(cases.Shared), tmp_path / "m.onnx", torch.randn(2, 4, 6, 6))
    assert [w.name for w in verdict.weights] == ["shared", "shared#2", "again", "again#2", "again#3"]


@pytest.mark.parametrize("kind", cases.ODD)
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_odd_models(kind, dynamic_batch, tmp_path):
    path, model = tmp_path / "m.onnx", build(kind)
    onnx.export(model, path, torch.randn(2, 3, 8, 8), dynamic_batch=dynamic_batch)
    verdict = onnx.verify(model, path, torch.randn(4, 3, 8, 8))
    assert verdict.ok, verdict.detail
    names = ["output0", "output1"] if kind is cases.Reshaped else ["output"]
    assert [o.name.partition("_")[0] for o in verdict.outputs] == names and all(o.elements for o in verdict.outputs)


def test_sequences(tmp_path):
    cases.exact(onnx, build(cases.Sequence), tmp_path / "m.onnx", torch.randn(2, 5, 6))


SCALE = [0.1, 0.37, 3.0, 1e-3]


@pytest.mark.parametrize("scale", SCALE)
def test_uniform_codes_at_ties(scale, tmp_path):
    grids = [(1, False, False), (1, True, False), (2, True, True), (3, True, False), (4, False, False)]
    wide = [(8, False, False), (8, True, True), (8, True, False), (10, False, False)]
    for bits, signed, narrow in grids + wide:
        form = UniformGrid(bits, signed, narrow, torch.tensor([scale]))
        x = cases.near_thresholds(form, np.arange(form.low - 2, form.high + 2) + 0.5)
        with pytest.warns(UserWarning, match="do not fit 8 bits") if bits > 8 else nullcontext():
            cases.assert_codes(onnx, form, x, tmp_path / "m.onnx")


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("levels", [[0, 1, 2, 4], [-4, -2, -1, 0, 1, 2, 4], [-3, -1, 1, 3], [0, 1], [0, 1, 300]])
def test_staircase_codes_at_ties(levels, scale, tmp_path):
    levels = torch.tensor(levels)
    thresholds = levels[:-1].double() + levels.diff() * torch.linspace(0.21, 0.63, len(levels) - 1).double()
    form = Staircase(3, levels, thresholds, torch.tensor([scale]))
    with pytest.warns(UserWarning, match=r"0 \.\. 300 do not fit 8 bits") if levels[-1] == 300 else nullcontext():
        cases.assert_codes(onnx, form, cases.near_thresholds(form, thresholds), tmp_path / "m.onnx")


def test_per_channel_activations(tmp_path):
    scale = torch.tensor([0.1, 0.37, 2.0])
    for bits in (4, 9):
        form = UniformGrid(bits, True, True, scale, 1)
        x = cases.near_thresholds(form, np.arange(-300, 300) + 0.5)
        with pytest.warns(UserWarning) if bits == 9 else nullcontext():
            cases.assert_codes(onnx, form, x, tmp_path / "m.onnx")
    form = Staircase(3, powers(3, True), powers(3, True)[:-1].double() + 0.4, scale, 1)
    x = cases.near_thresholds(form, form.thresholds)
    cases.assert_codes(onnx, form, x.reshape(*x.shape, 1, 1).expand(-1, -1, 2, 2).contiguous(), tmp_path / "m.onnx")


BETWEEN = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Concat": lambda a, b: torch.cat([a[:, :3], b[:, 3:]], 1),
    "AveragePool": lambda a, b: F.avg_pool2d(a, 2),
    "GlobalAveragePool": lambda a, b: F.adaptive_avg_pool2d(a, 1),
    "LeakyRelu": lambda a, b: F.leaky_relu(a),
    "Sigmoid": lambda a, b: torch.sigmoid(a),
    "Softmax": lambda a, b: torch.softmax(a, 1),
    "MaxPool": lambda a, b: F.max_pool2d(a, 2),
}


class Between(nn.Module):
    """An operation between quantizers, with scales per channel in front, behind, or both; no layer."""

    def __init__(self, operation, per_channel, steps):
        super().__init__()
        self.operation, self.two = BETWEEN[operation], operation in ("Add", "Mul", "Concat")
        names = ("a", "b", "c") if self.two else ("a", "c")
        for i, name in enumerate(names):
            scale = 0.02 + 0.05 * torch.rand(6 if per_channel[name == "c"] else 1)
            form = UniformGrid(4 if name == "a" else 8, True, False, scale, 1)
            if steps and i == 0:
                form = Staircase(3, powers(3, True), powers(3, True)[:-1].double() + 0.4, scale, 1)
            self.add_module(name, FrozenActivation(form, name))

    def forward(self, x):
        return self.c(self.operation(self.a(x), self.b(0.7 * x) if self.two else None))


@pytest.mark.parametrize("steps", [False, True], ids=["grid", "steps"])
@pytest.mark.parametrize("per_channel", [(True, False), (False, True), (True, True)], ids=["before", "behind", "both"])
@pytest.mark.parametrize("operation", BETWEEN)
def test_operations_between_scales_per_channel(operation, per_channel, steps, tmp_path):
    """ONNX Runtime's integer versions of these operations refuse such scales, or give other numbers."""
    model, x, path = Between(operation, per_channel, steps).eval(), torch.randn(4, 6, 8, 8), tmp_path / "m.onnx"
    onnx.export(model, path, x[:1])
    verdict = onnx.verify(model, path, x)
    assert verdict.ok and all(a.probes for a in verdict.activations), verdict.detail
    assert np.allclose(onnx.execute(path, [x.numpy()])[0], model(x).numpy(), atol=1e-6)


def test_wide_weights_take_32_bits(tmp_path):
    for form, storage in (
        (lambda w: UniformGrid(12, True, True, torch.tensor([1e-3])), "i32"),
        (lambda w: Codebook(2, torch.tensor([0, 3, 200]), torch.tensor([0.01]), 0), "i32"),
    ):
        model = build(Single, "l", 3, 4, form=form, per_channel=True)
        report, _ = cases.exact(onnx, model, tmp_path / "m.onnx", torch.randn(2, 3, 5, 5))
        assert report.layers[1].storage == storage


class Chain(nn.Module):
    """Integer layers one behind the other: what ONNX Runtime likes to fuse."""

    def __init__(self):
        super().__init__()
        layers = [Layer(f"l{i}", 8, 8, bits=8, norm=False) for i in range(3)]
        self.layers, self.out = nn.Sequential(*layers), Layer("out", 8, 4, norm=False, relu=False)

    def forward(self, x):
        return self.out(self.layers(x))


def test_optimised_graphs(tmp_path):
    """End to end the file runs with ONNX Runtime's own rewriting; layer by layer it does not."""
    path, model, x = tmp_path / "m.onnx", build(Chain), torch.rand(4, 8, 16, 16) * 3
    onnx.export(model, path, x[:1])
    plain = onnx._runner(cases.onnx.load(str(path)))({"input": x.numpy()})["output"]
    optimised = onnx.execute(path, [x.numpy()])[0]
    wanted = model(x).detach().numpy()
    np.testing.assert_allclose(plain, wanted, atol=1e-4 * np.abs(wanted).max())
    # fused kernels may move single codes of 8 bits by one step
    np.testing.assert_allclose(optimised, wanted, atol=0.02 * np.abs(wanted).max())
    assert onnx.verify(model, path, x).ok


def test_fixed_batch(tmp_path):
    path, model, x = tmp_path / "m.onnx", build(Net), torch.randn(4, 3, 12, 12)
    onnx.export(model, path, x[:2], dynamic_batch=False)
    assert onnx.verify(model, path, x).ok
    np.testing.assert_allclose(onnx.execute(path, [x.numpy()])[0], model(x).detach().numpy(), atol=1e-4)
    with pytest.raises(ExportError, match="fixed batch of 2; 3 samples"):
        onnx.verify(model, path, x[:3])
    with pytest.raises(ExportError, match="ONNX Runtime refuses the inputs"):
        onnx.execute(path, [x[:3].numpy()])


class TwoInputs(nn.Module):
    """Two inputs, two outputs, one of them a quantizer's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Layer("a", 3, 4, norm=False), Layer("b", 3, 4, norm=False)

    def forward(self, x, y):
        return self.a(x) + self.b(y), self.b.quantize_input(x)


def test_several_inputs_and_outputs(tmp_path):
    path, model = tmp_path / "m.onnx", build(TwoInputs)
    x, y = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    onnx.export(model, path, (x, y))
    found = onnx.execute(path, [x.numpy(), y.numpy()])
    for one, wanted in zip(found, model(x, y), strict=True):
        np.testing.assert_allclose(one, wanted.detach().numpy(), atol=1e-5)
    assert onnx.verify(model, path, (x, y)).ok


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
        ("block.depthwise.weight.integers", flip_one, "block.depthwise"),
        ("block.depthwise.weight.scale", cases.grown, "block.depthwise"),
        ("head.weight.scale", cases.grown, "head"),
        ("block.point.input.scale", cases.grown, "block.point.input"),
        ("block.point.input.high", lambda high: high - 8, "block.point.input"),
        ("norm.bias", lambda bias: bias + 0.3, "stem"),
    ],
)
def test_tampering_is_found(tensor, change, first, tmp_path):
    path, model = tmp_path / "m.onnx", build(Net)
    onnx.export(model, path, torch.randn(1, 3, 12, 12))
    cases.tamper(path, "stem.norm.bias" if tensor == "norm.bias" else tensor, change)
    verdict = onnx.verify(model, path, torch.randn(4, 3, 12, 12))
    assert not verdict.ok and verdict.first_difference == first, verdict.detail
    assert first in verdict.to_json()


def test_the_table_names_the_runtime(tmp_path):
    from rich.console import Console

    path, model = tmp_path / "m.onnx", build(Net)
    onnx.export(model, path, torch.randn(1, 3, 12, 12))
    console = Console(width=160, file=io.StringIO())
    console.print(onnx.verify(model, path, torch.randn(2, 3, 12, 12)).to_table())
    text = console.file.getvalue()
    assert "torch and ONNX Runtime CPU, 2 samples: equal" in text and "block.grouped" in text


def test_errors_leave_no_file(tmp_path, monkeypatch):
    model, x = build(Net), torch.randn(1, 3, 12, 12)
    with pytest.raises(ExportError, match=r"m\.xml: a model in ONNX is written to a path that ends in \.onnx"):
        onnx.export(model, tmp_path / "m.xml", x)
    with pytest.raises(ExportError, match="must be positive"):
        onnx.export(cases.Only(UniformGrid(4, False, False, torch.zeros(1))), tmp_path / "m.onnx", x)
    real = _onnx_graph.importlib.import_module
    gone = {"onnx"}

    def absent(name, *args):
        if name.partition(".")[0] in gone:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(_onnx_graph.importlib, "import_module", absent)
    with pytest.raises(ExportError, match=r"^onnx is not installed: pip install 'fat-plugins\[qonnx\]'$"):
        onnx.export(model, tmp_path / "m.onnx", x)
    assert os.listdir(tmp_path) == []
    gone = {"onnxruntime"}
    onnx.export(model, tmp_path / "m.onnx", x)  # not needed to write
    with pytest.raises(ExportError, match=r"^onnxruntime is not installed"):
        onnx.verify(model, tmp_path / "m.onnx", x)
    with pytest.raises(ExportError, match=r"^onnxruntime is not installed"):
        onnx.execute(tmp_path / "m.onnx", [x.numpy()])
