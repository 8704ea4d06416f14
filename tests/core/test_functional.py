"""The shared tensor functions: compiled against eager, closed-form gradients, small helpers."""

from __future__ import annotations

import shutil

import pytest
import torch
from universal import DRAWS_NOISE, cases, run, sample

from fat_plugins import ConfigError, get_backend, kernels, set_backend
from fat_plugins import functional as F

# dynamo's own use of what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@pytest.fixture
def backend():
    """Restores the backend and forgets what was compiled."""
    before = get_backend()
    yield set_backend
    set_backend(before)
    kernels._compiled.clear()
    torch._dynamo.reset()


def functions():
    """Every differentiable kernel x options, as (name, function of x and scale)."""
    for clip in (True, False):
        for residual in (True, False):
            for inclusive in (True, False):
                yield (
                    f"uniform-{clip:d}{residual:d}{inclusive:d}",
                    lambda x, s, c=clip, r=residual, i=inclusive: F.fake_quantize(
                        x, s, -4, 3, clip_x_grad=c, residual_scale_grad=r, inclusive=i
                    ),
                )
            yield (
                f"levels-{clip:d}{residual:d}",
                lambda x, s, c=clip, r=residual: F.level_quantize(
                    x, s, torch.tensor([-4, -1, 0, 2, 3]), torch.tensor([-2.5, -0.5, 1.0, 2.5]),
                    clip_x_grad=c, residual_scale_grad=r,
                ),
            )  # fmt: skip


def evaluate(fn, dtype=torch.float32, per_channel=False):
    x = sample((6, 5, 4)).to(dtype) * 30
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = float("inf"), 3.0, -4.0  # the clip and its exact ends
    x.requires_grad_()
    scale = torch.linspace(0.5, 1.0, 5).reshape(1, 5, 1) if per_channel else torch.tensor(1.0)
    scale.requires_grad_()
    out = fn(x, scale)
    out.backward(sample(out.shape, seed=7).to(dtype))
    return out.detach(), x.grad, scale.grad


def check_against_eager(set_backend, compiler, chosen, granularity=(False, True)):
    for name, fn in chosen:
        for per_channel in granularity:
            set_backend("eager")
            expected = evaluate(fn, per_channel=per_channel)
            set_backend("compile", compiler)
            actual = evaluate(fn, per_channel=per_channel)
            assert kernels._compiled, "nothing was compiled"
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_kernels_equal_eager_in_values_and_gradients(backend):
    """Through dynamo and AOT autograd; no compiler for machine code is needed for this."""
    wanted = {"uniform-111", "uniform-100", "uniform-001", "levels-11", "levels-00"}
    check_against_eager(backend, "aot_eager", [f for f in functions() if f[0] in wanted])


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for inductor's CPU code")
@pytest.mark.skipif(
    torch.__version__.startswith("2.4."),
    reason="what the compiler of torch 2.4 builds flushes subnormals of the whole process (fast math)",
)
def test_machine_code_equals_eager(backend, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (shutil.which("g++"),))  # whatever CXX says
    check_against_eager(backend, "inductor", [f for f in functions() if f[0] == "uniform-110"], (False,))


@pytest.mark.parametrize("case", cases(bits=(3,)), ids=str)
def test_quantizers_inside_a_compiled_model(case, backend):
    """The user's own ``torch.compile`` takes a quantizer whole, without a graph break."""
    quantizer, x = case.ready()
    quantizer.train()
    grad = sample(x.shape, seed=5)
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    expected = run(quantizer, x, grad)
    quantizer.load_state_dict(state)
    torch._dynamo.reset()
    # a random generator cannot be made inside a graph
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=case.algorithm not in DRAWS_NOISE)
    leaf = x.clone().requires_grad_()
    quantizer.zero_grad()
    out = compiled(leaf)
    out.backward(grad)
    torch.testing.assert_close(out, expected["out"], rtol=1e-6, atol=1e-6)
    dx = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # an owned weight is not read
    torch.testing.assert_close(dx, expected["dx"], rtol=1e-6, atol=1e-6)
    for name, p in quantizer.named_parameters():
        torch.testing.assert_close(p.grad, expected["params"][name], rtol=1e-6, atol=1e-6)


def test_auto_compiles_only_on_cuda(backend):
    backend("auto")
    evaluate(next(functions())[1])
    assert not kernels._compiled


