"""CFWS: the split of kernels, the search for thresholds, the merge of branches (section 11 of the specification)."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fat_plugins import CheckpointError, ConfigError, TensorSpec, get_algorithm, rebuild, rewrite
from fat_plugins.algorithms.cfws import CoarseFine, split_kernel
from fat_plugins.algorithms.cfws.kl import BINS, LEAST, MagnitudeHistogram, kl_scores
from fat_plugins.algorithms.cfws.split import centre_ratio
from fat_plugins.recipes.nets_repvgg import RepVGG, RepVGGBlock


def toy(outputs=64, inputs=64, seed=0):
    """A re-parameterised kernel: small neighbours, and a centre that carries a 1x1 branch and the identity."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * 0.0133
    weight[:, :, 1, 1] += torch.randn(outputs, inputs, generator=generator) * 0.4
    return weight + torch.nn.functional.pad(torch.eye(outputs, inputs)[..., None, None], (1, 1, 1, 1))


def absmax(weight, bits=8, per_channel=True):
    """What a host does: symmetric, narrow, scaled by the largest magnitude."""
    spec = TensorSpec("weight", bits, shape=tuple(weight.shape), per_channel=per_channel)
    quantizer = get_algorithm("minmax").make(spec)
    quantizer.calibrate(weight)
    return quantizer.eval()(weight), quantizer.freeze(weight)


@pytest.fixture
def random_net():
    torch.manual_seed(1)
    net = RepVGG(3, 5, 8, 2)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
        conv.weight.data /= 20
    return net.eval()


# -- the split -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("extract_center", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_parts_add_up_and_the_coarse_one_is_on_its_own_grid(bits, extract_center, per_channel):
    weight = toy(12, 7)
    weight[3] *= 1e4
    levels = 2 ** (bits - 1) - 1
    coarse, fine, step = split_kernel(weight, bits, per_channel, extract_center)
    assert torch.equal(coarse + fine, weight)
    centre = weight[:, :, 1, 1] if extract_center else weight.flatten(1)
    largest = centre.abs().amax(1) if per_channel else centre.abs().amax().reshape(1)
    assert torch.allclose(step, (largest / levels).double(), rtol=2e-5)
    rounded = (fine[:, :, 1, 1] if extract_center else fine.flatten(1)).abs()
    assert bool((rounded <= step[:, None] / 2 * (1 + 1e-6)).all())
    if extract_center:
        neighbours = torch.ones(3, 3)
        neighbours[1, 1] = 0
        assert not bool((coarse * neighbours).any())
        assert torch.equal(fine * neighbours, weight * neighbours)
    # the host finds the same scale, so its codes bring back every bit
    deployed, (codes, form) = absmax(coarse, bits, per_channel)
    assert torch.equal(deployed, coarse)
    assert torch.equal(form.scale.double(), step)
    assert int(codes.abs().max()) == levels


def test_the_centre_is_rounded_half_up():
    weight = torch.zeros(1, 4, 3, 3)
    weight[0, :, 1, 1] = torch.tensor([127.0, 2.5, -2.5, -127.0]) / 64
    coarse, _, step = split_kernel(weight)
    assert (coarse[0, :, 1, 1] / step).tolist() == [127, 3, -2, -127]


@pytest.mark.parametrize("bits,plain,split,gain", [(8, 1.1e-5, 1.9e-8, 28), (4, 6.1e-4, 1.4e-5, 16)])
def test_the_error_of_a_toy_kernel(bits, plain, split, gain):
    weight = toy()
    coarse, fine, _ = split_kernel(weight, bits)
    before = float((absmax(weight, bits)[0] - weight).square().mean())
    after = float((absmax(coarse, bits)[0] + absmax(fine, bits)[0] - weight).square().mean())
    assert plain / 2.5 < before < plain * 2.5 and split / 2.5 < after < split * 2.5
    assert 10 * math.log10(before / after) == pytest.approx(gain, abs=2)


