"""OpenVINO export: sizes, kernels, numbers, error paths."""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frozen_nets import (
    Layer,
    Net,
    Single,
    activation_grid,
    build,
    codebook,
    powers,
    staircase,
    weight_grid,
)
from torch import nn

from fat_plugins import ExportError, TensorSpec, get_algorithm
from fat_plugins.forms import Codebook, SumOfGrids, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight

openvino = pytest.importorskip("openvino")

from fat_plugins.export import _ov  # noqa: E402
from fat_plugins.export.openvino import execute, export, kernels  # noqa: E402
from fat_plugins.export.verify import verify  # noqa: E402

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
#: u2 and u3 constants exist in files from 2025.4 on
NARROW = _ov.version() >= (2025, 4)


def write(model, path, x, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(this OpenVINO writes no|in float|not by a conv).*")
        return export(model, path, x, **options)


def infer(path, *inputs):
    compiled = openvino.Core().compile_model(str(path), "CPU", F32)
    return [torch.from_numpy(v.copy()) for v in compiled([x.numpy() for x in inputs]).values()]


def assert_same(path, model, x):
    """Outputs agree but for float noise."""
    with torch.no_grad():
        wanted = model(x)
    found = infer(path, x)[0]
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max()) + 1e-6


def operations(path):
    return [n.get_type_name() for n in openvino.Core().read_model(str(path)).get_ops()]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_net(bits, tmp_path):
    model, x = build(Net, bits), torch.randn(2, 3, 16, 16)
    path = tmp_path / "m.xml"
    report = write(model, path, x)
    assert_same(path, model, torch.randn(5, 3, 16, 16))  # another batch size
    ran = kernels(path)
    assert [k.name for k in ran if k.speed != "int8"] == []
    assert {k.name for k in ran} == {
        "stem", "block.full", "block.depthwise", "block.point", "block.grouped", "head"
    }  # fmt: skip
    assert "BatchNormInference" not in operations(path)
    assert report.versions == {"openvino": openvino.__version__}
    assert report.to_dict()["openvino"] == openvino.__version__
    assert json.loads(report.to_json())["layers"][0]["name"] == "stem.input"
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml"]


@pytest.mark.parametrize("bits", [2, 3])
def test_size(bits, tmp_path):
    model = build(Net, bits, width=96)
    report = write(model, tmp_path / "m.xml", torch.randn(1, 3, 8, 8))
    assert report.weights_bytes == os.path.getsize(tmp_path / "m.bin")
    low = [r for r in report.layers if r.kind == "weight" and r.bits == bits]
    eight = [r for r in report.layers if r.kind == "weight" and r.bits == 8]
    width = bits if NARROW or bits == 4 else 4
    assert all(r.bytes <= r.elements * width / 8 + 1 for r in low)
    assert {r.storage for r in eight} == {"i8"}
    # everything that is not a code: biases and scales per channel of six layers
    others = 2 * 4 * (96 + 96 + 96 + 192 + 192 + 10) + 300
    codes = sum(4 * r.elements for r in low)
    assert report.weights_bytes <= codes * width / 32 * 1.01 + sum(r.elements for r in eight) + others
    assert report.float_bytes > codes


