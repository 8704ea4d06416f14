"""DropBits against its specification (dropbits.md): vectors and acceptance tests of section 11, pitfalls of section
10."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from references import categorical, cpq, sigmoid
from torch.utils.flop_counter import FlopCounterMode

from fat_plugins import ConfigError, Progress, TensorSpec, get_algorithm, param_groups, regularization, set_progress
from fat_plugins.algorithms import _rq as shared
from fat_plugins.algorithms import dropbits as module
from fat_plugins.quantizer import LayerQuantizers, module_geometry

DropBits = get_algorithm("dropbits")
ALPHA, SIGMA = 0.5, 0.5 / 3
X = [-1.9, -0.55, -0.26, -0.04, 0.3, 0.5, 0.74, 0.9]


def weight(bits=3, shape=(8,), name="w", **params):
    """A float64 weight quantizer with the step and noise scale of section 11."""
    quantizer = DropBits.make(TensorSpec("weight", bits, name=name, shape=shape), params).double()
    with torch.no_grad():
        quantizer.log_alpha.fill_(math.log(ALPHA))
        quantizer.log_sigma.fill_(math.log(SIGMA))
    return quantizer


def tensor(values, grad=True):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def gates_open(quantizer, pattern):
    """Draws that open (1) or close (0) each gate for certain."""
    quantizer.logit = torch.where(tensor(pattern, False) > 0, 1e3, -1e3)
    return quantizer


# -- vectors of section 11 ---------------------------------------------------------------------------------------------
PI = [4.3258e-6, 8.6879e-5, 0.00174181, 0.03374388, 0.39005135, 0.51155448, 0.05964850, 0.00316878]


def test_categorical_vector():
    r, rho = tensor([0.3 / ALPHA], False), tensor(ALPHA / SIGMA, False)
    found = [shared.probability(r, rho, float(k), -4, 3, True).value.item() for k in range(-4, 4)]
    assert found == pytest.approx(PI, rel=2e-5)
    assert sum(found) == pytest.approx(1, abs=1e-14)
    assert categorical(0.3, ALPHA, SIGMA, -4, 3)[0].tolist() == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize(
    "normalization,expected",
    [
        # the third value is printed as .60626349; 50-digit arithmetic gives .60626359
        ("truncated", [2.34322859, -0.16843376, 0.60626359, 0, 0.55669987, 0.00105374, -0.60441540, 0.67581153]),
        ("raw", [1.29966723, -0.16849530, 0.60625510, 0, 0.55635180, 0, -0.60625510, 0.64983362]),
    ],
)
def test_imax_gradient_vector(normalization, expected):
    x = tensor(X)
    weight(normalization=normalization, mask="none")(x).sum().backward()
    assert x.grad.tolist() == pytest.approx(expected, abs=5e-9)


def test_hard_concrete_vector():
    phi, u = torch.cat([torch.logit(tensor([0.9], False)), tensor([0, -1.0], False)]), tensor([0.3, 0.05, 0.9], False)
    z = module.hard_concrete(phi, torch.logit(u))
    assert z.tolist() == pytest.approx([0.96006285, 0, 0.92916968], abs=5e-9)
    assert module.open_probability(phi).tolist() == pytest.approx([0.97802912, 0.83182218, 0.64533522], abs=5e-9)
    # the deterministic gate has no temperature
    assert module.hard_concrete(phi).tolist() == pytest.approx(
        [min(1, sigmoid(p) * 1.2 - 0.1) for p in phi.tolist()], abs=1e-12
    )


def test_pair_and_level_ids():
    assert module.pair_ids(3).tolist() == [3, 2, 1, 0, 0, 1, 2, 3]
    assert module.level_ids(3).tolist() == [3, 3, 2, 1, 1, 2, 3, 3]
    assert module.level_ids(4).tolist() == [4] * 4 + [3, 3, 2, 1, 1, 2, 3, 3] + [4] * 4


# -- acceptance tests of section 11 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [ALPHA / 20, ALPHA / 3, ALPHA])
@pytest.mark.parametrize("truncated", [True, False])
def test_stable_form_equals_the_differences_of_distribution_functions(sigma, truncated):
    k = np.arange(-4, 4)
    x = np.linspace(-2.2, 1.7, 41)
    top, bottom = (sigmoid((ALPHA * (k + d) - x[:, None]) / sigma) for d in (0.5, -0.5))
    literal = top - bottom
    if truncated:
        literal = literal / (top[:, -1:] - bottom[:, :1])
    r, rho = torch.tensor(x / ALPHA), tensor(ALPHA / sigma, False)
    found = [shared.probability(r, rho, float(i), -4, 3, truncated).value for i in k]
    assert np.abs(torch.stack(found, -1).numpy() - literal).max() < 2e-15
    # and the stable form of the specification
    stable = categorical(x, ALPHA, sigma, -4, 3, truncated)[0]
    np.testing.assert_allclose(torch.stack(found, -1).numpy(), stable, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("far", [3.0, 50.0, 1e6, 1e30])
@pytest.mark.parametrize(
    "params", [{"mask": "none"}, {"mask": "endpoints"}, {"estimator": "full", "mask": "endpoints"}]
)
def test_far_outside_the_grid_the_nearest_end_is_taken(far, params):
    """Section 10.1: the floating arg max over pi gives the most negative level for a large positive x."""
    quantizer = weight(**params)
    if params["mask"] != "none":
        gates_open(quantizer, [1, 1, 1])
    for mode in (True, False):
        x = tensor([far, -far])
        out = quantizer.train(mode)(x)
        assert out.tolist() == [1.5, -2.0]
        out.sum().backward()
        assert x.grad.isfinite().all() and quantizer.log_alpha.grad.isfinite()


@pytest.mark.parametrize("sigma", [ALPHA / 20, ALPHA / 3, ALPHA])
def test_far_outside_the_probability_of_the_end_keeps_its_limit(sigma):
    """Where both the cell's and the grid's mass underflow: (1 - e^-rho) / (1 - e^-(K rho))."""
    rho = ALPHA / sigma
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        x = torch.tensor([2.5, 30.0, 1e6, 1e30], dtype=dtype) * ALPHA
        one = torch.tensor(rho, dtype=dtype)
        for sign, end in ((1, 3.0), (-1, -4.0)):
            r = shared.position(sign * x, torch.tensor(ALPHA, dtype=dtype), one, -4, 3)
            pi = shared.probability(r, one, end, -4, 3, True).value
            assert pi[1:].tolist() == pytest.approx([math.expm1(-rho) / math.expm1(-8 * rho)] * 3, rel=tolerance)


@pytest.mark.parametrize("estimator", ["imax", "full"])
@pytest.mark.parametrize("truncated", [True, False])
def test_closed_forms_equal_autograd(truncated, estimator):
    """The composition of section 4.1, all points at once, differentiated by torch."""
    x, log_alpha, log_sigma = tensor(np.linspace(-2.6, 2.1, 33)), tensor([math.log(0.47)]), tensor([math.log(0.2)])
    grad = torch.randn(33, dtype=torch.float64)
    alpha, sigma = log_alpha.exp(), log_sigma.exp()
    k = torch.arange(-4.0, 4.0, dtype=torch.float64)
    g = alpha * k
    b, a = (g + alpha / 2 - x[:, None]) / sigma, (g - alpha / 2 - x[:, None]) / sigma
    logits = torch.nn.functional.logsigmoid(b) + torch.nn.functional.logsigmoid(-a)
    pi = torch.softmax(logits, 1) if truncated else logits.exp() * (1 - torch.exp(-alpha / sigma))
    hard = torch.nn.functional.one_hot((x / alpha).round().clamp(-4, 3).long() + 4, 8).double()
    y = hard + (pi - pi.detach()) * (hard if estimator == "imax" else 1.0)
    out = (y * g).sum(1)
    out.backward(grad)
    wanted = [p.grad.clone() for p in (x, log_alpha, log_sigma)]
    for p in (x, log_alpha, log_sigma):
        p.grad = None
    plan = module._Plan(-4, 3, estimator, truncated, None, 1.0)
    ours = module._Categorical.apply(x, log_alpha, log_sigma, None, plan)
    ours.backward(grad)
    assert torch.equal(ours, out)
    for p, w in zip((x, log_alpha, log_sigma), wanted, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("estimator", ["imax", "full", "ste"])
@pytest.mark.parametrize("rule", ["expected", "raw"])
@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("family", ["endpoints", "hierarchical"])
def test_masked_forward_and_backward_equal_the_float64_reference(family, truncated, rule, estimator):
    normalization = "truncated" if truncated else "raw"
    quantizer = weight(
        4, (64,), mask=family, estimator=estimator, gate_gradient=rule, normalization=normalization,
        keep_probability=0.6,
    ).train()  # fmt: skip
    for step in range(3):
        quantizer.on_progress(Progress(step=step))
        x = tensor(np.linspace(-5.3, 4.9, 64))
        grad = torch.randn(64, dtype=torch.float64)
        mask = quantizer.mask()
        r = cpq(
            x.detach().numpy(), ALPHA, SIGMA, -8, 7, grad.numpy(), estimator, truncated, mask.detach().numpy(), rule
        )
        quantizer.zero_grad()
        out = quantizer(x)
        out.backward(grad)
        np.testing.assert_allclose(out.detach().numpy(), r["out"], rtol=1e-12)
        np.testing.assert_allclose(x.grad.numpy(), r["dx"], rtol=1e-8, atol=1e-10)
        factor = 1 / math.sqrt(64 * 7)
        np.testing.assert_allclose(quantizer.log_alpha.grad, r["dalpha"] * ALPHA * factor, rtol=1e-8)
        np.testing.assert_allclose(quantizer.log_sigma.grad, r["dsigma"] * SIGMA * factor, rtol=1e-8, atol=1e-12)
        # the gates' own chain is torch's
        (expected,) = torch.autograd.grad(mask, quantizer.phi, torch.tensor(r["dmask"]))
        torch.testing.assert_close(quantizer.phi.grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("rho", [1.0, 3.0, 20.0])
def test_the_chosen_point_is_the_most_probable_one_that_is_kept(bits, rho):
    """The staircase against the arg max of section 3.4 over all points, for soft, closed and nearly closed gates."""
    low, count = -(2 ** (bits - 1)), 2**bits
    r = torch.linspace(low - 1.7, -low + 0.9, 997, dtype=torch.float64)
    k = torch.arange(low, -low, dtype=torch.float64)
    log_raw = -torch.log(math.cosh(rho / 2) + torch.cosh(rho * (r[:, None] - k)))
    generator = torch.Generator().manual_seed(bits)
    for trial in range(20):
        mask = torch.rand(count, generator=generator, dtype=torch.float64)
        if trial % 2:
            mask = torch.where(mask < 0.3, 0.0, torch.where(mask < 0.5, mask**40, mask.clamp_min(0.6)))
        mask[count // 2] = 1.0
        scores = log_raw + mask.log()
        found = module.masked_codes(r, torch.tensor(rho, dtype=torch.float64), mask, low)
        best = scores.max(1).values
        chosen = scores.gather(1, (found - low).long()[:, None])[:, 0]
        assert (best - chosen).max() < 1e-9, trial


def test_expected_rule_is_the_gradient_of_the_expectation_over_kept_points():
    """Section 4.2, by torch's autograd."""
    x = tensor(np.linspace(-2, 2, 9), False)
    mask = tensor([0.3, 0.0, 0.8, 1.0, 1.0, 0.8, 0.0, 0.3])
    pi, _, k = categorical(x.numpy(), ALPHA, SIGMA, -4, 3)
    p = mask * torch.tensor(pi)
    (p * torch.tensor(ALPHA * k)).sum(1).div(p.sum(1).clamp_min(1e-6)).sum().backward()
    ours = cpq(x.numpy(), ALPHA, SIGMA, -4, 3, np.ones(9), mask=mask.detach().numpy())["dmask"]
    assert ours == pytest.approx(mask.grad.tolist(), rel=1e-10)


