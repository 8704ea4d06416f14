"""SDQ beside what the universal tester checks: acceptance tests, schedules and pitfalls of its specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from universal import sample

from fat_plugins import ConfigError, Progress, TensorSpec, get_algorithm, param_groups
from fat_plugins.algorithms.sdq import SDQWeight
from fat_plugins.forms import Codebook, UniformGrid

SHAPE = (8, 4, 3, 3)
POWERS = {"levels": "power_of_two"}


def weight(bits=3, shape=SHAPE, keep_zeros=False, calibrated=None, **params) -> SDQWeight:
    spec = TensorSpec("weight", bits, name="layer", shape=tuple(shape), keep_zeros=keep_zeros)
    quantizer = get_algorithm("sdq").make_weight(spec, params)
    if calibrated is not None:
        quantizer.calibrate(calibrated)
    return quantizer


def activation(bits=4, signed=False, **params):
    return get_algorithm("sdq").make_activation(TensorSpec("activation", bits, name="layer", signed=signed), params)


def clip_of(quantizer, w) -> float:
    return float(quantizer.alpha.detach()) * float(w.std(correction=0))


# -- section 11 --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_values_are_few_and_those_of_a_fake_quantize(bits):
    w = sample(SHAPE).double()
    quantizer = weight(bits).double()
    out = quantizer(w).detach()
    n, c = 2 ** (bits - 1) - 1, clip_of(quantizer, w)
    assert out.unique().numel() <= 2 * n + 1 and float(out.abs().max()) == pytest.approx(c)
    step = 2 * c / (2 * n)  # FakeQuantize(il = -c, ih = c, levels = 2n + 1)
    again = np.round((np.clip(out.numpy(), -c, c) + c) / step) * step - c
    assert np.allclose(again, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", ["uniform", "power_of_two"])
def test_the_clip_has_the_sign_of_clipped_weights_for_a_gradient(levels):
    w = sample(SHAPE).double()
    quantizer = weight(3, levels=levels, alpha=1.0).double()
    clipped = (w.abs() > clip_of(quantizer, w)).double()
    assert 0 < clipped.sum() < w.numel()
    quantizer(w).backward(clipped)
    expected = w.std(correction=0) * (clipped * w.sign()).sum() / math.sqrt(w.numel() * 3)
    assert float(quantizer.alpha.grad) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_powers_of_two_change_in_the_middle_of_their_exponents(bits):
    m = 2 ** (bits - 1) - 1
    w = sample((64, 64)).double()
    quantizer = weight(bits, w.shape, **POWERS).double()
    c = clip_of(quantizer, w)
    for j in range(m - 1):
        boundary = c * 2 ** -(j + 0.5)
        for factor, exponent in ((1 + 1e-9, j), (1 - 1e-9, j + 1)):
            for sign in (1, -1):
                value = w.new_tensor(sign * boundary * factor)
                out = quantizer._on_grid(value, *quantizer._parts(w)).detach()
                assert float(out) == pytest.approx(sign * c * 2.0**-exponent, rel=1e-12)
    threshold = c * 2 ** -(m - 1) / math.sqrt(2)
    for factor, zero in ((1 - 1e-9, True), (1 + 1e-9, False)):
        out = quantizer._on_grid(w.new_tensor(threshold * factor), *quantizer._parts(w)).detach()
        assert (float(out) == 0) == zero
    assert quantizer(w).unique().numel() == 2 * m + 1


def test_three_and_four_bits_of_powers():
    w = sample((64, 64))
    for bits, smallest in ((3, 1 / 4), (4, 1 / 64)):
        quantizer = weight(bits, w.shape, **POWERS)
        magnitudes = (quantizer(w).detach().abs() / clip_of(quantizer, w)).unique()
        assert magnitudes[1] == pytest.approx(smallest, rel=1e-5) and magnitudes[-1] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("params", [POWERS, {"levels": "uniform", "alpha": 4.0}], ids=["power_of_two", "uniform"])
@pytest.mark.parametrize("tau,share", [(0.25, 0.197), (0.5, 0.383), (1.0, 0.683)])
def test_pruning_of_gaussian_weights(tau, share, params):
    w = sample((200, 300)) - 0.01
    quantizer = weight(5, w.shape, tau=tau, **params)  # whose own zeros are fewer than any of these
    assert float((quantizer.eval()(w) == 0).double().mean()) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("bits,largest,width", [(2, 1, 2), (3, 4, 4), (4, 64, 8), (5, 2**14, 16)])
def test_integers_of_powers_of_two(bits, largest, width):
    w = sample(SHAPE)
    codes, form = weight(bits, **POWERS).freeze(w)
    assert isinstance(form, Codebook) and form.bits == bits
    powers = [2**k for k in range(2 ** (bits - 1) - 1)]
    assert form.levels.tolist() == [-p for p in reversed(powers)] + [0] + powers and powers[-1] == largest
    assert -(2 ** (width - 1)) < -largest and largest <= 2 ** (width - 1) - 1
    pruned, same = weight(bits, tau=1.5, **POWERS).freeze(w)
    assert torch.equal(same.levels, form.levels) and (pruned != codes).any()


def test_no_gradient_reaches_the_deviation():
    w = sample(SHAPE).double().requires_grad_()
    for params in ({}, POWERS, {"pruning_ratio": 0.5}, {"tau": 1.0, **POWERS}):
        grad = sample(SHAPE, seed=3).double()
        quantizer = weight(3, **params).double()
        w.grad = None
        quantizer(w).backward(grad)
        inside = w.detach().abs() <= clip_of(quantizer, w.detach())
        assert torch.equal(w.grad, grad * inside)  # nothing but the straight-through path, pruned weights included


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("params", [{}, POWERS, {"pruning_ratio": 0.5}, {"tau": 0.5}, {"alpha": "mse"}], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 1)])
def test_constants_keep_their_value_and_zeros_stay(shape, params, bits):
    for value in (0.3, -0.3):
        w = torch.full(shape, value)
        out = weight(bits, shape, calibrated=w, **params)(w)
        assert out.isfinite().all() and torch.allclose(out, w, rtol=1e-5)
    zeros = torch.zeros(shape)
    out = weight(bits, shape, calibrated=zeros, **params)(zeros)
    assert not out.any() and not torch.signbit(out).any()


# -- pruning -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", ["uniform", "power_of_two"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.9])
def test_the_ratio_is_exact_in_every_layer(ratio, levels):
    w = sample((20, 50))
    out = weight(5, w.shape, levels=levels, pruning_ratio=ratio, alpha=0.6).eval()(w)
    zeros = int((out == 0).sum())
    rounded = int((weight(5, w.shape, levels=levels, alpha=0.6)(w) == 0).sum()) if levels == "uniform" else 0
    assert zeros == max(rounded, int(ratio * w.numel()))
    assert float(w[out != 0].abs().min()) >= float(w[out == 0].abs().max()) if zeros else True


def test_negative_zeros_are_none():
    w = sample(SHAPE)
    for params in ({}, POWERS, {"pruning_ratio": 0.7}):
        out = weight(3, **params)(w)
        assert (out == 0).any() and not torch.signbit(out[out == 0]).any()


def test_the_threshold_grows_over_a_third_of_the_training():
    w = sample((50, 60))
    quantizer = weight(3, w.shape, pruning_ratio=0.8, **POWERS)
    deployed = quantizer.eval()(w)
    assert not quantizer.noisy  # nobody has said how long training is
    found = []
    for step in (0, 15, 30, 45):
        quantizer.on_progress(Progress(step=step, total_steps=90))
        found.append(float((quantizer.train()(w) == 0).double().mean()))
        assert quantizer.noisy == (step < 30)
        assert torch.equal(quantizer.eval()(w), deployed)
        codes, form = quantizer.train().freeze(w)
        assert torch.equal(form.decode(codes), deployed)
    limit = w.abs().flatten().sort().values[int(0.8 * w.numel())]
    assert found[0] == 0 and found[2] == found[3] == 0.8
    assert found[1] == pytest.approx(float((w.abs() < limit / 2).double().mean()), abs=1e-3)
    quantizer.on_progress(Progress(epoch=1, total_epochs=6))  # epochs where steps are not counted
    assert float(quantizer.ramp) == 0.5
    at_once = weight(3, w.shape, pruning_ratio=0.8, ramp=0.0)
    at_once.on_progress(Progress(step=0, total_steps=90))
    assert float(at_once.ramp) == 1 and not at_once.noisy


def test_nothing_is_noisy_without_a_threshold_of_its_own():
    for quantizer in (weight(), weight(keep_zeros=True, tau=1.0)):
        quantizer.on_progress(Progress(step=0, total_steps=90))
        assert not quantizer.noisy


def test_zeros_of_a_sparsity_algorithm_take_the_threshold_s_place():
    w = sample((30, 40))
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    sparse = w * mask
    for levels in ("uniform", "power_of_two"):
        plain, own = (weight(4, w.shape, True, levels=levels, **p) for p in ({}, {"tau": 3.0}))
        assert torch.equal(plain(sparse), own(sparse))  # it has its own rule no more
        # the clip is that of the survivors, as if the others were not there
        alone = weight(4, (int(mask.sum()),), levels=levels)
        assert torch.allclose(plain(sparse)[mask], alone(w[mask]), rtol=1e-5)
        assert not plain(sparse)[~mask].any()


# -- options, rates and reports ----------------------------------------------------------------------------------------
def test_where_clips_start():
    assert [float(weight(b).alpha.detach()) for b in (2, 3, 4, 8)] == [2, 3, 3, 3]
    assert [float(activation(b).alpha.detach()) for b in (2, 3, 4, 8)] == [2, 2.5, 3, 3]
    w = sample((64, 64))
    for params in ({}, POWERS):
        best = weight(3, w.shape, calibrated=w, alpha="mse", **params)
        least = float((best(w) - w).detach().square().mean())
        for alpha in (1.0, 2.5, 4.0):
            assert float((weight(3, w.shape, alpha=alpha, **params)(w) - w).detach().square().mean()) > least


def test_two_thresholds_and_wide_powers_are_refused():
    with pytest.raises(ConfigError, match=r"pruning_ratio: 0.5 and tau: 1.0 are two thresholds; give one"):
        weight(3, tau=1.0, pruning_ratio=0.5)
    with pytest.raises(ConfigError, match=r"layer: levels 'power_of_two' need integers of more than 16 bits at 6 bits"):
        weight(6, **POWERS)
    with pytest.raises(ConfigError, match=r"params.alpha: expected a number or 'mse', got 'mes'; did you mean 'mse'"):
        weight(3, alpha="mes")
    assert activation(8, **POWERS).bits == 8  # activations are uniform


def test_clips_have_no_decay_and_a_rate_of_their_own():
    for quantizer in (weight(clip_lr=10.0), activation(clip_lr=10.0)):
        (group,) = (g for g in param_groups(quantizer, 0.01, 1e-4) if g["params"])
        assert group["params"] == [quantizer.alpha]
        assert group["lr"] == pytest.approx(0.1) and group["weight_decay"] == 0.0


def test_what_reports_see():
    w = sample(SHAPE)
    quantizer = weight(3, pruning_ratio=0.5, calibrated=w, **POWERS)
    quantizer.on_progress(Progress(step=10, total_steps=60))
    numbers = quantizer.monitor(w)
    assert (numbers["clip"], numbers["ramp"], numbers["zeros"]) == (3.0, 0.5, 0.5)
    assert "ramp" not in weight().monitor(w)
    facts = get_algorithm("sdq").network_facts([(quantizer, quantizer.freeze(w))], 10)
    assert facts == {"zeros of the quantized weights": 0.5}
    x = activation()
    x.calibrate(sample((64, 3), "activation", signed=False))
    assert x.monitor()["clip"] == 3.0


def test_forms():
    assert isinstance(weight(3).freeze(sample(SHAPE)).form, UniformGrid)
    quantizer = activation(4, signed=True)
    quantizer.calibrate(sample((64, 3), "activation"))
    form = quantizer.form()
    assert (form.low, form.high, form.narrow) == (-7, 7, True)


# -- activations -------------------------------------------------------------------------------------------------------
def test_the_deviation_is_that_in_front_of_the_relu():
    before = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0)) * 0.7
    unsigned, signed = activation(4, None), activation(4, None)
    unsigned.calibrate(before.relu())
    signed.calibrate(before + 3 * (before > 100))
    assert float(unsigned.sigma) == pytest.approx(0.7, rel=0.02) and not unsigned.signed
    assert float(signed.sigma) == pytest.approx(float(before.std(correction=0)), rel=1e-5) and signed.signed
    assert float(unsigned.form().scale) == pytest.approx(3 * float(unsigned.sigma) / 15, rel=1e-6)


def test_batches_of_a_calibration_are_averaged():
    quantizer = activation(4, None)
    for factor in (1.0, 3.0):
        quantizer.calibrate(torch.ones(10) * factor)
    assert float(quantizer.sigma) == pytest.approx(2 * 2**0.5)
    quantizer.calibrate(torch.tensor([-2.0, 2.0]))  # now it is signed: what was counted before means something else
    assert float(quantizer.sigma) == pytest.approx(2.0)
    quantizer.reset_calibration()
    quantizer.calibrate(torch.tensor([-1.0, 1.0]))
    assert float(quantizer.sigma) == pytest.approx(1.0)


def test_training_follows_the_data_and_evaluation_does_not():
    quantizer = activation(4)
    quantizer.calibrate(torch.ones(10))
    assert float(quantizer.sigma) == pytest.approx(2**0.5)
    quantizer.train()(3 * torch.ones(4, 5))
    assert float(quantizer.sigma) == pytest.approx((0.9 + 0.3) * 2**0.5)
    quantizer.eval()(9 * torch.ones(4, 5))
    for bad in (torch.full((4,), float("nan")), torch.full((4,), float("inf")), torch.ones(0)):
        quantizer.train()(bad)
    assert float(quantizer.sigma) == pytest.approx(1.2 * 2**0.5)


def test_a_range_is_the_clip_until_data_comes():
    quantizer = activation(4)
    quantizer.calibrate_range(0.0, 6.0)
    assert float(quantizer.form().scale) * 15 == pytest.approx(6.0)


@pytest.mark.parametrize("signed", [False, True])
def test_processes_share_one_deviation(signed, monkeypatch):
    x = sample((64, 5), "activation", signed) + (0.5 if signed else 0)
    mine, other = x[:20], x[20:]  # batches of unequal size
    alone, together = activation(4, signed, momentum=1.0), activation(4, signed, momentum=1.0)
    for quantizer in (alone, together):
        quantizer.calibrate_range(-1.0 if signed else 0.0, 1.0)
    alone.train()(x)

    def all_reduce(sums, op):
        assert op == torch.distributed.ReduceOp.SUM
        d = other.double()
        sums.add_(torch.stack([torch.tensor(d.numel()).double(), d.sum(), d.square().sum()]))

    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    together.train()(mine)
    assert float(together.sigma) == pytest.approx(float(alone.sigma), rel=1e-5)
    together.train()(mine[:0])  # a process whose batch is empty takes part as well
    assert float(together.sigma) == pytest.approx(
        float(other.std(correction=0) if signed else other.square().mean().mul(2).sqrt()), rel=1e-5
    )
