"""Quantization Networks: vectors, acceptance tests and pitfalls of the specification (sections 10 and 11)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from references import ramp, soft_steps
from universal import Case, sample

from fat_plugins import ConfigError, Progress, TensorSpec, get_algorithm, param_groups
from fat_plugins.algorithms.quantization_networks import (
    fitted_thresholds,
    kmeans,
    uniform_thresholds,
    weight_levels,
)
from fat_plugins.forms import Codebook, Staircase, UniformGrid

SHAPE = (4, 2, 3, 3)
FOUR = (-4, -2, -1, 0, 1, 2, 4)


def weight(bits, params=None, shape=SHAPE, **spec):
    spec = TensorSpec("weight", bits, name="layer", shape=shape, **spec)
    return get_algorithm("quantization_networks").make_weight(spec, params)


def activation(bits, params=None, **spec):
    spec = TensorSpec("activation", bits, name="layer", **spec)
    return get_algorithm("quantization_networks").make_activation(spec, params)


def vector(bits, thresholds=None, **params):
    """The quantizer of section 11 in float64, its weight and dL/dQ(W)."""
    w = torch.from_numpy(ramp(SHAPE, 0.7, 0.3, 0.05, 0.01))
    q = weight(bits, {"temperature": 5.0, **params}).double()
    q.calibrate(w)
    with torch.no_grad():  # calibration is float32 to the vectors' float64
        q.beta.copy_(1.25 * max(q.levels) / w.abs().max())
        q.alpha.copy_(1 / q.beta)
    if thresholds is not None:
        q.set_thresholds(torch.tensor(thresholds, dtype=torch.float64))
    return q.train(), w, torch.from_numpy(ramp(SHAPE, 0.9, -0.4, 0.3))


def backward(q, x, grad):
    x = x.clone().requires_grad_()
    q.zero_grad()
    out = q(x)
    out.backward(grad)
    return out.detach(), x.grad


# -- section 11 --------------------------------------------------------------------------------------------------------
def test_vector_of_binary_weights():
    q, w, g = vector(1)
    assert q.alpha.item() == pytest.approx(0.04735626, abs=1e-8)
    assert q.beta.item() == pytest.approx(21.11653036, abs=1e-8)
    y, dx = backward(q, w, g)  # t1 is the default of one bit
    assert np.allclose(y.flatten()[:3], [0.040904349, 0.046523211, 0.046125832], atol=1e-9)
    assert np.allclose(dx.flatten()[:3], [-0.2729553993, 0.2898963098, 0.6161408353], atol=1e-10)
    assert q.alpha.grad.item() == pytest.approx(1.019439391, abs=1e-9)
    assert q.beta.grad.item() == pytest.approx(4.11783521e-3, abs=1e-11)
    true, _, _ = vector(1, backward="true")
    y_true, dx = backward(true, w, g)
    assert torch.equal(y_true, y)
    assert np.allclose(dx.flatten()[:3], [-0.0741614840, 0.0125392360, 0.0379076727], atol=1e-10)
    assert true.alpha.grad.item() == pytest.approx(1.019439391, abs=1e-9)
    assert true.beta.grad.item() == pytest.approx(4.65016232e-4, abs=1e-12)


def test_vector_of_the_set_of_powers_of_two():
    q, w, g = vector(3, [-2.4, -1.1, -0.05, 0.05, 1.1, 2.4])
    backward(q, w, g)
    assert q.alpha.grad.item() == pytest.approx(3.6545320649, abs=1e-9)
    codes, form = q.freeze(w)
    assert form.integers(codes).flatten()[:10].tolist() == [2, 4, 4, 2, 1, -2, -4, -4, -2, 2]


@pytest.mark.parametrize("bits,levels", [(1, "auto"), (2, "auto"), (3, "+-2"), (3, "+-4"), (3, "uniform"), (5, "auto")])
def test_level_sets(bits, levels):
    q, w = weight(bits, {"levels": levels}), sample(SHAPE)
    q.calibrate(w)
    expected = {
        (1, "auto"): (-1, 1), (2, "auto"): (-1, 0, 1), (3, "+-2"): (-2, -1, 0, 1, 2), (3, "+-4"): FOUR,
        (3, "uniform"): tuple(range(-3, 4)), (5, "auto"): tuple(range(-15, 16)),
    }[bits, levels]  # fmt: skip
    assert q.levels == expected == weight_levels(bits, levels)
    codes, form = q.freeze(w)
    assert form.bits == bits and set(form.integers(codes).unique().tolist()) <= set(expected)
    assert isinstance(form, Codebook if expected in ((-1, 1), FOUR) else UniformGrid)
    assert torch.equal(form.decode(codes), q.eval()(w))
    # one scale times integers: FakeQuantize of 2 p + 1 levels leaves the folded weight alone (section 8)
    p, folded = max(expected), form.decode(codes).double().numpy()
    top = p * form.scale.item()
    step = 2 * top / (2 * p)
    assert np.allclose(np.round((np.clip(folded, -top, top) + top) / step) * step - top, folded, rtol=1e-6, atol=0)


def test_three_bits_are_the_papers_better_set():
    assert weight(3).levels == FOUR and weight(4).levels == tuple(range(-7, 8))


@pytest.mark.parametrize("case", [Case("quantization_networks", o, b, "weight") for o in (0, 2, 3) for b in (1, 3, 5)])
@pytest.mark.parametrize("epoch", [0, 7, 400])
def test_training_forward_and_backward_equal_the_float64_reference(case, epoch):
    q, x = case.ready()
    q, x, g = q.double().train(), x.double(), sample(x.shape, seed=5).double()
    q.on_progress(Progress(epoch=epoch))
    y, dx = backward(q, x, g)
    k = q.params.temperature * (epoch + 1)
    r = soft_steps(
        x.numpy(), q.alpha.item(), q.beta.item(), q.thresholds().numpy(), q.levels, k, "t1" if q.t1 else "true", 2000,
        g.numpy(),
    )  # fmt: skip
    for ours, theirs in ((y, r["y"]), (dx, r["dx"]), (q.alpha.grad, r["dalpha"]), (q.beta.grad, r["dbeta"])):
        assert np.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_training_of_activations_equals_the_float64_reference(bits, tied, signed):
    q = activation(bits, {"uniform_thresholds": tied, "temperature": 3.0})
    x = sample((4, 3, 5, 5), "activation", signed)
    q.calibrate(x)
    q, x, g = q.double().train(), x.double(), sample(x.shape, seed=5).double()
    y, dx = backward(q, x, g)
    alpha, beta = (v.item() for v in q._scales())
    r = soft_steps(x.numpy(), alpha, beta, q.thresholds().numpy(), q.levels, 3.0, grad=g.numpy())
    dalpha = r["dalpha"] - (r["dbeta"] * beta / alpha if tied else 0)
    for ours, theirs in ((y, r["y"]), (dx, r["dx"]), (q.alpha.grad, dalpha)):
        assert np.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
    assert (q.beta is None) == tied


def test_true_mode_equals_autograd_where_no_clamp_is_active():
    q, w, g = vector(3, [-2.4, -1.1, -0.05, 0.05, 1.1, 2.4], temperature=1.0)
    _, dx = backward(q, w, g)
    x, a, b = w.clone().requires_grad_(), q.alpha.detach().requires_grad_(), q.beta.detach().requires_grad_()
    distance = b * x[..., None] - q.thresholds()
    assert distance.abs().max() < 10
    steps = torch.tensor(q.levels, dtype=torch.float64).diff()
    (a * ((torch.sigmoid(distance) * steps).sum(-1) - 4) * g).sum().backward()
    assert torch.allclose(dx, x.grad, rtol=1e-12)
    assert torch.allclose(q.alpha.grad, a.grad, rtol=1e-12) and torch.allclose(q.beta.grad, b.grad, rtol=1e-12)


def test_clip_leaves_a_constant_leak():
    q, _, _ = vector(1, backward="true")
    q.on_progress(Progress(epoch=19))  # T = 100
    far = torch.tensor([5.0, 50.0, -5.0]).double()
    q.spec = TensorSpec("weight", 1, shape=(3,))
    y, dx = backward(q, far, torch.ones(3).double())
    leak = 1 / (1 + np.exp(10.0))
    assert np.allclose(dx, 100 * 2 * leak * (1 - leak), rtol=1e-12)
    assert np.allclose(y, q.alpha.item() * (2 * np.array([1 - leak, 1 - leak, leak]) - 1), rtol=1e-12)


def test_temperature_is_capped_for_weights_only():
    x = torch.tensor([1e-3, 2e-3, -5e-4]).double()
    grads = {}
    for q in (weight(1, {"backward": "true"}, (3,)).double(), activation(1, {"uniform_thresholds": True}).double()):
        q.calibrate(x.abs())
        for epoch in (199, 399):
            q.train().on_progress(Progress(epoch=epoch))
            shifted = x + (0 if q.role == "weight" else 0.5 * q.alpha.item())
            with torch.no_grad():
                (q.beta if q.role == "weight" else q.alpha).fill_(1.0)
                q.alpha.fill_(1.0)
                shifted = x + (0 if q.role == "weight" else 0.5)
            grads[q.role, epoch] = backward(q, shifted, torch.ones_like(x))[1]
    assert torch.equal(grads["weight", 199], grads["weight", 399])
    assert not torch.equal(grads["activation", 199], grads["activation", 399])


# -- schedules ---------------------------------------------------------------------------------------------------------
def test_the_staircase_hardens_with_the_epoch():
    q, w = weight(2), sample(SHAPE)
    q.calibrate(w)
    hard = q.eval()(w)
    gaps = []
    for epoch in (0, 9, 99):
        q.train().on_progress(Progress(epoch=epoch))
        gaps.append((q(w) - hard).abs().mean().item())
        q.eval()
        assert torch.equal(q(w), hard)  # evaluation is always hard
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


@pytest.mark.parametrize("restart", [False, True])
def test_phases(restart):
    params = {"weight_epochs": 3, "activation_epochs": 2, "restart_temperature": restart}
    w, a = weight(2, params), activation(2, params)
    x, values = sample(SHAPE), sample((2, 8), "activation", signed=False)
    w.calibrate(x), a.calibrate(values)
    seen = []
    for epoch in range(7):
        progress = Progress(epoch=epoch)
        w.train().on_progress(progress), a.train().on_progress(progress)
        _, dx = backward(w, x, torch.ones_like(x))
        y, _ = backward(a, values, torch.ones_like(values))
        learns = bool(dx.any()) and bool(w.alpha.grad) and bool(w.beta.grad)
        assert learns or not (dx.any() or w.alpha.grad or w.beta.grad)
        assert a.alpha.grad is not None and a.beta.grad is not None  # every parameter takes part in every phase
        assert bool(a.alpha.grad) != torch.equal(y, values)
        seen.append((learns, not torch.equal(y, values), w.clock.item(), a.clock.item()))
    third = [(True, True, 1, 1), (True, True, 2, 2)] if restart else [(True, True, 4, 3), (True, True, 5, 4)]
    assert seen == [
        (True, False, 1, 1), (True, False, 2, 1), (True, False, 3, 1), (False, True, 3, 1), (False, True, 3, 2), *third
    ]  # fmt: skip
    # the deployed function is the same in every phase
    assert not torch.equal(a.eval()(values), values)


def test_activations_end_at_a_temperature_that_trains():
    """Of a training of known length, unless K is given; one bit needs steep sigmoids beside zero."""
    last = Progress(epoch=19, total_epochs=20)
    for bits, params, expected in (
        (3, {}, 40), (3, {"weight_epochs": 10}, 40), (3, {"temperature": 1.5}, 30),
        (3, {"activation_temperature": 5.0}, 100), (1, {}, 200),
    ):  # fmt: skip
        q = activation(bits, params)
        q.on_progress(last)
        assert q.k * q.clock.item() == pytest.approx(expected)
    q = activation(3)
    q.on_progress(Progress(epoch=19))  # nobody knows how long it will be
    assert q.k * q.clock.item() == 200
    q.on_progress(Progress(epoch=1, total_epochs=2))  # never steeper than the weights
    assert q.k * q.clock.item() == 20
    # in force in the forward: one threshold at 1, T = 40
    q = activation(2, {"weight_epochs": 0})
    q.calibrate(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    q.on_progress(last)
    with torch.no_grad():
        q.alpha.fill_(1.0), q.beta.fill_(1.0)
        q.set_thresholds(torch.tensor([1.0, 50.0, 60.0]))
    assert q.train()(torch.tensor([1.05])).item() == pytest.approx(1 / (1 + np.exp(-40 * 0.05)), rel=1e-3)


def test_batch_norms_need_the_hard_network():
    assert weight(2).noisy and activation(2).noisy


def test_a_second_phase_needs_a_first():
    with pytest.raises(ConfigError, match=r"layer: params\.activation_epochs 2 needs weight_epochs"):
        weight(2, {"activation_epochs": 2})


def test_levels_of_another_width_are_refused():
    with pytest.raises(ConfigError, match=r"layer: levels '\+-4' are 3-bit levels, not 4-bit; allowed: 'auto'"):
        weight(4, {"levels": "+-4"})


def test_thresholds_are_no_parameters_and_alpha_beta_do_not_decay():
    q, w, g = vector(3)
    before = q.thresholds().clone()
    groups = param_groups(q, 0.1, 5e-4)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(q.alpha): 0.0, id(q.beta): 0.0}
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(3):
        backward(q, w, g)
        optimizer.step()
    assert torch.equal(q.thresholds(), before)
    a = activation(2)  # those of activations are ordinary parameters (section 4)
    assert {g["weight_decay"] for g in param_groups(a, 0.1, 5e-4) if g["params"]} == {5e-4}


# -- initialisation ----------------------------------------------------------------------------------------------------
def test_initial_scales_span_five_quarters():
    q, w = weight(3), sample(SHAPE)
    q.calibrate(w)
    assert (w * q.beta).abs().max().item() == pytest.approx(1.25 * 4)
    assert (q.alpha * q.beta).item() == pytest.approx(1)


def test_thresholds_of_one_and_two_bits_are_given():
    w = sample(SHAPE)
    for bits, expected in ((1, [0.0]), (2, [-0.05, 0.05])):
        q = weight(bits)
        q.calibrate(w)
        assert q.thresholds().tolist() == expected
    a = activation(1)
    a.calibrate(sample((4, 9), "activation", signed=False))
    assert a.thresholds().tolist() == [0.05]


def test_kmeans_thresholds_are_midpoints_with_the_middle_overridden():
    w = sample((64, 64), seed=3)
    q = weight(3, shape=(64, 64))
    q.calibrate(w)
    centres = kmeans(w.double() * q.beta.double(), 7)
    expected = ((centres[1:] + centres[:-1]) / 2).tolist()
    b = q.thresholds().tolist()
    assert b[2:4] == [-0.05, 0.05]
    assert np.allclose(b[:2] + b[4:], expected[:2] + expected[4:], rtol=1e-5)
    assert b == sorted(b) and b != [-v for v in reversed(b)]  # k-means is not symmetric
    symmetric = weight(3, {"symmetric_thresholds": True}, (64, 64))
    symmetric.calibrate(w)
    b = symmetric.thresholds().tolist()
    assert b == [-v for v in reversed(b)] and b[3] == 0.05


def test_kmeans_is_as_good_as_sklearn():
    cluster = pytest.importorskip("sklearn.cluster")
    for seed, clusters in ((0, 4), (1, 7), (2, 31)):
        v = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).double()
        centres = kmeans(v, clusters)
        ours = (v[:, None] - centres).square().amin(1).sum().item()
        theirs = cluster.KMeans(clusters, n_init=3, random_state=0).fit(v.numpy()[:, None]).inertia_
        assert ours <= 1.03 * theirs
    two = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.2])
    assert kmeans(two, 2).tolist() == pytest.approx([0.1, 5.1])


def test_large_tensors_are_thinned_out():
    v = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kmeans(v, 5), kmeans(v[:100_000], 5), atol=0.02)


def test_too_few_distinct_values_give_equally_spaced_thresholds():
    w = torch.full(SHAPE, 0.3)
    w[0] = -0.1
    q = weight(3)
    q.calibrate(w)
    assert torch.equal(q.thresholds(), uniform_thresholds(FOUR)) and q.eval()(w).isfinite().all()
    a = activation(2)
    a.calibrate(torch.full((8,), 0.5))
    assert a.thresholds().tolist() == [0.5, 1.5, 2.5]


def test_the_override_must_leave_the_thresholds_ascending():
    # nearly everything close to zero: k-means puts other thresholds inside of -0.05 .. 0.05
    w = torch.cat([torch.linspace(-0.01, 0.01, 60), torch.tensor([1.0])]).double()
    b = fitted_thresholds(w * 5, FOUR, middle=True)
    assert torch.equal(b, uniform_thresholds(FOUR))
    assert bool((fitted_thresholds(torch.randn(500) * 2, FOUR, middle=True).diff() > 0).all())


def test_equally_spaced_thresholds():
    assert uniform_thresholds((0, 1, 2, 3)).tolist() == [0.5, 1.5, 2.5]
    assert uniform_thresholds((-1, 0, 1)).tolist() == [-0.5, 0.5] and uniform_thresholds((-1, 1)).tolist() == [0]
    assert torch.allclose(uniform_thresholds(FOUR).diff(), torch.tensor(9 / 7).double())
    q = weight(3, {"uniform_thresholds": True})
    q.calibrate(sample(SHAPE))
    assert torch.allclose(q.thresholds(), uniform_thresholds(FOUR))


def test_later_batches_widen_the_range():
    small, large = (sample((4, 50), "activation", False, seed) for seed in (0, 1))
    small = small * 0.1
    q, whole = activation(2), activation(2)
    q.calibrate(small), q.calibrate(large)
    whole.calibrate(torch.cat([small, large]))
    assert torch.equal(q.beta, whole.beta) and torch.allclose(q.thresholds(), whole.thresholds(), rtol=1e-6)
    resumed = activation(2)  # the samples are not in a checkpoint
    resumed.load_state_dict(q.state_dict())
    resumed.calibrate(large)
    assert resumed.calibrated and torch.equal(resumed.beta, q.beta)


def test_a_range_gives_equally_spaced_thresholds():
    q = activation(3)
    q.calibrate_range(0.0, 2.0)
    assert q.thresholds().tolist() == [i + 0.5 for i in range(7)] and q.beta.item() == pytest.approx(1.25 * 7 / 2)


# -- deployment --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strict", [False, True])
def test_ties(strict):
    q = weight(1, {"strict": strict}, (4,))
    q.calibrate(torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    w = torch.tensor([-1.0, 0.0, -0.0, 1.0])  # dead filters: the paper gives +alpha, the code -alpha
    signs = torch.sign(q.eval()(w)).tolist()
    assert signs == ([-1, -1, -1, 1] if strict else [-1, 1, 1, 1])
    a = activation(2, {"strict": strict}, signed=False).eval()
    a.calibrate_range(0.0, 1.0)
    with torch.no_grad():
        a.alpha.fill_(0.25), a.beta.fill_(4.0)
    a.set_thresholds(torch.tensor([0.5, 1.0, 3.0]))
    x = torch.tensor([0.125, 0.25, 0.75, 0.7499999])
    assert a(x).tolist() == ([0.0, 0.25, 0.5, 0.5] if strict else [0.25, 0.5, 0.75, 0.5])
    form = a.form()
    assert torch.equal(form.decode(form.encode(x)), a(x))


def moved(bits, **params):
    """A calibrated activation quantizer whose alpha and beta have learned, and inputs."""
    a, x = activation(bits, params).eval(), sample((4000,), "activation", signed=False, seed=4)
    a.calibrate(x)
    with torch.no_grad():
        a.alpha.mul_(0.83)
        if a.beta is not None:
            a.beta.mul_(1.21)
    return a, x


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_arbitrary_thresholds_are_a_multithreshold_and_a_sum_of_comparisons(bits):
    a, x = moved(bits)
    t = (a.thresholds() / a.beta.item()).numpy()
    values, v = x.double().numpy(), a.alpha.item()
    away = np.abs(values[:, None] - t).min(1) > 1e-6
    count = sum((values >= edge).astype(float) for edge in t)
    assert away.mean() > 0.9 and np.allclose(a(x).detach().numpy()[away], (v * count)[away], rtol=1e-6)
    assert isinstance(a.form(), Staircase)
    # one FakeQuantize of two levels around each threshold
    one = sum(np.where(np.round(np.clip((values - edge + 0.01) / 0.02, 0, 1)) > 0, v, 0.0) for edge in t)
    assert np.allclose(a(x).detach().numpy()[away], one[away], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_equally_spaced_thresholds_are_one_fake_quantize(bits):
    n, a, x = 2**bits - 1, *moved(bits)
    a.set_thresholds(uniform_thresholds(a.levels))
    values, t = x.double().numpy(), (a.thresholds() / a.beta.item()).numpy()
    d = 1 / a.beta.item()
    low = t[0] - d / 2
    fake = np.round(np.clip((values - low) / d, 0, n)) * a.alpha.item()
    away = np.abs(values[:, None] - t).min(1) > 1e-6
    assert np.allclose(a(x).detach().numpy()[away], fake[away], rtol=1e-6)
    # and where the output has the same step, one Quant
    tied, x = moved(bits, uniform_thresholds=True)
    form = tied.form()
    assert isinstance(form, UniformGrid) and not form.signed and form.bits == bits
    assert torch.equal(form.decode(form.encode(x)), tied(x))
    assert set(tied.state_dict()) == {"status", "alpha", "threshold_bits"}


@pytest.mark.parametrize("tied", [False, True])
def test_signed_activations_take_the_form_of_weights(tied):
    x = sample((500,), "activation", signed=True)
    for bits, levels in ((1, [-1, 1]), (3, list(range(-3, 4)))):
        a = activation(bits, {"uniform_thresholds": tied}).eval()
        a.calibrate(x)
        form = a.form()
        assert isinstance(form, UniformGrid if tied and bits > 1 else Staircase)
        assert (a(x) / form.scale).round().unique().tolist() == levels
        assert torch.equal(form.decode(form.encode(x)), a(x))


def test_first_and_last_layers_are_not_quantized_by_it():
    from fat_plugins.config import CompressionConfig

    config = CompressionConfig.parse({"algorithm": "quantization_networks", "first_layer": "float", "last_layer": 8})
    spec = TensorSpec("weight", 4, name="layer", shape=(4, 4))
    assert config.resolve(spec, lambda scope: False, "first") is None
    assert config.resolve(spec, lambda scope: False, "last")[0] == "minmax"
    assert config.resolve(spec, lambda scope: False)[0] == "quantization_networks"


# -- pitfalls ----------------------------------------------------------------------------------------------------------
def test_scales_pushed_below_zero_stay_positive_and_come_back():
    q, w = weight(2), sample(SHAPE)
    q.calibrate(w)
    with torch.no_grad():
        q.alpha.fill_(-0.1), q.beta.fill_(-3.0)
    assert q.eval()(w).isfinite().all() and float(q.freeze(w).form.scale) > 0
    q.train()
    backward(q, w, torch.ones_like(w))
    assert q.alpha.grad.isfinite() and q.beta.grad.isfinite() and bool(q.alpha.grad)


def test_zero_weights_do_not_divide_by_zero():
    q = weight(3)
    q.calibrate(torch.zeros(SHAPE))
    assert q.beta.isfinite() and q.alpha > 0 and not q.eval()(torch.zeros(SHAPE)).any()


def test_saturation_true_fades_and_t1_grows():
    w, g = sample(SHAPE), torch.ones(SHAPE)
    sizes = {}
    for mode in ("true", "t1"):
        q = weight(2, {"backward": mode})
        q.calibrate(w)
        for epoch in (0, 49):
            q.train().on_progress(Progress(epoch=epoch))
            sizes[mode, epoch] = backward(q, w, g)[1].median().item()
    assert sizes["true", 49] < 0.1 * sizes["true", 0] and sizes["t1", 49] == pytest.approx(
        50 * sizes["t1", 0], rel=1e-4
    )


def test_half_precision_models_keep_their_thresholds():
    a = activation(8)
    a.calibrate(sample((4000,), "activation", signed=False))
    half = copy.deepcopy(a).to(torch.bfloat16)
    assert torch.equal(half.thresholds(), a.thresholds())
    half.form()  # ascending


def test_autocast_computes_in_float32():
    q, w, g = weight(2), sample(SHAPE), sample(SHAPE, seed=5)
    q.calibrate(w)
    q.train().on_progress(Progress(epoch=199))
    y, dx = backward(q, w, g)
    with torch.autocast("cpu", torch.bfloat16):
        y_cast, dx_cast = backward(q, w, g)
    assert torch.equal(y, y_cast) and torch.equal(dx, dx_cast)


@pytest.mark.parametrize("bits", [1, 5])
def test_memory_does_not_grow_with_the_number_of_sigmoids(bits):
    """Beside the weight nothing of its size is kept, however many sigmoids there are."""
    q = weight(bits, shape=(64, 64))
    w = sample((64, 64)).requires_grad_()
    q.calibrate(w.detach())
    q.train()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        q(w)
    assert sum(t.numel() for t in saved.values()) < 1.1 * w.numel()