@pytest.mark.parametrize("mask", ["endpoints", "hierarchical"])
def test_evaluation_does_not_depend_on_gates(mask):
    """Section 10.6."""
    quantizer = weight(4, (100,), mask=mask, keep_probability=0.5)
    x = tensor(np.linspace(-5, 5, 100), False)
    expected = (x / ALPHA).round().clamp(-8, 7) * ALPHA
    with torch.no_grad():
        for step, phi in enumerate((-4.0, 0.0, 4.0)):
            quantizer.phi.fill_(phi)
            quantizer.on_progress(Progress(step=step))
            assert torch.allclose(quantizer.eval()(x), expected, atol=1e-15)
            assert torch.equal(quantizer.freeze(x).codes, (x / ALPHA).round().clamp(-8, 7).int())
        quantizer.phi.fill_(-4.0)
        assert not torch.allclose(quantizer.train()(x), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deployed_grid(bits):
    """Section 8: FakeQuantize with 2^b levels from -2^(b-1) alpha to (2^(b-1) - 1) alpha; QONNX signed, not narrow."""
    quantizer = weight(bits, (101,)).eval()
    x = tensor(np.linspace(-4, 4, 101), False)
    form = quantizer.freeze(x).form
    low, high, levels = form.low * form.scale, form.high * form.scale, 2**bits
    assert low.item() == pytest.approx(-(2 ** (bits - 1)) * ALPHA)
    assert high.item() == pytest.approx((2 ** (bits - 1) - 1) * ALPHA)
    step = (high - low) / (levels - 1)
    fake = torch.round((x.clamp(low.item(), high.item()) - low) / step) * step + low
    ties = form.ties(x) < 1e-6
    torch.testing.assert_close(quantizer(x)[~ties], fake[~ties])
    assert (form.signed, form.narrow, form.bits) == (True, False, bits)
    act = DropBits.make(TensorSpec("activation", bits, signed=False), {})
    act.calibrate(torch.rand(100))
    assert (act.form().signed, act.form().low, act.form().high) == (False, 0, 2**bits - 1)


@pytest.mark.parametrize(
    "phi,bits", [([4, 4, 4], 4), ([4, 4, -4], 3), ([4, -4, 4], 2), ([-4, 4, 4], 2), ([-4, -4, -4], 2)]
)
def test_decision_takes_consecutive_levels_and_never_less_than_two_bits(phi, bits):
    assert module.decide_bits(torch.tensor(phi, dtype=torch.float32)) == bits


def test_decision_threshold():
    """P(Z = 0) = sigmoid(beta log(-gamma / zeta) - phi) < 0.34."""
    border = module.BETA * math.log(0.1 / 1.1) - math.log(0.34 / 0.66)
    for shift, bits in ((1e-3, 3), (-1e-3, 2)):
        assert module.decide_bits(torch.tensor([9.0, border + shift])) == (bits if bits == 3 else 2)
    closed = 1 - module.open_probability(torch.tensor([border], dtype=torch.float64))
    assert closed.item() == pytest.approx(0.34, abs=1e-12)


# -- pitfalls of section 10 --------------------------------------------------------------------------------------------
def test_noise_scale_stays_between_a_twentieth_of_the_step_and_the_step():
    """Section 10.3, and a gradient may lead back but not further out."""
    for value, bound in ((-50.0, ALPHA / 20), (50.0, ALPHA)):
        quantizer = weight(mask="none")
        with torch.no_grad():
            quantizer.log_sigma.fill_(value)
        assert quantizer.sigma.item() == pytest.approx(bound)
        seen = set()
        for sign in (1.0, -1.0):
            quantizer.zero_grad()
            quantizer(tensor([0.37, -0.6, 1.1])).backward(sign * torch.ones(3, dtype=torch.float64))
            seen.add(float(torch.sign(quantizer.log_sigma.grad)))
        assert seen == {0.0, 1.0 if value > 0 else -1.0}


@pytest.mark.parametrize("rule", ["expected", "raw"])
@pytest.mark.parametrize("x", [1.5, -2.0, 1.24, 3.0, -1e4])
def test_gates_have_bounded_gradients_where_hardly_any_mass_is_kept(rule, x):
    """Section 10.4: one weight far from every point that the mask leaves."""
    quantizer = weight(3, (1,), mask="endpoints", gate_gradient=rule)
    with torch.no_grad():
        quantizer.log_sigma.fill_(math.log(ALPHA / 20))
    gates_open(quantizer, [0, 0, 0])
    value = tensor([x])
    out = quantizer.train()(value)
    assert out.item() in (0.0, -ALPHA)
    mask = torch.full((8,), 1e-9, dtype=torch.float64).requires_grad_()
    plan = module._Plan(-4, 3, "imax", True, rule, 1.0)
    arguments = quantizer.log_alpha.detach().requires_grad_(), quantizer.log_sigma.detach().requires_grad_(), mask, plan
    module._Categorical.apply(value, *arguments).sum().backward()
    assert value.grad.isfinite().all() and mask.grad.isfinite().all()
    # at most: twice the largest level over the smallest mass that counts
    assert mask.grad.abs().max() <= 2 * 4 * ALPHA / 1e-6


def test_one_draw_for_the_whole_layer():
    """Section 10.5: two equal weights never get different values."""
    quantizer = weight(4, (64,), mask="endpoints", keep_probability=0.5).train()
    x = tensor(np.linspace(-4, 4, 64), False)
    assert quantizer.mask().shape == (16,) and quantizer.phi.shape == (7,)
    for step in range(5):
        quantizer.on_progress(Progress(step=step))
        assert torch.equal(quantizer(torch.stack([x, x]))[0], quantizer(x.flip(0)).flip(0))


def test_draws_depend_on_seed_name_and_step_only():
    """Section 10.7: equal on every rank and after a restart, whatever else draws numbers or runs forward."""

    def draws(step=3, seed=0, name="w", bits=4):
        quantizer = weight(bits, (4,), name=name, mask="endpoints", seed=seed)
        torch.rand(step + 1)
        quantizer(tensor([0.1] * 4))
        quantizer.on_progress(Progress(step=step))
        return quantizer.logit

    state = torch.random.get_rng_state()
    first = draws()
    torch.manual_seed(99)
    assert torch.equal(draws(), first)
    for other in (draws(step=4), draws(seed=1), draws(name="v")):
        assert not torch.equal(other, first)
    torch.random.set_rng_state(state)
    weight(4, (4,), mask="endpoints").on_progress(Progress(step=1))
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers are used up
    quantizer = weight(4, (4,), mask="endpoints").train()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(tensor([0.1] * 4))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_ties_go_to_even():
    """Section 10.8."""
    x = tensor([-0.75, -0.25, 0.25, 0.75, 1.25], False)
    assert weight(mask="none")(x).tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0]


