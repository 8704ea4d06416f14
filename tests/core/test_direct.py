"""Direct Quantization against its specification (direct.md): section 11's vectors and tests, section 10's pitfalls."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from references import direct_activation, direct_levels, direct_weight
from torch import nn

from fat_plugins import ConfigError, QuantizationError, TensorSpec, get_algorithm, param_groups
from fat_plugins.algorithms import _direct_fit as fit
from fat_plugins.forms import Codebook, Staircase, SumOfGrids, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight

DIRECT = get_algorithm("direct")
DOUBLE = torch.float64


def wave(shape, a=1.7, b=0.5):
    """The specification's deterministic fill, float64: ``sin(.37 a i^2 + 1.3 a i + b)``, i = flat index."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    return torch.from_numpy(np.sin(0.37 * a * i**2 + 1.3 * a * i + b).reshape(shape))


def example_weight():
    return 0.3 * wave((2, 12), a=1.1, b=0.2)


def example_activation():
    """Five channels (rows), the last one with about 200 times the energy of the others."""
    factors = torch.tensor([0.5, 0.6, 0.55, 0.45, 6.0], dtype=DOUBLE).unsqueeze(1)
    offsets = torch.tensor([0.1, 0.0, 0.2, 0.1, 2.0], dtype=DOUBLE).unsqueeze(1)
    return torch.relu(wave((5, 200), a=2.3) * factors + offsets)


def weight(w, bits=2, per_channel=None, **params):
    """A calibrated float64 weight quantizer."""
    spec = TensorSpec("weight", bits, name="w", shape=tuple(w.shape), per_channel=per_channel)
    quantizer = DIRECT.make(spec, params).double()
    quantizer.calibrate(w)
    return quantizer


def activation(x=None, bits=2, axis=0, signed=None, **params):
    """A float64 activation quantizer, calibrated when ``x`` is given."""
    quantizer = DIRECT.make(TensorSpec("activation", bits, name="a", channel_axis=axis, signed=signed), params).double()
    if x is not None:
        quantizer.calibrate(x)
    return quantizer


def relative_errors(quantizer, x):
    """Squared error of every channel relative to its energy."""
    return ((quantizer.eval()(x) - x).square().sum(1) / x.square().sum(1)).numpy()


# -- section 11 ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_1_qem_never_gets_worse(bits, tied):
    rows = wave((6, 90), a=0.9)
    errors = []
    for rounds in range(1, 21):
        basis, planes = fit.qem(rows, bits, tied, rounds)
        worth = basis * 2.0 ** torch.arange(bits) if tied else basis
        errors.append((torch.einsum("ck,kcn->cn", worth, planes) - rows).square().mean(1).numpy())
        assert (basis > 0).all() and (basis.diff(dim=1) >= 0).all()
    for before, after in pairwise(errors):
        # the damping of 1e-4 against sums over 90 weights may cost a little near the optimum
        assert (after <= before * (1 + 1e-5)).all()
    assert (errors[-1] < errors[0]).any() or bits == 1


def test_1_one_bit_is_the_mean_magnitude_and_the_sign():
    w = wave((4, 30))
    quantizer = weight(w, bits=1)
    assert torch.allclose(quantizer.basis.detach(), w.abs().mean(1)[None], rtol=1e-12)
    assert torch.equal(quantizer(w).detach(), torch.where(w > 0, 1.0, -1.0) * quantizer.basis.detach().T)


