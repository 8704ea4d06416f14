"""Deployed forms: exact codes and values, ties, files. Properties over random grids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fat_plugins import ConfigError, ExportError, QuantizationError
from fat_plugins.forms import (
    Codebook,
    Staircase,
    SumOfGrids,
    UniformGrid,
    form_from_dict,
    form_kind,
    form_to_dict,
    grids,
    lowest_code,
)
from fat_plugins.frozen import FrozenActivation, FrozenWeight
from fat_plugins.functional import fake_quantize, level_quantize

quick = settings(derandomize=True, max_examples=40, deadline=None)
values = arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32))
scales = st.floats(2**-10, 2**10, width=32)


@st.composite
def uniform_grids(draw):
    signed = draw(st.booleans())
    bits = draw(st.integers(2 if signed else 1, 8))
    scale = torch.tensor([draw(scales)])
    return UniformGrid(bits, signed, draw(st.booleans()) if signed else False, scale)


@st.composite
def staircases(draw):
    levels = sorted(draw(st.sets(st.integers(-128, 127), min_size=2, max_size=16)))
    gaps = draw(st.lists(st.floats(2**-4, 1, width=32), min_size=len(levels) - 1, max_size=len(levels) - 1))
    thresholds = torch.tensor(np.cumsum(gaps) - 4.0, dtype=torch.float64)
    return Staircase(4, torch.tensor(levels), thresholds, torch.tensor([draw(scales)]))


@st.composite
def codebooks(draw):
    levels = sorted(draw(st.sets(st.integers(-128, 127), min_size=2, max_size=16)))
    return Codebook(4, torch.tensor(levels), torch.tensor([draw(scales)]))


forms = st.one_of(uniform_grids(), codebooks(), staircases())


@quick
@given(uniform_grids(), values)
def test_uniform_codes_are_rounded_half_to_even(form, x):
    codes = form.encode(torch.from_numpy(x))
    r = x / form.scale.numpy()  # float32, as the quantizer computes
    assert np.array_equal(codes.numpy(), np.clip(np.rint(r), form.low, form.high).astype(np.int32))
    assert int(codes.min()) >= form.low and int(codes.max()) <= form.high and form.high - form.low < 2**form.bits
    assert np.array_equal(form.decode(codes).numpy(), codes.numpy().astype(np.float32) * form.scale.numpy())


@quick
@given(codebooks(), values)
def test_codebooks_take_the_nearest_level_and_the_lower_one_on_a_tie(form, x):
    r = (x / form.scale.numpy()).astype(np.float64)
    levels = form.levels.numpy()
    expected = np.abs(r[:, None] - levels).argmin(1)
    assert np.array_equal(form.encode(torch.from_numpy(x)).numpy(), expected)
    assert np.array_equal(form.integers(form.encode(torch.from_numpy(x))).numpy(), levels[expected])


@quick
@given(staircases(), values)
def test_staircases_count_the_thresholds_strictly_below(form, x):
    r = (x / form.scale.numpy())[:, None]
    expected = (r > form.thresholds.numpy().astype(np.float32)).sum(1)
    assert np.array_equal(form.encode(torch.from_numpy(x)).numpy(), expected)


@quick
@given(forms, values)
def test_codes_grow_with_the_value_and_survive_a_second_encoding(form, x):
    x = torch.from_numpy(np.sort(x))
    codes = form.encode(x)
    assert codes.dtype == torch.int32 and bool((codes.diff() >= 0).all())
    if not isinstance(form, Staircase):  # whose levels need not lie between their thresholds
        assert torch.equal(form.encode(form.decode(codes)), codes)


@quick
@given(forms, values)
def test_files_keep_a_form_exactly(form, x):
    again = form_from_dict(json.loads(json.dumps(form_to_dict(form))))
    x = torch.from_numpy(x)
    assert type(again) is type(form) and form_kind(again) == form_kind(form)
    assert torch.equal(again.scale, form.scale) and again.bits == form.bits
    codes = form.encode(x)
    assert torch.equal(again.encode(x), codes) and torch.equal(again.decode(codes), form.decode(codes))


@quick
@given(forms, values)
def test_ties_measure_the_distance_to_the_nearest_threshold(form, x):
    x = torch.from_numpy(x)
    r = (x.double() / form.scale.double()).numpy()
    if isinstance(form, UniformGrid):
        thresholds = np.arange(form.low, form.high) + 0.5
        r = np.clip(r, form.low, form.high)
    else:
        thresholds = form.thresholds.numpy()
    expected = np.abs(r[:, None] - thresholds).min(1)
    assert np.allclose(form.ties(x).numpy(), expected, rtol=0, atol=1e-9)


@quick
@given(forms, values, st.floats(1e-3, 0.4))
def test_codes_outside_the_tie_guard_do_not_change_when_the_input_moves_less(form, x, guard):
    x = torch.from_numpy(x).double()
    safe = form.ties(x) > guard
    step = form.scale.double() * guard * 0.99
    codes = form.encode(x)
    for moved in (x - step, x + step):
        assert torch.equal(form.encode(moved)[safe], codes[safe])


@quick
@given(uniform_grids(), values)
def test_fake_quantize_equals_its_form_and_numpy(form, x):
    x = torch.from_numpy(x).requires_grad_()
    scale = form.scale.clone().reshape(()).requires_grad_()
    out = fake_quantize(x, scale, form.low, form.high)
    assert torch.equal(out, form.decode(form.encode(x.detach())))
    grad = torch.cos(torch.arange(x.numel()).float())
    out.backward(grad)
    r, g = x.detach().numpy() / form.scale.numpy(), grad.numpy()
    inside = (r >= form.low) & (r <= form.high)
    assert np.array_equal(x.grad.numpy(), np.where(inside, g, 0))
    residual = np.where(inside, np.rint(r) - r, np.clip(r, form.low, form.high))
    assert np.isclose(scale.grad.item(), (g * residual).sum(), rtol=1e-4, atol=1e-4 * (1 + np.abs(residual).max()))


@quick
@given(staircases(), values)
def test_level_quantize_equals_its_form(form, x):
    x = torch.from_numpy(x)
    assert torch.equal(
        level_quantize(x, form.scale.reshape(()), form.levels, form.thresholds), form.decode(form.encode(x))
    )


def test_ties_at_exact_halves():
    form = UniformGrid(4, True, True, torch.ones(1))
    x = torch.tensor([-7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5])
    assert form.encode(x).tolist() == [-7, -2, -2, 0, 0, 2, 2, 6, 7]
    assert form.ties(x).tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]  # no threshold beyond the ends


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scales_per_channel(axis):
    x = torch.randn(3, 3, 3) * 4
    scale = torch.tensor([0.5, 1.0, 2.0])
    for make in (
        lambda s, a=0: UniformGrid(3, True, True, s, a),
        lambda s, a=0: Codebook(3, torch.tensor([-4, -1, 0, 2]), s, a),
        lambda s, a=0: Staircase(3, torch.tensor([-4, 0, 2]), torch.tensor([-1.0, 0.7]).double(), s, a),
    ):
        form = make(scale, axis)
        codes = form.encode(x)
        for i in range(3):
            part, single = x.select(axis, i), make(scale[i : i + 1])
            assert torch.equal(codes.select(axis, i), single.encode(part))
            assert torch.equal(form.decode(codes).select(axis, i), single.decode(single.encode(part)))
            assert torch.equal(form.ties(x).select(axis, i), single.ties(part))


def test_bounds_of_uniform_grids():
    one = torch.ones(1)
    bounds = {
        (4, True, True): (-7, 7),
        (4, True, False): (-8, 7),
        (4, False, False): (0, 15),
        (2, True, True): (-1, 1),
        (1, False, False): (0, 1),
    }
    for (bits, signed, narrow), expected in bounds.items():
        form = UniformGrid(bits, signed, narrow, one)
        assert (form.low, form.high) == expected


@pytest.mark.parametrize(
    "make,text",
    [
        (lambda: UniformGrid(4, True, True, torch.tensor(1.0)), "1-d float tensor, got \\(\\)"),
        (lambda: UniformGrid(4, True, True, torch.ones(2, 2)), "1-d float tensor, got \\(2, 2\\)"),
        (lambda: UniformGrid(4, True, True, torch.ones(1).int()), "1-d float tensor"),
        (lambda: Codebook(2, torch.tensor([0, 2, 1]), torch.ones(1)), "ascending int64 levels"),
        (lambda: Codebook(2, torch.tensor([0.0, 1.0]), torch.ones(1)), "ascending int64 levels"),
        (lambda: Codebook(1, torch.tensor([0, 1, 2]), torch.ones(1)), "3 levels do not fit 1-bit codes"),
        (lambda: Staircase(2, torch.tensor([1, 0]), torch.ones(1), torch.ones(1)), "ascending int64 levels"),
        (lambda: Staircase(2, torch.tensor([0, 1]), torch.ones(2), torch.ones(1)), "one ascending threshold"),
        (lambda: Staircase(2, torch.tensor([0, 1, 2]), torch.ones(2), torch.ones(1)), "one ascending threshold"),
        (lambda: form_from_dict({"kind": "unifrom"}), "unknown deployed form 'unifrom'; allowed: uniform, codebook"),
        (lambda: form_from_dict({}), "unknown deployed form None"),
        (lambda: form_from_dict({"kind": "uniform", "bits": 4}), "deployed form 'uniform': .*missing"),
        (lambda: form_from_dict({"kind": "uniform", "bitz": 4}), "deployed form 'uniform': .*bitz"),
        (
            lambda: form_from_dict(
                {"kind": "uniform", "bits": 4, "signed": True, "narrow": True, "scale": ["a"], "channel_axis": 0}
            ),
            "deployed form 'uniform'",
        ),
    ],
)
def test_forms_that_cannot_be_are_refused(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    "form",
    [
        UniformGrid(4, True, True, torch.ones(1)),
        Codebook(2, torch.tensor([0, 1]), torch.ones(1)),
        Staircase(2, torch.tensor([0, 1]), torch.tensor([0.5]), torch.ones(1)),
    ],
    ids=form_kind,
)
def test_nan_and_infinity_in_encode(form):
    with pytest.raises(QuantizationError, match="NaN"):
        form.encode(torch.tensor([float("nan")]))
    low, high = form.integers(form.encode(torch.tensor([-float("inf"), float("inf")]))).tolist()
    assert (low, high) == ((-7, 7) if isinstance(form, UniformGrid) else (0, 1))
    assert form.encode(torch.empty(0)).shape == (0,)


def test_forms_cannot_be_changed():
    with pytest.raises(AttributeError):
        UniformGrid(4, True, True, torch.ones(1)).bits = 3


# --------------------------------------------------------------------------------------------------------------------
# sums of grids
# --------------------------------------------------------------------------------------------------------------------
@st.composite
def sums(draw):
    """Two or three grids, codebooks among them, with one scale each or one per channel along either axis."""
    channels, axis = draw(st.sampled_from([1, 3])), draw(st.integers(0, 1))
    parts = []
    for _ in range(draw(st.integers(2, 3))):
        count = draw(st.sampled_from([1, channels]))
        scale = torch.tensor(draw(st.lists(scales, min_size=count, max_size=count)))
        if draw(st.booleans()):
            parts.append(UniformGrid(draw(st.integers(2, 3)), draw(st.booleans()), False, scale, axis))
        else:
            levels = draw(st.sampled_from([[-1, 1], [-1, 0, 1], [-4, -2, -1, 0, 1, 2, 4]]))
            parts.append(Codebook((len(levels) - 1).bit_length(), torch.tensor(levels), scale, axis))
    return SumOfGrids(parts)


def random_codes(form, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for p in form.parts:
        count = p.high - p.low + 1 if isinstance(p, UniformGrid) else len(p.levels)
        parts.append(torch.randint(0, count, shape, generator=generator) + lowest_code(p))
    return parts


@quick
@given(sums(), st.integers(0, 5))
def test_sum_codes_are_exact(form, seed):
    parts = random_codes(form, (3, 3), seed)
    codes = form.pack(parts)
    assert codes.dtype == torch.int32 and 0 <= int(codes.min()) and int(codes.max()) < 2**form.bits
    assert all(torch.equal(a, b.int()) for a, b in zip(form.split(codes), parts, strict=True))
    value = form.decode(codes)
    reference = sum(p.decode(c).double() for p, c in zip(form.parts, parts, strict=True))
    torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-5 * float(reference.abs().max()))
    # sums may coincide, their values may not change
    again = form.encode(value)
    assert torch.equal(form.decode(again), value)
    assert bool((again <= codes).all())
    assert torch.equal(form.encode(form.decode(again)), again)
    frozen = FrozenWeight(codes, form, "layer")
    assert torch.equal(frozen(torch.zeros(3, 3)), value)
    assert [c.tolist() for _, c in grids(form, codes)] == [c.tolist() for c in form.split(codes)]


@quick
@given(sums())
def test_sum_encodes_to_the_nearest(form):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * float(form.parts[0].scale.max()) * 2
    found = (form.decode(form.encode(x)).double() - x.double()).abs()
    for seed in range(20):
        other = form.decode(form.pack(random_codes(form, (3, 3), seed))).double()
        assert bool((found <= (other - x.double()).abs()).all())


@quick
@given(sums())
def test_sum_survives_files(form):
    back = form_from_dict(json.loads(json.dumps(form_to_dict(form))))
    assert form_kind(back) == "sum" and back.bits == form.bits
    codes = form.pack(random_codes(form, (3, 3)))
    assert torch.equal(back.decode(codes), form.decode(codes))


def sign_and_magnitude():
    """SQuantizer's weights: t * T + d * J with J of the sign of T."""
    sign = Codebook(2, torch.tensor([-1, 0, 1]), torch.tensor([0.5]))
    rest = UniformGrid(3, True, True, torch.tensor([0.125]))
    legal = [(t, t * j) for t in (-1, 0, 1) for j in range(4) if t or not j]
    codes = SumOfGrids([sign, rest]).pack(
        [torch.tensor([t + 1 for t, _ in legal]), torch.tensor([j for _, j in legal])]
    )
    return SumOfGrids([sign, rest], codes.long().sort().values), sorted(0.5 * t + 0.125 * j for t, j in legal)


