"""Deployed = trained: a sample of ``driver.py`` (tox environment ``equality``), and tries of the judge itself.

Every algorithm of the registry, every target whose packages are here.
"""

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from banks import LAYERS, POOLS, WIDTHS, Bank, channels, plans, settings
from compare import GUARD, HERE, batches, compare, crafted, fitting

from fat_plugins import algorithms
from fat_plugins.export._codes import differs, input_guard, quantizer_guard
from fat_plugins.export.probes import fill, points, thresholds
from fat_plugins.export.verify import _record
from fat_plugins.forms import Codebook, Staircase, UniformGrid

NAMES, TARGETS = list(algorithms()), list(HERE)
each_target = pytest.mark.parametrize("target", TARGETS)
#: a plugin's file may not take everything, and says so while it is written
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def small(name, count=1):
    """Some branches of an algorithm; those of few thresholds, whose files are small."""
    found = [p for p in plans(name) if p.activation.bits < 8]
    return random.Random(name).sample(found, min(count, len(found)))


@pytest.fixture(scope="module")
def sample():
    """A branch of every algorithm, frozen, and what the trained ones gave."""
    bank = Bank([p for name in NAMES for p in small(name)])
    inputs = bank.inputs(3)
    with torch.no_grad():
        trained = bank(*inputs)
        return bank.freeze(), inputs, trained


def test_the_frozen_model_is_the_trained_one(sample):
    bank, inputs, trained = sample
    for branch, wanted, found in zip(bank.branches, trained, bank(*inputs), strict=True):
        assert torch.equal(wanted, found), branch.plan


@each_target
def test_codes_are_equal_in_every_layer(sample, target, tmp_path):
    bank = copy.deepcopy(sample[0])
    tally, report = compare(bank, HERE[target], tmp_path / f"m{HERE[target].suffix}")
    assert tally.differences == tally.deployed_differences == 0, tally.first
    assert tally.branches + sum(tally.refused.values()) == len(sample[0].branches)
    assert set(tally.refused) <= {"thresholds per channel of a tensor of rank 3; allowed: 2, 4"}
    assert all(a.probes for a in report.activations) and tally.codes > 50_000
    # quantizers of files with exact arithmetic have no ties at all
    assert target == "openvino" or not any(a.ties for a in report.activations)


def test_every_setting_of_every_algorithm_is_planned():
    """A new algorithm, option or width joins by itself."""
    for name in NAMES:
        found = plans(name)
        for role, cases in (("weight", {p.weight for p in found}), ("activation", {p.activation for p in found})):
            assert set(settings(name, role)) <= cases
        assert {p.signed for p in found} == {False, True} and {p.data for p in found} >= {"random"}
        assert {p.layer.name for p in found} == {layer.name for layer in LAYERS} or len(found) < len(LAYERS)
    every = [p for name in NAMES for p in plans(name)]
    assert {p.weight.bits for p in every} == {p.activation.bits for p in every} == set(WIDTHS)
    assert {p.data for p in every} == {"random", "zeros", "constant"}
    assert {p.pool for p in every} == {None, *POOLS}
    assert len(plans("lsq", everything=True)) == 2 * 14 * 7