def test_gradient_of_the_step_is_scaled_by_the_size_of_the_tensor():
    """Section 10.9."""
    small, large = weight(shape=(8,), mask="none"), weight(shape=(8, 16), mask="none")
    small(tensor(X)).sum().backward()
    large(tensor([X] * 16).T).sum().backward()
    assert large.log_alpha.grad.item() == pytest.approx(small.log_alpha.grad.item() * 4)  # 16 / sqrt(16)


@pytest.mark.parametrize("init", ["mse", "rq"])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_all_zero_calibration(role, init):
    """Section 10.10."""
    quantizer = DropBits.make(TensorSpec(role, 3, shape=(4, 4) if role == "weight" else ()), {"init": init})
    quantizer.calibrate(torch.zeros(4, 4))
    assert quantizer.alpha.item() > 0
    assert not quantizer(torch.zeros(4, 4)).any() and quantizer(torch.ones(4, 4)).isfinite().all()


def test_penalty_is_the_marginal_probability():
    """Section 10.11, and section 4.3: lambda times the sum of P(Z_m != 0) of levels 2 .. b."""
    quantizer = weight(4, mask="hierarchical", bit_penalty=0.5, layer_weight=0.25)
    with torch.no_grad():
        quantizer.phi.copy_(tensor([math.log(9), 0, -1], False))
    assert regularization(quantizer).item() == pytest.approx(0.125 * (0.97802912 + 0.83182218 + 0.64533522), abs=1e-8)
    regularization(quantizer).backward()
    p = module.open_probability(quantizer.phi.detach())
    torch.testing.assert_close(quantizer.phi.grad, 0.125 * p * (1 - p))
    for other in (weight(4, mask="endpoints"), weight(2, mask="hierarchical"), weight(4, mask="none")):
        assert regularization(other) is None


