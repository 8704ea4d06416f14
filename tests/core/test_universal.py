"""The universal tester: every registered algorithm, each of its options, 2 to 8 bits (see ``universal.py``)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from universal import (
    COUNTS_SURVIVORS,
    FREE_THRESHOLDS,
    LAYERS,
    ONE_BIT_MORE,
    OWN_MASK,
    REFERENCES,
    TRANSFORMS_WEIGHTS,
    ZERO_ON_TOP,
    Layer,
    cases,
    reaches_the_range,
    run,
    sample,
    scale_invariant,
)

from fat_plugins import CheckpointError, ConfigError, QuantizationError, TensorSpec, algorithms, get_algorithm
from fat_plugins.forms import Staircase, form_from_dict, form_to_dict

ALL, WEIGHTS, ACTIVATIONS = cases(), cases("weight"), cases("activation")
FEW = cases(bits=(3,))  # where the bit width plays no part
each = pytest.mark.parametrize("case", ALL, ids=str)
#: weights are signed; activations are tested after a ReLU and without one
SIGNED = [(c, s) for c in ALL for s in ((True,) if c.role == "weight" else (False, True))]
each_signed = pytest.mark.parametrize(
    "case,signed", SIGNED, ids=lambda v: str(v) if not isinstance(v, bool) else "su"[not v]
)
each_weight = pytest.mark.parametrize("case", WEIGHTS, ids=str)
each_activation = pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
each_once = pytest.mark.parametrize("case", FEW, ids=str)
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)


def deployed(quantizer, x):
    """What the deployed form computes for ``x``, and its integer codes."""
    if quantizer.role == "weight":
        codes, form = quantizer.freeze(x)
    else:
        form = quantizer.form()
        codes = form.encode(x)
    return form.decode(codes).to(x.dtype), codes, form


def channels(form) -> int:
    """How many channels of an activation have thresholds or scales of their own."""
    return getattr(form, "channels", form.scale.numel())


def has_zero(case) -> bool:
    """Whether zero is one of the levels."""
    quantizer, x = case.ready()
    form = deployed(quantizer, x)[2]
    return not form.decode(form.encode(torch.zeros_like(x))).any()


def close(actual, expected, tolerance=1e-9):
    actual = np.asarray(actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual)
    scale = max(1e-300, np.abs(expected).max()) if np.size(expected) else 1.0
    assert actual.shape == np.shape(expected)
    assert np.abs(actual - expected).max(initial=0) <= tolerance * scale


# -- the numbers -----------------------------------------------------------------------------------------------------
def test_every_algorithm_supplies_references():
    for name, algorithm in algorithms().items():
        for role in ("weight", "activation"):
            if getattr(algorithm, f"{role}_quantizer") is not None:
                assert (name, role) in REFERENCES, f"add a float64 reference for {name} {role}s to universal.py"


@each_weight
@each_layer
def test_grid_scale_is_the_scale_of_the_form(case, layer, no_host_sync):
    quantizer, w = case.ready(layer)
    with no_host_sync():
        scale = quantizer.grid_scale(w)
    assert not scale.requires_grad
    assert torch.equal(scale, quantizer.freeze(w).form.scale)


@each_activation
@pytest.mark.parametrize("signed", [False, True])
def test_grid_scale_of_activations_is_the_scale_of_the_form(case, signed, no_host_sync):
    quantizer, _ = case.ready(signed=signed)
    expected = quantizer.form().scale
    with no_host_sync():
        scale = quantizer.grid_scale()
    assert not scale.requires_grad and torch.equal(scale, expected)


@each_weight
def test_whoever_accepts_slices_quantizes_them_alike(case):
    quantizer, w = case.ready()
    part = quantizer.eval()(w[:, 1:3])
    assert torch.equal(part, quantizer(w)[:, 1:3]) or not quantizer.accepts_slices


@each_signed
def test_forward_and_backward_equal_the_float64_reference(case, signed):
    quantizer, x = case.ready(signed=signed)
    quantizer, x = quantizer.double(), x.double()
    grad = sample(x.shape, seed=5).double()
    ours = run(quantizer, x, grad)
    out, dx, params = REFERENCES[case.algorithm, case.role](quantizer, x.numpy(), grad.numpy())
    close(ours["out"], out)
    close(ours["dx"], dx)
    assert set(ours["params"]) == set(params)
    for name, expected in params.items():
        close(ours["params"][name], np.asarray(expected))


@each_layer
@pytest.mark.parametrize("case", cases("weight", bits=(4,)), ids=str)
def test_layer_geometries(case, layer: Layer):
    quantizer, x = case.ready(layer)
    out, _, _ = REFERENCES[case.algorithm, case.role](quantizer.double(), x.double().numpy(), x.double().numpy())
    close(quantizer(x.double()), out)
    quantizer = quantizer.float()
    assert torch.equal(quantizer(x), deployed(quantizer, x)[0])


@each_weight
def test_transposed_layers_quantize_as_their_transpose(case):
    plain, x = case.ready(Layer("conv", (6, 4, 3, 3)))
    transposed = case.make(Layer("transposed", (4, 6, 3, 3), 1)).eval()
    transposed.load_state_dict(plain.state_dict())
    assert torch.equal(transposed(x.transpose(0, 1)), plain(x).transpose(0, 1))


@each_weight
def test_an_owned_weight_leaves_training_and_is_folded(case):
    quantizer, w = case.ready()
    parameter = torch.nn.Parameter(w.clone())
    quantizer.fold_into(parameter)
    if not quantizer.owns_weight:
        assert parameter.requires_grad and torch.equal(parameter, w)
        return
    assert not parameter.requires_grad and torch.equal(parameter, quantizer(w))
    # nothing reads the value again, and a second calibration does not start anew from it
    values = quantizer(parameter)
    quantizer.calibrate(torch.zeros_like(w))
    assert torch.equal(quantizer(torch.zeros_like(w)), values)
    quantizer.reset_calibration()
    waiting = torch.nn.Parameter(w.clone())
    quantizer.fold_into(waiting)
    assert not waiting.requires_grad and torch.equal(waiting, w)
    quantizer.calibrate(torch.ones_like(w))
    assert not torch.equal(quantizer(w), values)


# -- the form --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@each_signed
def test_form_equals_the_evaluation_forward_bit_for_bit(case, signed, dtype):
    quantizer, x = case.ready(signed=signed)
    x = x.to(dtype)
    for model in (quantizer, copy.deepcopy(quantizer).to(dtype)):
        out = model(x)
        assert out.dtype == dtype
        assert torch.equal(out, deployed(model, x)[0])


@each
def test_codes_fit_the_bit_width(case):
    quantizer, x = case.ready()
    _, codes, form = deployed(quantizer, torch.cat([x.flatten(), x.flatten() * 50]).reshape(2, *x.shape)[0])
    assert codes.dtype == torch.int32
    if case.role == "weight" and case.algorithm in ZERO_ON_TOP:
        assert codes.unique().numel() <= 2**case.bits + 1
        return
    if case.role == "weight" and case.params.get("alphabet") in ONE_BIT_MORE:
        assert codes.unique().numel() <= 2**case.bits + 1 and form.bits == quantizer.bits == case.bits + 1
        return
    assert codes.unique().numel() <= 2**case.bits
    assert form.bits == case.bits
    x = sample((4096,) if channels(form) == 1 else (64, channels(form), 64), "activation", seed=3) * 100
    if case.role == "activation":
        codes = form.encode(x)
        assert codes.unique().numel() <= 2**case.bits
    assert int(codes.max()) - int(codes.min()) < 2**case.bits


@each
def test_idempotent_on_its_own_grid(case):
    quantizer, x = case.ready()
    values, codes, form = deployed(quantizer, x)
    if case.role == "activation" and case.algorithm in FREE_THRESHOLDS and isinstance(form, Staircase):
        return
    assert torch.equal(form.encode(values), codes)
    if case.role == "activation":
        assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@each
def test_form_survives_json(case):
    quantizer, x = case.ready()
    values, codes, form = deployed(quantizer, x)
    again = form_from_dict(form_to_dict(form))
    assert torch.equal(again.decode(codes), values) and torch.equal(again.encode(x), form.encode(x))


@pytest.mark.parametrize("case", [c for c in ALL if scale_invariant(c)], ids=str)
def test_codes_do_not_change_with_the_scale(case):
    codes = []
    for factor in (1.0, 4.0):
        quantizer = case.make().eval()
        x = sample((8, 4, 3, 3), case.role, signed=False) * factor
        quantizer.calibrate(x)
        codes.append(deployed(quantizer, x)[1])
    assert torch.equal(*codes)


@each_weight
def test_zeros_of_a_sparsity_algorithm_stay(case):
    if not get_algorithm(case.algorithm).weight_quantizer.has_zero:
        with pytest.raises(QuantizationError, match="layer: the grid has no zero, so sparsity cannot be kept"):
            case.make(keep_zeros=True)
        return
    quantizer, x = case.ready(keep_zeros=True)
    x[torch.rand(x.shape) < 0.5] = 0
    grad = torch.ones_like(x)
    result = run(quantizer, x, grad)
    if not has_zero(case):
        with pytest.raises(QuantizationError, match="the grid has no zero, so sparsity cannot be kept"):
            quantizer.freeze(x)
        return
    values, _, _ = deployed(quantizer, x)
    assert (result["out"][x == 0] == 0).all() and (values[x == 0] == 0).all()
    assert torch.equal(values, result["out"])
    # a learned mask must still see the weights that it switched off
    if case.algorithm in OWN_MASK:
        assert torch.equal(result["dx"], grad)
        return
    if case.algorithm in COUNTS_SURVIVORS:
        assert torch.equal(result["dx"][x == 0], grad[x == 0])
        return
    free, _ = case.ready(keep_zeros=False)
    assert torch.equal(result["dx"], run(free, x, grad)["dx"])


# -- state -----------------------------------------------------------------------------------------------------------
@each_signed
def test_state_dict_round_trip_through_safetensors(case, signed):
    quantizer, x = case.ready(signed=signed)
    fresh = case.make().eval()
    fresh.load_state_dict(load_safetensors(save_safetensors(quantizer.state_dict())))
    assert torch.equal(fresh(x), quantizer(x))
    assert (fresh.calibrated, fresh.signed) == (True, quantizer.signed)
    assert torch.equal(deployed(fresh, x)[1], deployed(quantizer, x)[1])


@each_once
def test_newer_or_foreign_states_are_refused(case):
    quantizer, x = case.ready()
    before, state = quantizer(x), quantizer.state_dict()
    newer = {**state, "status": state["status"] + torch.tensor([1, 0, 0])}
    with pytest.raises(CheckpointError, match=r"layer: checkpoint layout 2 is newer .* upgrade fat-plugins"):
        quantizer.load_state_dict(newer)
    with pytest.raises(CheckpointError, match="not a checkpoint of a fat-plugins quantizer"):
        quantizer.load_state_dict({**state, "status": torch.zeros(5)})
    assert torch.equal(quantizer(x), before)


@each_once
def test_older_states_are_upgraded(case, monkeypatch):
    quantizer, x = case.ready()
    state = quantizer.state_dict()
    fresh = case.make().eval()
    seen = []
    monkeypatch.setattr(type(fresh), "state_version", 7)
    monkeypatch.setattr(type(fresh), "upgrade_state", lambda self, state, prefix, version: seen.append(version))
    fresh.load_state_dict(state)
    assert seen == [1] and int(fresh.status[0]) == 7
    assert torch.equal(fresh(x), quantizer(x))


@each_once
def test_float_checkpoints_load_without_the_quantizer(case):
    quantizer, x = case.ready()
    before = quantizer(x)
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.calibrated and torch.equal(quantizer(x), before)


@each
def test_evaluation_is_deterministic_and_changes_nothing(case):
    quantizer, x = case.ready()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    first = quantizer(x)
    quantizer.train()(x)
    quantizer.load_state_dict(before)
    quantizer.eval()
    assert torch.equal(quantizer(x), first) and torch.equal(quantizer(x), first)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize("case", [c for c in FEW if list(c.make().parameters())], ids=str)
def test_deepcopy_is_independent_and_keeps_the_gradient_factor(case):
    quantizer, x = case.ready()
    grad = sample(x.shape, seed=5)
    plain = run(quantizer, x, grad)["params"]
    quantizer.set_lr_multiplier(3.0)
    quantizer.set_lr_multiplier(0.5)  # replaces, does not multiply
    once = copy.deepcopy(quantizer)
    twice = copy.deepcopy(once)
    reloaded = copy.deepcopy(quantizer)
    reloaded.load_state_dict(quantizer.state_dict(), assign=True)
    # assign=True shares tensors: put parameters of its own there
    reloaded.load_state_dict({k: v.clone() for k, v in quantizer.state_dict().items()}, assign=True)
    for clone in (quantizer, once, twice, reloaded):
        for name, g in run(clone, x, grad)["params"].items():
            assert torch.equal(g, plain[name] * 0.5), name
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(-2)  # logits that are doubled choose the same levels
    assert not torch.equal(twice(x), quantizer(x))


@each_once
def test_disabled_is_the_identity(case):
    quantizer, x = case.ready()
    quantizer.enabled = False
    assert quantizer(x) is x


@each_activation
def test_activations_are_the_identity_until_calibrated(case):
    quantizer = case.make()
    x = sample((2, 3), "activation")
    assert quantizer(x) is x and not quantizer.calibrated
    quantizer.calibrate(x)
    assert not torch.equal(quantizer(x), x)


@each_activation
def test_calibration_by_batches_and_by_range(case):
    x = sample((8, 16), "activation", signed=False)
    batches, whole, ranged = case.make(), case.make(), case.make()
    batches.calibrate(x[:4])
    assert not batches.signed
    batches.calibrate(x[4:] - 1)
    assert batches.signed  # one negative batch is enough
    whole.calibrate(x)
    ranged.calibrate_range(0.0, float(x.max()))
    for quantizer in (batches, whole, ranged):
        assert quantizer.calibrated
        values, _, form = deployed(quantizer.eval(), x)
        assert values.isfinite().all() and float(form.scale) > 0
    # the step of the range reaches its upper end
    form = ranged.form()
    if reaches_the_range(case):
        top = float(form.decode(form.encode(x.max())))
        assert top == pytest.approx(float(x.max()), rel=1e-5)
    # an unsigned grid is not widened by what it cannot reach
    forced = case.make(signed=False)
    forced.calibrate_range(-100.0, 1.0)
    reference = case.make(signed=False)
    reference.calibrate_range(0.0, 1.0)
    assert not forced.signed and torch.equal(forced.form().scale, reference.form().scale)
    forced.calibrate(torch.tensor([-100.0, 0.5, 1.5]))
    reference.calibrate(torch.tensor([0.0, 0.5, 1.5]))
    assert not forced.signed and torch.equal(forced.form().scale, reference.form().scale)
    fresh, clipped = case.make(signed=False), case.make(signed=False)
    fresh.calibrate(torch.tensor([-100.0, 0.5, 1.5]))
    clipped.calibrate(torch.tensor([0.0, 0.5, 1.5]))
    assert torch.equal(fresh.form().scale, clipped.form().scale)


# -- numerics, devices, compilation ----------------------------------------------------------------------------------
@each_once
def test_autocast_computes_codes_in_float32(case):
    quantizer, x = case.ready()
    if case.role == "weight":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer(x), quantizer.float()(x)) and quantizer(x).dtype == torch.float32
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(half)
        _, codes, _ = deployed(quantizer, half)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantizer(half.float()).bfloat16())
    assert torch.equal(codes, deployed(quantizer, half.float())[1])


@each_once
def test_no_host_synchronisation_in_a_training_step(case, no_host_sync):
    quantizer, x = case.ready()
    quantizer.train()
    grad = torch.ones_like(x)
    x.requires_grad_()
    with no_host_sync():
        quantizer(x).backward(grad)
        with torch.autocast("cpu", torch.bfloat16):
            quantizer(x).backward(grad)
    grads = [p.grad for p in quantizer.parameters()] + ([] if getattr(quantizer, "owns_weight", False) else [x.grad])
    assert grads and all(g.isfinite().all() for g in grads)


def test_the_no_host_sync_check_can_fail(no_host_sync):
    with no_host_sync(), pytest.raises(AssertionError, match="stalls"):
        torch.ones(1).item()
    with no_host_sync(), pytest.raises(AssertionError, match="stalls"):
        bool(torch.ones(1) > 0)
    assert torch.ones(1).item() == 1


@each_once
def test_memory_only_the_input_is_kept_for_the_backward(case):
    """No codes, masks or residuals of the size of the input are saved, beside what the transform itself needs."""
    quantizer, x = case.ready()
    x = (x if case.role == "weight" else sample((8, 3, 8, 16), "activation")).requires_grad_()
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        quantizer(x)
    big = [n for n in saved.values() if n >= x.numel() * x.element_size()]
    if case.role == "activation":
        assert len(big) == 1
    elif case.algorithm not in TRANSFORMS_WEIGHTS:
        assert len(big) <= 1


@pytest.mark.gpu
@each_once
def test_cuda_equals_cpu(case):
    quantizer, x = case.ready()
    grad = sample(x.shape, seed=5)
    cpu = run(quantizer, x, grad)
    _, codes, _ = deployed(quantizer, x)
    gpu_quantizer = copy.deepcopy(quantizer).cuda()
    gpu = run(gpu_quantizer, x.cuda(), grad.cuda())
    gpu_codes = deployed(gpu_quantizer, x.cuda())[1].cpu()
    assert (gpu_codes != codes).float().mean() < 1e-3  # ties may fall differently
    torch.testing.assert_close(gpu["dx"].cpu(), cpu["dx"], rtol=1e-3, atol=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_quantizer.train()
        gpu_quantizer(x.cuda().requires_grad_()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- edges -----------------------------------------------------------------------------------------------------------
EDGES = {
    "zero": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.full_like(x, 0.3),
    "negative_constant": lambda x: torch.full_like(x, -0.3),
    "one_zero_filter": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "outlier": lambda x: torch.cat([x[:1] * 1e6, x[1:]]),
    "huge": lambda x: (x * 1e37).clamp(-3e38, 3e38),
    "tiny": lambda x: x * 1e-36,
    "subnormal": lambda x: x * 1e-40,
}


@pytest.mark.parametrize("edge", EDGES)
@each_once
def test_edge_values_give_finite_results(case, edge):
    x = EDGES[edge](sample((8, 4, 3, 3), case.role, signed=True))
    quantizer = case.make()
    quantizer.calibrate(x)
    for mode in (True, False):
        result = run(quantizer.train(mode), x, torch.ones_like(x))
        assert result["out"].isfinite().all()
        assert all(g.isfinite().all() for g in result["params"].values())
        if edge not in ("tiny", "subnormal"):  # there 1/std is itself beyond float32
            assert result["dx"].isfinite().all()
    values, _, _ = deployed(quantizer.eval(), x)
    assert torch.equal(values, quantizer(x))
    if edge == "zero" and has_zero(case):
        assert not values.any()


@pytest.mark.parametrize("shape,axis", [((1,), 0), ((1, 1, 1, 1), 0), ((1, 5), 0), ((5, 1), 0), ((5, 1), 1)])
@pytest.mark.parametrize("case", cases("weight", bits=(2, 4)), ids=str)
def test_smallest_weights(case, shape, axis):
    layer = Layer("small", shape, axis)
    quantizer = case.make(layer)
    x = sample(shape)
    quantizer.calibrate(x)
    for mode in (True, False):  # training may be soft or noisy
        result = run(quantizer.train(mode), x, torch.ones_like(x))
        assert result["out"].isfinite().all() and result["dx"].isfinite().all()
    assert torch.equal(result["out"], deployed(quantizer, x)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_once
def test_nan_and_infinity_are_refused_where_they_would_stay(case, value):
    x = sample((8, 4, 3, 3), case.role)
    bad = x.clone()
    bad[1, 2, 1, 1] = value
    quantizer = case.make()
    with pytest.raises(QuantizationError, match=r"layer: .* holds NaN or infinite values"):
        quantizer.calibrate(bad)
    assert not quantizer.calibrated
    quantizer.calibrate(x)
    if case.role == "weight":
        with pytest.raises(QuantizationError, match="layer: weight holds NaN or infinite values"):
            quantizer.freeze(bad)
    else:
        with pytest.raises(QuantizationError, match=r"layer: range .* is not finite"):
            quantizer.calibrate_range(0.0, value)
        out = quantizer.eval()(bad)
        # NaN stays visible, infinity takes the end of the grid, nothing else changes
        assert torch.isnan(out[1, 2, 1, 1]) if value != value else out.isfinite().all()
        mask = torch.ones_like(x, dtype=torch.bool)
        mask[1, 2, 1, 1] = False
        assert torch.equal(out[mask], quantizer(x)[mask])


@each_activation
def test_nan_has_no_code(case):
    quantizer, _ = case.ready()
    with pytest.raises(QuantizationError, match="cannot encode a tensor that holds NaN"):
        quantizer.form().encode(torch.tensor([1.0, float("nan")]))


@each_once
def test_empty_tensors(case):
    if case.role == "weight":
        with pytest.raises(QuantizationError, match=r"layer: cannot quantize an empty tensor"):
            case.make(Layer("empty", (0, 3)))
        with pytest.raises(QuantizationError, match=r"layer: cannot quantize an empty tensor"):
            case.make(Layer("none", ()))
        with pytest.raises(QuantizationError, match=r"layer: channel axis 4 is outside a weight of shape \[8, 4\]"):
            case.make(Layer("axis", (8, 4), 4))
        with pytest.raises(QuantizationError, match=r"layer: cannot quantize an empty tensor"):
            case.make().calibrate(torch.empty(0))
        return
    quantizer = case.make()
    with pytest.raises(QuantizationError, match="layer: cannot calibrate on an empty tensor"):
        quantizer.calibrate(torch.empty(0, 3))
    quantizer, _ = case.ready()
    for mode in (True, False):  # a batch whose last part is empty is legal
        assert run(quantizer.train(mode), torch.empty(0, 3), torch.empty(0, 3))["out"].shape == (0, 3)
    if channels(quantizer.form()) == 1:
        scalar = torch.tensor(0.7)
        assert run(quantizer, scalar, torch.tensor(1.0))["out"].shape == ()


# -- the contract with optimizers, configs and hosts -----------------------------------------------------------------
@each_once
def test_param_groups_name_only_own_parameters_once(case):
    quantizer = case.make()
    own = {id(p) for p in quantizer.parameters()}
    seen = [id(p) for g in quantizer.param_groups(0.1, 1e-3) for p in g["params"]]
    assert len(seen) == len(set(seen)) and set(seen) <= own


@pytest.mark.parametrize("name", list(algorithms()))
def test_unknown_params_name_the_nearest_key(name):
    algorithm = get_algorithm(name)
    for key in algorithm.Params.model_fields:
        with pytest.raises(ConfigError, match=f"params.{key}x: unknown key; allowed: .*; did you mean '{key}'"):
            algorithm.parse_params({key + "x": 1})
    with pytest.raises(ConfigError, match="params: expected an object, got"):
        algorithm.parse_params([1])


@pytest.mark.parametrize("bits", [0, 1, 9, -1, "4", True, 4.0, None, 32])
@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("name", list(algorithms()))
def test_bits_outside_the_definition_are_one_clear_line(name, role, bits):
    algorithm = get_algorithm(name)
    low, high = getattr(algorithm, f"{role}_bits")
    if type(bits) is int and low <= bits <= high:
        assert algorithm.make(TensorSpec(role, bits, name="conv1", shape=(4, 4))).spec.bits == bits
        return
    with pytest.raises(ConfigError) as error:
        algorithm.make(TensorSpec(role, bits, name="conv1", shape=(4, 4)))
    text = str(error.value)
    assert text.startswith(f"conv1: algorithm '{name}' has no {bits!r}-bit {role}s; allowed: {low} to {high}")
    too_low = type(bits) is int and bits < low
    assert (algorithm.bits_reason in text) == too_low and "\n" not in text


@pytest.mark.parametrize("name", list(algorithms()))
def test_granularity_that_is_not_defined_is_refused(name):
    algorithm = get_algorithm(name)
    for role, allowed in (
        ("weight", algorithm.per_channel_weights),
        ("activation", algorithm.per_channel_activations),
    ):
        spec = TensorSpec(role, getattr(algorithm, f"{role}_bits")[1], name="conv1", shape=(4, 4), per_channel=True)
        if allowed:
            assert algorithm.make(spec) is not None
        else:
            with pytest.raises(ConfigError, match=f"conv1: .* one scale per {role} tensor; per_channel must be false"):
                algorithm.make(spec)


@pytest.mark.parametrize("name", list(algorithms()))
def test_descriptions_for_tables(name):
    algorithm = get_algorithm(name)
    assert algorithm.title and algorithm.paper and algorithm.fidelity and algorithm.bits_reason
    assert all(f.description for f in algorithm.Params.model_fields.values())
    assert any(case.algorithm == name for case in WEIGHTS)