# --------------------------------------------------------------------------------------------------------------------
# the judge
# --------------------------------------------------------------------------------------------------------------------
FORMS = [
    UniformGrid(8, False, False, torch.tensor([0.037]), 1),
    UniformGrid(4, True, True, torch.tensor([0.37]), 1),
    UniformGrid(3, True, False, torch.tensor([0.1, 2.0, 3e-3]), 1),
    Codebook(3, torch.tensor([-4, -2, -1, 0, 1, 2, 4]), torch.tensor([0.1]), 1),
    Staircase(2, torch.tensor([0, 1, 300]), torch.tensor([[0.1, 3.0], [0.2, 9.0], [0.5, 7.0]]).double(),
              torch.tensor([0.3]), 1),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_probes_lie_on_both_sides_of_every_threshold(form):
    guard = quantizer_guard(form, GUARD)
    rows = points(form, 2 * guard)
    x = fill((4, 3, 17, 29), rows, 1)
    distance = form.ties(x)
    assert not bool((distance < guard).any())  # none is a tie
    codes = form.encode(x)
    for channel in range(3):
        close = distance[:, channel] < 3 * guard
        assert int(close.sum()) >= 2 * thresholds(form).shape[1] or rows.shape[1] > 4 * 17 * 29
        assert set(codes[:, channel].unique().tolist()) == set(form.encode(x).unique().tolist())
    on = fill((4, 3, 17, 29), points(form, 2 * guard, ulps=2), 1)
    assert bool((form.ties(on) < guard).any())


def test_probes_of_a_small_tensor_are_spread_evenly():
    rows = torch.arange(1000.0)[None]
    assert fill((1, 5, 2), rows, 1).flatten().tolist() == [100.0 * i for i in range(10)]
    assert fill((0, 3), rows, 1).shape == (0, 3)


def test_the_tie_guard_is_narrow():
    """Of numbers that fill the grid evenly, few lie where another code would be forgiven."""
    x = torch.linspace(0, 1, 1_000_003)
    for bits, share in ((2, 2.2e-4), (4, 2.2e-4), (8, 3.6e-3)):
        form = UniformGrid(bits, False, False, torch.tensor([1 / (2**bits - 1)]), 0)
        assert float((form.ties(x) < input_guard(form, GUARD)).float().mean()) < share
        assert float((form.ties(x) < quantizer_guard(form, GUARD)).float().mean()) < 2.2e-4


def rescaled(module, factor):
    """The torch side of a frozen quantizer gets another scale than the file has."""
    module.form = replace(module.form, scale=module.form.scale * factor)
    module.scale.mul_(factor)


@pytest.fixture(scope="module")
def grids():
    """Plain grids of every width and sign, in one bank."""
    found, taken = [], set()
    for plan in plans("lsq", everything=True):
        key = (plan.activation.bits, plan.signed)
        if key not in taken and plan.data == "random" and not plan.norm:
            taken.add(key)
            found.append(plan)
    return Bank(found).freeze()


@each_target
def test_a_scale_that_is_wrong_by_a_thousandth_is_found(grids, target, tmp_path):
    bank = copy.deepcopy(grids)
    path = tmp_path / f"m{HERE[target].suffix}"
    assert fitting(bank, HERE[target], path, {}) is not None
    inputs = batches(bank)
    assert HERE[target].verify(bank, path, inputs).ok
    for branch in bank.branches:
        rescaled(branch.first, 1.001)
    report = HERE[target].verify(bank, path, inputs)
    assert not report.ok
    for check in report.activations:
        if check.name.endswith("first"):
            assert check.differences and check.probe_differences, check


@each_target
def test_a_threshold_that_no_data_come_near_is_tried(target, tmp_path):
    """Zeros everywhere have code 0 with any scale."""
    bank = Bank(small("lsq", 1)).freeze()
    path = tmp_path / f"m{HERE[target].suffix}"
    fitting(bank, HERE[target], path, {})
    zeros = tuple(torch.zeros_like(x) for x in bank.inputs(2))
    assert HERE[target].verify(bank, path, zeros).ok
    rescaled(bank.branches[0].first, 1.001)
    report = HERE[target].verify(bank, path, zeros)
    assert report.first_difference == "b0.first" and "numbers beside thresholds" in report.detail
    assert report.activations[0].differences == 0 and report.to_dict()["activations"][0]["probe_differences"]


def test_crafted_inputs_hold_ties():
    bank = Bank([p for p in plans("lsq") if p.data == "random" and p.activation.bits == 4][:3]).freeze()
    for branch, x in zip(bank.branches, crafted(bank, 6), strict=True):
        form = branch.first.form
        assert x.shape[1] == channels(branch.plan.layer)[0]
        assert bool((form.ties(x) < 1e-6).any()) and bool((x == 0).any()) and bool(torch.signbit(x[x == 0]).any())


# --------------------------------------------------------------------------------------------------------------------
# what was found, once each
# --------------------------------------------------------------------------------------------------------------------
def plan_of(layer, weight_bits, activation_bits, *, signed, size=7, norm=False, name="lsq"):
    """One branch by hand: ``size`` odd has a bias."""
    for plan in plans(name, everything=True):
        if plan.weight.bits == weight_bits and plan.activation.bits == activation_bits and not plan.weight.per_channel:
            chosen = next(one for one in LAYERS if one.name == layer)
            return replace(plan, layer=chosen, signed=signed, size=size, norm=norm, edge=False, data="random")
    raise AssertionError("no such setting")


@pytest.mark.skipif("onnx" not in HERE, reason="no ONNX Runtime")
@pytest.mark.parametrize("layer", ["conv3x3", "transposed", "linear"])
def test_onnx_runtime_does_not_round_a_bias(layer, tmp_path):
    bank = Bank([plan_of(layer, 2, 8, signed=signed) for signed in (False, True)]).freeze()
    tally, report = compare(bank, HERE["onnx"], tmp_path / "m.onnx")
    assert tally.differences == tally.deployed_differences == 0, tally.first
    assert all(a.end_to_end == 0 for a in report.activations[:2])


@pytest.mark.skipif("openvino" not in HERE, reason="no OpenVINO")
def test_strided_transposed_convolutions_of_signed_inputs_run_in_float(tmp_path):
    from fat_plugins.export.openvino import kernels

    bank = Bank([plan_of("transposed", 4, 4, signed=signed) for signed in (True, False)]).freeze()
    report = HERE["openvino"].export(bank, tmp_path / "m.xml", bank.inputs(2))
    notes = {r.name: r.note for r in report.layers if r.kind == "weight"}
    assert "not safe: runs in float" in notes["b0"] and not notes["b1"]
    assert {r.storage for r in report.layers if r.kind == "weight"} == {"i4", "u4"}
    assert {k.name: k.speed for k in kernels(tmp_path / "m.xml")}["b0"] == "float"


@pytest.mark.skipif("qonnx" not in HERE, reason="no qonnx")
def test_one_bit_is_bipolar_in_qonnx(tmp_path):
    import onnx

    found = [p for p in plans("bitat", everything=True) if p.data == "random" and len(p.layer.shape) != 3][:2]
    bank = Bank(found).freeze()
    tally, _ = compare(bank, HERE["qonnx"], tmp_path / "m.onnx")
    assert tally.differences == tally.deployed_differences == 0 and tally.branches == 2
    types = [n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert types.count("BipolarQuant") >= 2


@pytest.mark.skipif("openvino" not in HERE, reason="no OpenVINO")
def test_integer_and_float_kernels_give_the_same_codes(tmp_path):
    import openvino

    from fat_plugins.export._ov import exact
    from fat_plugins.export.openvino import kernels

    chosen = [plan_of(layer, w, a, signed=s, norm=True)
              for layer in ("conv3x3", "depthwise", "linear", "grouped")
              for w, a, s in ((2, 2, False), (4, 4, True), (8, 8, False), (8, 8, True))]  # fmt: skip
    bank, path = Bank(chosen).freeze(), tmp_path / "m.xml"
    HERE["openvino"].export(bank, path, bank.inputs(2))
    assert {k.speed for k in kernels(path)} == {"int8"}
    inputs = bank.inputs(16, seed=3)
    calls, x, core = _record(bank, inputs), [v.numpy() for v in inputs], openvino.Core()
    for settings_, integers in ((exact("CPU"), True), ({**exact("CPU"), "LP_TRANSFORMS_MODE": "NO"}, False)):
        compiled = core.compile_model(str(path), "CPU", settings_)
        found = compiled(x)
        assert _integer_convolutions(compiled) == (12 if integers else 0)
        for i, branch in enumerate(bank.branches):
            form, reached = branch.second.form, calls.inputs[branch.second.name]
            bad = differs(form, torch.from_numpy(found[i]), form.encode(reached))
            assert not bool((bad & (form.ties(reached) >= input_guard(form, GUARD))).any()), branch.plan


def _integer_convolutions(compiled):
    """How many convolutions of a compiled model run on integer kernels."""
    infos = [{k: str(getattr(v, "value", v)) for k, v in n.get_rt_info().items()}
             for n in compiled.get_runtime_model().get_ordered_ops()]  # fmt: skip
    layers = [i for i in infos if i.get("layerType") == "Convolution"]
    return sum("_i8" in i["primitiveType"].lower() or i["runtimePrecision"] in ("i8", "u8") for i in layers)