GEOMETRIES = [
    dict(),
    dict(stride=2),
    dict(padding=0),
    dict(padding=0, stride=2),
    dict(padding=2),
    dict(padding=(0, 3), stride=(2, 1)),
    dict(padding="same"),
    dict(padding="valid"),
    dict(dilation=2, padding=2, stride=2),
    dict(dilation=2, padding=1),
    dict(groups=2),
    dict(groups=8),
    dict(padding=2, padding_mode="reflect"),
    dict(kernel_size=5, padding=2, stride=3),
    dict(kernel_size=(3, 1), padding=(1, 0)),
    dict(bias=False),
]


@pytest.mark.parametrize("extract_center", [True, False])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_the_two_convolutions_are_the_one(options, extract_center):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **options}).double()
    model = nn.Sequential(copy.deepcopy(conv))
    rewrite(model, "cfws", params={"threshold": 0, "extract_center": extract_center})
    block = model[0]
    assert isinstance(block, CoarseFine)
    if extract_center:
        assert block.coarse.kernel_size == (1, 1) and block.coarse.bias is None
        if options in ({}, {"stride": 2}):  # padding 1 of a 3x3: no padding and no crop
            assert block.coarse.padding == (0, 0) and block.crop == (0, 0)
    for size in ((9, 11), (8, 8), (12, 7)):
        x = torch.randn(2, 8, *size, dtype=torch.float64)
        assert torch.allclose(model(x), conv(x), atol=1e-12)


def test_zero_centres_and_depthwise_kernels():
    weight = toy(4, 4)
    weight[2, :, 1, 1] = 0
    weight[3] = 0
    coarse, fine, step = split_kernel(weight)
    assert torch.equal(coarse + fine, weight) and step[2] == step[3] == 0
    assert not coarse[2:].any() and bool(torch.isfinite(fine).all())
    assert torch.equal(absmax(coarse)[0], coarse)

    depthwise = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    coarse, fine, step = split_kernel(depthwise)
    assert torch.equal(coarse[:, :, 1, 1], depthwise[:, :, 1, 1]) and not fine[:, :, 1, 1].any()
    assert torch.allclose(step, depthwise[:, 0, 1, 1].abs().double() / 127)


# -- the rewrite -----------------------------------------------------------------------------------------------------
def mixed_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3, dtype=torch.bfloat16),
        nn.Conv2d(4, 4, 3, padding=1),
    )  # fmt: skip
    for i in (1, 6):
        net[i].weight.data[:, :, 1, 1] *= 50
    return net.eval()


def test_which_layers_are_split_and_why_others_are_not():
    net = mixed_net()
    (report,) = rewrite(net, "cfws")
    assert set(report.changed) == {"1", "6"} and report.changed["1"]["ratio"] > 4
    assert report.left["0"].startswith("centre taps up to") and report.left["2"] == "a 1x1 kernel has no neighbours"
    assert report.left["3"] == "an even kernel has no centre" and "is computed" in report.left["4"]
    assert report.left["5"].startswith("bfloat16 does not hold")
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert not net[1].training and not net[1].coarse.training

    net = mixed_net()
    (report,) = rewrite(net, "cfws", params={"layers": ["6"]})
    assert set(report.changed) == {"6"} and report.left["1"] == "not among the layers of the options"
    with pytest.raises(ConfigError, match=r"cfws: layers: no convolution is called 'blocks\.1\.cnv'; did you mean"):
        rewrite(RepVGG(3, 5, 8, 2), "cfws", params={"layers": ["blocks.1.cnv"]})


def test_a_layer_used_twice_is_split_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.weight.data[:, :, 1, 1] += 9
    net = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)})
    (report,) = rewrite(net, "cfws")
    assert list(report.changed) == ["a"] and net["a"] is net["b"][0]
    assert isinstance(net["a"], CoarseFine)


def test_a_weight_of_nan_is_refused_and_the_float_model_of_a_copy_stays():
    net = mixed_net()
    whole = copy.deepcopy(net)
    net[6].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match="cfws: 6: the weight holds NaN or infinite values"):
        rewrite(net, "cfws")
    assert isinstance(net[1], nn.Conv2d)  # nor is anything else changed
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    rewrite(copy.deepcopy(whole), "cfws")
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    conv = nn.Conv2d(2, 2, 3)
    (report,) = rewrite(conv, "cfws", params={"threshold": 0})
    assert report.left == {"": "it is the model itself"}


