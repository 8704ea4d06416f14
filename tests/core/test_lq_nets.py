"""LQ-Nets beside what the universal tester checks: sections 3, 6 and 11 of the baselines specification."""

from itertools import pairwise

import pytest
import torch
from universal import CONV, Case, sample

from fat_plugins import QuantizationError, get_algorithm
from fat_plugins.forms import Codebook, SumOfGrids, UniformGrid


def weight(bits=2, **params):
    return get_algorithm("lq_nets").make(Case("lq_nets", 0, bits, "weight").spec(), params)


def test_constants_of_the_authors():
    quantizer = weight(3, init="authors")
    quantizer.calibrate(sample(CONV.shape))
    fan_out = 8 * 3 * 3
    expected = [0.6745 * (2 / fan_out) ** 0.5 * 2**j / 4 for j in range(3)]
    assert torch.allclose(quantizer.basis, torch.tensor(expected).unsqueeze(1).expand(3, 8), rtol=1e-6)


def test_a_step_moves_the_basis_a_tenth_of_the_way_to_the_fit():
    quantizer = weight(2, init="authors").double()
    w = sample(CONV.shape).double()
    quantizer.calibrate(w)
    before = quantizer.basis.clone()
    codes, form = quantizer.freeze(w)
    planes = torch.stack([2.0 * c - 1 for c in form.split(codes)]).double().reshape(2, 8, -1)
    rows = w.reshape(8, -1)
    expected = []
    for channel in range(8):
        b = planes[:, channel].T
        left = b.T @ b + 1e-4 * torch.eye(2, dtype=torch.float64)
        expected.append(torch.linalg.solve(left, b.T @ rows[channel] + 1e-4 * before[:, channel]))
    quantizer.train()(w)
    assert torch.allclose(quantizer.basis, 0.9 * before + 0.1 * torch.stack(expected, 1), rtol=1e-9)


def test_steps_do_not_increase_the_error():
    quantizer = weight(3, init="authors").double()
    w = sample(CONV.shape).double()
    quantizer.calibrate(w)
    errors = []
    for _ in range(20):
        errors.append(float((quantizer.train()(w) - w).square().mean()))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)) and errors[-1] < 0.9 * errors[0]


def test_evaluation_leaves_the_basis_alone():
    quantizer = weight()
    w = sample(CONV.shape)
    quantizer.calibrate(w)
    before = quantizer.basis.clone()
    quantizer.eval()(w)
    assert torch.equal(quantizer.basis, before)


def test_a_value_on_a_threshold_takes_the_level_below():
    quantizer = weight(2)
    quantizer.calibrate(sample(CONV.shape))
    quantizer.basis.copy_(torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 8))  # levels -3, -1, 1, 3
    w = torch.zeros(CONV.shape)
    w[0, 0, 0] = torch.tensor([-2.0, 0.0, 2.0])
    assert quantizer.eval()(w)[0, 0, 0].tolist() == [-3.0, -1.0, 1.0]


def test_a_negative_entry_is_exported_as_a_positive_one_with_its_bits_turned():
    quantizer = weight(2)
    w = sample(CONV.shape)
    quantizer.calibrate(w)
    quantizer.basis[0].neg_()
    codes, form = quantizer.freeze(w)
    assert all(bool((p.scale > 0).all()) for p in form.parts)
    assert torch.equal(form.decode(codes), quantizer.eval()(w))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_forms(bits):
    w = sample(CONV.shape)
    free, snapped = weight(bits), weight(bits, grid=8)
    for quantizer in (free, snapped):
        quantizer.calibrate(w)
        codes, form = quantizer.freeze(w)
        assert torch.equal(form.decode(codes), quantizer.eval()(w))
    assert isinstance(free.freeze(w).form, SumOfGrids if bits > 1 else Codebook)
    form = snapped.freeze(w).form
    assert isinstance(form, UniformGrid) and form.bits == 8
    assert len(snapped.freeze(w).codes[0].unique()) <= 2**bits


def test_broken_values_do_not_enter_the_basis():
    quantizer = weight()
    w = sample(CONV.shape)
    quantizer.calibrate(w)
    before = quantizer.basis.clone()
    w[0, 0, 0, 0] = float("nan")
    out = quantizer.train()(w)
    assert torch.isnan(out).sum() == 1 and torch.isfinite(quantizer.basis).all()
    assert torch.equal(quantizer.basis[:, 0], before[:, 0]) and not torch.equal(quantizer.basis[:, 1], before[:, 1])


def test_sparsity_is_refused():
    case = Case("lq_nets", 0, 2, "weight")
    with pytest.raises(QuantizationError, match="no zero"):
        case.make(keep_zeros=True)


def test_without_gradient_there_is_no_graph():
    quantizer = weight()
    w = sample(CONV.shape).requires_grad_()
    quantizer.calibrate(w)
    with torch.no_grad():
        assert not quantizer.train()(w).requires_grad
    assert quantizer(w).requires_grad
