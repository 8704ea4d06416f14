"""DoReFa, PACT and LSQ+: acceptance tests and pitfalls of the baselines specification (sections 10 and 11)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import dorefa_weight
from universal import sample

from fat_plugins import TensorSpec, get_algorithm, param_groups
from fat_plugins.forms import Codebook, Staircase, UniformGrid


def weight(algorithm, bits, shape=(8, 4, 3, 3), params=None, **spec):
    spec = TensorSpec("weight", bits, shape=shape, **{"followed_by_norm": True, **spec})
    return get_algorithm(algorithm).make_weight(spec, params)


def activation(algorithm, bits, params=None, **spec):
    return get_algorithm(algorithm).make_activation(TensorSpec("activation", bits, **spec), params)


# -- DoReFa ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["dorefa", "pact"])
def test_dorefa_two_bits_are_thirds(algorithm):
    q, w = weight(algorithm, 2), sample((8, 4, 3, 3))
    q.calibrate(w)
    assert sorted(set((q(w) * 3).round().int().flatten().tolist())) == [-3, -1, 1, 3]
    codes, form = q.freeze(w)
    assert isinstance(form, Codebook) and form.levels.tolist() == [-3, -1, 1, 3] and codes.max() == 3


def test_dorefa_gradient_passes_through_tanh_and_the_maximum():
    w = sample((4, 9)).double() * 8
    q = weight("dorefa", 2, (4, 9)).double()
    x = w.clone().requires_grad_()
    g = torch.linspace(-1, 2, 36).double().reshape(4, 9)
    (q(x) * g).sum().backward()
    reference = torch.from_numpy(dorefa_weight(w.numpy(), 2, grad=g.numpy())["dw"])
    assert torch.allclose(x.grad, reference, rtol=1e-12)
    top = w.abs().argmax()
    # without the path through the maximum the largest weight would have this gradient
    alone = (1 - torch.tanh(w).square()) / torch.tanh(w).abs().max() * g
    assert not torch.isclose(x.grad.flatten()[top], alone.flatten()[top])
    others = torch.arange(36) != top
    assert torch.allclose(x.grad.flatten()[others], alone.flatten()[others])


def test_dorefa_one_bit_is_the_sign_times_the_mean():
    w = torch.tensor([[-0.3, 0.0, 0.5, -0.8]])
    q = weight("dorefa", 1, (1, 4))
    assert torch.allclose(q(w), torch.tensor([[-0.4, 0.4, 0.4, -0.4]]))
    codes, form = q.freeze(w)
    assert form.levels.tolist() == [-1, 1] and form.bits == 1 and torch.equal(form.decode(codes), q(w))
    x = w.clone().requires_grad_()
    q(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_dorefa_zero_rounds_to_the_even_code():
    # n/2 = 1.5 goes to code 2
    assert weight("dorefa", 2, (1, 2))(torch.tensor([[0.0, 1.0]]))[0, 0] == pytest.approx(1 / 3)


def test_dorefa_keeps_the_scale_where_no_norm_follows():
    w = sample((8, 16)) * 0.1
    plain, head = weight("dorefa", 4, (8, 16)), weight("dorefa", 4, (8, 16), followed_by_norm=False)
    assert plain(w).abs().max() == pytest.approx(1.0)
    assert head(w).abs().max() == pytest.approx(w.abs().max().item(), rel=1e-3)
    assert (head(w) - w).abs().max() <= w.abs().max() / 15 * 1.01
    assert torch.equal(plain.freeze(w).codes, head.freeze(w).codes)


def test_dorefa_activations_are_clipped_to_one():
    q = activation("dorefa", 2, signed=False)
    q.calibrate(torch.tensor([0.0, 9.0]))
    x = torch.tensor([-1.0, 0.2, 0.5, 0.7, 5.0])
    assert torch.allclose(q(x), torch.tensor([0, 1 / 3, 2 / 3, 2 / 3, 1]))


# -- PACT --------------------------------------------------------------------------------------------------------------
def test_pact_grid_and_gradients():
    q = activation("pact", 2, {"alpha": 1.5}, signed=False)
    q.calibrate(torch.tensor([0.0, 1.0]))
    x = torch.tensor([-1.0, 0.0, 0.3, 0.9, 1.2, 1.5, 4.0], requires_grad=True)
    out = q(x)
    assert torch.allclose(out, torch.tensor([0, 0, 0.5, 1.0, 1.0, 1.5, 1.5]))
    out.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert q.alpha.grad.item() == 2  # 1.5 itself counts, section 5


def test_pact_numbers_of_the_squantizer_specification():
    q = activation("pact", 4, signed=False)
    q.calibrate(torch.tensor([0.0, 1.0]))
    assert torch.allclose(q(torch.tensor([0.2, 3.3, 9.99, 12.0])), torch.tensor([0, 3.3333333, 10, 10]))


def test_pact_clip_decays_with_the_weights():
    q = activation("pact", 4)
    groups = param_groups(q, 0.1, 5e-4)
    assert [g["weight_decay"] for g in groups if any(p is q.alpha for p in g["params"])] == [5e-4]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    q.alpha.grad = torch.zeros(())
    optimizer.step()
    assert q.alpha.item() == pytest.approx(10 * (1 - 0.1 * 5e-4))


@pytest.mark.parametrize(("name", "params"), [("pact", {"alpha": None}), ("fat", {})])
def test_a_clip_from_calibration_has_the_least_error(name, params):
    """One outlier must not take the levels of the bulk: at low bits that costs points of accuracy."""
    bulk = sample((4096,)).abs()
    x = torch.cat([bulk, torch.tensor([3 * bulk.max().item()])])
    q = activation(name, 3, params, signed=False)
    q.calibrate(x)
    largest, one = float(x.max()), q.alpha.item()

    def error(clip: float) -> float:
        q.alpha.data.fill_(clip)
        return float((q(x) - x).detach().square().mean())

    best = min((largest * i / 100 for i in range(1, 101)), key=error)
    assert one == pytest.approx(best, rel=1e-4)
    assert one < largest
    q.calibrate(4 * x)  # the geometric mean of both batches
    assert q.alpha.item() == pytest.approx(2 * one, rel=1e-4)
    q.calibrate(torch.zeros(16))  # which says nothing
    assert q.alpha.item() == pytest.approx(2 * one, rel=1e-4)
    q.reset_calibration()
    q.calibrate(x)
    assert q.alpha.item() == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("name", "params"), [("pact", {"alpha": None}), ("fat", {})])
def test_a_clip_search_begins_anew_where_the_grid_turns_signed(name, params):
    x = sample((4096,))
    q, fresh = activation(name, 4, params), activation(name, 4, params)
    q.calibrate(7 * x.abs())
    for each in (q, fresh):
        each.calibrate(x)
    assert q.signed and q.alpha.item() == fresh.alpha.item()


def test_pact_clip_from_calibration():
    def clip(*batches, **options):
        q = activation("pact", 2, {"alpha": None}, **options)
        for batch in batches:
            q.calibrate(batch)
        return q.alpha.item()

    def error(x, alpha, low=0):
        return ((x / alpha * 3).round().clamp(low, 3) * alpha / 3 - x).square().mean().item()

    x = sample((4, 500)).abs()
    best = min(error(x, a) for a in np.linspace(0.05, 1, 400) * x.max().item())
    assert error(x, clip(x)) < 1.01 * best < 0.6 * error(x, x.max().item())
    # the geometric mean over batches, of which those without a value say nothing
    assert clip(x, 4 * x, 0 * x) == pytest.approx(2 * clip(x), rel=1e-5)
    # a batch that turns the grid signed begins anew: three levels, not four
    assert clip(x, -x) == pytest.approx(clip(-x), rel=1e-6)
    assert clip(x, -x) != pytest.approx(clip(x), rel=1e-2)
    q = activation("pact", 4, {"alpha": None}, signed=False)
    q.calibrate_range(0.0, 3.0)
    assert q.alpha.item() == 3


# -- LSQ+ --------------------------------------------------------------------------------------------------------------
def test_lsq_plus_initial_step_of_weights():
    w = sample((8, 16))
    q = weight("lsq_plus", 3, (8, 16))
    q.calibrate(w)
    mean, std = w.mean().item(), w.std().item()
    assert q.step.item() == pytest.approx(max(abs(mean - 3 * std), abs(mean + 3 * std)) / 4, rel=1e-5)
    rows = weight("lsq_plus", 3, (8, 16), per_channel=True)
    rows.calibrate(w)
    reach = torch.maximum((w.mean(1) - 3 * w.std(1)).abs(), (w.mean(1) + 3 * w.std(1)).abs())
    assert torch.allclose(rows.step, reach / 4)


def swish(count=4000):
    x = torch.randn(count, generator=torch.Generator().manual_seed(2)) * 2
    return torch.nn.functional.silu(x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lsq_plus_offset_serves_asymmetric_data(bits):
    x = swish()
    plus, lsq = activation("lsq_plus", bits), activation("lsq", bits)
    for q in (plus, lsq):
        q.calibrate(x)
        q.eval()
    assert plus.beta.item() < 0 or bits < 4
    # a signed grid without offset wastes half of its codes
    assert (plus(x) - x).square().mean() < 0.7 * (lsq(x) - x).square().mean()


def test_lsq_plus_initialisation_is_the_best_that_was_tried():
    x = swish()
    q = activation("lsq_plus", 3)
    q.calibrate(x)
    q.eval()
    error = (q(x) - x).square().mean().item()
    for factor in (0.7, 0.85, 1.2, 1.5):
        with torch.no_grad():
            step, beta = q.step.clone(), q.beta.clone()
            q.step.mul_(factor)
            q.beta.mul_(factor)
            assert (q(x) - x).square().mean().item() >= 0.97 * error
            q.step.copy_(step), q.beta.copy_(beta)


def test_lsq_plus_form_is_a_plain_grid_without_offset():
    q = activation("lsq_plus", 4)
    q.calibrate(torch.linspace(0, 1, 100))
    assert isinstance(q.form(), UniformGrid) and q.form().low == 0
    with torch.no_grad():
        q.beta.copy_(-3.2 * q.step)
    form = q.form()
    assert isinstance(form, Staircase) and form.levels.tolist() == list(range(-3, 13))


def test_lsq_plus_ties_go_to_the_even_level_in_the_form_too():
    q = activation("lsq_plus", 3).eval()
    q.calibrate(torch.linspace(-1, 1, 100))
    with torch.no_grad():
        q.step.fill_(0.25)
        q.beta.fill_(-0.75)
    ties = torch.arange(-8, 9) * 0.125
    x = torch.cat([ties, torch.nextafter(ties, ties - 1), torch.nextafter(ties, ties + 1)])
    form = q.form()
    assert torch.equal(form.decode(form.encode(x)), q(x))
    assert torch.equal(q(torch.tensor([-0.125, 0.125, 0.375])), torch.tensor([0.0, 0.0, 0.5]))


def test_lsq_plus_float_offset_is_for_training_only():
    x = swish()
    trained, rounded = activation("lsq_plus", 3, {"train_float_offset": True}), activation("lsq_plus", 3)
    for q in (trained, rounded):
        q.calibrate(x)
        with torch.no_grad():
            q.beta.copy_(-1.4 * q.step)
    assert not torch.allclose(trained.train()(x), rounded.train()(x))
    assert torch.equal(trained.eval()(x), rounded.eval()(x))
    levels = (trained.train()(x) - trained.beta) / trained.step
    assert (levels - levels.round()).abs().max() < 1e-4


def test_lsq_plus_offset_does_not_decay():
    q = activation("lsq_plus", 3)
    groups = param_groups(q, 0.1, 5e-4)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(q.beta)] == 0 and decay[id(q.step)] == 5e-4


def test_minmax_follows_the_range_that_all_processes_see(monkeypatch):
    quantizer = activation("minmax", 8)
    quantizer.calibrate(torch.tensor([0.0, 1.0]))
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda t, op: t.clamp_min_(3.0))
    momentum = quantizer.params.momentum
    quantizer.train()(torch.tensor([0.0, 2.0]))
    assert float(quantizer.largest) == pytest.approx(1 + (3 - 1) * momentum)