def test_ratio_of_centre_and_neighbours():
    weight = torch.zeros(2, 2, 3, 3)
    assert centre_ratio(weight) == 0
    weight[1, 0, 1, 1] = -3
    assert centre_ratio(weight) == math.inf
    weight[0, 1, 2, 0] = 0.5
    assert centre_ratio(weight) == 6
    net = nn.Sequential(nn.Conv2d(2, 2, 3))
    net[0].weight.data = torch.zeros(2, 2, 3, 3)
    net[0].weight.data[0, 0, 1, 1] = 1
    (report,) = rewrite(net, "cfws")
    assert report.changed == {"0": {"ratio": None}}  # infinity is no JSON


def test_merge_split_and_rebuild(random_net):
    x = torch.randn(2, 3, 12, 12)
    before = random_net(x)
    fresh = RepVGG(3, 5, 8, 2).eval()
    reports = rewrite(random_net, ["reparameterize", "cfws"], x)
    assert torch.allclose(random_net(x), before, rtol=1e-3, atol=1e-4)
    assert len(reports[0].changed) == 5 and len(reports[1].changed) >= 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in random_net.modules())
    records = json.loads(json.dumps([r.to_dict() for r in reports]))
    rebuild(fresh, records)
    fresh.load_state_dict(random_net.state_dict())
    assert torch.equal(fresh(x), random_net(x))
    for layer, text in (("head", "layer 'head' is a Linear, expected a Conv2d"), ("hat", "no layer 'hat'")):
        records[1]["changed"] = {layer: {}}
        with pytest.raises(CheckpointError, match=text):
            rebuild(RepVGG(3, 5, 8, 2), records)


def test_merging(random_net):
    block = random_net.blocks[2]
    x = torch.randn(2, 8, 6, 6)
    before = block(x)
    block.reparameterize()
    block.reparameterize()  # nothing is left to do
    assert [n for n, _ in block.named_parameters()] == ["conv.weight", "conv.bias"]
    assert torch.allclose(block(x), before, atol=1e-5)
    with pytest.raises(ConfigError, match="reparameterize: no block of the model has a method reparam"):
        rewrite(nn.Sequential(nn.Linear(2, 2)), "reparameterize")

    class Careless(RepVGGBlock):
        def reparameterize(self):
            super().reparameterize()
            self.conv.bias.data += 1

    with pytest.raises(ConfigError, match="reparameterize: outputs of the merged model differ by"):
        rewrite(nn.Sequential(Careless(3, 3)).eval(), "reparameterize", torch.randn(1, 3, 4, 4))

    class Elsewhere(nn.Module):
        """As the authors of RepVGG call it."""

        def switch_to_deploy(self):
            self.merged = True

    net = nn.Sequential(Elsewhere())
    rewrite(net, "reparameterize")
    assert net[0].merged


# -- the threshold ---------------------------------------------------------------------------------------------------
def reference_scores(counts, i, levels):
    """Score of the paper, KL and the two sums, bin by bin as section 5 has it."""
    p = counts[:i].copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    for j in range(levels):
        a, b = i * j // levels, i * (j + 1) // levels
        filled = p[a:b] > 0
        if filled.any():
            q[a:b][filled] = counts[a:b].sum() / filled.sum()
    both = (p > 0) & (q > 0)
    if (p > 0)[~both].any():
        return math.inf, math.inf, 0, 0, 0
    total_p, total_q = p.sum(), q.sum()
    p, q = p[both], q[both]
    d = (p * (np.log(total_p * p) - np.log(total_q * q))).sum() / total_p
    kl = (p * (np.log(total_q * p) - np.log(total_p * q))).sum() / total_p
    return d, kl, total_p, total_q, p.sum() / total_p