# -- what imax does, section 4.1 ---------------------------------------------------------------------------------------
def test_known_consequences_of_imax():
    quantizer = weight(mask="none", normalization="raw")
    x = tensor([0.2, -0.24, 0.6, 0.9, 0.5, 1.0, 0.7499, 1.2499])
    quantizer(x).sum().backward()
    g = x.grad
    assert g[:2].tolist() == [0, 0]  # the cell of zero
    assert g[2] < 0 < g[3]  # above and below a centre, for positive levels
    assert g[4:6].abs().max() < 1e-12  # at a centre
    # at a cell's edge 0.61 |k*|
    assert abs(g[6].item()) == pytest.approx(0.61, rel=0.01) and abs(g[7].item()) == pytest.approx(1.22, rel=0.01)


def test_full_is_close_to_straight_through():
    full, ste = weight(mask="none", estimator="full"), weight(mask="none", estimator="ste")
    x = tensor(np.linspace(-0.75, 0.25, 50))  # two cells in the middle of the grid
    full(x).sum().backward()
    assert 0.95 < x.grad.min() < 0.97 and 1.01 < x.grad.max() < 1.04
    x.grad = None
    ste(x).sum().backward()
    assert x.grad.tolist() == [1.0] * 50


# -- masks -------------------------------------------------------------------------------------------------------------
def test_dropped_points_are_avoided():
    quantizer = weight(3, (9,), mask="endpoints").train()
    x = tensor(np.linspace(-2, 2, 9), False)
    k = x / ALPHA
    for pattern, kept in (
        ([1, 1, 1], {-4, -3, -2, -1, 0, 1, 2, 3}), ([0, 1, 1], {-4, -3, -1, 0, 2, 3}), ([1, 0, 0], {-2, -1, 0, 1}),
        ([0, 0, 0], {-1, 0}),
    ):  # fmt: skip
        found = gates_open(quantizer, pattern)(x) / ALPHA
        assert set(found.round().int().tolist()) <= kept
        outside = [not any(abs(v - p) < 1e-9 for p in kept) for v in k.tolist()]
        assert torch.allclose(found[~torch.tensor(outside)], k[~torch.tensor(outside)])


