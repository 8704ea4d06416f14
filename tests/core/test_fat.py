"""FAT against its specification: the test vectors and acceptance tests of section 11, the facts and pitfalls of
section 10, the tables of sections 6 to 8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import fat_standardize, fat_transform, power_of_two_grid, ramp

from fat_plugins import ConfigError, TensorSpec, get_algorithm, param_groups
from fat_plugins.forms import Codebook, Staircase, UniformGrid
from fat_plugins.functional import dft_gate, standardize

FAT = get_algorithm("fat")


def weight(shape, bits=4, axis=0, norm=True, **params):
    spec = TensorSpec("weight", bits, name="w", shape=tuple(shape), channel_axis=axis, followed_by_norm=norm)
    return FAT.make(spec, params)


def activation(bits=4, alpha=None, signed=False, **params):
    quantizer = FAT.make(TensorSpec("activation", bits, name="a"), params)
    quantizer.calibrate_range(-1.0 if signed else 0.0, 1.0)
    if alpha is not None:
        with torch.no_grad():
            quantizer.alpha.fill_(alpha)
    return quantizer


# -- section 11 ------------------------------------------------------------------------------------------------------
def test_vector_of_the_specification():
    shape = (4, 2, 3, 3)
    w = torch.from_numpy(ramp(shape, 0.7, 0.3, 0.05, 0.01)).requires_grad_()
    quantizer = weight(shape, bits=4, alpha=1.25).double()
    with torch.no_grad():
        quantizer.alpha.fill_(1.25)
        quantizer.transform.copy_(torch.from_numpy(ramp((4, 4), 1.1, 0.2, 0.15)))
    out = quantizer(w)
    out.backward(torch.from_numpy(ramp(shape, 0.9, -0.4, 0.3)))

    def equal(tensor, expected):
        assert np.allclose(tensor.detach().numpy(), expected, rtol=0, atol=1e-9)

    equal(out.flatten()[:6], [0.5357142857, 1.0714285714, 1.0714285714, 0.7142857143, 0.1785714286, -0.5357142857])
    equal(w.grad.flatten()[:4], [0.248052261, 4.337743759, 5.778719567, 2.99869458])
    equal(quantizer.transform.grad.flatten()[:3], [0.547182364, 0.569583201, 0.561934568])
    equal(quantizer.alpha.grad, 0.316620813)


@pytest.mark.parametrize("n", [1, 2, 9, 18, 25])
def test_half_spectrum_equals_the_full_one_in_values_and_gradients(n):
    rows = torch.from_numpy(ramp((4, n), 0.7, 0.3)).requires_grad_()
    t = torch.from_numpy(ramp((4, 4), 1.1, 0.2, 0.15)).requires_grad_()
    grad = torch.from_numpy(ramp((4, n), 0.9, -0.4))

    def full(rows, t):
        spectrum = torch.fft.fft(rows.to(torch.complex128), dim=1)
        z = torch.fft.ifft(torch.sigmoid(t @ spectrum.abs()) * spectrum, dim=1)
        assert z.imag.abs().max() < 1e-15
        return z.real

    half = dft_gate(rows, t)
    expected = full(rows, t)
    assert torch.allclose(half, expected, rtol=0, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(half, (rows, t), grad), torch.autograd.grad(expected, (rows, t), grad), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [2, 9, 18])
def test_gate_passes_gradcheck(n):
    rows = torch.from_numpy(ramp((3, n), 0.7, 0.3)).requires_grad_()
    t = torch.from_numpy(ramp((3, 3), 1.1, 0.2, 0.15)).requires_grad_()
    assert torch.autograd.gradcheck(dft_gate, (rows, t), atol=1e-6)


def test_standardised_path_passes_gradcheck_with_detached_statistics():
    w = torch.from_numpy(ramp((3, 2, 3), 0.7, 0.3, 0.05, 0.01)).requires_grad_()
    t = torch.from_numpy(ramp((3, 3), 1.1, 0.2, 0.15)).requires_grad_()
    mean, std = w.detach().mean(), w.detach().std()

    def smooth(w, t):  # the statistics are constants of the layer
        return dft_gate(((w - mean) / std).reshape(3, -1), t)

    assert torch.autograd.gradcheck(smooth, (w, t), atol=1e-6)
    grad = torch.from_numpy(ramp((3, 6), 0.9, -0.4))
    expected = torch.autograd.grad(smooth(w, t), w, grad)[0]
    actual = torch.autograd.grad(dft_gate(standardize(w)[0].reshape(3, -1), t), w, grad)[0]
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_parseval_the_gate_never_adds_energy():
    w = ramp((8, 3, 3, 3), 0.7, 0.3, 0.05, 0.01)
    quantizer = weight(w.shape).double()
    wt, _ = quantizer._transformed(torch.from_numpy(w))
    what, _ = standardize(torch.from_numpy(w))
    assert (wt.flatten(1).norm(dim=1) <= what.flatten(1).norm(dim=1)).all()
    assert wt.norm() < what.norm()


def test_gradient_of_the_transform_is_exactly_zero_for_large_layers_at_init():
    w = torch.randn(128, 64, 3, 3) * 0.05  # C = 128, N = 576
    quantizer = weight(w.shape)
    quantizer.calibrate(w)
    quantizer(w).backward(torch.randn_like(w))
    assert not quantizer.transform.grad.any()
    small = weight((8, 1, 3, 3))
    small(w[:8, :1]).backward(torch.randn(8, 1, 3, 3))
    assert small.transform.grad.any()


@pytest.mark.parametrize("levels", ["uniform", "power_of_two"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_at_most_two_to_the_b_minus_one_weight_levels_and_idempotence(bits, levels):
    w = torch.randn(16, 8, 3, 3)
    quantizer = weight(w.shape, bits, levels=levels, alpha=1.0).eval()
    out = quantizer(w)
    assert out.unique().numel() <= 2**bits - 1
    if (bits, levels) != (5, "power_of_two"):  # whose smallest level, alpha / 2^14, nothing rounds to here
        assert out.unique().numel() == 2**bits - 1
        assert (out == 0).any() and torch.equal(out.unique(), -out.unique().flip(0))
    if bits == 2:
        assert torch.equal(out.unique(), torch.tensor([-1.0, 0.0, 1.0]))
    form = quantizer.freeze(w).form
    assert torch.equal(form.decode(form.encode(out)), out)
    # FakeQuantize export of section 8: levels 2^b - 1 over [-alpha, alpha] leaves quantized weights alone
    if levels == "uniform":
        n = 2 ** (bits - 1) - 1
        again = torch.fake_quantize_per_tensor_affine(out, 1.0 / n, 0, -n, n)
        assert torch.allclose(again, out, atol=1e-6)
        assert (form.low, form.high) == (-n, n)


def test_ablation_switch_fixes_the_gate_to_one():
    w = torch.randn(8, 4, 3, 3)
    off = weight(w.shape, transform="none")
    assert off.transform is None and off.gate(w) is None and "transform" not in off.state_dict()
    assert torch.equal(off._transformed(w)[0], standardize(w)[0])
    on = weight(w.shape)
    with torch.no_grad():
        on.transform.fill_(1e4)  # sigmoid saturates: M = 1
    assert torch.allclose(on(w), off(w), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e-30])
def test_constant_weights_do_not_become_nan(value):
    w = torch.full((4, 2, 3, 3), value, requires_grad=True)
    quantizer = weight(w.shape)
    quantizer.calibrate(w.detach())
    out = quantizer(w)
    out.sum().backward()
    assert out.isfinite().all()
    assert torch.equal(out.sign(), torch.full_like(out, np.sign(value)))  # the guard keeps the mean
    assert quantizer.transform.grad.isfinite().all() and quantizer.alpha.grad.isfinite()


# -- sections 3 and 4 ------------------------------------------------------------------------------------------------
def test_forward_divides_by_the_unbiased_layer_deviation():
    w = ramp((4, 2, 3, 3), 0.7, 0.3, 0.05, 0.01)
    what, std = standardize(torch.from_numpy(w))
    expected, sd = fat_standardize(w)
    assert np.allclose(what.numpy(), expected, rtol=1e-13) and float(std) == pytest.approx(sd, rel=1e-13)
    assert float(what.mean()) == pytest.approx(0, abs=1e-15) and float(what.std()) == pytest.approx(1)


def test_weight_gradient_is_not_masked_outside_the_clip():
    w = torch.randn(8, 4, 3, 3, requires_grad=True)
    quantizer = weight(w.shape, transform="none", alpha=0.1)  # nearly everything is clipped
    grad = torch.randn(8, 4, 3, 3)
    quantizer(w).backward(grad)
    assert torch.allclose(w.grad, grad / w.detach().std(), rtol=1e-5)


def test_statistics_carry_no_gradient():
    w = torch.randn(8, 4, 3, 3, requires_grad=True)
    standardize(w)[0].sum().backward()  # through mean and std this would be zero
    assert torch.allclose(w.grad, 1 / w.detach().std().expand_as(w))


def test_transform_mixes_output_channels_at_each_frequency():
    what = ramp((4, 9), 0.7, 0.3)
    t = np.zeros((4, 4))
    t[1, 2] = 0.5  # filter 1 is gated by the magnitudes of filter 2
    wt, saved = fat_transform(what, t)
    assert np.allclose(dft_gate(torch.from_numpy(what), torch.from_numpy(t)).numpy(), wt, atol=1e-14)
    assert np.allclose(wt[[0, 2, 3]], what[[0, 2, 3]] / 2)  # sigmoid(0)
    assert np.allclose(saved["m"][1], 1 / (1 + np.exp(-0.5 * np.abs(np.fft.fft(what[2])))))


def test_no_mean_is_restored_in_front_of_a_batch_norm_but_the_scale_is_elsewhere():
    w = torch.randn(8, 4, 3, 3) * 0.05 + 0.02
    plain, auto, forced = weight(w.shape), weight(w.shape, norm=False), weight(w.shape, restore_scale=True)
    assert (plain.restore, auto.restore, forced.restore) == (False, True, True)
    assert weight(w.shape, norm=False, restore_scale=False).restore is False
    assert torch.allclose(auto(w), plain(w) * w.std(), rtol=1e-5)
    assert torch.equal(auto(w), forced(w))
    (codes, form), (codes_plain, form_plain) = auto.freeze(w), plain.freeze(w)
    assert torch.equal(codes, codes_plain)
    assert float(form.scale) == pytest.approx(float(form_plain.scale * w.std()))


def test_shifting_a_weight_changes_nothing():
    """Only the mean moves, and it is removed (section 3, step 1)."""
    w = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    quantizer = weight(w.shape).double()
    assert torch.equal(quantizer.freeze(w).codes, quantizer.freeze(w + 3).codes)
    wt, _ = quantizer._transformed(w + 3)
    assert abs(float(standardize(w + 3)[0].mean())) < 1e-14 and wt.isfinite().all()


def test_uniquant_subtracts_the_mean_only():
    w = torch.randn(6, 1, 3, 3) * 0.05 + 0.5
    quantizer = weight(w.shape, transform="uniquant")
    assert torch.allclose(quantizer._transformed(w)[0], w - w.mean(), atol=1e-7)
    assert quantizer.transform is None
    assert not quantizer(w).any()  # section 7.3: a clip of 3 quantizes plain weights to zero at the start
    w.requires_grad_()
    quantizer(w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


# -- sections 5 and 6 ------------------------------------------------------------------------------------------------
def test_initial_values():
    quantizer = weight((5, 4, 3, 3))
    assert torch.equal(quantizer.transform, torch.full((5, 5), 0.2)) and quantizer.alpha == 3.0
    w = torch.randn(5, 4, 3, 3)
    spectrum = torch.fft.fft(standardize(w)[0].flatten(1), dim=1).abs()
    half = torch.sigmoid(spectrum.mean(0))[: 36 // 2 + 1].expand(5, -1)  # the same mask for every filter
    assert torch.allclose(quantizer.gate(w), half, atol=1e-6)
    assert activation(activation_alpha=8.0).alpha == 8.0
    ranged = activation()
    ranged.calibrate_range(0.0, 2.5)
    assert ranged.alpha == 2.5


@pytest.mark.parametrize("levels", ["uniform", "power_of_two"])
def test_gradient_of_the_activation_clip_in_the_two_copies(levels):
    x = torch.tensor([-1.0, 0.0, 0.3, 1.4, 1.5, 1.6, 100.0])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    results = {}
    for variant in ("cifar", "imagenet"):
        quantizer = activation(2, alpha=1.5, variant=variant, levels=levels)
        v = x.clone().requires_grad_()
        quantizer(v).backward(grad)
        assert torch.equal(v.grad, grad * torch.tensor([0.0, 1, 1, 1, 1, 0, 0]))  # r <= 1, and the lower clamp
        results[variant] = float(quantizer.alpha.grad)
    assert results["imagenet"] == pytest.approx(32 + 64)  # PACT
    r = np.array([0.0, 0.2, 1.4 / 1.5, 1.0])
    grid = np.array([0, 1 / 3, 2 / 3, 1]) if levels == "uniform" else power_of_two_grid(3)
    q = grid[np.abs(r[:, None] - grid).argmin(1)]
    residual = ((q - r) * [2, 4, 8, 16]).sum()
    assert results["cifar"] == pytest.approx(32 + 64 + residual, rel=1e-5)


def test_signed_activations_clip_symmetrically():
    """Section 5: the authors' grid is unbounded below; ours is the b-bit symmetric one of section 8."""
    quantizer = activation(4, alpha=2.5, signed=True)
    out = quantizer(torch.tensor([-10.0, -2.5, -1.0, 1.0, 9.0]))
    assert out.min() == -2.5 and out.max() == 2.5
    assert (quantizer.form().low, quantizer.form().high) == (-7, 7)