@pytest.mark.parametrize("levels", [128, 256, 8])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_scores_and_the_identity_between_them(levels, kind):
    rng = np.random.default_rng(levels)
    counts = np.floor(1e4 * rng.random(700) * np.exp(-np.arange(700) / 90))
    if kind == "sparse":
        counts[rng.random(700) < 0.7] = 0
        counts[-1] = 1
    kept, paper = kl_scores(torch.from_numpy(counts), levels, "paper")
    _, standard = kl_scores(torch.from_numpy(counts), levels, "standard")
    assert kept[0] == max(LEAST, levels) and kept[-1] == 700
    finite = 0
    for i, one, other in zip(kept.tolist(), paper.tolist(), standard.tolist(), strict=True):
        d, kl, p, s, mass = reference_scores(counts, i, levels)
        assert one == pytest.approx(d, rel=1e-6, abs=1e-9)
        assert other == pytest.approx(kl, rel=1e-6, abs=1e-9)
        if math.isfinite(d):
            finite += 1
            assert d - kl == pytest.approx(2 * math.log(p / s) * mass, rel=1e-6, abs=1e-9)
    assert finite > 50


def activation(params=None, **spec):
    return get_algorithm("cfws").make(TensorSpec("activation", **{"bits": 8, "name": "layer", **spec}), params)


def test_the_papers_score_clips_less_on_heavy_tails():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) ** 3
    found = {}
    for score in ("paper", "standard"):
        quantizer = activation({"score": score})
        quantizer.calibrate(x)
        found[score] = quantizer.threshold.item()
    assert found["standard"] < found["paper"] <= float(x.abs().max())
    assert found["standard"] < 0.6 * float(x.abs().max())


def test_zeros_do_not_count_and_batches_add_up():
    torch.manual_seed(0)
    x = torch.randn(20_000).abs()
    plain, padded, parted = activation(), activation(), activation()
    plain.calibrate(x)
    padded.calibrate(torch.cat([torch.zeros(100_000), x]))
    assert padded.threshold.item() == plain.threshold.item() > 2
    for part in x.sort().values.split(2500):  # each batch reaches farther
        parted.calibrate(part)
    assert parted.threshold.item() == pytest.approx(plain.threshold.item(), rel=0.05)
    parted.reset_calibration()
    parted.calibrate(x)
    assert parted.threshold.item() == plain.threshold.item()


def test_histogram():
    histogram = MagnitudeHistogram()
    histogram.add(torch.zeros(5))
    assert histogram.largest == 0
    histogram.add(torch.tensor([1.0, -0.5, 0.0, 0.25]))
    histogram.add(torch.tensor([[3.0, -4.0]]))
    assert (histogram.largest, histogram.range, int(histogram.counts.sum())) == (4, 4, 5)
    bins = histogram.bins()
    assert bins.sum() == 5 and len(bins) == BINS
    assert bins.nonzero().ravel().tolist() == [128, 256, 511, 1536, 2047]  # the largest so far stood in the last bin
    tiny = MagnitudeHistogram()
    tiny.add(torch.tensor([1e-44, 0.0]))  # no float32 has twice as many bins within
    tiny.add(torch.tensor([1.0, 1e30]))
    assert int(tiny.counts.sum()) == 3 and tiny.bins().sum() == 3


def test_degenerate_activations():
    for x in (torch.zeros(2, 3), torch.full((2, 3), 0.7), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])):
        quantizer = activation()
        quantizer.calibrate(x)
        assert torch.allclose(quantizer.eval()(x), x, atol=1e-6)
        assert quantizer.signed == bool((x < 0).any())
    ranges = activation()
    ranges.calibrate_range(-2.0, 5.0)
    assert ranges.threshold.item() == 5 and ranges.signed


def test_levels_of_the_search():
    """128 signed or unsigned, or 256: more levels, more to tell apart, other thresholds."""
    torch.manual_seed(0)
    x = torch.randn(50_000).abs() ** 3
    few, many = activation({"unsigned_levels": 128}), activation({"unsigned_levels": 256})
    for quantizer in (few, many):
        quantizer.calibrate(x)
        assert not quantizer.signed and quantizer.form().high == 255
    assert few.threshold.item() != many.threshold.item()
    signed = activation(signed=True)
    signed.calibrate(x)
    assert signed.threshold.item() == few.threshold.item() and signed.form().high == 127


def test_training_does_not_move_the_threshold():
    quantizer = activation()
    quantizer.calibrate(torch.randn(1000))
    before = quantizer.threshold.clone()
    quantizer.train()(torch.randn(10) * 100)
    assert torch.equal(quantizer.threshold, before)
    assert not list(quantizer.parameters())