def test_sum_of_allowed_codes():
    form, levels = sign_and_magnitude()
    x = torch.linspace(-1.2, 1.2, 97)
    nearest = torch.tensor([min(levels, key=lambda v: abs(v - float(value))) for value in x])
    got = form.decode(form.encode(x))
    tie = torch.tensor([sorted(abs(v - float(value)) for v in levels)[1] for value in x]) == (got - x).abs()
    assert torch.equal(got[~tie], nearest[~tie])
    assert set(form.encode(x).tolist()) <= set(form.allowed.tolist())
    # 0.25 lies halfway between 0 and 0.5 and 0.125 is not among the values
    assert form.decode(form.encode(torch.tensor([0.25, 0.251, 0.125]))).tolist() == [0, 0.5, 0]
    back = form_from_dict(form_to_dict(form))
    assert torch.equal(back.allowed, form.allowed)
    assert form.decode(form.encode(torch.tensor([torch.inf, -torch.inf]))).tolist() == [0.875, -0.875]


def test_sum_errors():
    grid, one = UniformGrid(2, True, False, torch.ones(3)), Codebook(1, torch.tensor([-1, 1]), torch.ones(1))
    with pytest.raises(ConfigError, match="two or more parts"):
        SumOfGrids([grid])
    with pytest.raises(ConfigError, match="same channels"):
        SumOfGrids([grid, UniformGrid(2, True, False, torch.ones(4))])
    with pytest.raises(ConfigError, match="same channels"):
        SumOfGrids([grid, UniformGrid(2, True, False, torch.ones(3), 1)])
    with pytest.raises(ConfigError, match=r"32 bits.*31"):
        SumOfGrids([UniformGrid(16, True, False, torch.ones(1))] * 2)
    with pytest.raises(ConfigError, match="ascend"):
        SumOfGrids([grid, one], torch.tensor([0, 2**grid.bits * 2]))
    with pytest.raises(QuantizationError, match=r"-3 \.\. 0 of a part; allowed: -2 \.\. 1"):
        SumOfGrids([grid, one]).pack([torch.tensor([-3, 0]), torch.tensor([0, 1])])
    with pytest.raises(QuantizationError, match="65536"):
        SumOfGrids([UniformGrid(9, True, False, torch.ones(1))] * 2).encode(torch.zeros(1))
    with pytest.raises(QuantizationError, match="NaN"):
        SumOfGrids([one, one]).encode(torch.tensor([torch.nan]))
    with pytest.raises(ExportError, match="fc: a sum of grids cannot hold activations"):
        FrozenActivation(SumOfGrids([one, one]), "fc")