def test_clips_cannot_leave_the_positive_numbers_but_can_return():
    for quantizer, x in ((weight((4, 4)), torch.randn(4, 4)), (activation(), torch.rand(4, 4))):
        for bad in (0.0, -1.0, -1e10):
            with torch.no_grad():
                quantizer.alpha.fill_(bad)
            quantizer.alpha.grad = None
            out = quantizer(x)
            assert out.isfinite().all() and out.abs().max() <= 1.1e-5
            out.backward(-x)  # larger is better
            assert quantizer.alpha.grad < 0  # gradient descent moves the clip up again


def test_infinite_activations_take_the_largest_level():
    for levels in ("uniform", "power_of_two"):
        out = activation(4, alpha=2.0, levels=levels)(torch.tensor([float("inf"), -float("inf")]))
        assert out.tolist() == [2.0, 0.0]


# -- section 7 -------------------------------------------------------------------------------------------------------
def test_learning_rates_of_the_cifar_runs():
    class Net(torch.nn.Module):
        def __init__(self, variant):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.w = weight((8, 3, 3, 3), variant=variant)
            self.a = activation(variant=variant)

    net = Net("cifar")
    groups = param_groups(net, lr=0.04, weight_decay=5e-4)
    where = {id(p): g for g in groups for p in g["params"]}
    for p, lr, decay in (
        (net.conv.weight, 0.04, 5e-4),
        (net.w.alpha, 0.02, 1e-4),
        (net.w.transform, 0.02, 1e-4),
        (net.a.alpha, 0.1, 1e-4),
    ):
        assert where[id(p)]["lr"] == pytest.approx(lr) and where[id(p)]["weight_decay"] == pytest.approx(decay)
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters())) == len(where)
    torch.optim.SGD(groups, momentum=0.9)
    # ImageNet: one group for everything
    (one,) = param_groups(Net("imagenet"), lr=0.01, weight_decay=1e-4)
    assert len(one["params"]) == 5 and one["lr"] == 0.01


