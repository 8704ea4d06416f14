"""One Model for All beside what the universal tester checks: section 11 of its specification, and every width."""

from math import sqrt

import pytest
import torch
from references import haar_matrix, lsq_step
from universal import CONV, Layer, sample

from fat_plugins import ConfigError, QuantizationError, TensorSpec, get_algorithm, param_groups
from fat_plugins.algorithms.one_model_for_all import gained, haar, inverse_haar
from fat_plugins.forms import Codebook, Staircase, UniformGrid

WIDTHS = (8, 4, 3, 2, 1)
SHAPES = [(3, 1, n, 4) for n in (4, 5, 6, 7, 9, 12)]


def made(bits=4, role="weight", layer=CONV, signed=None, spec=None, **params):
    own = dict(shape=layer.shape, channel_axis=layer.axis) if role == "weight" else dict(signed=signed)
    params.setdefault("bit_set", list(WIDTHS))
    return get_algorithm("one_model_for_all").make(TensorSpec(role, bits, name="layer", **own, **spec or {}), params)


def ready(bits=4, role="weight", layer=CONV, signed=False, **options):
    """Calibrated, with gains that differ from 1 and between bands, and an input."""
    quantizer = made(bits, role, layer, **options)
    x = sample(layer.shape if role == "weight" else (4, 3, 5, 5), role, signed)
    quantizer.calibrate(x)
    if getattr(quantizer, "gains", None) is not None:
        with torch.no_grad():
            noise = torch.rand(quantizer.gains.shape, generator=torch.Generator().manual_seed(1))
            quantizer.gains.add_(noise - 0.5)
    return quantizer.eval(), x


# -- the transform ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reconstruction_is_perfect_and_energy_is_kept(shape, levels):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bands = haar(x, levels)
    assert len(bands) == levels + 1
    assert torch.allclose(inverse_haar(bands, shape[2]), x, atol=1e-14)
    assert sum(b.square().sum() for b in bands) == pytest.approx(float(x.square().sum()), rel=1e-14)
    for band, matrix in zip(bands, haar_matrix(shape[2], levels), strict=True):
        assert torch.allclose(band, torch.einsum("kj,cgjs->cgks", torch.from_numpy(matrix), x), atol=1e-14)


@pytest.mark.parametrize("levels", [1, 2])
def test_gains_of_one_leave_the_weight_as_it_is(levels):
    x = torch.randn(SHAPES[1])
    assert torch.equal(gained(x, torch.ones(1, levels + 1)), x)