def test_thresholds_per_channel():
    levels, scale = torch.tensor([-1, 0, 3]), torch.tensor([0.5])
    thresholds = torch.tensor([[-1.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    form = Staircase(2, levels, thresholds, scale, 1)
    x = torch.tensor([[[-0.6, -0.5, 0.4, 0.6]], [[-0.1, 0.0, 1.9, 2.1]]]).transpose(0, 1)
    assert form.encode(x).tolist() == [[[0, 0, 1, 2], [0, 0, 1, 2]]]
    for channel in range(2):
        alone = Staircase(2, levels, thresholds[channel], scale, 1)
        assert torch.equal(alone.encode(x[:, channel]), form.encode(x)[:, channel])
        torch.testing.assert_close(alone.ties(x[:, channel]), form.ties(x)[:, channel])
    again = form_from_dict(form_to_dict(form))
    assert torch.equal(again.encode(x), form.encode(x)) and again.channels == 2
    assert torch.equal(FrozenActivation(form, "a")(x), form.decode(form.encode(x)))
    with pytest.raises(ConfigError, match="one ascending threshold between each two levels"):
        Staircase(2, levels, thresholds.flip(1), scale, 1)
    with pytest.raises(ConfigError, match="a staircase of 2 channels cannot have 3 scales; allowed: 1 or 2"):
        Staircase(2, levels, thresholds, torch.ones(3), 1)
