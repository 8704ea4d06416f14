"""Summaries and comparisons of plain models, the numbers behind them, and what quantizers say about themselves."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fat_plugins
from fat_plugins import Progress, QuantizationError, TensorSpec, algorithms, compare, get_algorithm, summary
from fat_plugins.frozen import FrozenActivation, FrozenWeight
from fat_plugins.measure import LOSSLESS, cosine, error_of
from fat_plugins.placed import float_weights, monitor, network_facts, register_finder
from fat_plugins.quantizer import LayerQuantizers, WeightQuantizer


class Block(nn.Module):
    """A quantized convolution behind a quantized input, and a float head."""

    def __init__(self, algorithm="lsq", bits=4, **spec):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.act = get_algorithm("lsq").make(TensorSpec("activation", 3, name="[input]"))
        if algorithm:
            shape = tuple(self.conv.weight.shape)
            quantizer = get_algorithm(algorithm).make(TensorSpec("weight", bits, name="conv", shape=shape, **spec))
            quantizer.calibrate(self.conv.weight)
            parametrize.register_parametrization(self.conv, "weight", quantizer, unsafe=True)
        self.eval()

    def forward(self, x):
        return self.head(self.conv(self.act(x)).relu().mean((2, 3)))


@pytest.fixture
def x():
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


# -- numbers ---------------------------------------------------------------------------------------------------------
def test_errors_in_decibels():
    a = torch.tensor([3.0, -4.0])
    assert error_of(a, a).sqnr_db == LOSSLESS
    half = error_of(a, a / 2)
    assert (half.sqnr_db, half.relative_mse, half.gain) == (pytest.approx(20 * math.log10(2)), 0.25, 1.0)
    fitted = error_of(a, a / 2, fit=True)
    assert (fitted.sqnr_db, fitted.gain) == (LOSSLESS, 2.0)
    assert error_of(torch.zeros(2), a) is None
    assert error_of(a, torch.zeros(2), fit=True).relative_mse == 1.0
    assert cosine(a, -2 * a) == pytest.approx(-1)
    assert cosine(a, torch.zeros(2)) is None


# -- summary ---------------------------------------------------------------------------------------------------------
def test_summary_counts_what_is_deployed(x):
    model = Block(per_channel=True)
    found = summary(model)
    weight = next(row for row in found.layers if row.role == "weight")
    codes, form = model.conv.parametrizations.weight[0].freeze(model.conv.parametrizations.weight.original)
    assert (weight.name, weight.algorithm, weight.bits, weight.form) == ("conv", "lsq", 4, "uniform")
    assert (weight.shape, weight.quantizer) == ((8, 3, 3, 3), "LSQWeight")
    assert weight.scale == (float(form.scale.min()), float(form.scale.max()))
    assert weight.scale[0] < weight.scale[1]
    assert weight.code_range == (int(codes.min()), int(codes.max()))
    assert (weight.codes_used, weight.codes) == (codes.unique().numel(), 16)
    assert weight.zeros == float((codes == 0).double().mean()) > 0
    assert weight.bytes == 216 // 2 + 8 * 4
    assert 10 < weight.sqnr_db < 40
    assert found.float_bytes == 216 * 4
    activation = next(row for row in found.layers if row.role == "activation")
    assert (activation.calibrated, activation.form, activation.bits) == (False, None, 3)
    model.act.calibrate(x)
    assert next(r for r in summary(model).layers if r.role == "activation").form == "uniform"


def test_summary_shows_itself_everywhere():
    found = summary(Block())
    text = str(found)
    assert "[input]" in text and "activation (not calibrated)" in text and "124 of" not in text
    page = found._repr_html_()
    assert page.startswith("<table>") and "<th>layer</th>" in page
    data = json.loads(json.dumps(found.to_dict()))
    assert data["layers"][0]["shape"] in ([8, 3, 3, 3], [])
    assert set(data) == {"model", "weight_bytes", "float_bytes", "layers", "facts"}


def test_names_are_no_markup():
    model = nn.Sequential(Block())
    model[0].conv.parametrizations.weight[0].spec = TensorSpec(
        "weight", 4, name="<script>[red]x[/red]", shape=(8, 3, 3, 3)
    )
    assert "[red]x[/red]" in str(summary(model))
    assert "<script>" not in summary(model)._repr_html_()


def test_summary_of_frozen_models_and_of_plain_ones():
    model = Block()
    codes, form = model.conv.parametrizations.weight[0].freeze(model.conv.parametrizations.weight.original)
    frozen = nn.Sequential(FrozenWeight(codes, form, "conv"), FrozenActivation(None, "act"))
    rows = {row.name: row for row in summary(frozen).layers}
    assert rows["conv"].bytes == 216 // 2 + 4
    assert rows["conv"].algorithm == ""
    assert rows["act"].calibrated is False
    with pytest.raises(QuantizationError, match="Linear holds no quantizer of fat-plugins"):
        summary(nn.Linear(2, 2))


def test_a_weight_that_owns_itself_has_no_error():
    (row, *_) = [r for r in summary(Block("direct", 2)).layers if r.role == "weight"]
    assert row.sqnr_db is None
    assert row.form == "sum"


# -- compare ---------------------------------------------------------------------------------------------------------
def test_compare_float_against_quantized(x):
    quantized = Block(bits=4)
    model = Block(algorithm=None)
    found = compare(model, quantized, x)
    rows = {row.name: row for row in found.layers}
    assert list(rows) == ["conv", "head"]
    weight = quantized.conv.parametrizations.weight[0].eval()(model.conv.weight)
    error = error_of(model.conv.weight, weight, fit=True)
    assert rows["conv"].weight_sqnr_db == pytest.approx(error.sqnr_db)
    assert rows["head"].weight_sqnr_db == LOSSLESS
    assert 10 < rows["conv"].sqnr_db < 60
    with torch.no_grad():
        assert found.output.largest == pytest.approx(float((model(x) - quantized(x)).abs().max()))
    assert found.output.gain is None
    assert compare(model, model, x).output.sqnr_db == LOSSLESS
    assert "equal" in str(compare(model, model, x))
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["name"] == "conv"


def test_compare_takes_a_factor_out(x):
    model = Block(algorithm=None)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight *= 4
        other.conv.bias *= 4
        other.head.weight /= 4
    row = compare(model, other, x).layers[0]
    assert (row.gain, row.weight_gain, row.sqnr_db > 100) == (pytest.approx(0.25), pytest.approx(0.25), True)


def test_compare_restores_modes_and_leaves_no_hooks(x):
    model, other = Block(), Block(algorithm=None).train()
    other.head.eval()
    compare(model, other, x)
    assert (other.training, other.conv.training, other.head.training) == (True, True, False)
    assert not any(m._forward_hooks for m in [*model.modules(), *other.modules()])


def test_compare_names_what_does_not_match(x):
    model = Block()
    with pytest.raises(QuantizationError, match=r"no layer of Block \(conv, head\) has the name of one of Sequential"):
        compare(model, nn.Sequential(nn.Linear(1, 1)), x)
    other = Block(algorithm=None)
    other.conv = nn.Conv2d(3, 4, 3, padding=1)
    other.head = nn.Linear(4, 4)
    with pytest.raises(QuantizationError, match="conv: the outputs have 576 and 288 elements"):
        compare(model, other, x)
    extra = Block(algorithm=None)
    extra.more = nn.Linear(2, 2)
    assert compare(model, extra, x).unmatched == ([], ["more"])


def test_compare_takes_dictionaries(x):
    model = Block()
    assert compare(model, Block(algorithm=None), {"x": x}).layers[0] == compare(model, Block(None), (x,)).layers[0]


# -- what quantizers say ---------------------------------------------------------------------------------------------
def test_hosts_tell_where_their_quantizers_stand():
    model = Block()
    quantizer = model.conv.parametrizations.weight[0]
    ((found, weight),) = float_weights(model).items()
    assert found is quantizer and torch.equal(weight, model.conv.parametrizations.weight.original)
    assert not weight.requires_grad

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = get_algorithm("lsq").make(TensorSpec("weight", 2, name="own", shape=(2, 2)))
            self.w = torch.ones(2, 2)
            self.quantizer.calibrate(self.w)

    assert float_weights(Owner()) == {}
    register_finder("test", lambda m: [(o.quantizer, o.w) for o in m.modules() if isinstance(o, Owner)])
    try:
        assert [w.sum() for w in float_weights(nn.Sequential(Owner())).values()] == [4]
    finally:
        register_finder("test", lambda m: ())


def test_monitor_has_a_name_for_everything(x):
    model = Block()
    assert set(monitor(model)) == {"conv"}  # the activation is not calibrated
    model.act.calibrate(x)
    model.act.spec = TensorSpec("activation", 3, name="conv")
    found = monitor(model)
    assert {k: v["kind"] for k, v in found.items()} in (
        {"conv": "weight", "conv (activation)": "activation"}, {"conv": "activation", "conv (weight)": "weight"},
    )  # fmt: skip
    model.act.enabled = False
    assert set(monitor(model)) == {"conv"}
    assert set(monitor(model)["conv"]["values"]) == {"bits", "scale", "zeros"}


@pytest.mark.parametrize("name", sorted(algorithms()))
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_every_quantizer_gives_numbers_and_figures(name, role):
    algorithm = get_algorithm(name)
    low, high = algorithm.weight_bits if role == "weight" else algorithm.activation_bits
    spec = TensorSpec(role, min(max(low, 3), high), name="t", shape=(4, 3, 3, 3) if role == "weight" else ())
    quantizer = algorithm.make(spec)
    w = torch.randn(4, 3, 3, 3)
    quantizer.calibrate(w if role == "weight" else w.relu())
    quantizer.on_progress(Progress(0, 0, 10, 2))
    before = torch.random.get_rng_state()
    argument = (w,) if role == "weight" else ()
    numbers, figures = quantizer.monitor(*argument), quantizer.figures(*argument)
    assert torch.equal(torch.random.get_rng_state(), before)  # a log must not change the training
    assert numbers["bits"] == spec.bits and math.isfinite(numbers["scale"]) and numbers["scale"] > 0
    assert all(type(v) is float for v in numbers.values())
    for figure in figures:
        data = json.loads(json.dumps(figure.to_dict(), allow_nan=False))
        assert data["rows"] if figure.kind == "image" else data["series"]
        assert all(len(y) == len(figure.x) for y in figure.series.values())
    if role == "weight":
        # what is rounded lies in the units of the grid: the quantized value is near it
        assert isinstance(quantizer, WeightQuantizer) and quantizer.rounded(w).shape == w.shape
        codes, form = quantizer.freeze(w)
        error = error_of(quantizer.rounded(w), form.decode(codes))
        assert error.sqnr_db > 3 if not quantizer.owns_weight and name != "quantization_networks" else True


def make(name, params=None, bits=4, shape=(4, 3, 3, 3)):
    quantizer = get_algorithm(name).make(TensorSpec("weight", bits, name="t", shape=shape), params)
    w = torch.randn(shape)
    quantizer.calibrate(w)
    return quantizer, w


def test_fat_shows_its_gate():
    quantizer, w = make("fat")
    (figure,) = quantizer.figures(w)
    assert (figure.kind, figure.limits) == ("image", (0.0, 1.0))
    gate = quantizer.gate(w)
    assert torch.allclose(torch.tensor(figure.rows), gate, atol=1e-5)
    assert quantizer.monitor(w)["gate"] == pytest.approx(float(gate.mean()))
    assert make("fat", {"transform": "none"})[0].figures(w) == []


def test_large_images_are_averaged_down():
    figure = fat_plugins.Figure.image("t", torch.arange(400.0).reshape(1, 400).expand(300, 400), "", "")
    assert (len(figure.rows), len(figure.rows[0])) == (96, 192)
    assert figure.rows[0][0] < 3 and figure.rows[0][-1] > 396


def test_dropbits_tells_expected_bits_until_they_are_decided():
    quantizer, w = make("dropbits", {"mask": "hierarchical"})
    numbers = quantizer.monitor(w)
    with torch.no_grad():
        quantizer.phi.copy_(torch.tensor([20.0, -20.0, 20.0]))
    closed = quantizer.monitor(w)
    assert numbers["expected bits"] > 3.5
    assert closed["expected bits"] == pytest.approx(2, abs=0.1)  # the fourth bit needs the third
    assert closed["gate of bit 4"] == pytest.approx(1, abs=0.05)
    (figure,) = quantizer.figures(w)
    assert (figure.x, figure.series["probability"][1]) == (["bit 2", "bit 3", "bit 4"], pytest.approx(0, abs=0.1))
    quantizer.decide()
    assert quantizer.monitor(w)["bits"] == 2


def test_quantization_networks_harden():
    quantizer, w = make("quantization_networks", bits=2)
    soft = {}
    for epoch in (0, 50):
        quantizer.on_progress(Progress(epoch=epoch))
        (figure,) = quantizer.figures(w)
        lines = {name: torch.tensor(y) for name, y in figure.series.items()}
        soft[epoch] = float((lines["training"] - lines["deployed"]).abs().mean())
        assert quantizer.monitor(w)["temperature"] == (epoch + 1) * quantizer.params.temperature
        # the line of the deployed function is the evaluation forward
        x = torch.tensor(figure.x)[None, None, None]
        assert torch.allclose(quantizer.eval()(x)[0, 0, 0], lines["deployed"], atol=1e-4)
        quantizer.train()
    assert soft[50] < soft[0] / 5


def test_squantizer_tells_threshold_and_rates():
    quantizer, w = make("squantizer", bits=3)
    numbers = quantizer.monitor(w)
    kept = w.abs() >= numbers["threshold"]
    assert numbers["zeros"] == pytest.approx(1 - float(kept.float().mean()))
    (figure,) = quantizer.figures(w)
    assert figure.series["times smaller"][1] == pytest.approx(32 / 3 / float(kept.float().mean()), rel=1e-4)
    assert quantizer.figures(torch.zeros_like(w)) == []


def test_direct_tells_what_every_bit_is_worth():
    quantizer, w = make("direct", bits=2)
    (figure,) = quantizer.figures(w)
    assert figure.x == ["bit 1", "bit 2"]
    assert quantizer.monitor(w)["bit 2"] == pytest.approx(float(quantizer.basis[1].detach().mean()))
    tied, w = make("direct", {"levels": "tied"}, bits=2)
    numbers = tied.monitor(w)
    assert numbers["bit 2"] == pytest.approx(2 * numbers["bit 1"])


def test_bitat_tells_its_stage():
    layers = []
    for i in range(2):
        quantizer, w = make("bitat", bits=1)
        layers.append(LayerQuantizers(f"l{i}", quantizer, None, {"weight": nn.Parameter(w)}))
    stages = get_algorithm("bitat").make_coordinator(layers)
    assert stages.monitor() == {"stage": 0.0}
    with pytest.warns(UserWarning, match="no calibration data"):
        stages.on_progress(Progress(0, 0, 10, 10))
    assert stages.monitor()["stage"] == 1
    assert 0 < stages.monitor()["block error"] < 1
    assert stages.figures()[0].series["stage"] == [1.0, 0.0]


def test_network_facts_count_other_parameters():
    model = Block("squantizer", 3)
    facts = network_facts(model)
    codes, form = model.conv.parametrizations.weight[0].freeze(model.conv.parametrizations.weight.original)
    nonzero, others = int((form.decode(codes) != 0).sum()), 8 + 4 * 8 + 4
    assert facts["compression rate, other parameters at 32 bits"] == pytest.approx(
        32 * (216 + others) / (3 * nonzero + 32 * others)
    )
    assert facts == summary(model).facts
    assert "compression rate as published" in str(summary(model))
    assert network_facts(Block("lsq")) == {}