def test_a_bit_exists_only_if_all_lower_ones_do():
    quantizer = weight(4, mask="hierarchical").train()
    assert quantizer.phi.shape == (3,)
    levels = module.level_ids(4)
    for pattern, bits in (([1, 1, 1], 4), ([1, 1, 0], 3), ([1, 0, 1], 2), ([0, 1, 1], 1)):
        assert torch.equal(gates_open(quantizer, pattern).mask(), (levels <= bits).double())


def test_gates_are_kept_with_their_probability():
    quantizer = weight(3, mask="endpoints", gates="bernoulli", keep_probability=0.7)
    draws = []
    for step in range(3000):
        quantizer.on_progress(Progress(step=step))
        draws.append(quantizer.mask())
    draws = torch.stack(draws)
    assert set(draws.unique().tolist()) == {0.0, 1.0} and (draws[:, 3:5] == 1).all()
    assert draws[:, 5:].mean().item() == pytest.approx(0.7, abs=0.02)
    assert "phi" not in dict(quantizer.named_parameters()) and "phi" in quantizer.state_dict()
    soft = weight(3, mask="endpoints", keep_probability=0.7)
    values = []
    for step in range(3000):
        soft.on_progress(Progress(step=step))
        values.append(soft.mask().detach()[5:])
    opened = (torch.stack(values) > 0).double().mean().item()
    assert opened == pytest.approx(module.open_probability(torch.logit(torch.tensor(0.7))).item(), abs=0.02)


@pytest.mark.parametrize(
    "bits,mask,gates",
    [(2, "auto", 0), (3, "auto", 3), (4, "auto", 7), (2, "endpoints", 1), (2, "hierarchical", 0),
     (4, "hierarchical", 3), (4, "none", 0)],
)  # fmt: skip
def test_number_of_gates(bits, mask, gates):
    quantizer = weight(bits, mask=mask)
    assert (0 if quantizer.phi is None else quantizer.phi.numel()) == gates
    assert quantizer.noisy == bool(gates)
    if gates:
        assert quantizer.phi.tolist() == pytest.approx([2.19722] * gates, abs=1e-5)


def test_gate_logits_are_bounded_and_can_come_back():
    """Section 7: +- log(100)."""
    quantizer = weight(3, mask="endpoints").train()
    gates_open(quantizer, [1, 1, 1])
    with torch.no_grad():
        quantizer.phi.copy_(tensor([900.0, -900.0, 0.0], False))
    assert quantizer._logits().tolist() == pytest.approx([math.log(100), -math.log(100), 0.0])
    for sign, kept in ((1.0, [True, False, True]), (-1.0, [False, True, True])):
        quantizer.zero_grad()
        (sign * quantizer._logits()).sum().backward()
        assert (quantizer.phi.grad != 0).tolist() == kept


# -- learned bit widths: regulariser, decision, fine-tuning ------------------------------------------------------------
def hierarchical(**params):
    return weight(4, (200,), mask="hierarchical", **params).train()


def test_life_of_a_learned_width():
    quantizer = hierarchical(learn_epochs=2)
    x = tensor(np.linspace(-5, 5, 200))
    with torch.no_grad():
        quantizer.phi.copy_(tensor([3.0, 3.0, -3.0], False))
    quantizer.on_progress(Progress(step=5, epoch=1))
    assert (quantizer.bits, quantizer.noisy, quantizer.spec.bits) == (4, True, 4)
    assert quantizer.freeze(x.detach()).form.bits == 4  # what evaluation computes now
    quantizer.on_progress(Progress(step=6, epoch=2))
    assert (quantizer.bits, quantizer.noisy) == (3, False) and regularization(quantizer) is None
    codes, form = quantizer.freeze(x.detach())
    assert form.bits == 3 and (codes.min(), codes.max()) == (-4, 3)
    expected = (x.detach() / ALPHA).round().clamp(-4, 3) * ALPHA
    for mode in (True, False):  # no masks in fine-tuning
        assert torch.allclose(quantizer.train(mode)(x), expected)
    assert form.scale.item() == pytest.approx(ALPHA)
    # gates stay in the graph with a gradient of zero, which DistributedDataParallel waits for
    quantizer.train()(x).sum().backward()
    assert quantizer.phi.grad.tolist() == [0, 0, 0] and x.grad.abs().max() > 0
    # the decision is final
    with torch.no_grad():
        quantizer.phi.fill_(9.0)
    quantizer.on_progress(Progress(step=0, epoch=0))
    assert quantizer.bits == 3 and quantizer.decide() == 3


@pytest.mark.parametrize(
    "params,progress,decided",
    [
        ({}, Progress(1000, 1000), False),  # nothing is planned
        ({}, Progress(999, 7, None, 10), False),
        ({}, Progress(0, 8, None, 10), True),
        ({}, Progress(74, 0, 100), False),
        ({}, Progress(75, 0, 100), True),
        ({"learn_fraction": 0.5}, Progress(0, 5, None, 10), True),
        ({"learn_epochs": 3}, Progress(1000, 2, 10, 3), False),
        ({"learn_epochs": 3}, Progress(0, 3, None, 100), True),
    ],
)
def test_when_widths_are_decided(params, progress, decided):
    quantizer = hierarchical(**params)
    quantizer.on_progress(progress)
    assert quantizer.noisy != decided


