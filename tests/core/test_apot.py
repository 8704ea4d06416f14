"""APoT beside what the universal tester checks: sections 3, 8.1 and 11 of the baselines specification."""

import pytest
import torch
from universal import Case

from fat_plugins import ConfigError, get_algorithm
from fat_plugins.algorithms.apot import levels_of, magnitudes, normalized
from fat_plugins.forms import Codebook, Staircase


@pytest.mark.parametrize(("bits", "largest"), [(1, 1), (2, 4), (3, 10), (4, 48), (5, 100)])
def test_magnitudes_are_integers_up_to_those_of_the_specification(bits, largest):
    found = magnitudes(bits)
    assert len(found) == 2**bits and found[0] == 0 and found[-1] == largest


def test_three_bits_of_magnitude():
    assert magnitudes(3) == [0, 1, 2, 3, 4, 6, 8, 10]
    assert levels_of(4, True).tolist() == [-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10]
    assert levels_of(2, True).tolist() == [-1, 0, 1]


def test_normalized_has_the_gradient_of_mean_and_deviation():
    torch.manual_seed(0)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for restore in (False, True):
        assert torch.autograd.gradcheck(lambda w, restore=restore: normalized(w, restore), (w,))


def test_a_constant_weight_keeps_its_value():
    w = torch.full((4, 3, 3, 3), -0.3, requires_grad=True)
    out, std = normalized(w, True)
    assert torch.equal(out, w) and float(std.detach()) == pytest.approx(0.3)
    out.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_two_bits_pass_the_gradient_outside_the_clip():
    for bits, passes in ((2, True), (3, False)):
        quantizer = get_algorithm("apot").make(Case("apot", 0, bits, "weight").spec(), {"alpha": 0.5})
        w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        unity = normalized(w)[0].detach()
        grad = (unity.abs() > 0.5).float() * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        quantizer(w).backward(grad)
        assert bool(w.grad.abs().max() > 0) == passes


def test_forms_are_integers_times_one_step():
    quantizer, w = Case("apot", 0, 4, "weight").ready()
    form = quantizer.freeze(w).form
    assert isinstance(form, Codebook) and int(form.levels.abs().max()) == 10 and form.bits == 4
    activation, _ = Case("apot", 0, 4, "activation").ready()
    form = activation.form()
    assert isinstance(form, Staircase) and int(form.levels.max()) == 48
    assert torch.equal(form.thresholds, (form.levels[1:] + form.levels[:-1]).double() / 2)


def test_levels_beyond_eight_bits_are_refused():
    for role, bits in (("weight", 7), ("activation", 6)):
        with pytest.raises(ConfigError, match=f"algorithm 'apot' has no {bits}-bit {role}s"):
            Case("apot", 0, bits, role).make()


def test_the_clip_starts_where_the_error_is_least():
    quantizer, w = Case("apot", 0, 2, "weight").ready()
    fresh = get_algorithm("apot").make(quantizer.spec)
    fresh.calibrate(w)
    errors = []
    for alpha in (0.5, float(fresh.alpha.detach()), 3.0):
        with torch.no_grad():
            fresh.alpha.fill_(alpha)
            errors.append(float((fresh(w) - fresh.rounded(w)).square().mean()))
    assert errors[1] == min(errors)
