"""SLB beside what the universal tester checks: section 11 of its specification."""

import math

import pytest
import torch
from universal import CONV, Case, sample

from fat_plugins import ConfigError, Progress, get_algorithm
from fat_plugins.forms import Codebook
from fat_plugins.quantizer import TensorSpec


def made(bits=2, shape=CONV.shape, per_channel=None, **params):
    spec = TensorSpec("weight", bits, name="conv", shape=shape, per_channel=per_channel)
    return get_algorithm("slb").make(spec, params)


def at(quantizer, epoch, total=100):
    quantizer.on_progress(Progress(epoch=epoch - 1, total_epochs=total))  # the paper counts from 1
    return quantizer


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradients_are_autograds_and_cancel(bits):
    quantizer = made(bits, init="he").double()
    quantizer.calibrate(sample(CONV.shape).double())
    with torch.no_grad():
        quantizer.logits.mul_(20)
        quantizer.temperature.fill_(1.7)
    grad = sample(CONV.shape, seed=3).double()
    quantizer.train()(torch.zeros(CONV.shape, dtype=torch.float64)).backward(grad)
    logits = quantizer.logits.detach().clone().requires_grad_()
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    (torch.softmax(1.7 * logits, -1) @ levels).reshape(CONV.shape).backward(grad)
    assert torch.allclose(quantizer.logits.grad, logits.grad, atol=1e-12)
    assert quantizer.logits.grad.sum(-1).abs().max() < 1e-12


def test_one_bit_is_a_hyperbolic_tangent():
    quantizer = made(1).double()
    quantizer.calibrate(sample(CONV.shape).double())
    with torch.no_grad():
        quantizer.temperature.fill_(1.3)
    a = quantizer.logits.detach()
    expected = torch.tanh(1.3 * (a[..., 1] - a[..., 0]) / 2).reshape(CONV.shape) * quantizer.scale
    assert torch.allclose(quantizer.train()(torch.zeros(CONV.shape).double()), expected)


def test_soft_and_hard_weights_meet_as_the_temperature_grows():
    quantizer = made(2, init="he")
    quantizer.calibrate(sample(CONV.shape))
    torch.manual_seed(0)
    with torch.no_grad():
        quantizer.logits.normal_()
    x, gaps = torch.zeros(CONV.shape), []
    hard = quantizer.eval()(x)
    quantizer.train()
    for temperature in (1, 10, 100, 1e5):
        quantizer.temperature.fill_(temperature)
        gaps.append(float((quantizer(x) - hard).abs().max().detach()))
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.3 and gaps[-1] < 1e-6


def test_schedule_of_the_vendors_code():
    quantizer = made()
    for epoch, expected in ((1, 1.0), (20, 1.0), (21, 1.2), (60, 1.2**40), (100, 1.2**40)):
        assert float(at(quantizer, epoch).temperature) == pytest.approx(expected, rel=1e-6)
        assert quantizer.hard == (epoch >= 60) and quantizer.noisy == (epoch < 60)
    assert 1.2**40 == pytest.approx(1470, rel=1e-3)


def test_an_unknown_length_has_no_schedule():
    quantizer = made()
    quantizer.on_progress(Progress(epoch=80))
    assert float(quantizer.temperature) == 1.0 and not quantizer.hard


def test_the_hard_phase_gives_logits_no_gradient():
    quantizer = made()
    quantizer.calibrate(sample(CONV.shape))
    out = at(quantizer, 60).train()(torch.zeros(CONV.shape))
    assert not out.requires_grad and torch.equal(out, quantizer.eval()(torch.zeros(CONV.shape)))


def test_start_of_the_vendors_code():
    shape = (64, 64, 3, 3)
    quantizer = made(2, shape, init="he")
    quantizer.calibrate(torch.zeros(shape))
    assert float(quantizer.logits.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9 * 4)), rel=0.01)
    soft = quantizer.train()(torch.zeros(shape)).detach()
    assert float(soft.std()) == pytest.approx(0.011, abs=5e-4)
    again = made(2, shape, init="he")
    again.calibrate(torch.zeros(shape))
    assert torch.equal(again.logits, quantizer.logits)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.105), (2, 0.045), (4, 0.0045)])
def test_start_from_float_weights(bits, error):
    w = torch.rand(CONV.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    quantizer = made(bits, scale="max")
    quantizer.calibrate(w)
    soft, hard = quantizer.train()(w).detach(), quantizer.eval()(w).detach()
    assert float((soft - w).square().mean().sqrt() / quantizer.scale) < error  # of the scale: 9.5, 3.4 and 0.35 %
    levels = torch.linspace(-1, 1, 2**bits) * w.abs().max()
    nearest = levels[(w.unsqueeze(-1) - levels).abs().argmin(-1)]
    assert torch.allclose(hard, nearest)


def test_a_scale_per_channel_is_the_best_of_each():
    w = sample(CONV.shape) * torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1)
    errors = {}
    for per_channel in (False, True):
        quantizer = made(3, per_channel=per_channel)
        quantizer.calibrate(w)
        difference = (quantizer.eval()(w) - w).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)
        errors[per_channel] = float(difference.detach().max())
    assert errors[True] < 0.4 < errors[False]


def test_the_form_is_odd_integers():
    quantizer, w = Case("slb", 0, 2, "weight").ready()
    form = quantizer.freeze(w).form
    assert isinstance(form, Codebook) and form.levels.tolist() == [-3, -1, 1, 3]


def test_rates():
    quantizer = made(2, optimizer="sgd")
    w = sample(CONV.shape)
    quantizer.calibrate(w)
    (group,) = quantizer.param_groups(0.1, 1e-4)
    assert group["weight_decay"] == 0 and group["lr"] > 0.1
    # a step of this rate moves a soft weight between levels about as far as a step of the float weight
    grad = torch.zeros(CONV.shape)
    grad[0, 0, 0, 0] = 1.0
    before = quantizer.train()(w)
    before.backward(grad)
    with torch.no_grad():
        quantizer.logits -= group["lr"] * quantizer.logits.grad
        moved = float((before - quantizer(w))[0, 0, 0, 0])
    assert 0.2 * 0.1 < moved < 2 * 0.1


def test_a_window_that_ends_before_it_begins_is_refused():
    with pytest.raises(ConfigError, match=r"end: 0.1 lies before begin, 0.5"):
        made(begin=0.5, end=0.1)
