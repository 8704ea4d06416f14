"""Relaxed Quantization against its specification (dropbits.md section 3.2 and the pitfalls of section 10)."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fat_plugins import Progress, TensorSpec, get_algorithm
from fat_plugins.algorithms import _rq as shared
from fat_plugins.algorithms import rq as module

RQ = get_algorithm("rq")
ALPHA = 0.5


def weight(bits=3, shape=(64,), sigma=ALPHA / 3, name="w", **params):
    quantizer = RQ.make(TensorSpec("weight", bits, name=name, shape=shape), params).double().train()
    with torch.no_grad():
        quantizer.log_alpha.fill_(math.log(ALPHA))
        quantizer.log_sigma.fill_(math.log(sigma))
    return quantizer


def ramp(n=64, low=-2.4, high=1.9):
    return torch.linspace(low, high, n, dtype=torch.float64, requires_grad=True)


def literal(x, log_alpha, log_sigma, draw):
    """Section 3.2 with all points at once: pi by the (windowed, renormalised) distribution functions, Gumbel noise,
    softmax; the noise is drawn as the module draws it."""
    alpha, sigma = log_alpha.exp(), log_sigma.exp()
    k = torch.arange(draw.low, draw.high + 1, dtype=torch.float64)
    g = alpha * k
    top, bottom = (torch.sigmoid((g + d * alpha / 2 - x[:, None]) / sigma) for d in (1, -1))
    raw = top - bottom
    nearest = (x.detach() / alpha.detach()).clamp(draw.low, draw.high).round()
    generator = torch.Generator().manual_seed(draw.seed)

    def gumbel():
        e = torch.empty(x.shape, dtype=torch.float32).exponential_(generator=generator)
        return -e.clamp_min(1e-30).log().double()

    if draw.delta is None:
        noise, window = torch.stack([gumbel() for _ in k], 1), torch.ones_like(raw, dtype=torch.bool)
    else:
        half = int(draw.delta)
        drawn = {o: gumbel() for o in sorted(range(-half, half + 1), key=abs)}
        offset = (k - nearest[:, None]).long()
        noise = sum(torch.where(offset == o, n[:, None], 0.0) for o, n in drawn.items())
        window = (offset.abs() <= half) & ((g - alpha * nearest[:, None]).abs() <= draw.delta * sigma)
    pi = raw * window / (raw * window).sum(1, keepdim=True)
    scores = pi.masked_fill(~window, 1.0).log().masked_fill(~window, -math.inf) + noise
    z = torch.softmax(scores / draw.temperature, 1)
    if not draw.straight_through:
        return (z * g).sum(1)
    hard = torch.nn.functional.one_hot(scores.argmax(1), k.numel()).double()
    return ((hard + z - z.detach()) * g).sum(1)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    "sigma,delta",  # no narrow noise on the whole grid: the literal formulas lose their digits there
    [(ALPHA / 3, None), (ALPHA * 0.9, None), (ALPHA / 6, 3.0), (ALPHA / 3, 3.0), (ALPHA * 0.9, 3.0), (ALPHA, 1.5)],
)
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_forward_and_backward_equal_the_formulas(temperature, delta, sigma, straight_through):
    x, log_alpha = ramp(), torch.tensor([math.log(ALPHA)], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([math.log(sigma)], dtype=torch.float64, requires_grad=True)
    draw = module._Draw(-4, 3, temperature, delta, straight_through, 17, 1.0)
    grad = torch.randn(64, dtype=torch.float64)
    results = []
    for out in (literal(x, log_alpha, log_sigma, draw), module._Relaxed.apply(x, log_alpha, log_sigma, draw)):
        for p in (x, log_alpha, log_sigma):
            p.grad = None
        out.backward(grad)
        results.append([out.detach(), *(p.grad.clone() for p in (x, log_alpha, log_sigma))])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


def test_the_points_are_drawn_with_their_probabilities():
    """RQ-ST on one value, repeated: frequencies are pi."""
    x = torch.full((40000,), 0.3, dtype=torch.float64)
    out = weight(shape=(40000,), straight_through=True, local_grid=False)(x)
    r, rho = torch.tensor(0.3 / ALPHA), torch.tensor(3.0)
    pi = torch.stack([shared.probability(r, rho, float(k), -4, 3, True).value for k in range(-4, 4)])
    counts = torch.stack([(out / ALPHA).round() == k for k in range(-4, 4)]).double().mean(1)
    assert (counts - pi).abs().max() < 0.01


def test_low_temperature_gives_grid_points_and_evaluation_rounds():
    x = ramp()
    cold = weight(temperature=1e-3)(x)
    assert ((cold / ALPHA) - (cold / ALPHA).round()).abs().median() < 1e-6
    quantizer = weight().eval()
    assert torch.equal(quantizer(x), (x / ALPHA).clamp(-4, 3).round() * ALPHA)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, ((x / ALPHA >= -4) & (x / ALPHA <= 3)).double())
    assert quantizer.log_sigma.grad.item() == 0  # a gradient, for DistributedDataParallel


@pytest.mark.parametrize("sigma", [1e-9, ALPHA / 20, 1e9])
@pytest.mark.parametrize("far", [0.3, 50.0, 1e30])
@pytest.mark.parametrize("local", [True, False])
def test_underflow_gives_no_nan(sigma, far, local):
    """Section 10.2: log of an underflowed pi; section 10.3: sigma -> 0."""
    quantizer = weight(shape=(2,), sigma=sigma, local_grid=local)
    x = torch.tensor([far, -far], dtype=torch.float64, requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert quantizer.log_alpha.grad.isfinite().all() and quantizer.log_sigma.grad.isfinite().all()
    assert ALPHA / 20 * 0.999 <= quantizer.sigma.item() <= ALPHA * 1.001


def test_noise_depends_on_seed_name_and_step_only():
    x = ramp().detach()

    def forward(step=3, seed=0, name="w"):
        quantizer = weight(name=name, seed=seed)
        quantizer(x)
        quantizer.on_progress(Progress(step=step))
        return quantizer(x)

    state = torch.random.get_rng_state()
    first = forward()
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers are used up
    torch.manual_seed(99)
    assert torch.equal(forward(), first)
    for other in (forward(step=4), forward(seed=1), forward(name="v")):
        assert not torch.equal(other, first)
    quantizer = weight()
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x)) and torch.equal(quantizer(x), quantizer(x))
    act = RQ.make(TensorSpec("activation", 3, name="w")).double().train()
    act.calibrate(x)
    assert act._seed != quantizer._seed  # the input of a layer draws other noise than its weight


@pytest.mark.parametrize("bits,temperature,local", [(2, 1.0, False), (3, 2.0, True), (4, 2.0, True), (8, 2.0, True)])
def test_defaults_by_width(bits, temperature, local):
    draw = weight(bits)._draw(ramp())
    assert draw.temperature == temperature and (draw.delta == 3.0) == local and not draw.straight_through


def test_nan_stays_visible():
    for params in ({}, {"straight_through": True}):
        x = torch.tensor([0.1, math.nan], dtype=torch.float64)
        assert torch.isnan(weight(shape=(2,), **params)(x)).tolist() == [False, True]


@pytest.mark.parametrize("params", [{}, {"local_grid": False}, {"straight_through": True}])
def test_training_keeps_the_input_only(params):
    quantizer = RQ.make(TensorSpec("weight", 8, shape=(64, 64)), params).train()
    w = torch.randn(64, 64, requires_grad=True)
    quantizer.calibrate(w.detach())
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        quantizer(w)
    assert sorted(n for n in saved.values() if n > 1) == [w.numel()]


def test_no_host_synchronisation_with_noise(no_host_sync):
    quantizer = RQ.make(TensorSpec("weight", 4, name="w", shape=(8, 8))).train()
    w = torch.randn(8, 8)
    quantizer.calibrate(w)
    w.requires_grad_()
    with no_host_sync():
        quantizer.on_progress(Progress(step=1))
        quantizer(w).sum().backward()
    assert w.grad.isfinite().all()