@pytest.mark.parametrize("per_channel", [None, False])
@pytest.mark.parametrize("levels", ["basis", "tied"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_2_initial_bits_are_the_least_squares_codes(bits, levels, per_channel):
    w = wave((3, 4, 5))
    quantizer = weight(w, bits, per_channel, levels=levels)
    rows = w.reshape(1 if per_channel is False else 3, -1)
    basis, planes = fit.qem(rows, bits, quantizer.tied)
    assert torch.equal(torch.where(quantizer.z >= 0, 1.0, -1.0).double(), planes.reshape(quantizer.z.shape))
    assert torch.equal(quantizer.basis.detach(), basis.T)
    assert 0.02 <= quantizer.z.abs().min() and quantizer.z.abs().max() <= 1
    out = quantizer(w).detach()
    for row in out if per_channel is None else [out]:
        assert row.unique().numel() <= 2**bits


def test_2_example_levels():
    quantizer = weight(example_weight())
    levels = quantizer(example_weight())[0].detach().unique()
    assert levels.diff().tolist() == pytest.approx([0.244, 0.069, 0.244], abs=5e-4)


def test_2_margins_are_distances_to_the_threshold_at_which_the_bit_changes():
    """Section 6.1 c, by search."""
    w = example_weight()
    for bits in (1, 2, 3):
        z, basis = fit.initial_weight(w, bits, False)
        table = fit.bit_table(bits, True).double()
        for o in range(2):
            levels = table @ basis[:, o]
            order = levels.argsort(stable=True)
            levels, rows = levels[order], table[order]
            half_gap = float(levels[-1] - levels[0]) / (2 * (2**bits - 1))
            for i in range(12):
                for k in range(bits):
                    crossings = [m for m in range(2**bits - 1) if rows[m, k] != rows[m + 1, k]]
                    margin = min(abs(float(w[o, i] - (levels[m] + levels[m + 1]) / 2)) for m in crossings)
                    expected = min(max(margin / half_gap, 0.02), 1)
                    assert abs(float(z[k, o, i])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("z_grad", ["plain", "normalized"])
@pytest.mark.parametrize("levels", ["basis", "tied"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("per_channel", [None, False])
def test_3_gradients(bits, levels, z_grad, per_channel):
    w, grad = wave((3, 8)), wave((3, 8), a=0.4)
    quantizer = weight(w, bits, per_channel, levels=levels, z_grad=z_grad).eval()
    with torch.no_grad():
        quantizer.z[:, 0, 0] = 1.0  # on the border of the window: the gradient passes
        quantizer.z[:, 0, 1] = 1.0001  # beyond it: none
        quantizer.z[:, 0, 2] = 0.0  # sgn(0) = +1
    quantizer(w).backward(grad)
    z, basis = quantizer.z.detach().numpy(), quantizer.basis.detach().numpy()
    out, dz, dbasis = direct_weight(z, basis, grad.numpy(), z_grad == "normalized")
    assert np.allclose(quantizer(w).detach().numpy(), out, rtol=1e-12)
    assert np.allclose(quantizer.z.grad.numpy(), dz, rtol=1e-10)
    assert np.allclose(quantizer.basis.grad.numpy(), dbasis, rtol=1e-10)
    assert (dz[:, 0, 0] != 0).all() and (dz[:, 0, 1] == 0).all()
    assert (quantizer(w)[0, 2] == quantizer.basis[:, 0].sum() * (2**bits - 1 if levels == "tied" else 1)).all()


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (6, 1, 3, 3), (4, 3, 5)])
def test_4_nothing_of_the_weights_shape_remains_and_levels_move_without_flips(shape):
    w = wave(shape).float()
    quantizer = DIRECT.make(TensorSpec("weight", 2, shape=shape))
    quantizer.calibrate(w)
    assert all(t.shape != w.shape for t in quantizer.state_dict().values())
    before, bits = quantizer(w).detach(), quantizer.z.detach() >= 0
    optimizer = torch.optim.SGD([{"params": [quantizer.basis], "lr": 1e-2}, {"params": [quantizer.z], "lr": 1e-9}])
    (quantizer(w) * torch.linspace(0.5, 1, w.numel()).reshape(shape)).sum().backward()
    optimizer.step()
    assert torch.equal(quantizer.z.detach() >= 0, bits)
    assert not torch.equal(quantizer(w).detach(), before)


def test_5_projection():
    w = example_weight()
    quantizer = weight(w).train()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=50.0)
    quantizer(w).square().sum().backward()
    optimizer.step()
    assert quantizer.z.abs().max() > 1 and quantizer.basis.min() < 0  # the step went too far
    quantizer(w)
    assert quantizer.z.abs().max() <= 1 and quantizer.basis.min() == fit.LEVEL_FLOOR


def test_6_the_activation_example():
    x = example_activation()
    plain, norm, l21 = (activation(x, channel_weight=kind) for kind in ("none", "norm", "l21"))
    assert plain.basis.tolist() == pytest.approx([2.62, 5.00], abs=6e-3)
    assert relative_errors(plain, x) == pytest.approx([1, 1, 1, 1, 0.014], abs=6e-4)
    assert norm.basis.tolist() == pytest.approx([0.49, 6.19], abs=6e-3)
    assert relative_errors(norm, x) == pytest.approx([0.076, 0.076, 0.104, 0.101, 0.072], abs=6e-4)
    assert l21.basis.tolist() == pytest.approx([0.53, 6.16], abs=6e-3)
    errors = relative_errors(l21, x)
    assert 0.065 < errors.min() and errors.max() < 0.135
    # the intended trade: the sum of all errors grows
    totals = [float((q.eval()(x) - x).square().mean()) for q in (plain, norm)]
    assert totals == pytest.approx([0.132, 0.270], abs=6e-4)


def test_6_tied_example():
    """Section 5.3: the ordinary channels win, the strong one is clipped; a lower cap gives it some range back."""
    x = example_activation()
    errors = relative_errors(activation(x, levels="tied"), x)
    assert 0.075 < errors[:4].min() and errors[:4].max() < 0.125 and errors[4] == pytest.approx(0.58, abs=5e-3)
    capped = activation(x, levels="tied", channel_cap=1.0)
    assert capped.form().scale > 1.001 * activation(x, levels="tied").form().scale


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_7_equal_channel_weights_are_plain_qem(bits, signed):
    x = wave((4, 300)) if signed else wave((4, 300)).relu()
    quantizer = activation(x, bits, channel_weight="none", signed=signed)
    basis = torch.tensor([0.6745 * 2 * 2**i / (2**bits - 1) for i in range(bits)], dtype=DOUBLE)
    basis = basis * x.float().double().square().mean().sqrt()
    table = fit.bit_table(bits, signed).double()
    flat = x.float().double().reshape(-1)
    for _ in range(60):  # LQ-Nets' alternation, written out, over all elements alike
        levels = table @ basis
        nearest = (flat[:, None] - levels.sort().values).abs().argmin(1)
        b = table[levels.argsort()][nearest]
        a = b.T @ b / flat.numel()
        r = 1e-6 * a.diagonal().mean()
        new = torch.linalg.solve(a + r * torch.eye(bits), b.T @ flat / flat.numel() + r * basis)
        basis = new.clamp_min(1e-6).sort().values
    assert torch.allclose(quantizer.basis, basis, rtol=2e-5)


@pytest.mark.parametrize("levels", ["basis", "tied"])
def test_8_activation_gradient(levels):
    quantizer = activation(signed=False, levels=levels)
    quantizer.calibrate_range(0.0, 3.2)
    x = torch.tensor([-0.5, 0.1, 0.7, 3.0, 99.0], dtype=DOUBLE, requires_grad=True)
    quantizer.eval()(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 0]
    signed = activation(signed=True, levels=levels)
    signed.calibrate_range(-3.2, 3.2)
    x = torch.tensor([-99.0, -3.1, 0.1, 3.1, 99.0], dtype=DOUBLE, requires_grad=True)
    signed.eval()(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_9_evaluation_does_not_move_the_levels():
    x = example_activation()
    quantizer = activation(x)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.eval()(3 * x)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    quantizer.train()(3 * x)
    assert not torch.equal(quantizer.basis, before["basis"]) and not torch.equal(quantizer.energy, before["energy"])


def test_10_a_basis_is_a_sum_of_binary_grids_and_no_single_uniform_grid():
    w = example_weight()
    quantizer = weight(w).eval()
    codes, form = quantizer.freeze(w)
    assert isinstance(form, SumOfGrids) and [p.levels.tolist() for p in form.parts] == [[-1, 1], [-1, 1]]
    wq = quantizer(w).detach()
    assert torch.equal(form.decode(codes), wq)
    v = quantizer.basis.detach()
    planes = torch.where(quantizer.z >= 0, 1.0, -1.0).double()
    assert torch.equal(sum(v[k, :, None] * planes[k] for k in range(2)), wq)
    # K binary convolutions whose outputs add up
    x = wave((3, 12), a=0.7)
    parts = sum(x @ part.decode(c).T for part, c in zip(form.parts, form.split(codes), strict=True))
    assert torch.allclose(parts, x @ wq.T, atol=1e-12)
    # a single FakeQuantize of four levels over the same range errs by 0.058 in channel 0
    top = float(wq[0].max())
    step = 2 * top / 3
    single = torch.round((wq[0] + top) / step) * step - top
    assert float((single - wq[0]).abs().max()) == pytest.approx(0.058, abs=5e-4)
    # and so does any other: the gaps differ
    gaps = wq[0].unique().diff()
    assert gaps.max() > 3 * gaps.min()


def test_10_tied_weights_are_odd_integers():
    w = example_weight().float()
    for bits in (1, 2, 3, 4):
        quantizer = weight(w, bits, levels="tied").float().eval()
        codes, form = quantizer.freeze(w)
        assert isinstance(form, Codebook) and form.levels.tolist() == list(range(1 - 2**bits, 2**bits, 2))
        assert form.scale.shape == (2,) and torch.equal(form.decode(codes), quantizer(w))
        # one FakeQuantize of 2^K levels, exact but for its division
        top = (form.scale * (2**bits - 1)).unsqueeze(1)
        x = quantizer(w).detach()
        fake = torch.round((x + top) / (2 * top) * (2**bits - 1)) / (2**bits - 1) * 2 * top - top
        assert ((fake - x).abs() <= 4e-7 * top).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_10_activations_are_sums_of_steps(bits, signed):
    x = wave((5, 400)) if signed else example_activation()
    quantizer = activation(x, bits, signed=signed).eval()
    form = quantizer.form()
    levels = form.decode(torch.arange(2**bits)).double() if not isinstance(form, UniformGrid) else None
    if levels is None:  # one bit is evenly spaced
        assert bits == 1 and not signed
        levels = torch.tensor([0.0, 1.0]).double() * form.scale
    out = torch.full_like(x, float(levels[0]))
    for low, high in pairwise(levels):
        out = out + (high - low) * (x > (low + high) / 2)
    assert torch.allclose(out, quantizer(x), atol=1e-12)
    # carried by integers of 16 bits: within 2^-16 of the top of what the basis says
    exact = direct_levels(quantizer.basis.numpy(), bits, signed, True if bits == 1 else False)
    plain = np.sort((fit.basis_codes(bits, signed, bits == 1).double() @ quantizer.basis).numpy())
    assert np.abs(exact - plain).max() <= plain[-1] * (2.0**-16 if not signed else 2.0**-15)


def test_10_tied_activations():
    x = example_activation().float()
    quantizer = activation(x, 3, levels="tied").float().eval()
    form = quantizer.form()
    assert isinstance(form, UniformGrid) and (form.low, form.high) == (0, 7)
    assert torch.equal(form.decode(form.encode(x)), quantizer(x))
    signed = activation(x - 1, 3, levels="tied").float().eval()
    form = signed.form()
    assert isinstance(form, Staircase) and form.levels.tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert torch.equal(form.decode(form.encode(x - 1)), signed(x - 1))


def test_10_a_batch_norm_keeps_the_form():
    """Section 8: gamma / sigma goes into the scales; where it is negative the codes flip."""
    w = example_weight()
    quantizer = weight(w).eval()
    codes, form = quantizer.freeze(w)
    factor = torch.tensor([-1.7, 0.4], dtype=DOUBLE)
    parts = [Codebook(1, p.levels, p.scale * factor.abs(), 0) for p in form.parts]
    flipped = torch.where(factor.unsqueeze(1) < 0, 3 - codes, codes)
    assert torch.allclose(SumOfGrids(tuple(parts)).decode(flipped), quantizer(w).detach() * factor.unsqueeze(1))


# -- the 8-bit grid under a basis ------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_channel", [None, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid_rounds_levels_by_at_most_half_a_step(bits, per_channel):
    w = wave((4, 3, 3, 3)).float()
    plain, snapped = (weight(w, bits, per_channel, grid=g).float().eval() for g in (None, 8))
    codes, form = snapped.freeze(w)
    assert isinstance(form, UniformGrid) and (form.bits, form.low, form.high) == (8, -127, 127)
    assert torch.equal(form.decode(codes), snapped(w))
    step = form.scale.reshape(-1, 1, 1, 1)
    assert ((snapped(w) - plain(w)).abs() <= step * 0.5001).all() and not torch.equal(snapped(w), plain(w))
    assert all(row.unique().numel() <= 2**bits for row in snapped(w))
    # the gradients are those of the plain basis
    for quantizer in (plain, snapped):
        quantizer(w).backward(w)
    assert torch.equal(plain.z.grad, snapped.z.grad) and torch.equal(plain.basis.grad, snapped.basis.grad)
    assert torch.equal(snapped.grid_scale(w), form.scale)


@pytest.mark.parametrize("signed", [False, True])
def test_grid_of_activations_fits_eight_bits(signed):
    x = wave((5, 400)) if signed else example_activation()
    quantizer = activation(x, 3, grid=8).float().eval()
    levels = quantizer.form().levels
    assert (int(levels[0]), int(levels[-1])) == ((-127, 127) if signed else (0, 255))
    x = x.float()
    assert torch.equal(quantizer.form().decode(quantizer.form().encode(x)), quantizer(x))


def test_grid_and_tied_exclude_each_other():
    with pytest.raises(ConfigError, match=r"w: params\.grid: levels 'tied' are on a grid of their own"):
        weight(example_weight(), levels="tied", grid=8)


# -- one bit: not among the widths of the universal tests --------------------------------------------------------------
@pytest.mark.parametrize("signed", [False, True])
def test_one_bit(signed):
    w = wave((3, 2, 3, 3)).float()
    quantizer = weight(w, 1).float().eval()
    codes, form = quantizer.freeze(w)
    assert isinstance(form, Codebook) and (form.bits, form.levels.tolist()) == (1, [-1, 1])
    assert torch.equal(form.decode(codes), quantizer(w))
    assert torch.equal(FrozenWeight(codes, form)(w), quantizer(w))
    x = wave((3, 50)).float() if signed else wave((3, 50)).relu().float()
    act = activation(x, 1).float().eval()
    out, dx = direct_activation(
        x.double().numpy(), direct_levels(act.basis.double().numpy(), 1, signed, True), signed, np.ones(x.shape)
    )
    assert np.allclose(act(x).numpy(), out, rtol=1e-6)
    leaf = x.clone().requires_grad_()
    act(leaf).sum().backward()
    assert np.array_equal(leaf.grad.numpy(), dx)
    assert torch.equal(act.form().decode(act.form().encode(x)), act(x))
    assert torch.equal(FrozenActivation(act.form(), "a")(x), act(x))


# -- section 10 --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_weights_per_channel_need_the_damping(bits):
    """Fewer weights than bits: the normal equations are singular."""
    for shape in ((6, 1, 1, 1), (6, 1, 3, 3), (4, 2)):
        w = wave(shape)
        quantizer = weight(w, bits)
        assert quantizer.basis.isfinite().all() and quantizer.z.isfinite().all()
        assert (quantizer(w).detach() - w).square().mean() < 0.3 * w.square().mean()
        assert weight(w, bits, per_channel=False).basis.shape == (bits, 1)


def test_zero_and_constant_filters():
    w = torch.stack([torch.zeros(9), torch.full((9,), 0.3), torch.full((9,), -2.0)]).double()
    for bits in (1, 2, 3, 4):
        quantizer = weight(w, bits, z_grad="normalized")
        assert quantizer.basis.min() >= fit.LEVEL_FLOOR
        assert torch.allclose(quantizer(w), w, rtol=0.02, atol=2e-5)
        quantizer(w).sum().backward()
        assert quantizer.z.grad.isfinite().all() and quantizer.basis.grad.isfinite().all()


def test_equal_entries_of_the_basis_are_ternary():
    w = example_weight()
    quantizer = weight(w).float().eval()
    with torch.no_grad():
        quantizer.basis[:, 0] = 0.25
    values = quantizer(w.float())
    assert set(values[0].unique().tolist()) <= {-0.5, 0.0, 0.5}
    codes, form = quantizer.freeze(w.float())
    assert torch.equal(form.decode(codes), values)
    act = activation(signed=True).float().eval()
    act.calibrate_range(-1, 1)
    act.basis.fill_(0.25)
    x = torch.linspace(-1, 1, 101)
    assert act.form().levels.numel() == 3  # the level 0 stands once
    assert torch.equal(act.form().decode(act.form().encode(x)), act(x))
    assert set(act(x).unique().tolist()) == {-0.5, 0.0, 0.5}


def test_a_level_below_zero_is_clamped_and_keeps_its_bits():
    w = example_weight()
    quantizer = weight(w).eval()
    bits = quantizer.z.detach() >= 0
    with torch.no_grad():
        quantizer.basis[0, 0] = -0.3
    value = quantizer(w)[0].detach()
    assert torch.allclose(value.abs(), quantizer.basis[1, 0].detach().expand(12), atol=2e-6)  # not |-0.3|
    assert torch.equal(quantizer.z.detach() >= 0, bits)
    quantizer(w).backward(torch.ones_like(w))
    assert quantizer.basis.grad[0, 0] == torch.where(bits[0, 0], 1.0, -1.0).sum()  # it can come back


def test_auxiliary_variables_do_not_decay():
    for optimizer in ("adam", "sgd"):
        quantizer = weight(example_weight(), optimizer=optimizer)
        groups = {id(p): g for g in param_groups(quantizer, 0.1, 1e-2) for p in g["params"]}
        assert groups[id(quantizer.z)]["weight_decay"] == 0
        assert groups[id(quantizer.basis)]["weight_decay"] == 1e-4
        assert all(g["weight_decay"] == 0 for g in param_groups(quantizer, 0.1, 0.0))


def test_learning_rates():
    """Section 7, in proportion to the base (Adam: 1e-3)."""
    w = example_weight()
    for bits, z_rate in ((1, 1e-2), (2, 1e-3), (4, 1e-3)):
        z, basis = weight(w, bits).param_groups(1e-3, 0.0)
        assert (z["lr"], basis["lr"]) == (pytest.approx(z_rate), 1e-3)
    for levels in ("basis", "tied"):
        quantizer = weight(w, 3, levels=levels, optimizer="sgd")
        z, basis = quantizer.param_groups(0.1, 0.0)
        v = quantizer.basis.detach()
        v = v * torch.tensor([[1.0], [2.0], [4.0]]) if levels == "tied" else v
        assert z["lr"] == pytest.approx(0.1 / float(v.square().mean())) and basis["lr"] == pytest.approx(0.01)
    normalized = weight(w, 3, optimizer="sgd", z_grad="normalized").param_groups(0.1, 0.0)
    assert normalized[0]["lr"] == 0.1


def test_normalized_gradients_flip_a_bit_when_sgd_on_float_weights_would_cross():
    """z counts half gaps: the float weight crosses the threshold after as many steps as z changes its sign."""
    w = torch.tensor([[0.31, -0.7, 0.75, -0.28]], dtype=DOUBLE)
    quantizer = weight(w, 1, z_grad="normalized", optimizer="sgd").train()
    optimizer = torch.optim.SGD([{"params": [quantizer.z]}, {"params": [quantizer.basis], "lr": 0.0}], lr=0.02)
    margin = float(w[0, 0])
    steps = 0
    while quantizer.z[0, 0, 0] >= 0:
        optimizer.zero_grad()
        quantizer(w)[0, 0].backward()  # a gradient of 1
        optimizer.step()
        steps += 1
    assert steps == int(np.ceil(margin / 0.02))


def test_averages_of_the_auxiliary_variables_stay_on_the_level_set():
    w = wave((3, 20))
    quantizer = weight(w)
    average = copy.deepcopy(quantizer)
    with torch.no_grad():
        quantizer.z.mul_(-0.4)
        for ours, theirs in zip(average.parameters(), quantizer.parameters(), strict=True):
            ours.lerp_(theirs, 0.3)
    assert all(row.unique().numel() <= 4 for row in average.eval()(w))


def test_deployed_state_is_bits_and_levels():
    w = wave((3, 20)).float()
    quantizer = weight(w).float().eval()
    frozen = FrozenWeight(*quantizer.freeze(w))
    assert set(frozen.state_dict()) == {"codes", "scale", "levels"} and not list(frozen.parameters())
    assert torch.equal(frozen(w), quantizer(w)) and int(frozen.codes.max()) <= 3


def test_a_plain_weight_converts_once_and_state_survives():
    w = wave((3, 20)).float()
    quantizer = DIRECT.make(TensorSpec("weight", 2, shape=(3, 20)))
    assert quantizer.z.numel() == 2 * w.numel() and not quantizer.calibrated
    quantizer.calibrate(w)
    fresh = DIRECT.make(TensorSpec("weight", 2, shape=(3, 20)))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(w), quantizer(w))
    fresh.calibrate(-w)  # the float weight is gone: nothing to start anew from
    assert torch.equal(fresh(w), quantizer(w))


def test_broken_parameters_are_refused_when_deployed():
    w = example_weight()
    for name in ("z", "basis"):
        quantizer = weight(w)
        with torch.no_grad():
            getattr(quantizer, name)[0, 0] = float("nan")
        with pytest.raises(QuantizationError, match=r"w: .* holds NaN or infinite values"):
            quantizer.freeze(w)


def test_shared_weights_run_two_forwards_before_one_backward():
    w = example_weight()
    quantizer = weight(w).train()
    with torch.no_grad():
        quantizer.z.mul_(3)
    (quantizer(w).sum() + quantizer(w).square().sum()).backward()
    assert quantizer.z.grad.isfinite().all()


def test_features_are_the_channels_of_a_linear_layer():
    """Two dimensions, axis 1; and one sample, one pixel."""
    x = example_activation().T.contiguous()
    rows = activation(example_activation())
    columns = activation(x, axis=1)
    assert torch.allclose(rows.basis, columns.basis) and columns.energy.shape == (5,)
    columns.train()(x[:1])
    assert columns.energy.shape == (5,) and columns.basis.isfinite().all()


def test_moving_averages_make_channel_weights_usable_on_tiny_batches():
    x = example_activation().T.contiguous()
    quantizer = activation(x, axis=1).train()
    energy, basis = quantizer.energy.clone(), quantizer.basis.clone()
    quantizer(x[3:4])
    assert torch.allclose(quantizer.energy, 0.9 * energy + 0.1 * x[3].square())
    step = quantizer._fitted(x[3:4].T, basis, quantizer.energy)
    assert torch.allclose(quantizer.basis, 0.9 * basis + 0.1 * step)


def test_dead_channels_add_nothing():
    x = example_activation()
    x[2] = 0
    with_dead, without = activation(x), activation(x[[0, 1, 3, 4]])
    assert with_dead.basis.isfinite().all()
    assert relative_errors(with_dead, x)[[0, 1, 3]].max() < 0.15
    assert torch.allclose(with_dead.basis, without.basis, rtol=0.1)


@pytest.mark.parametrize("cap", [1.0, 3.0, 10.0])
def test_channel_weights(cap):
    """Section 5.2: the cap is relative to the median, the mean is 1."""
    energy = torch.tensor([1e-9, 0.9, 1.0, 1.1, 200.0], dtype=DOUBLE)
    raw = 1 / (energy + 1e-3 * energy.mean())
    capped = (raw / raw.median()).clamp(max=cap)
    omega = fit.channel_weights("norm", cap, energy, energy)
    assert torch.allclose(omega, capped / capped.mean()) and float(omega.mean()) == pytest.approx(1)
    error = energy / 7
    l21 = fit.channel_weights("l21", cap, energy, error)
    expected = 1 / (error.sqrt() + 1e-3 * error.mean().sqrt())
    assert torch.allclose(l21, expected / expected.mean())


def test_signs_come_from_calibration():
    """Section 10: an unsigned quantizer on a signed tensor would act as a ReLU."""
    x = wave((5, 100))
    quantizer = activation(x)
    assert quantizer.signed and quantizer.eval()(x).min() < 0
    later = activation(x.relu())
    assert not later.signed
    later.calibrate(x)
    assert later.signed and torch.allclose(later.basis, quantizer.basis)


def test_calibration_averages_batches():
    x = example_activation()
    parts = [x[:, :100], x[:, 100:]]
    both = activation()
    for part in parts:
        both.calibrate(part)
    first = activation(parts[0])
    assert not torch.allclose(both.basis, first.basis, rtol=1e-6)
    assert relative_errors(both, x).max() < 0.15


def test_statistics_are_float32_under_autocast():
    x = example_activation().float()
    plain, cast = (activation(x).float().train() for _ in range(2))
    plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast(x)
    assert torch.equal(plain.basis, cast.basis) and cast.basis.dtype == torch.float32
    w = example_weight().float()
    with torch.autocast("cpu", torch.bfloat16):
        under = weight(w)
    assert torch.equal(under.basis, weight(w).basis)


def test_broken_batches_do_not_spoil_the_levels():
    x = example_activation()
    for value in (float("nan"), float("inf")):
        quantizer = activation(x).train()
        bad = x.clone()
        bad[1, 3] = value
        quantizer(bad)
        assert quantizer.basis.isfinite().all() and quantizer.energy.isfinite().all()
        assert relative_errors(quantizer, x).max() < 0.2


def test_processes_average_their_tallies(monkeypatch):
    """DDP: every rank takes the step of the whole batch (here two processes that see the same)."""
    x = example_activation()
    tally = fit.channel_tally(x, torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE))
    other = fit.channel_tally(2 * x, torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE))
    whole = fit.channel_tally(torch.cat([x, 2 * x], 1), torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE))
    packed = torch.cat([other.share, other.moment, other.mean_square.unsqueeze(1)], 1)
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda t: t.add_(packed))
    for ours, expected in zip(tally.over_processes(), whole, strict=True):
        assert torch.allclose(ours, expected)