LAYERS = {
    "3x3": dict(inputs=16, outputs=32),
    "1x1": dict(inputs=16, outputs=32, kernel=1),
    "depthwise": dict(inputs=16, outputs=16, groups=16),
    "grouped": dict(inputs=32, outputs=32, groups=4),
    "multiplier": dict(inputs=8, outputs=16, groups=8),
    "strided, biased": dict(inputs=16, outputs=32, stride=2, bias=True),
    "per channel": dict(inputs=16, outputs=32, per_channel=True),
    "no norm": dict(inputs=16, outputs=32, norm=False, bias=True),
    "transposed": dict(inputs=16, outputs=32, kind="transposed", stride=2),
    "transposed, grouped": dict(inputs=16, outputs=32, kind="transposed", groups=4),
    "transposed per channel": dict(inputs=16, outputs=32, kind="transposed", per_channel=True, bias=True),
    "linear": dict(inputs=64, outputs=32, kind="linear", norm=False, bias=True),
    "linear, norm": dict(inputs=64, outputs=32, kind="linear", per_channel=True),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_kinds(layer, tmp_path):
    options = LAYERS[layer]
    model = build(Single, "layer", bits=2 if options.get("per_channel") else 4, **options)
    x = torch.rand(2, options["inputs"], *(() if options.get("kind") == "linear" else (9, 9))) * 4
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert operations(tmp_path / "m.xml").count("BatchNormInference") == 0
    kernel = kernels(tmp_path / "m.xml")
    assert [k.name for k in kernel] == ["layer"]
    if "transposed" not in layer:  # how the plugin runs those depends on its version
        assert kernel[0].speed == "int8", kernel


def test_batch_norm_is_folded_into_the_scale(tmp_path):
    model = build(Single, "layer", 8, 8)
    with torch.no_grad():
        model.layer.norm.weight[:3] = torch.tensor([0.0, -1.5, 1e-3])
    x = torch.rand(1, 8, 6, 6) * 3
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    ops = operations(tmp_path / "m.xml")
    assert ops.count("Multiply") == 1  # the scale of the weight and nothing else
    assert ops.count("Add") == 1
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


def test_lsq_grid_uses_its_lowest_code(tmp_path):
    form = lambda w: UniformGrid(4, True, False, w.detach().abs().max().reshape(1) / 8, 0)  # noqa: E731
    model = build(Single, "layer", 16, 16, form=form, activation=UniformGrid(4, True, False, torch.tensor([0.4]), 1))
    assert int(model.layer.quantize_weight.codes.min()) == -8 or int(model.layer.quantize_weight.codes.max()) == 7
    x = torch.randn(2, 16, 8, 8) * 3
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


@pytest.mark.parametrize(("signed", "shift"), [(False, 0.2), (True, 0.0)])
def test_staircase(signed, shift, tmp_path):
    levels = powers(3 if signed else 7, signed)
    model = build(Single, "layer", 16, 16, activation=staircase(3, levels, shift=shift))
    x = torch.randn(2, 16, 8, 8) * 2
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


class Step(nn.Module):
    """One activation quantizer."""

    def __init__(self, form):
        super().__init__()
        self.quantize = FrozenActivation(form, "q")

    def forward(self, x):
        return self.quantize(x)


@pytest.mark.parametrize("scale", [0.1, 0.37, 1e-4])
def test_staircase_comparisons_are_exact_next_to_the_thresholds(scale, tmp_path):
    form = staircase(3, powers(7, False), reach=64 * scale, shift=0.13)
    points = [form.thresholds.float() * form.scale]
    for direction in (-torch.inf, torch.inf):
        x = points[0]
        for _ in range(4):
            x = torch.nextafter(x, torch.tensor(direction))
            points.append(x)
    x = torch.cat(points).reshape(1, -1)
    model = build(Step, form)
    write(model, tmp_path / "m.xml", x)
    assert torch.equal(form.encode(infer(tmp_path / "m.xml", x)[0]), form.encode(x))
    assert len(form.encode(x).unique()) > 1


def test_codebook_weights(tmp_path):
    model = build(Single, "layer", 16, 32, form=lambda w: codebook(w, 4, powers(7, True)))
    x = torch.rand(2, 16, 8, 8) * 3
    report = write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert report.layers[1].storage == "u4"
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


def test_one_bit_weights(tmp_path):
    binary = torch.tensor([-1, 1])
    model = build(Single, "layer", 32, 32, form=lambda w: codebook(w, 1, binary))
    x = torch.rand(2, 32, 8, 8) * 3
    report = write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert report.layers[1].storage == "u1"
    assert report.layers[1].bytes == 32 * 32 * 9 / 8
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


def test_levels_beyond_8_bits_run_in_float_and_say_so(tmp_path):
    model = build(
        Single, "layer", 16, 32,
        form=lambda w: codebook(w, 5, powers(15, True)), activation=staircase(4, powers(15, False)),
    )  # fmt: skip
    x = torch.rand(2, 16, 8, 8) * 3
    with pytest.warns(UserWarning, match=r"layer.input: levels 0 .. 16384 do not fit 8 bits.*1 more"):
        report = export(model, tmp_path / "m.xml", x)
    assert [n.split(":")[0] for n in report.notes] == ["layer.input", "layer"]
    assert_same(tmp_path / "m.xml", model, x)
    assert kernels(tmp_path / "m.xml")[0].speed == "float"


class Twice(nn.Module):
    """One layer and one quantizer, each called twice."""

    def __init__(self):
        super().__init__()
        self.layer = Layer("shared", 8, 8, norm=False)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_layer_that_is_called_twice(tmp_path):
    model = build(Twice)
    x = torch.rand(1, 8, 6, 6) * 3
    report = write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert [k.name for k in kernels(tmp_path / "m.xml")] == ["shared", "shared#2"]
    assert [r.name for r in report.layers if r.kind == "weight"] == ["shared"]
    assert report.weights_bytes < 8 * 8 * 9 / 2 + 200  # the codes stand in the file once


class Pooled(nn.Module):
    """A max pool between a quantizer and the convolution that reads it."""

    def __init__(self, **options):
        super().__init__()
        self.quantize, self.pool = FrozenActivation(activation_grid(4), "q"), nn.MaxPool2d(3, 2, **options)
        self.layer = Layer("layer", 16, 16, activation=None)

    def forward(self, x):
        return self.layer(self.pool(self.quantize(x)))


@pytest.mark.parametrize(
    ("options", "size"), [(dict(ceil_mode=True), 16), (dict(ceil_mode=True, padding=1), 16), (dict(), 15)]
)
def test_max_pools_let_integers_through(options, size, tmp_path):
    model = build(Pooled, **options)
    x = torch.rand(2, 16, size, size) * 4
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


def test_a_ceil_pool_whose_shape_would_change_stays(tmp_path):
    model = build(Pooled, ceil_mode=True, padding=1)
    model.pool.kernel_size = 2  # the last window would start in the padding: torch drops it, plain ceil does not
    x = torch.rand(1, 16, 9, 9) * 4
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)