def test_unknown_backends_are_refused():
    with pytest.raises(ConfigError, match=r"unknown backend 'compiled'; allowed: .*; did you mean 'compile'"):
        set_backend("compiled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name,fn", list(functions()), ids=lambda v: v if isinstance(v, str) else "")
def test_half_precision_is_computed_in_float32(name, fn, dtype):
    x = (sample((6, 5, 4)) * 30).to(dtype)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    scales = [torch.tensor(0.7, requires_grad=True) for _ in range(2)]
    a, b = fn(half, scales[0]), fn(full, scales[1])
    assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    grad = sample(a.shape, seed=7).to(dtype)
    a.backward(grad)
    b.backward(grad.float())
    assert half.grad.dtype == dtype and torch.equal(half.grad, full.grad.to(dtype))
    assert torch.equal(scales[0].grad, scales[1].grad)


def test_scales_that_nothing_learns_cost_nothing_and_change_nothing():
    fns = dict(functions())
    x = sample((6, 5)) * 30
    grad = sample((6, 5), seed=7)
    for name, fn in fns.items():
        results = []
        for learned in (True, False):
            leaf, scale = x.clone().requires_grad_(), torch.tensor(0.9, requires_grad=learned)
            fn(leaf, scale).backward(grad)
            results.append(leaf.grad)
            assert (scale.grad is not None) == learned
        assert torch.equal(*results), name


def test_positive_is_exact_far_below_the_floor_and_passes_the_gradient():
    x = torch.tensor([-1e30, -1.0, 0.0, 1e-6, 0.1, 7.0], requires_grad=True)
    y = F.positive(x, 1e-5)
    assert y.tolist() == pytest.approx([1e-5, 1e-5, 1e-5, 1e-5, 0.1, 7.0], rel=1e-6)
    y.backward(torch.arange(6.0))
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 5]


def test_grad_scale_changes_the_gradient_only():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = F.grad_scale(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad.tolist() == [0.25, 0.25]


def test_level_index_counts_thresholds_strictly_below():
    thresholds = torch.tensor([-0.5, 0.5, 2.0])
    x = torch.tensor([-0.6, -0.5, -0.49, 0.5, 0.51, 2.0, 3.0]) * 2
    assert F.level_index(x, torch.tensor(2.0), thresholds).tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("factor", [1.0, 2.0**90, 2.0**-90])
def test_standardize_is_exact_under_powers_of_two(factor):
    w = sample((4, 3, 3))
    normalised, std = F.standardize(w)
    again, again_std = F.standardize(w * factor)
    assert torch.equal(again, normalised) and torch.equal(again_std, std * factor)
    assert torch.allclose(std, w.std()) and torch.allclose(normalised, (w - w.mean()) / w.std(), atol=1e-6)


def test_levels_of_channels_last_tensors():
    """Convolutions often give this layout; the same values and gradients come out, and torch has nothing to warn of."""
    levels = torch.tensor([0, 1, 2, 4])
    thresholds = (levels[1:] + levels[:-1]) / 2
    x = torch.rand(2, 3, 4, 5) * 5
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        scale = torch.tensor(0.9, requires_grad=True)
        out = F.level_quantize(leaf, scale, levels, thresholds)
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        results.append((out, leaf.grad, scale.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# -- differentiated twice --------------------------------------------------------------------------------------------
def _fake(**rules):
    return lambda x, scale: F.fake_quantize(x, scale, -4, 3, **rules)


def _levels(x, scale):
    levels = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=x.dtype)
    return F.level_quantize(x, scale, levels, (levels[1:] + levels[:-1]) / 2)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "quantize",
    [_fake(), _fake(clip_x_grad=False), _fake(residual_scale_grad=False), _fake(inclusive=False), _levels],
)
def test_gradients_have_gradients(quantize, per_channel):
    """They are the same when somebody differentiates them again, and what he gets equals finite differences."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(3, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    scale = torch.full((3, 1) if per_channel else (), 0.7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(quantize(x, scale), (x, scale), grad)
    again = torch.autograd.grad(quantize(x, scale), (x, scale), grad, create_graph=True)
    torch.testing.assert_close(again, plain)
    assert all(g.requires_grad for g in again)

    def gradients(*inputs):
        return torch.autograd.grad(quantize(*inputs[:2]), inputs[:2], inputs[2], create_graph=True)

    assert torch.autograd.gradcheck(gradients, (x, scale, grad))