def test_the_decision_is_in_the_state():
    done = hierarchical(learn_epochs=1)
    with torch.no_grad():
        done.phi.copy_(tensor([3.0, -3.0, -3.0], False))
    done.on_progress(Progress(epoch=1))
    fresh = hierarchical(learn_epochs=1)
    fresh.load_state_dict(done.state_dict())
    x = tensor(np.linspace(-5, 5, 200), False)
    assert fresh.bits == 2 and torch.equal(fresh.eval()(x), done.eval()(x))
    assert copy.deepcopy(done).bits == 2
    undecided = hierarchical(learn_epochs=1)
    state = copy.deepcopy(undecided.state_dict())
    undecided.on_progress(Progress(epoch=1))  # a host announces before it loads
    undecided.load_state_dict(state)
    assert undecided.bits == 4 and undecided.noisy


def test_the_penalty_lowers_the_width_and_the_task_holds_it():
    """A layer whose loss needs four bits keeps more of them than one that has no use for them, at the same lambda."""
    needed = {}
    for name, fine in (("fine", True), ("coarse", False)):
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(200, generator=generator, dtype=torch.float64)
        quantizer = hierarchical(bit_penalty=0.03, learn_fraction=0.9)
        with torch.no_grad():
            quantizer.log_alpha.fill_(math.log(0.3))
            quantizer.log_sigma.fill_(math.log(0.1))
        target = w if fine else w.clamp(-0.6, 0.3)
        optimizer = torch.optim.Adam(param_groups(quantizer, 0.01), lr=0.01)
        for step in range(300):
            set_progress(quantizer, Progress(step=step, total_steps=300))
            loss = ((quantizer(w) - target) ** 2).mean()
            loss = loss if (term := regularization(quantizer)) is None else loss + term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        needed[name] = quantizer.bits
    assert needed["coarse"] == 2 < needed["fine"]


def test_share_of_the_weights():
    """``bit_weight: params``: the penalty of a layer counts its share of all weights."""
    shapes = [(30, 2), (20, 1)]
    layers = [LayerQuantizers(str(s), weight(4, s, mask="hierarchical", bit_weight="params")) for s in shapes]
    plain = regularization(weight(4, mask="hierarchical")).item()
    DropBits.make_coordinator(layers)
    assert [regularization(la.weight).item() for la in layers] == pytest.approx([plain * 0.75, plain * 0.25])
    one = LayerQuantizers("one", weight(4, mask="hierarchical"))
    DropBits.make_coordinator([one, *layers, LayerQuantizers("float")])
    assert regularization(one.weight).item() == pytest.approx(plain)


class Host(torch.nn.Module):
    """What an adapter makes of layers that run in order, with ReLU in between."""

    def __init__(self, layers, bits=4, data=None, **params):
        super().__init__()
        self.layers, self.quant = torch.nn.ModuleList(layers), torch.nn.ModuleList()
        params = {"mask": "hierarchical", **params}
        for i, layer in enumerate(layers):
            axis = int(getattr(layer, "transposed", False))
            spec = TensorSpec("weight", bits, f"layer{i}", tuple(layer.weight.shape), axis, **module_geometry(layer))
            self.quant.append(DropBits.make(spec, params))
            self.quant[i].calibrate(layer.weight)
        self.coordinator = DropBits.make_coordinator(
            [LayerQuantizers(f"layer{i}", q) for i, q in enumerate(self.quant)]
        )
        for x in data or ():
            with torch.no_grad():
                self(x, show=True)

    def forward(self, x, show=False):
        for i, (layer, quantizer) in enumerate(zip(self.layers, self.quant, strict=True)):
            if isinstance(layer, torch.nn.Linear) and layer.in_features != x.shape[-1]:
                x = x.flatten(1)
            if show and quantizer.wants_input:
                quantizer.observe_input(x)
            x = torch.func.functional_call(layer, {"weight": quantizer(layer.weight)}, (x,), strict=False)
            x = x.relu() if i + 1 < len(self.layers) else x
        return x

    def term(self):
        return regularization(self)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(5, 7), (3, 5)),
    "linear on a sequence": (lambda: torch.nn.Linear(5, 7), (3, 4, 2, 5)),
    "convolution": (lambda: torch.nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 1)), (3, 4, 9, 8)),
    "groups": (lambda: torch.nn.Conv2d(4, 6, 3, groups=2, padding="same"), (3, 4, 9, 8)),
    "depthwise": (lambda: torch.nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 6)),
    "one sample": (lambda: torch.nn.Conv1d(4, 6, 3, stride=3), (4, 11)),
    "volume": (lambda: torch.nn.Conv3d(2, 3, (1, 2, 3), stride=2), (2, 2, 5, 6, 7)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_multiply_accumulates_are_those_that_torch_counts(name):
    make, shape = LAYERS[name]
    net, x = Host([make()], bit_weight="macs"), torch.randn(shape)
    assert net.quant[0].counted is None and net.quant[0].wants_input
    for batches in (1, 2):  # every input counts
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, show=True)
        assert net.quant[0].counted == batches * counter.get_total_flops() // 2 > 0