class Averaged(nn.Module):
    """An average pool between two quantizers."""

    def __init__(self, pool):
        super().__init__()
        self.quantize, self.pool = FrozenActivation(activation_grid(4), "q"), pool
        self.layer = Layer("layer", 16, 16, activation=activation_grid(4, reach=1.7))

    def forward(self, x):
        return self.layer(self.pool(self.quantize(x)))


POOLS = [nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 2), nn.AvgPool2d(2, count_include_pad=False), nn.AdaptiveAvgPool2d(1)]


@pytest.mark.parametrize("pool", POOLS)
def test_averages_are_not_rounded_to_the_integers_that_they_are_of(pool, tmp_path):
    model = build(Averaged, pool=pool)
    x = torch.rand(2, 16, 12, 12) * 4
    write(model, tmp_path / "m.xml", x)
    report = verify(model, tmp_path / "m.xml", x)
    assert report.ok and not any(a.unexplained for a in report.activations), report.detail
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


class Other(nn.Module):
    """Weights in other places than 2-d convolutions and linear layers."""

    def __init__(self, kind):
        super().__init__()
        shapes = {"conv1d": (16, 8, 3), "linear on sequences": (16, 8), "matmul": (16, 8), "embedding": (50, 8)}
        self.kind, self.weight = kind, nn.Parameter(torch.randn(shapes[kind]))
        self.norm = nn.BatchNorm1d(16)
        self.norm.running_var.uniform_(0.5, 2)
        form = weight_grid(self.weight, 4, per_channel=True)
        self.quantize_weight = FrozenWeight(form.encode(self.weight.detach()), form, "layer")
        self.quantize = FrozenActivation(activation_grid(4), "q")

    def forward(self, x):
        w = self.quantize_weight(self.weight)
        if self.kind == "embedding":
            return self.quantize(F.embedding(x, w))
        x = self.quantize(x)
        if self.kind == "conv1d":
            return self.norm(F.conv1d(x, w))
        return F.linear(x, w) if self.kind == "linear on sequences" else x @ w.t()