# -- section 8 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits,largest", [(2, 1), (3, 4), (4, 64), (5, 2**14)])
def test_power_of_two_weights_are_integers_of_the_table(bits, largest):
    quantizer = weight((64, 16, 3, 3), bits, levels="power_of_two", alpha=1.5)
    w = torch.randn(64, 16, 3, 3)
    codes, form = quantizer.freeze(w)
    assert isinstance(form, Codebook) and form.bits == bits
    integers = form.integers(codes).abs().unique().tolist()
    powers = [2**j for j in range(largest.bit_length())]
    assert form.levels.tolist() == [-p for p in reversed(powers)] + [0] + powers
    assert set(integers) <= {0, *powers} and max(integers) == largest
    assert float(form.scale) == pytest.approx(1.5 / largest)
    assert torch.equal(form.decode(codes), quantizer(w))


@pytest.mark.parametrize("bits,largest", [(2, 4), (3, 64), (4, 2**14), (5, 2**30)])
def test_power_of_two_activations_are_integers_of_the_table(bits, largest):
    form = activation(bits, alpha=1.5, levels="power_of_two").form()
    assert isinstance(form, Staircase)
    assert form.levels.tolist() == [0, *(2**j for j in range(2**bits - 1))] and int(form.levels[-1]) == largest
    assert float(form.scale) == pytest.approx(1.5 / largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_power_of_two_thresholds_are_linear_midpoints(bits, dtype):
    """Nearest in the linear domain: 0.75 * 2^-j, the last one half of the smallest level (section 8)."""
    quantizer = activation(bits, alpha=1.0, levels="power_of_two").to(dtype).eval()
    grid = power_of_two_grid(2**bits - 1)
    middles = (grid[1:] + grid[:-1]) / 2
    assert middles[0] == 2.0 ** -(2**bits - 1) and middles[-1] == 0.75
    middles = middles[middles > 1e-4]
    below = torch.tensor(middles * (1 - 2**-7), dtype=dtype)
    above = torch.tensor(middles * (1 + 2**-7), dtype=dtype)
    index = np.searchsorted(grid, middles)
    assert np.array_equal(quantizer(below).double().detach().numpy(), grid[index - 1])
    assert np.array_equal(quantizer(above).double().detach().numpy(), grid[index])


def test_uniform_forms_of_the_specification():
    w = torch.randn(8, 4, 3, 3)
    quantizer = weight(w.shape, 4)
    codes, form = quantizer.freeze(w)
    assert isinstance(form, UniformGrid) and form.narrow and form.signed
    assert float(form.scale) == pytest.approx(3.0 / 7) and form.scale.numel() == 1
    assert torch.equal(codes, torch.round(7 * quantizer(w) / 3.0).int())
    form = activation(4, alpha=6.0).form()
    assert (form.low, form.high, form.signed) == (0, 15, False) and float(form.scale) == pytest.approx(6 / 15)


def test_one_bit_has_no_form():
    with pytest.raises(ConfigError, match=r"conv1: algorithm 'fat' has no 1-bit weights; .*FAT has no 1-bit form"):
        FAT.make(TensorSpec("weight", 1, name="conv1", shape=(4, 4)))


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_power_of_two_beyond_32_bit_integers_is_refused(role):
    with pytest.raises(ConfigError, match=r"conv1: FAT's power-of-two levels .* at 6 bits; allowed: 2 to 5"):
        FAT.make(TensorSpec(role, 6, name="conv1", shape=(4, 4)), {"levels": "power_of_two"})


@pytest.mark.parametrize(
    "params,text",
    [
        (
            {"levels": "power_of_2"},
            "params.levels: expected 'uniform' or 'power_of_two', got 'power_of_2'; did you mean",
        ),
        ({"transform": True}, "params.transform: expected 'dft', 'none' or 'uniquant', got True"),
        ({"variant": "imagnet"}, "did you mean 'imagenet'?"),
        ({"alpha": 0}, "params.alpha: must be greater than 0, got 0"),
        ({"alpha": float("nan")}, "params.alpha: must be "),
        ({"alpha": "3"}, "params.alpha: expected a number, got '3'"),
        ({"activation_alpha": -1.0}, "params.activation_alpha: must be greater than 0, got -1.0"),
        ({"restore_scale": "yes"}, "params.restore_scale: expected true, false or 'auto', got 'yes'"),
    ],
)
def test_bad_params_are_one_clear_line(params, text):
    with pytest.raises(ConfigError) as error:
        FAT.parse_params(params)
    assert text in str(error.value) and "\n" not in str(error.value)


# -- section 10 ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [9, 16, 144])
def test_gate_of_white_weights_at_init(n):
    w = torch.randn(64, n)
    expected = torch.sigmoid(torch.tensor(0.886 * n**0.5))
    middle = weight(w.shape).gate(w)[:, 1:].median()
    assert float(middle) == pytest.approx(float(expected), abs=0.01)


def test_one_zero_filter_has_a_zero_subgradient():
    w = torch.randn(4, 2, 3, 3)
    w[1] = w.mean()
    w = (w - w.mean()).requires_grad_()
    quantizer = weight(w.shape)
    quantizer(w).backward(torch.randn_like(w))
    assert w.grad.isfinite().all() and quantizer.transform.grad.isfinite().all()


def test_training_state_is_gone_after_freezing():
    codes, form = weight((4, 2, 3, 3)).freeze(torch.randn(4, 2, 3, 3))
    assert codes.dtype == torch.int32 and not form.scale.requires_grad
    assert sorted(vars(form)) == ["bits", "channel_axis", "narrow", "scale", "signed"]


def test_bf16_weights_are_computed_in_float32():
    w = (torch.randn(8, 4, 3, 3) * 0.05).bfloat16()
    quantizer = weight(w.shape)
    assert torch.equal(quantizer(w), quantizer(w.float()).bfloat16())
    assert torch.equal(quantizer.freeze(w).codes, quantizer.freeze(w.float()).codes)
    with torch.no_grad():
        quantizer.transform.copy_(torch.randn(8, 8) * 0.1)  # a gate that shows what precision it was computed in
    exact = quantizer._transformed(w.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer._transformed(w.float())[0], exact)
        assert torch.equal(quantizer(w.float()), quantizer.freeze(w).form.decode(quantizer.freeze(w).codes))


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.22), (3, 2.0), (4, 2.5), (5, 3.1)])
def test_the_weight_clip_starts_from_the_least_error(bits, clip):
    """The authors' 3.0 is that of 5 bits; at 2 bits it leaves one weight of eight."""
    w = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    q = weight(tuple(w.shape), bits, transform="none")
    q.calibrate(w)
    assert q.alpha.item() == pytest.approx(clip, abs=0.25)
    standard = (w - w.mean()) / w.std()
    found = float((q(w) - standard).detach().square().mean())
    for factor in (0.8, 1.25):
        q.alpha.data.mul_(factor)
        assert float((q(w) - standard).detach().square().mean()) > found
        q.alpha.data.div_(factor)


def test_a_given_weight_clip_is_kept_and_a_constant_weight_has_one():
    given = weight((4, 3, 3, 3), 2, alpha=3.0)
    given.calibrate(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    constant = weight((4, 3, 3, 3), 2)
    constant.calibrate(torch.full((4, 3, 3, 3), 0.5))
    assert given.alpha.item() == 3.0
    assert 0 < constant.alpha.item() < float("inf")