def test_share_of_the_multiply_accumulates():
    """``bit_weight: macs`` against float64, with a batch that is shorter and samples of another size."""
    layers = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 8, 3, stride=2), torch.nn.Linear(6, 10)]
    data = [torch.randn(4, 3, 14, 14), torch.randn(1, 3, 14, 14)]
    net = Host(layers, data=data, bit_weight="macs", bit_penalty=0.2, layer_weight=0.5)
    with torch.no_grad():
        for i, q in enumerate(net.quant):
            q.phi.copy_(torch.tensor([1.5, 0.3, -1.0]) - i)
    set_progress(net, Progress())
    macs = np.array([5 * 14 * 14 * 4 * 3 * 9, 5 * 6 * 6 * 8 * 4 * 9, 5 * 8 * 6 * 10 * 6], dtype=np.float64)
    assert [q.counted for q in net.quant] == macs.tolist()
    phi = np.array([[1.5, 0.3, -1.0]]) - np.arange(3)[:, None]
    opened = 1 / (1 + np.exp(module.BETA * np.log(0.1 / 1.1) - phi))
    expected = 0.2 * 0.5 * macs / macs.sum() * opened.sum(1)
    assert [q.regularization().item() for q in net.quant] == pytest.approx(expected.tolist(), rel=1e-6)
    assert net.term().item() == pytest.approx(expected.sum(), rel=1e-6)
    # and the gates learn by it
    net.term().backward()
    slope = 0.2 * 0.5 * (macs / macs.sum())[:, None] * opened * (1 - opened)
    assert torch.stack([q.phi.grad for q in net.quant]).numpy() == pytest.approx(slope, rel=1e-5)
    # training has begun: what other methods show from now on changes nothing
    net(data[0], show=True)
    assert [q.counted for q in net.quant] == macs.tolist()


def test_a_layer_that_is_called_twice_counts_twice_and_a_look_up_nothing():
    net = Host([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)], bit_weight="macs")
    for q, times in zip(net.quant, (2, 1, 0), strict=True):
        for _ in range(times):
            q.observe_input(torch.randn(5, 4))
    net.quant[2].observe_input(torch.randint(9, (5, 7)))
    set_progress(net, Progress())
    assert [q.share for q in net.quant] == pytest.approx([2 / 3, 1 / 3, 0])


def test_counts_are_in_the_state():
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)]
    net = Host(layers, data=[torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)], bit_weight="macs")
    set_progress(net, Progress())
    fresh = Host(layers, bit_weight="macs")  # a host that resumes may have no data
    fresh.load_state_dict(net.state_dict())
    set_progress(fresh, Progress(step=3))
    assert [q.share for q in fresh.quant] == [q.share for q in net.quant] == pytest.approx([108 / 116, 8 / 116])
    assert fresh.term().item() == net.term().item()
    clone = copy.deepcopy(net)
    set_progress(clone, Progress(step=3))
    assert clone.term().item() == net.term().item()
    # other settings keep the layout that they had
    assert "macs" not in weight(4, mask="hierarchical", bit_weight="params").state_dict()


def test_unknown_multiply_accumulates_are_refused():
    net = Host([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], bit_weight="macs")
    net.quant[0].observe_input(torch.randn(2, 4))
    for odd in (torch.randn(2, 3), torch.randn(())):  # no input of this layer
        net.quant[1].observe_input(odd)
    with pytest.raises(ConfigError, match=r"layer1: bit_weight 'macs' needs the layer's multiply-acc.*calibrate with"):
        set_progress(net, Progress())
    with pytest.raises(ConfigError, match=r"layer0: bit_weight 'macs' counts.*announce progress before the first loss"):
        net.term()
    fixed = Host([torch.nn.Linear(4, 4)], bit_weight="macs", mask="endpoints")  # nothing is learned, nothing needed
    set_progress(fixed, Progress())
    assert fixed.term() is None