def test_gradients_of_weight_and_gains_are_autograds():
    x = torch.randn(3, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    gains = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64)
    bands = [b * g.reshape(-1, 1, 1, 1) for b, g in zip(haar(x, 2), gains.unbind(1), strict=True)]
    expected = torch.autograd.grad(inverse_haar(bands, 7), (x, gains), grad)
    out = gained(x, gains)
    assert torch.allclose(out, inverse_haar(bands, 7), atol=1e-14)
    for ours, theirs in zip(torch.autograd.grad(out, (x, gains), grad), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "groups", "levels"),
    [
        (Layer("depthwise", (6, 1, 3, 3)), 6, 0),
        (Layer("stem", (8, 3, 3, 3)), 1, 0),
        (Layer("grouped", (8, 4, 3, 3)), 2, 2),
        (Layer("grouped_transposed", (8, 4, 3, 3), 1), 2, 2),
        (Layer("grouped_transposed_few", (6, 4, 3, 3), 1), 2, 0),
        (Layer("linear", (5, 12)), 1, 2),
        (Layer("vector", (5,)), 1, 0),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_which_layers_are_transformed(layer, groups, levels):
    spec = {"groups": groups}
    quantizer, w = ready(layer=layer, levels=2, spec=spec)
    assert quantizer.levels == levels and (quantizer.gains is None) == (levels == 0)
    if levels == 0:
        assert torch.equal(quantizer.rounded(w), w)


def test_a_grouped_transposed_layer_is_transformed_within_its_groups():
    layer = Layer("grouped_transposed", (8, 4, 3, 3), 1)
    quantizer, w = ready(layer=layer, spec={"groups": 2})
    whole = quantizer.rounded(w)
    other = w.clone()
    other[4:] = 0  # the inputs of the second group
    assert torch.equal(quantizer.rounded(other)[:4], whole[:4]) and not quantizer.rounded(other)[4:].any()


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gains_gain_nothing_for_the_error_of_the_weight(bits):
    """Section 11, item 3: what they may bring must come from the task."""
    w = sample((16, 16, 3, 3))
    quantizer = made(bits, layer=Layer("conv", w.shape))
    quantizer.calibrate(w)
    at_one = float((quantizer.eval()(w) - w).square().mean())
    errors = []
    for low, high in ((0.9, 1.0), (1.1, 1.0), (1.0, 0.9), (1.0, 1.1)):
        quantizer.gains[quantizer.widths.index(bits)] = torch.tensor([low, high])
        errors.append(float((quantizer(w) - w).square().mean()))
    assert min(errors) > 0.98 * at_one


# -- widths ----------------------------------------------------------------------------------------------------------
def test_steps_begin_by_the_rule_of_lsq_at_every_width():
    w = sample(CONV.shape)
    quantizer = made()
    quantizer.calibrate(w)
    for row, bits in zip(quantizer.step.tolist(), quantizer.widths, strict=True):
        assert row == pytest.approx([lsq_step(w.numpy(), max(2 ** (bits - 1) - 1, 1))], rel=1e-5)
    act, x = made(role="activation"), torch.rand(4, 3, 5)
    act.calibrate(x)
    assert act.step.tolist() == pytest.approx([lsq_step(x.numpy(), 2**b - 1) for b in act.widths], rel=1e-5)
    before = act.step.detach().clone()
    act.calibrate(x - 0.5)  # signed now: another Q_P
    factors = [sqrt((2**b - 1) / max(2 ** (b - 1) - 1, 1)) for b in act.widths]
    assert (act.step / before).tolist() == pytest.approx(factors, rel=1e-5)


@pytest.mark.parametrize("bits", [b for b in WIDTHS if b > 1])
def test_fixed_gains_are_lsq_bit_for_bit(bits):
    quantizer, w = made(8, gains="fixed"), sample(CONV.shape)
    other = get_algorithm("lsq").make(TensorSpec("weight", bits, shape=CONV.shape))
    for q in (quantizer, other):
        q.calibrate(w)
    quantizer.set_active_bits(bits)
    gradients = []
    for q in (quantizer, other):
        x = w.clone().requires_grad_()
        out = q(x)
        out.backward(sample(CONV.shape, seed=3))
        gradients.append((out, x.grad, q.step.grad.sum()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("gains", ["band", "channel_band", "fixed"])
@pytest.mark.parametrize("per_channel", [None, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_of_one_weight_is_deployed_bit_for_bit(bits, per_channel, gains):
    quantizer, w = ready(spec={"per_channel": per_channel}, gains=gains, levels=2)
    quantizer.set_active_bits(bits)
    codes, form = quantizer.freeze(w)
    assert isinstance(form, Codebook if bits == 1 else UniformGrid) and form.bits == quantizer.bits == bits
    assert torch.equal(form.decode(codes), quantizer(w)) and codes.unique().numel() <= 2**bits
    assert torch.equal(quantizer.grid_scale(w), form.scale)
    assert form.scale.numel() == (8 if per_channel else 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_of_one_activation_is_deployed_bit_for_bit(bits, signed):
    quantizer, x = ready(role="activation", signed=signed)
    quantizer.set_active_bits(bits)
    form = quantizer.form()
    assert isinstance(form, Staircase if bits == 1 and signed else UniformGrid) and form.bits == bits
    assert torch.equal(form.decode(form.encode(x)), quantizer(x))
    assert torch.equal(quantizer.grid_scale(), form.scale)
    if bits == 1:
        step = quantizer.step[quantizer.widths.index(1)]
        assert torch.equal(quantizer(x), torch.where(x > 0, step, -step) if signed else (x > step / 2) * step)


@pytest.mark.parametrize("per_channel", [None, True])
def test_one_bit_is_the_sign_and_the_mean(per_channel):
    quantizer, w = ready(1, spec={"per_channel": per_channel})
    w = w * torch.tensor([40.0, *[1.0] * 7]).reshape(-1, 1, 1, 1)
    latent = quantizer.rounded(w)
    mean = latent.abs().mean((1, 2, 3), keepdim=True) if per_channel else latent.abs().mean()
    assert torch.allclose(quantizer(w), latent.sign() * mean)
    leaf = w.clone().requires_grad_()
    quantizer(leaf).sum().backward()
    inside = (latent.abs() <= 1).to(w.dtype)
    assert 0 < inside.mean() < 1
    gains = quantizer.gains[-1].reshape(1, -1).detach()
    expected = gained(inside.reshape(8, 1, 4, -1), gains).reshape(w.shape)
    assert torch.allclose(leaf.grad, expected, atol=1e-6)
    assert not quantizer.step.grad.any()  # the mean takes its place, but it stays part of the graph


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_switching_there_and_back_gives_the_same_bits(role):
    quantizer, x = ready(8, role)
    with torch.no_grad():  # as evaluation runs: quantized weights are kept
        first = {b: (quantizer.set_active_bits(b), quantizer(x))[1] for b in WIDTHS}
        assert len({v.unique().numel() for v in first.values()}) == len(WIDTHS)
        for bits in (2, 8, 1, 3, 4):
            quantizer.set_active_bits(bits)
            assert torch.equal(quantizer(x), first[bits])


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_only_the_active_width_learns(role):
    quantizer, x = ready(2, role)
    quantizer.train()(x.requires_grad_()).square().sum().backward()
    row = quantizer.widths.index(2)
    for p in quantizer.parameters():
        assert p.grad[row].any() and not torch.cat([p.grad[:row], p.grad[row + 1 :]]).any()


def test_a_kept_weight_follows_the_gains():
    quantizer, w = ready()
    weight = torch.nn.Parameter(w)
    with torch.no_grad():
        before = quantizer(weight)
        quantizer.gains[quantizer.widths.index(4), 0] = 1.7
        assert not torch.equal(quantizer(weight), before)


# -- options ---------------------------------------------------------------------------------------------------------
def test_the_own_width_belongs_to_the_usual_ones():
    algorithm = get_algorithm("one_model_for_all")
    for bits, expected in ((3, (8, 4, 3, 2)), (4, (8, 4, 2)), (1, (8, 4, 2, 1))):
        assert algorithm.make(TensorSpec("activation", bits)).widths == expected
    assert algorithm.make(TensorSpec("activation", 4), {"bit_set": [4]}).widths == (4,)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bit_set": [8, 2]}, r"layer: 4 bits are not in bit_set \[8, 2\]; the tensor's width is"),
        ({"bit_set": [4, 4]}, r"params.bit_set: \[4, 4\] repeat each other"),
        ({"bit_set": []}, "params.bit_set: .* at least 1 item"),
        ({"bit_set": [9, 4]}, r"params.bit_set.0: must be less than or equal to 8, got 9"),
        ({"bit_set": [4.0]}, "params.bit_set.0: expected an integer, got 4.0"),
        ({"levels": 0}, "params.levels: must be greater than or equal to 1, got 0"),
        ({"gains": "bands"}, "params.gains: expected 'band', 'channel_band' or 'fixed', got 'bands'"),
    ],
    ids=str,
)
def test_options_that_are_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        made(**params)


def test_sparsity_is_refused_where_a_width_has_no_zero():
    with pytest.raises(QuantizationError, match=r"layer: the grid has no zero at 1 bit.*leave 1 out of bit_set"):
        made(spec={"keep_zeros": True})
    quantizer = made(spec={"keep_zeros": True}, bit_set=[4, 2])
    w = sample(CONV.shape)
    w[0] = 0
    quantizer.calibrate(w)
    for bits in (4, 2):
        quantizer.set_active_bits(bits)
        assert not quantizer(w)[0].any() and torch.equal(quantizer.freeze(w).form.decode(quantizer.freeze(w).codes),
                                                         quantizer(w))  # fmt: skip


def test_rates_of_steps_and_gains():
    model = torch.nn.ModuleList([made(), made(role="activation")])
    steps, gains = param_groups(model, 0.1, 1e-4)[1:]
    assert (steps["lr"], gains["lr"]) == (0.1, pytest.approx(0.01))
    assert steps["weight_decay"] == gains["weight_decay"] == 0
    assert steps["params"] == [model[0].step, model[1].step] and gains["params"] == [model[0].gains]


def test_what_a_report_shows():
    quantizer, w = ready(2, levels=2)
    numbers = quantizer.monitor(w)
    assert numbers["bits"] == 2 and {"gain low", "gain high 1", "gain high 2"} <= set(numbers)
    assert numbers["gain low"] == pytest.approx(quantizer.gains[quantizer.widths.index(2), 0].item())
    assert "bits=2 of [8, 4, 3, 2, 1]" in repr(quantizer)