@pytest.mark.parametrize(
    ("kind", "shape"), [("conv1d", (2, 8, 9)), ("linear on sequences", (2, 5, 8)), ("matmul", (3, 8))]
)
def test_other_layers(kind, shape, tmp_path):
    model = build(Other, kind)
    x = torch.rand(shape) * 3
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert [(k.name, k.speed) for k in kernels(tmp_path / "m.xml")] == [("layer", "int8")]


def test_embedding_keeps_packed_codes(tmp_path):
    model, x = build(Other, "embedding"), torch.randint(0, 50, (2, 7))
    report = write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert report.layers[0].storage == "i4"
    assert report.notes == ["layer: read by Gather, not by a convolution or matmul"]
    assert kernels(tmp_path / "m.xml") == []


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Layer("a", 4, 8), Layer("b", 4, 8)

    def forward(self, x, y):
        return torch.cat([self.a(x), F.avg_pool2d(self.b(y), 2)], 1), x


def test_several_inputs_and_outputs(tmp_path):
    model = build(TwoInputs)
    x, y = torch.rand(2, 4, 4, 4), torch.rand(2, 4, 8, 8)
    write(model, tmp_path / "m.xml", (x, y))
    found = infer(tmp_path / "m.xml", x, y)
    assert torch.allclose(found[0], model(x, y)[0], atol=1e-5)
    assert torch.equal(found[1], x)


def binary_bases(axis):
    """Form of a weight as the sum of two binary grids with scales per channel."""

    def form(weight):
        scale = weight.detach().abs().movedim(axis, 0).flatten(1).mean(1)
        return SumOfGrids([Codebook(1, torch.tensor([-1, 1]), s, axis) for s in (scale, scale * 0.37)])

    return form


class Sums(nn.Module):
    """Sums of grids in every kind of layer."""

    def __init__(self):
        super().__init__()
        self.full = Layer("full", 3, 8, form=binary_bases(0), activation=activation_grid(8, signed=True))
        self.depthwise = Layer("depthwise", 8, 8, groups=8, form=self.sign_and_rest)
        self.up = Layer("up", 8, 8, kind="transposed", stride=2, form=binary_bases(1), bias=True)
        self.head = Layer("head", 8, 5, kind="linear", form=self.sign_and_rest, norm=False, bias=True, relu=False)

    @staticmethod
    def sign_and_rest(weight):
        largest = weight.detach().abs().max().reshape(1)
        sign = Codebook(2, torch.tensor([-1, 0, 1]), largest * 0.3)
        return SumOfGrids([sign, UniformGrid(3, True, True, largest * 0.23)])

    def forward(self, x):
        return self.head(self.up(self.depthwise(self.full(x))).mean((2, 3)))


