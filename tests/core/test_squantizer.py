"""SQuantizer: vectors, acceptance tests and pitfalls of the specification (sections 10 and 11)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import squantize
from universal import sample

from fat_plugins import ConfigError, Progress, TensorSpec, get_algorithm, param_groups
from fat_plugins.algorithms.squantizer import compression_rates, compression_rates_of
from fat_plugins.forms import Codebook, SumOfGrids, UniformGrid, form_from_dict, form_to_dict

SHAPE = (4, 3, 3, 3)
SIGMAS = (-3.0, -0.5, 0.0, 0.6, 2.0, None)


def weight(bits=4, shape=SHAPE, keep_zeros=False, **params):
    spec = TensorSpec("weight", bits, name="layer", shape=shape, keep_zeros=keep_zeros)
    return get_algorithm("squantizer").make_weight(spec, params)


def spec_tensors():
    torch.manual_seed(0)
    w = torch.randn(SHAPE) * 0.1
    return w, torch.randn(SHAPE)


def backward(q, x, grad):
    x = x.clone().requires_grad_()
    out = q(x)
    out.backward(grad)
    return out.detach(), x.grad


# -- section 11 --------------------------------------------------------------------------------------------------------
def test_vector_of_four_bits():
    w, g = spec_tensors()
    assert np.allclose(
        w.flatten()[:9],
        [-.11258399, -.11523602, -.02505786, -.04338788, .08487104, .06920092, -.03160128, -.21152194, .03222749],
        atol=1e-8,
    )  # fmt: skip
    q = weight()
    out, dx = backward(q, w, g)
    assert np.allclose(
        out.flatten()[:9], [-.11976478, -.11976478, 0, 0, .08288385, 0, 0, -.19352661, 0], atol=1e-7
    )  # fmt: skip
    form = q.freeze(w).form
    gap, step = (p.scale.item() for p in form.parts)
    assert gap == pytest.approx(0.08288385, abs=1e-7) and step == pytest.approx(0.03688092, abs=1e-7)
    assert out.abs().max().item() == pytest.approx(0.34105027, abs=1e-7)
    assert (out == 0).sum() == 65 and torch.equal(dx, g * (out != 0))


def test_vector_of_two_bits():
    w, g = spec_tensors()
    q = weight(2)
    out, dx = backward(q, w, g)
    levels = out.abs().unique()
    assert np.allclose(levels, [0, 0.14683777, 0.25557363], atol=1e-7)
    # five values, not ternary, and the mask is that of the threshold
    assert out.unique().numel() == 5 and torch.equal(out != 0, weight()(w) != 0)
    assert torch.equal(dx, g * (out != 0))


def test_vector_of_activations():
    a = get_algorithm("squantizer").make_activation(TensorSpec("activation", 4, signed=False))
    a.calibrate(torch.tensor([0.0, 1.0]))
    x = torch.tensor([0.2, 3.3, 9.99, 12.0], requires_grad=True)
    out = a(x)
    assert torch.allclose(out, torch.tensor([0, 3.3333333, 10, 10]))
    out.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0] and a.alpha.grad.item() == 1
    assert {g["weight_decay"] for g in param_groups(a, 0.1, 1e-4) if g["params"]} == {1e-4}


# -- the grids ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("grid", ["paper", "aligned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_forward_and_backward_equal_the_float64_reference(bits, grid, sigma):
    if grid == "aligned" and bits == 8:
        with pytest.raises(ConfigError, match="layer: grid 'aligned' needs integers of more than 8 bits at 8 bits"):
            weight(bits, grid=grid)
        return
    w, g = sample(SHAPE).double(), sample(SHAPE, seed=5).double()
    q = weight(bits, grid=grid, sigma=sigma).train()
    out, dx = backward(q, w, g)
    r = squantize(w.numpy(), bits, sigma, grid, grad=g.numpy())
    assert np.allclose(out, r["wq"], rtol=1e-12, atol=1e-15) and np.array_equal(dx, r["dw"])
    assert out.unique().numel() <= 2**bits + 1
    codes, form = q.freeze(w)
    assert torch.equal(form.decode(codes), out)
    assert torch.equal(form.decode(form.encode(out)), out)


def test_two_integers_reproduce_the_papers_grid_up_to_one_addition():
    w, _ = spec_tensors()
    for bits in (2, 4):
        out = weight(bits)(w)
        codes, form = weight(bits).freeze(w)
        assert isinstance(form, SumOfGrids)
        t, j = form.split(codes)
        assert set(t.unique().tolist()) == {-1, 0, 1} and int(j.abs().max()) == 2 ** (bits - 1) - 1
        assert bool(((j == 0) | (torch.sign(j) == t)).all())
        a, b = (p.scale.double() for p in form.parts)
        assert torch.allclose(t * a + j * b, out.double(), rtol=1e-7)
        # codes say the same after a file
        again = form_from_dict(form_to_dict(form))
        assert torch.equal(again.decode(codes), out) and again.allowed.numel() == 2**bits + 1


def test_one_symmetric_fake_quantize_does_not():
    w, _ = spec_tensors()
    out = weight()(w).double()
    top = out.abs().max()
    for levels in range(3, 2 * 127 + 2, 2):
        step = 2 * top / (levels - 1)
        assert not torch.allclose(torch.round(out / step) * step, out, rtol=0, atol=1e-5 * top)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("sigma", [-1.0, 0.0, 1.0])
def test_the_aligned_grid_is_one_integer(bits, sigma):
    w = sample((16, 8, 3, 3))
    codes, form = weight(bits, w.shape, grid="aligned", sigma=sigma).freeze(w)
    assert isinstance(form, Codebook) and form.bits == bits + 1
    integers = form.integers(codes)
    n, top = 2 ** (bits - 1) - 1, int(form.levels[-1])
    first = top - n
    assert form.levels.tolist() == [*range(-top, -first + 1), 0, *range(first, top + 1)] and first >= 1
    # one FakeQuantize of 2 top + 1 levels
    step = form.scale.double()
    out = weight(bits, w.shape, grid="aligned", sigma=sigma)(w).double()
    assert torch.allclose(torch.round(out / step) * step, out, rtol=1e-6) and int(integers.abs().max()) <= top <= 127
    # no survivor is further from its level than from the papers' grid plus half a step of snapping
    alone = weight(bits, w.shape, sigma=sigma)(w).double()
    assert torch.equal(alone != 0, out != 0)


def test_dense_ablation_is_a_uniform_grid_without_gap():
    w = sample(SHAPE)
    for grid in ("paper", "aligned"):
        codes, form = weight(4, sigma=None, grid=grid).freeze(w)
        assert isinstance(form, UniformGrid) and form.narrow and form.bits == 4
        assert torch.equal(codes, torch.round(w / (w.abs().max() / 7)).int())


# -- training ----------------------------------------------------------------------------------------------------------
def test_weights_stay_dense_floats_until_the_delay_is_over():
    w = sample(SHAPE)
    q = weight().train()
    quantized = q(w)
    assert (quantized == 0).any()  # nothing known about the training: no delay
    for progress, waits in (
        (Progress(0, 0, 90, 9), True), (Progress(29, 2, 90, 9), True), (Progress(30, 3, 90, 9), False),
        (Progress(0, 2, None, 9), True), (Progress(0, 3, None, 9), False), (Progress(5, 1), False),
    ):  # fmt: skip
        q.on_progress(progress)
        assert torch.equal(q(w), w if waits else quantized)
    later = weight(delay_epochs=2).train()
    for epoch in range(4):
        later.on_progress(Progress(epoch=epoch, total_epochs=100))
        assert torch.equal(later(w), w if epoch < 2 else quantized)
    never = weight(delay=0.0).train()
    never.on_progress(Progress(0, 0, 90, 9))
    assert torch.equal(never(w), quantized)


def test_evaluation_shows_the_deployed_weight_before_the_delay_too():
    """So that a checkpoint chosen by its accuracy is never a float one (pitfalls 7 and 8)."""
    w = sample(SHAPE)
    q = weight()
    q.on_progress(Progress(0, 0, 90, 9))
    assert torch.equal(q.train()(w), w) and (q.eval()(w) == 0).any()
    # evaluation passes do not advance anything
    for _ in range(100):
        q(w)
    assert torch.equal(q.train()(w), w)
    fresh = weight()
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh.eval()(w), q.eval()(w))


def test_pruned_weights_return_when_the_threshold_moves():
    w = torch.tensor([0.1, 0.2, 1.0, 1.2])
    q = weight(4, (4,))
    assert (q(w) != 0).tolist() == [False, False, True, True]
    shrunk = torch.tensor([0.1, 0.2, 0.15, 0.12])
    assert (q(shrunk) != 0).tolist() == [False, True, True, False]


def test_statistics_are_those_of_the_dense_weight():
    w = sample((64, 64))
    q = weight(4, (64, 64))
    threshold = (w.abs().mean()).item()
    assert torch.equal(q(w) != 0, w.abs() >= threshold)
    # the statistics of the survivors alone would prune more and more
    assert (q(q(w)) == 0).sum() > 0 and (q(w) == 0).float().mean().item() == pytest.approx(0.575, abs=0.03)


def test_sigma_sets_the_sparsity_of_gaussian_weights():
    w = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    expected = {-1.0: 0.155, -0.5: 0.380, 0.0: 0.575, 0.5: 0.728, 1.0: 0.839}
    for sigma, sparsity in expected.items():
        out = weight(4, w.shape, sigma=sigma)(w)
        assert (out == 0).float().mean().item() == pytest.approx(sparsity, abs=0.01)


def test_nothing_is_learned():
    assert list(weight().parameters()) == [] and param_groups(weight(), 0.1, 1e-4)[0]["params"] == []


# -- pitfalls ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", ["paper", "aligned"])
@pytest.mark.parametrize("bits", [2, 4])
def test_constant_layers_and_single_survivors(bits, grid):
    constant = torch.full((3, 5), 0.3) * torch.tensor([1, -1, 1, 1, -1])
    single = torch.full((3, 5), 1e-3)
    single[1, 2] = -5.0
    for w, survivors in ((constant, 15), (single, 1), (torch.full((1,), -0.7), 1), (torch.zeros(3, 5), 0)):
        q = weight(bits, w.shape, grid=grid, sigma=0.5)
        out, dx = backward(q, w, torch.ones_like(w))
        assert out.isfinite().all() and dx.isfinite().all() and (out != 0).sum() == survivors
        kept = out != 0
        assert torch.allclose(out[kept], w[kept], rtol=1e-5)
        codes, form = q.freeze(w)
        assert torch.equal(form.decode(codes), out)
        scales = [p.scale for p in form.parts] if isinstance(form, SumOfGrids) else [form.scale]
        assert all(s > 0 for s in scales)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e-3])
def test_a_rounded_mean_prunes_nothing_of_a_constant_layer(value):
    w = torch.full((7, 77), value)
    assert (weight(4, w.shape)(w) != 0).all()


def test_large_sigma_keeps_the_largest():
    w = sample(SHAPE)
    out = weight(sigma=50.0)(w)
    assert (out != 0).sum() == 1 and out.abs().max() == w.abs().max()


def test_negative_thresholds_are_clamped_so_that_no_sign_flips():
    w = sample(SHAPE)
    for bits in (3, 4):
        q = weight(bits, sigma=-5.0)
        out = q(w)
        assert bool((torch.sign(out) * torch.sign(w) >= 0).all())
        dense = weight(bits, sigma=None)(w)
        assert torch.allclose(out, dense)
        codes, form = q.freeze(w)
        assert torch.equal(form.decode(codes), out) and torch.equal(form.decode(form.encode(out)), out)


def test_every_filter_of_a_depthwise_layer_may_vanish_but_not_the_layer():
    w = sample((6, 1, 3, 3)) * torch.tensor([1e-3, 1, 1, 1e-3, 1, 1]).reshape(6, 1, 1, 1)
    out = weight(4, w.shape)(w)
    assert not out[0].any() and not out[3].any() and out.any()


def test_weights_equal_to_the_threshold_stay():
    w = torch.tensor([-1.0, 1.0, 3.0, -3.0])  # mean 2
    assert (weight(4, (4,))(torch.tensor([2.0, -2.0, 2.0, 2.0])) != 0).all()
    w = torch.tensor([1.0, 2.0, 3.0])
    out, dx = backward(weight(4, (3,)), w, torch.ones(3))
    assert dx.tolist() == [0, 1, 1] and out[1].item() == 2.0


def test_autocast_computes_the_threshold_in_float32():
    w, g = spec_tensors()
    out, dx = backward(weight(), w, g)
    with torch.autocast("cpu", torch.bfloat16):
        cast, dx_cast = backward(weight(), w, g)
    assert torch.equal(out, cast) and torch.equal(dx, dx_cast)


# -- somebody else's mask ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", ["paper", "aligned"])
@pytest.mark.parametrize("sigma", [0.0, 2.0, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_given_mask_replaces_the_rule(bits, sigma, grid):
    w, g = spec_tensors()
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5
    w = w * mask
    q = weight(bits, keep_zeros=True, sigma=sigma, grid=grid)
    out, dx = backward(q, w, g)
    r = squantize(w.double().numpy(), bits, sigma, grid, mask=mask.numpy())
    assert np.allclose(out, r["wq"], rtol=1e-5, atol=1e-7)
    assert torch.equal(dx, g)  # whose mask it is decides
    if sigma is not None:
        assert torch.equal(out != 0, mask)
    codes, form = q.freeze(w)
    assert torch.equal(form.decode(codes), out)
    assert not weight(bits, keep_zeros=True, sigma=sigma, grid=grid)(torch.zeros(SHAPE)).any()


# -- compression rates -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "total,nonzero,bits,rate",
    [(11.7e6, 5.0e6, 4, 18), (25.5e6, 11.5e6, 4, 17), (3.6e6, 3.1e6, 4, 9)],
    ids=["ResNet-18", "ResNet-50", "MobileNetV2"],
)
def test_published_compression_rates(total, nonzero, bits, rate):
    # nothing else in the network: the published rate prices everything alike
    assert compression_rates_of(int(total), int(nonzero), bits, 0).published == rate


def test_honest_compression_rates():
    # section 9.2: ResNet-18, convolutions 60 % sparse, the rest float32
    rates = compression_rates_of(11_166_912, int(0.4 * 11_166_912), 4, 532_000)
    assert rates.published == 18
    assert rates.without_index == pytest.approx(10.7, abs=0.2) and rates.with_index == pytest.approx(8.1, abs=0.2)
    assert rates.sparsity[1] == pytest.approx(0.6) and rates.sparsity[0] < 0.6  # "all" against "conv"


def test_the_report_prints_both_accountings():
    w, _ = spec_tensors()
    frozen = [weight().freeze(w), weight(2).freeze(w), weight(grid="aligned").freeze(w)]
    rates = compression_rates(frozen, 4, 100)
    nonzero, total = 3 * 43, 3 * 108 + 100
    assert rates == compression_rates_of(3 * 108, nonzero, 4, 100)
    assert rates.published == 8 * total // (nonzero + 100)
    text = str(rates)
    assert f"as published {rates.published}x" in text and f"{rates.with_index:.1f}x" in text and "no index" in text
    assert "60.2% of the quantized weights" in text