def test_elimination_solves():
    matrix = wave((7, 4, 4))
    matrix = matrix @ matrix.transpose(1, 2) + torch.eye(4)
    right = wave((7, 4), a=0.3)
    assert torch.allclose(fit.solve(matrix, right), torch.linalg.solve(matrix, right))


# -- it trains --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("params", [{}, {"levels": "tied"}, {"grid": 8}], ids=str)
@pytest.mark.parametrize("bits", [1, 2])
def test_training_flips_bits_and_lowers_the_loss(bits, params):
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x[:, :6].sum(1) > x[:, 6:].relu().sum(1)).long()
    layers = nn.ModuleList([nn.Linear(12, 32), nn.Linear(32, 2)])
    weights, acts = nn.ModuleList(), nn.ModuleList()
    for layer in layers:
        quantizer = DIRECT.make(TensorSpec("weight", bits, shape=tuple(layer.weight.shape)), params)
        quantizer.calibrate(layer.weight)
        quantizer.fold_into(layer.weight)
        weights.append(quantizer)
        acts.append(DIRECT.make(TensorSpec("activation", 2, channel_axis=1), params))

    def forward(calibrate=False):
        h = x
        for layer, quantizer, act in zip(layers, weights, acts, strict=True):
            if calibrate:
                act.calibrate(h)
            h = nn.functional.linear(act(h), quantizer(layer.weight), layer.bias)
            h = h.relu() if layer is layers[0] else h
        return h

    with torch.no_grad():
        forward(calibrate=True)
    net = nn.ModuleList([layers, weights, acts]).train()
    groups = param_groups(net, 1e-2, 1e-4)
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    bits_before = [q.z.detach() >= 0 for q in weights]
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(forward(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert any(not torch.equal(q.z.detach() >= 0, b) for q, b in zip(weights, bits_before, strict=True))
    assert not any(p is layer.weight for layer in layers for g in groups for p in g["params"])