def test_sums_of_grids_are_sums_of_integer_layers(tmp_path):
    path, model, x = tmp_path / "m.xml", build(Sums), torch.randn(4, 3, 8, 8)
    with pytest.warns(UserWarning):
        report = export(model, path, x[:1])
    layers = {r.name: r for r in report.layers if r.kind == "weight"}
    assert layers["full"].storage == "u1+u1" and layers["full"].bytes == 2 * 8 * 3 * 9 / 8
    assert all("a sum of 2 grids" in r.note for r in layers.values())
    assert {k.name: k.speed for k in kernels(path)} == {f"{name}|{i}": "int8" for name in layers for i in (0, 1)}
    assert "BatchNormInference" not in operations(path)
    verdict = verify(model, path, x)
    assert verdict.ok and [w.name for w in verdict.weights] == list(layers)
    (found,) = execute(path, [x.numpy()])
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-4)
    flipped = copy.deepcopy(model)
    flipped.up.quantize_weight.codes[0, 0, 0, 0] ^= 2  # the second basis of one weight
    verdict = verify(flipped, path, x)
    assert verdict.first_difference == "up" and [w.differences for w in verdict.weights] == [0, 0, 1, 0]
    with pytest.raises(ExportError, match="refuses the inputs"):
        execute(path, [x.numpy()[:, :2]])


class Gate(nn.Module):
    """A sum of grids behind a global pool, as in squeeze-and-excitation: one number per channel of a sample."""

    def __init__(self, norm, bias):
        super().__init__()
        self.gate = Layer("gate", 8, 8, kernel=1, form=Sums.sign_and_rest, bias=bias, norm=norm, relu=False)
        self.out = FrozenActivation(activation_grid(8, signed=True), "out")

    def forward(self, x):
        return self.out(self.gate(F.adaptive_avg_pool2d(x, 1)))


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
def test_constant_beside_a_sum_of_grids_at_one_position(norm, bias, tmp_path):
    path, model = tmp_path / "m.xml", build(Gate, norm, bias)
    with pytest.warns(UserWarning, match="a sum of 2 grids"):
        export(model, path, torch.rand(1, 8, 3, 3))
    for batch in (1, 2):
        assert_same(path, model, 3 * torch.rand(batch, 8, 3, 3))


class Branches(nn.Module):
    """The sum of two layers behind a global pool, and a batch norm behind that."""

    def __init__(self):
        super().__init__()
        options = {"kernel": 1, "norm": False, "bias": True, "relu": False}
        self.one, self.two = Layer("one", 8, 8, **options), Layer("two", 8, 8, **options)
        self.norm, self.out = nn.BatchNorm2d(8), FrozenActivation(activation_grid(8, signed=True), "out")
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, 1)
        return self.out(self.norm(F.relu(self.one(x) + self.two(x))))


def test_sum_of_layers_at_one_position(tmp_path):
    path, model = tmp_path / "m.xml", build(Branches)
    write(model, path, torch.rand(1, 8, 3, 3))
    for batch in (1, 2):
        assert_same(path, model, 3 * torch.rand(batch, 8, 3, 3))
    assert {k.name: k.speed for k in kernels(path)} == {"one": "int8", "two": "int8"}


def test_fixed_batch(tmp_path):
    model = build(Single, "layer", 4, 4)
    write(model, tmp_path / "m.xml", torch.rand(2, 4, 5, 5), dynamic_batch=False)
    assert openvino.Core().read_model(str(tmp_path / "m.xml")).inputs[0].get_partial_shape().to_shape()[0] == 2


@pytest.mark.parametrize("algorithm", ["fat", "lsq", "minmax"])
def test_every_algorithm_exports_through_its_forms_alone(algorithm, tmp_path):
    torch.manual_seed(0)
    kind = get_algorithm(algorithm)
    weight = torch.randn(16, 8, 3, 3)
    wq = kind.make_weight(TensorSpec("weight", 4, "layer", shape=(16, 8, 3, 3)))
    aq = kind.make_activation(TensorSpec("activation", 4, "layer.input"))
    wq.calibrate(weight)
    aq.calibrate(torch.rand(2, 8, 8, 8))
    frozen = wq.freeze(weight)
    model = Single("layer", 8, 16, form=lambda _: frozen.form, activation=aq.form()).eval()
    model.layer.quantize_weight = FrozenWeight(frozen.codes, frozen.form, "layer")
    x = torch.rand(2, 8, 8, 8)
    write(model, tmp_path / "m.xml", x)
    assert_same(tmp_path / "m.xml", model, x)
    assert kernels(tmp_path / "m.xml")[0].speed == "int8"