@pytest.mark.parametrize("bit_weight", ["one", "macs"])
def test_two_layers_learn_widths_and_are_fine_tuned(bit_weight):
    """From penalty to decision to fine-tuning: the layer of four values gives a bit away, the one of many keeps all."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(12, 16), torch.nn.Linear(16, 4)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.randint(-2, 2, (16, 12)) * 0.25)
        layers[1].weight.normal_()
        x = torch.randn(256, 12)
        target = layers[1](layers[0](x).relu())
    penalty = {"one": 0.1, "macs": 0.2}[bit_weight]
    net = Host(layers, data=[x], bit_weight=bit_weight, bit_penalty=penalty, learn_epochs=8).train()
    with torch.no_grad():  # its four values are the inner four points of sixteen
        net.quant[0].log_alpha.fill_(math.log(0.25))
        net.quant[0].log_sigma.fill_(math.log(0.25 / 3))
    optimizer = torch.optim.Adam(param_groups(net, 0.003), lr=0.003)

    def epoch(number):
        for step in range(30):
            set_progress(net, Progress(step=30 * number + step, epoch=number))
            loss = torch.nn.functional.mse_loss(net(x), target)
            loss = loss if (term := net.term()) is None else loss + term
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def error():
        with torch.no_grad():
            out = net.eval()(x)
        net.train()
        return torch.nn.functional.mse_loss(out, target).item() / target.var().item()

    for number in range(8):
        epoch(number)
        assert [q.bits for q in net.quant] == [4, 4]  # decided at once, and not before
    set_progress(net, Progress(step=240, epoch=8))
    widths = [q.bits for q in net.quant]
    decided, before = error(), [layer.weight.detach().clone() for layer in layers]
    for number in range(8, 14):
        epoch(number)
        assert net.term() is None and [q.bits for q in net.quant] == widths
    assert widths == [3, 4]
    assert all(not torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))
    assert max(decided, error()) < 0.15
    for bits, q, layer in zip(widths, net.quant, layers, strict=True):
        codes, form = q.freeze_codes(layer.weight.detach())
        assert form.bits == bits and -(2 ** (bits - 1)) <= codes.min() and codes.max() < 2 ** (bits - 1)
        assert torch.equal(form.decode(codes), q.eval()(layer.weight))


def test_learned_widths_need_gates_that_learn():
    with pytest.raises(
        ConfigError, match="conv1: mask 'hierarchical' learns bit widths, which gates 'bernoulli' cannot"
    ):
        DropBits.make(
            TensorSpec("weight", 4, name="conv1", shape=(2, 2)), {"mask": "hierarchical", "gates": "bernoulli"}
        )


# -- initialisation and optimizer --------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4])
def test_initial_steps(bits):
    w = torch.randn(16, 9)
    for quantizer, x in (
        (DropBits.make(TensorSpec("weight", bits, shape=(16, 9)), {"init": "rq"}), w),
        (DropBits.make(TensorSpec("activation", bits), {"init": "rq"}), w),
    ):
        quantizer.calibrate(x)
        t = (w.max() - w.min()).item()
        assert quantizer.alpha.item() == pytest.approx(t / 2**bits + 3 * t / 2 ** (2 * bits), rel=1e-6)
        assert quantizer.sigma.item() == pytest.approx(quantizer.alpha.item() / 3, rel=1e-6)
    act = DropBits.make(TensorSpec("activation", bits), {"init": "rq"})
    for batch in (w.relu(), w.relu() * 2, w.relu()):  # the largest over all batches
        act.calibrate(batch)
    t = w.max().item() * 2
    assert act.alpha.item() == pytest.approx(t / 2**bits + 3 * t / 2 ** (2 * bits), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_error_step(bits):
    w = torch.randn(64, 64)
    best = DropBits.make(TensorSpec("weight", bits, shape=(64, 64)), {})
    best.calibrate(w)
    low, high = best.bounds

    def error(step):
        return (((w / step).round().clamp(low, high) * step - w) ** 2).mean().item()

    fine = min(error(s) for s in np.linspace(0.02, 1.2, 400) * w.abs().max().item() / high)
    assert error(best.alpha.item()) < 1.01 * fine
    assert error(best.alpha.item()) < 0.7 * error(w.abs().max().item() / high)
    act = DropBits.make(TensorSpec("activation", bits), {})
    steps = []
    for batch in (w.relu(), 3 * w.relu()):
        one = DropBits.make(TensorSpec("activation", bits), {})
        one.calibrate(batch)
        steps.append(one.alpha.item())
        act.calibrate(batch)
    assert act.alpha.item() == pytest.approx(math.sqrt(steps[0] * steps[1]), rel=1e-5)


def test_learning_rates():
    """Section 7: step and noise scale a tenth and no decay, gates ten times and no decay."""
    quantizer = weight(3, mask="endpoints")
    rest, own, gates = param_groups(quantizer, lr=0.01, weight_decay=1e-4)
    assert rest["params"] == [] and own["params"] == [quantizer.log_alpha, quantizer.log_sigma]
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(0.001), 0.0)
    assert gates == {"params": [quantizer.phi], "lr": 0.1, "weight_decay": 0.0}


def test_activations_have_an_estimator_of_their_own():
    for estimator, in_zero_cell in (("imax", 0.0), ("full", 1.0), ("ste", 1.0)):
        act = DropBits.make(TensorSpec("activation", 2), {"act_estimator": estimator, "estimator": "imax"}).double()
        act.calibrate(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        x = tensor([0.3 * act.alpha.item()])
        act(x).sum().backward()
        assert x.grad.item() == pytest.approx(in_zero_cell, abs=0.3)  # the end of the grid is near


# -- cost --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("params", [{"mask": "none"}, {"mask": "endpoints"}, {"mask": "none", "estimator": "full"}])
def test_training_keeps_the_input_only(params):
    quantizer = DropBits.make(TensorSpec("weight", 8, shape=(64, 64)), params).train()
    w = torch.randn(64, 64, requires_grad=True)
    quantizer.calibrate(w.detach())
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        quantizer(w)
    assert sorted(n for n in saved.values() if n > 256) == [w.numel()]


@pytest.mark.parametrize("params", [{"mask": "endpoints"}, {"mask": "hierarchical"}, {"estimator": "full"}])
def test_no_host_synchronisation_with_masks(params, no_host_sync):
    quantizer = DropBits.make(TensorSpec("weight", 4, name="w", shape=(8, 8)), params).train()
    w = torch.randn(8, 8)
    quantizer.calibrate(w)
    w.requires_grad_()
    with no_host_sync():
        quantizer.on_progress(Progress(step=1))
        loss = quantizer(w).sum()
        if (term := quantizer.regularization()) is not None:
            loss = loss + term
        loss.backward()
    assert w.grad.isfinite().all() and quantizer.phi.grad.isfinite().all()


def test_the_compiled_backward_is_the_same(monkeypatch):
    from fat_plugins import kernels, set_backend

    x, grad = tensor(np.linspace(-2.5, 2.5, 60)), torch.randn(60, dtype=torch.float64)
    results = []
    before = kernels._backend, kernels._compiler
    try:
        for backend, compiler in (("eager", "inductor"), ("compile", "aot_eager")):
            set_backend(backend, compiler)
            quantizer, x.grad = weight(mask="none"), None
            quantizer(x).backward(grad)
            results.append((x.grad.clone(), quantizer.log_alpha.grad, quantizer.log_sigma.grad))
    finally:
        set_backend(*before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
