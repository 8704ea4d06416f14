"""DAQ beside what the universal tester checks: section 11 of its specification."""

import numpy as np
import pytest
import torch
from references import daq_mid_rise
from universal import CONV, sample

from fat_plugins import ConfigError, ExportError, get_algorithm
from fat_plugins.algorithms.daq import STEPS
from fat_plugins.forms import Staircase, UniformGrid
from fat_plugins.mixed import parse_sections, refuse_undeployable
from fat_plugins.quantizer import TensorSpec


def weight(bits=2, **params):
    return get_algorithm("daq").make(TensorSpec("weight", bits, "conv", CONV.shape), params)


def activation(bits=2, signed=True, per_channel=None, **params):
    spec = TensorSpec("activation", bits, "relu", channel_axis=1, per_channel=per_channel, signed=signed)
    return get_algorithm("daq").make(spec, params)


def image_like(signed=True, shape=(3, 5, 9, 7), seed=0):
    """Channels of each image with means and spreads of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(*shape[:2], 1, 1, generator=generator) * 3 + 0.05
    x = torch.randn(shape, generator=generator) * spread + torch.randn(*shape[:2], 1, 1, generator=generator)
    return x if signed else x.relu()


def run(quantizer, x):
    """Calibrated on ``x`` and applied to it in training."""
    quantizer.calibrate(x)
    return quantizer.train()(x)


# -- 1. the table ----------------------------------------------------------------------------------------------------
def test_the_code_reads_the_table_one_bit_below():
    assert len(STEPS) == 9
    for bits, end in ((2, 2.39), (4, 4.40)):
        code, paper = weight(bits).params, weight(bits, step_index="bits").params
        assert code.step(bits) * (2 ** (bits - 1) - 0.5) == pytest.approx(end, abs=0.006)
        assert (code.step(bits), paper.step(bits)) == (STEPS[bits - 1], STEPS[bits])
    # what the table holds is the best uniform step of a normal distribution
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3, 4):
        steps = STEPS[bits] * torch.linspace(0.9, 1.1, 21)
        errors = [
            (torch.from_numpy(daq_mid_rise(x.numpy(), float(s), 2 ** (bits - 1))) - x).square().mean() for s in steps
        ]
        assert abs(int(torch.stack(errors).argmin()) - 10) <= 2


def test_weights_reach_so_many_deviations():
    w = sample(CONV.shape)
    w[0, 0] *= 20
    for bits, end in ((2, 2.394), (4, 4.395)):
        out = weight(bits)(w)
        assert out.unique().numel() <= 2**bits
        assert float(out.abs().max()) == pytest.approx(end * float(w.std()), rel=1e-4)


# -- 2. the grid -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_without_zero_and_ties_to_the_even_step(bits):
    quantizer = activation(bits)
    quantizer.calibrate(image_like())
    quantizer.mean.zero_()
    step = 2 * float(quantizer.grid_scale())
    half = 2 ** (bits - 1)
    levels = quantizer.form().levels.tolist()
    assert levels == list(range(1 - 2 * half, 2 * half, 2)) and 0 not in levels
    ties = torch.arange(1 - half, half) * step  # whole steps, which lie between two levels
    expected = daq_mid_rise(ties.double().numpy(), step, half)
    assert np.allclose(quantizer(ties).double().numpy(), expected, rtol=1e-6)
    assert quantizer(torch.zeros(1)).item() == pytest.approx(-step / 2)  # round(1/2) = 0


def test_a_step_of_zero_gives_zero():
    w = torch.full(CONV.shape, 0.3)
    assert not weight()(w).any()
    codes, form = weight().freeze(w)
    assert not form.decode(codes).any()
    x = image_like()
    x[0, 1] = 2.5
    out = run(activation(dynamic=True), x)
    assert torch.equal(out[0, 1], x[0, 1])  # the mean, and nothing beside it
    behind = image_like(signed=False)
    behind[0, 1] = 0
    assert not run(activation(signed=False, dynamic=True), behind)[0, 1].any()


# -- 3. both branches ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("index", ["bits-1", "bits"])
def test_signed_channels_by_the_formulas(bits, index):
    x = image_like()
    out = run(activation(bits, dynamic=True, step_index=index), x)
    factor = STEPS[bits - (index == "bits-1")]
    for image, wanted in zip(out, x.double().numpy(), strict=True):
        for channel, own in zip(image, wanted, strict=True):
            step = factor * own.std(ddof=1)
            expected = own.mean() + daq_mid_rise(own - own.mean(), step, 2 ** (bits - 1))
            assert np.allclose(channel.numpy(), expected, atol=1e-5)
            assert channel.unique().numel() <= 2**bits


def test_behind_a_relu_the_code_does_not_clip():
    x = image_like(signed=False, shape=(2, 4, 24, 24))
    x[..., 0, 0] *= 6
    free = run(activation(2, signed=False, dynamic=True, clip=False), x)
    clipped = run(activation(2, signed=False, dynamic=True), x)
    most = max(c.unique().numel() for image in free for c in image)
    assert most > 4  # five and more levels of "two bits"
    for own, all_levels, kept in zip(x.flatten(0, 1), free.flatten(0, 1), clipped.flatten(0, 1), strict=True):
        v = own.double()
        n = (v > 0).sum() + 1
        step = STEPS[1] * (v.square().sum() / n - (v.sum() / n) ** 2).sqrt().clamp_min(1e-9)
        assert torch.allclose(all_levels.double(), torch.round(v / step) * step, atol=1e-5)
        assert torch.allclose(kept.double(), torch.round(v / step).clamp(max=3) * step, atol=1e-5)
        assert kept.unique().numel() <= 4


def test_the_branch_is_not_decided_by_a_minimum():
    x = image_like()
    signed = activation(signed=None, dynamic=True)
    out = run(signed, x)
    assert signed.signed
    low = float(x.min())
    assert torch.allclose(signed(x - low), out - low, atol=1e-4)  # a minimum of zero: still around the mean
    unsigned = activation(signed=None, dynamic=True)
    run(unsigned, x.relu())
    assert not unsigned.signed
    above = x.relu() + 0.5  # no zero behind a ReLU: still whole steps from zero
    for channel in unsigned(above).flatten(0, 1):
        values = channel.unique()
        steps = values / values.diff().min() if values.numel() > 1 else values / values
        assert torch.allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (7,), (), (2, 3, 5), (1, 1, 1, 1), (0, 3, 4, 4)])
def test_shapes_without_positions_or_elements(shape):
    quantizer = activation(dynamic=True)
    quantizer.calibrate(image_like())
    out = quantizer(torch.randn(shape))
    assert out.shape == shape and bool(out.isfinite().all())


# -- 4. gradients ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_the_gradient_is_the_identity(dynamic, signed):
    quantizer = activation(signed=signed, dynamic=dynamic, sigma_bits=4)
    x = (image_like(signed) * 5).requires_grad_()
    out = run(quantizer, x)
    grad = sample(x.shape, seed=2)
    out.backward(grad)
    assert torch.equal(x.grad, grad)
    w = (sample(CONV.shape) * 100).requires_grad_()
    weight()(w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


# -- 6. deviations on a grid -----------------------------------------------------------------------------------------
def test_deviations_are_quantized_per_image():
    x = image_like(shape=(3, 8, 11, 11))
    out = run(activation(3, dynamic=True, sigma_bits=2), x)
    for image, own in zip(out, x.double().numpy(), strict=True):
        sigma = own.reshape(8, -1).std(1, ddof=1)
        coarse = sigma.mean() + daq_mid_rise(sigma - sigma.mean(), STEPS[1] * sigma.std(ddof=1), 2)
        coarse = coarse.clip(0)
        assert len(set(coarse.round(9))) <= 4
        for channel, values, s in zip(image, own, coarse, strict=True):
            mean = values.mean()  # never quantized
            expected = mean + (daq_mid_rise(values - mean, STEPS[2] * s, 4) if s > 0 else 0)
            assert np.allclose(channel.numpy(), expected, atol=1e-4)
    # images do not see each other
    alone = activation(3, dynamic=True, sigma_bits=2)
    alone.calibrate(x)
    assert torch.allclose(alone(x[1:2]), out[1:2], atol=1e-6)
    one = x[:, :1]  # nothing to spread over
    assert torch.isfinite(alone(one)).all()


# -- the deployed form -----------------------------------------------------------------------------------------------
def test_calibration_is_the_mean_over_images():
    parts = [image_like(seed=1), image_like(seed=2, shape=(5, 5, 9, 7))]
    tensor, channel = activation(), activation(per_channel=True)
    for part in parts:
        tensor.calibrate(part)
        channel.calibrate(part)
    x = torch.cat(parts).double()
    assert tensor.sigma.item() == pytest.approx(float(x.flatten(1).std(1).mean()), rel=1e-5)
    assert tensor.mean.item() == pytest.approx(float(x.flatten(1).mean(1).mean()), rel=1e-4)
    around_zero = (x.square().sum((2, 3)) / (9 * 7 - 1)).sqrt().mean(0)
    assert torch.allclose(channel.sigma.double(), around_zero, rtol=1e-5) and not channel.mean.any()


@pytest.mark.parametrize("signed", [True, False])
def test_forms_per_channel(signed):
    x = image_like(signed)
    quantizer = activation(3, signed, per_channel=True, sigma_bits=4)
    quantizer.calibrate(x)
    form = quantizer.eval().form()
    assert isinstance(form, Staircase if signed else UniformGrid) and form.scale.numel() == 5
    assert torch.equal(form.decode(form.encode(x)), quantizer(x))
    assert torch.equal(quantizer.grid_scale(), form.scale)
    fresh = activation(3, signed, per_channel=True, sigma_bits=4).eval()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    flat = activation(3, signed, per_channel=True)
    flat.calibrate(x[:, :, 0, 0])  # without positions: one scale
    assert flat.form().scale.numel() == 1 and flat(x).shape == x.shape


def test_a_mean_far_from_zero_moves_the_levels():
    x = image_like() * 0.1 + 7
    quantizer = activation(3)
    quantizer.calibrate(x)
    levels = quantizer.form().decode(torch.arange(8))
    assert levels.min() < 7 < levels.max() and (quantizer(x) - x).abs().mean() < 0.5
    constant = activation(3)
    constant.calibrate(torch.full((2, 3, 4, 4), -0.3))
    assert constant(torch.full((1, 3, 4, 4), -0.3)).unique().item() == pytest.approx(-0.3, rel=2e-3)


def test_what_follows_every_input_is_not_exported():
    quantizer = activation(dynamic=True)
    quantizer.calibrate(image_like())
    with pytest.raises(
        ExportError, match=r"^relu: daq's dynamic .*; set params.dynamic: false to deploy .*calibration$"
    ):
        quantizer.form()
    static = activation()
    static.load_state_dict(quantizer.state_dict())
    assert torch.equal(static.form().scale, quantizer.nominal_form().scale)
    assert torch.equal(quantizer.grid_scale(), quantizer.nominal_form().scale)
    assert quantizer.monitor()["scale"] > 0


def test_recipes_that_export_refuse_it_early():
    section = {"algorithm": "daq", "params": {"dynamic": True}}
    with pytest.raises(ConfigError, match=r"^compression: daq's dynamic .*, or leave 'export' null$"):
        refuse_undeployable(parse_sections([("compression", section)]))
    refuse_undeployable(parse_sections([("compression", {"algorithm": "daq"})]))
    refuse_undeployable(parse_sections([("compression", {"algorithm": "lsq"})]))
    within = {"algorithm": "daq", "activations": {"params": {"dynamic": True}}}
    with pytest.raises(ConfigError, match="dynamic"):
        refuse_undeployable(parse_sections([("compression", within)]))


def test_more_levels_than_bits_need_run_time_ranges():
    with pytest.raises(
        ConfigError, match=r"^params: clip: false has more than 2\^bits levels, which only dynamic: true"
    ):
        activation(clip=False)
    with pytest.raises(ConfigError, match=r"params\.sigma_bits"):
        activation(sigma_bits=9)