def test_ops_run_eagerly_traced_and_exported():
    model, x = build(Net, 3), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its tracer
            warnings.filterwarnings("ignore", message="At pre-dispatch tracing")  # and torch 2.4's, of any operator
            assert torch.equal(torch.jit.trace(model, x)(x), wanted)
            if hasattr(nn.Module.__call__, "__wrapped__") and torch.__version__.startswith("2.4."):
                pytest.skip("NNCF 2 wraps modules, and torch 2.4 cannot export what it wrapped")
            program = torch.export.export(model, (x,))
            assert torch.equal(program.module()(x), wanted)
    targets = {str(n.target) for n in program.graph.nodes}
    assert {"fat_plugins.decode_weight.default", "fat_plugins.quantize_activation.default"} <= targets


@pytest.mark.parametrize("form", [activation_grid(4), activation_grid(3, True), staircase(3, powers(7, False))])
def test_frozen_activation_is_the_form(form):
    x = torch.randn(1000) * 3
    assert torch.equal(FrozenActivation(form, "q")(x), form.decode(form.encode(x)))


def test_frozen_weight_keeps_the_dtype_of_the_weight():
    form = weight_grid(torch.randn(4, 4), 4)
    codes = form.encode(torch.randn(4, 4))
    assert torch.equal(FrozenWeight(codes, form, "w")(torch.zeros(4, 4)), form.decode(codes))
    assert FrozenWeight(codes, form, "w")(torch.zeros(4, 4, dtype=torch.float64)).dtype == torch.float64


# --------------------------------------------------------------------------------------------------------------------
# errors
# --------------------------------------------------------------------------------------------------------------------
def test_bad_paths(tmp_path):
    model, x = build(Single, "layer", 4, 4), torch.rand(1, 4, 5, 5)
    with pytest.raises(ExportError, match=r"ends in \.xml"):
        export(model, tmp_path / "m.onnx", x)
    with pytest.raises(ExportError, match="does not exist"):
        export(model, tmp_path / "missing" / "m.xml", x)
    (tmp_path / "d.xml").mkdir()
    with pytest.raises(ExportError, match="is a directory"):
        export(model, tmp_path / "d.xml", x)
    assert os.listdir(tmp_path) == ["d.xml"]


def test_unwritable_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match="cannot be written to"):
        export(build(Single, "layer", 4, 4), tmp_path / "m.xml", torch.rand(1, 4, 5, 5))


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model, x = build(Single, "layer", 4, 4), torch.rand(1, 4, 5, 5)
    write(model, tmp_path / "m.xml", x)
    before = {f: (tmp_path / f).read_bytes() for f in os.listdir(tmp_path)}

    def full(*args, **kwargs):
        Path(args[1]).write_text("half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(ExportError, match="No space left"):
        export(build(Single, "layer", 4, 4, seed=1), tmp_path / "m.xml", x)
    assert {f: (tmp_path / f).read_bytes() for f in os.listdir(tmp_path)} == before


def test_uncalibrated_and_unfrozen(tmp_path):
    x = torch.rand(1, 4, 5, 5)
    model = build(Single, "layer", 4, 4)
    model.layer.quantize_input = FrozenActivation(None, "layer.input")
    with pytest.raises(ExportError, match=r"layer\.input: the activation quantizer was never calibrated"):
        export(model, tmp_path / "m.xml", x)
    model.layer.quantize_input = get_algorithm("lsq").make_activation(TensorSpec("activation", 4, "a"))
    with pytest.raises(ExportError, match=r"layer\.quantize_input: still a training quantizer"):
        export(model, tmp_path / "m.xml", x)
    with pytest.raises(ExportError, match="no frozen quantizer"):
        export(nn.Linear(2, 2), tmp_path / "m.xml", torch.rand(1, 2))
    model.layer.quantize_input = FrozenActivation(UniformGrid(4, False, False, torch.zeros(1)), "layer.input")
    with pytest.raises(ExportError, match="must be positive"):
        export(model, tmp_path / "m.xml", x)
    assert os.listdir(tmp_path) == []


def test_names_must_be_there_and_unique(tmp_path):
    model = build(TwoInputs)
    x = (torch.rand(1, 4, 4, 4), torch.rand(1, 4, 8, 8))
    model.b.quantize_weight.name = "a"
    with pytest.raises(ExportError, match="two FrozenWeight modules are named 'a'"):
        export(model, tmp_path / "m.xml", x)
    model.b.quantize_weight.name = ""
    with pytest.raises(ExportError, match="has no name"):
        export(model, tmp_path / "m.xml", x)


def test_bad_example_input(tmp_path):
    model = build(Single, "layer", 4, 4)
    with pytest.raises(ExportError, match="example_input must be a tensor"):
        export(model, tmp_path / "m.xml", "x")
    with pytest.raises(ExportError, match="cannot convert the model"):
        export(model, tmp_path / "m.xml", torch.rand(1, 3, 5, 5))


def test_codes_outside_the_form(tmp_path):
    model = build(Single, "layer", 4, 4)
    model.layer.quantize_weight.codes[0, 0, 0, 0] = 9
    with pytest.raises(ExportError, match=r"layer: codes .* 9 lie outside the form's -7 \.\. 7"):
        export(model, tmp_path / "m.xml", torch.rand(1, 4, 5, 5))


def test_openvino_missing(tmp_path, monkeypatch):
    _ov.openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        with pytest.raises(ExportError, match="pip install 'openvino"):
            export(build(Single, "layer", 4, 4), tmp_path / "m.xml", torch.rand(1, 4, 5, 5))
    finally:
        _ov.openvino.cache_clear()


def test_kernels_of_a_foreign_model(tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        kernels(tmp_path / "none.xml")
    op = _ov.opset()
    x = op.parameter([1, 2])
    model = openvino.Model([op.result(op.relu(x))], [x])
    with pytest.raises(ExportError, match="was not written by fat-plugins"):
        kernels(model)


def test_float_inputs_of_packed_products_are_not_quantized_behind_our_back(tmp_path):
    """The CPU plugin would quantize them by a rule of its own; the file says that it must not."""
    weight = FrozenWeight(*packed_linear(8, 64), name="fc")
    net = torch.nn.Sequential(torch.nn.Linear(64, 8))
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", weight, unsafe=True)
    x = torch.randn(5, 64) * torch.logspace(-2, 2, 64)
    path = tmp_path / "m.xml"
    export(net.eval(), path, x)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled([x.numpy()])[0])
    with torch.no_grad():
        assert (found - net(x)).abs().max() < 1e-5 * net(x).abs().max()


def packed_linear(outputs: int, inputs: int):
    """Codes and grid of a 4-bit weight."""
    codes = torch.randint(-7, 8, (outputs, inputs), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return codes, UniformGrid(4, True, True, torch.tensor([0.05]), 0)


@pytest.mark.parametrize(("text", "allowed"), [("2024.5.0-1-x", False), ("2027.0.0", False), ("2025.0.0-1-y", True)])
def test_unsupported_versions_are_refused(monkeypatch, text, allowed):
    monkeypatch.setattr(openvino, "__version__", text)
    _ov.openvino.cache_clear()
    try:
        if allowed:
            assert _ov.openvino() is openvino
            return
        with pytest.raises(
            ExportError, match=r"openvino .* is not supported, allowed: 2024\.6 to 2026\.x; pip install"
        ):
            _ov.openvino()
    finally:
        _ov.openvino.cache_clear()
