"""BiTAT: the vectors, acceptance tests and pitfalls of its specification (sections 10 and 11)."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import bitat_metric
from torch import nn

from fat_plugins import ConfigError, QuantizationError, TensorSpec, get_algorithm
from fat_plugins.algorithms.bitat import RPReLU, distillation_loss, maths
from fat_plugins.algorithms.bitat.quantizers import FIXED, FREE, SCALES, WAITING
from fat_plugins.algorithms.bitat.stages import cayley
from fat_plugins.forms import Codebook, Staircase
from fat_plugins.functional import per_channel_view
from fat_plugins.network import set_progress
from fat_plugins.quantizer import LayerQuantizers, Progress, conv_geometry, module_geometry

BITAT = get_algorithm("bitat")


# --------------------------------------------------------------------------------------------------------------------
# the example layers of section 11
# --------------------------------------------------------------------------------------------------------------------
def wave(*shape, a=1.7, b=0.5):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * a * i * i + 1.3 * a * i + b).reshape(shape)


X = wave(64, 3, a=2.1) @ wave(3, 6, a=0.7) + 0.15 * wave(64, 6, a=3.3) + 0.4
W = 0.2 * wave(6, 3, a=1.1, b=0.2)
X2 = maths.sign((X - X.mean(0)) @ W + 0.1 * wave(1, 3))
W2 = 0.3 * wave(3, 4, a=0.6)


def metric(x, k_max=256, groups=1, **options):
    rows = x if x.ndim == 3 else x.unsqueeze(0)
    moments = maths.Moments(len(rows), rows.shape[-1], rows.device)
    moments.add(rows)
    mean, sigma = moments.covariance()
    return maths.make_metric(mean, sigma, float(moments.count), eps=1e-4, k_max=k_max, **options)


def plain(w):
    """``sgn(w) * mean|w|`` per column."""
    return maths.sign(w) * w.abs().mean(0)


def test_objective_is_the_centred_output_error():
    m, error = metric(X), W - plain(W)
    output = ((X - X.mean(0)) @ error).square().sum(1).mean()
    assert float(output) == pytest.approx(0.0810137, abs=5e-8)
    assert float(m.level * m.objective(error[None])) == pytest.approx(float(output), rel=1e-9)
    assert float(m.objective(error[None])) == pytest.approx(0.111463, abs=5e-7)
    reference, level, mean = bitat_metric(X.numpy())
    np.testing.assert_allclose(m.times(torch.eye(6, dtype=torch.float64)[None])[0], reference, atol=1e-12)
    assert float(m.level) == pytest.approx(level) and np.allclose(m.mean[0], mean)
    assert float(m.importance.square().mean()) == pytest.approx(1.0, abs=1e-4)


def test_solver_history_and_result():
    m = metric(X)
    signs, alpha, history = maths.solve(W[None], m)
    assert history == pytest.approx([0.107252, 0.041569, 0.031936], abs=5e-7)
    error = W[None] - signs * alpha.unsqueeze(1)
    assert float(m.objective(error)) == pytest.approx(history[-1])
    # no single flip lowers J, and alpha is the best for these signs
    for i in range(6):
        for j in range(3):
            flipped = signs.clone()
            flipped[0, i, j] *= -1
            assert m.objective(W[None] - flipped * alpha.unsqueeze(1)) >= m.objective(error)
    for factor in (0.999, 1.001):
        assert m.objective(W[None] - signs * alpha.unsqueeze(1) * factor) > m.objective(error)


def test_solver_on_random_layers_never_goes_up_and_beats_the_mean():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 300, 12, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
        w = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
        for k, shared in ((256, False), (5, False), (256, True)):
            m = metric(x, k_max=k)
            _signs, alpha, history = maths.solve(w, m, shared=shared)
            assert all(b <= a + 1e-9 for a, b in itertools.pairwise(history)) and (alpha > 0).all()
            scale = w.abs().mean((0, 1, 2)) if shared else w.abs().mean(1, keepdim=True)
            assert history[-1] <= float(m.objective(w - maths.sign(w) * scale))
            assert not shared or alpha.unique().numel() == 1


def test_solver_turns_a_negative_scale_around():
    # two inputs that are nearly opposite: sgn(w) points away from the output
    x = torch.tensor([[1.0, -0.99], [-1.0, 0.99], [1.1, -1.0], [-1.1, 1.0]], dtype=torch.float64).repeat(20, 1)
    w = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    m = metric(x)
    _signs, alpha, history = maths.solve(w, m)
    assert (alpha > 0).all() and history[-1] <= history[0]


def test_aggregation():
    full = metric(X)
    assert metric(X, k_max=6).reduction is None
    m = metric(X, k_max=4)
    p = m.reduction[0]
    torch.testing.assert_close(p @ p.T, torch.eye(4, dtype=torch.float64))
    dense = m.times(torch.eye(6, dtype=torch.float64)[None])[0]
    assert float(dense.trace()) == pytest.approx(6.0, abs=1e-3)
    assert float(full.diagonal().sum()) == pytest.approx(6.0, abs=1e-3)
    # diagonal and columns are those of the same matrix, and the errors inside a group are not free
    torch.testing.assert_close(m.diagonal()[0], dense.diagonal())
    for i in range(6):
        torch.testing.assert_close(m.column(torch.tensor([i]))[0], dense[:, i])
    inside = torch.linalg.svd(p)[2][4:].T
    assert torch.linalg.eigvalsh(inside.T @ dense @ inside).min() > 0
    # with k = d the aggregated form is the plain one
    same = copy.copy(full)
    same.reduction = torch.eye(6, dtype=torch.float64)[None]
    error = (W - plain(W))[None]
    assert float(same.objective(error)) == pytest.approx(float(full.objective(error)))


def test_kmeans_is_deterministic_and_leaves_no_cluster_empty():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = maths.kmeans(rows, 7, 3)
    assert torch.equal(labels, maths.kmeans(rows, 7, 3)) and labels.unique().numel() == 7
    copies = torch.ones(9, 4)
    assert maths.kmeans(copies, 5, 0).unique().numel() == 5
    two = torch.cat([torch.zeros(10, 2), torch.ones(6, 2)])
    split = maths.kmeans(two, 2, 1)
    assert split[:10].unique().numel() == split[10:].unique().numel() == 1 and split[0] != split[-1]


def test_permutation_of_the_inputs_changes_nothing():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    a, b = metric(X), metric(X[:, order])
    error = (W - plain(W))[None]
    assert float(b.objective(error[:, order])) == pytest.approx(float(a.objective(error)))
    assert maths.solve(W[order][None], b)[2] == pytest.approx(maths.solve(W[None], a)[2])


# --------------------------------------------------------------------------------------------------------------------
# a small host: layers that run in order, with data
# --------------------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """What an adapter makes of layers: quantizers in front of each, a coordinator, calibration passes."""

    def __init__(self, layers, params=None, activations=True, data=None, tail=True, **spec):
        super().__init__()
        params = {"calibration_samples": 64, **(params or {})}
        self.layers = nn.ModuleList(layers)
        self.act = nn.ModuleList()
        self.quant = nn.ModuleList()
        for i, layer in enumerate(layers):
            axis = 1 if getattr(layer, "transposed", False) else 0
            shape = TensorSpec(
                "weight", 1, f"layer{i}", tuple(layer.weight.shape), axis, **module_geometry(layer), **spec
            )
            self.quant.append(BITAT.make_weight(shape, params))
            self.quant[i].calibrate(layer.weight)
            own = activations and (activations is True or i in activations)
            self.act.append(BITAT.make_activation(TensorSpec("activation", 1, f"in{i}", channel_axis=1), params) if own
                            else nn.Identity())  # fmt: skip
        self.tail = nn.LazyLinear(3) if tail else None
        self.data = data
        known = [
            LayerQuantizers(f"layer{i}", q, a if own_input(a) else None,
                            {f"layer{i}.{n}": p for n, p in layer.named_parameters()})
            for i, (q, a, layer) in enumerate(zip(self.quant, self.act, layers, strict=True))
        ]  # fmt: skip
        self.stages = BITAT.make_coordinator(known)
        if data is not None:
            self.eval()
            for a in self.act:
                if own_input(a):
                    a.enabled = False
            with torch.no_grad():
                for a in self.act:
                    if own_input(a):
                        a.register_forward_pre_hook(lambda m, args: m.calibrate(args[0]) if not m.calibrated else None)
                self(data)
            for a in self.act:
                if own_input(a):
                    a.enabled = True
                    a._forward_pre_hooks.clear()
            self.train()
            self.passes = 0
            self.stages.set_calibration(self.calibrate)

    def calibrate(self, samples):
        self.passes += 1
        training = self.training
        self.eval()
        with torch.no_grad():
            self(self.data[:samples])
        self.train(training)

    def forward(self, x):
        for a, q, layer in zip(self.act, self.quant, self.layers, strict=True):
            x = a(x)
            if q.wants_input:
                q.observe_input(x)
            weight = q(layer.weight)
            if isinstance(layer, nn.Linear):
                x = F.linear(x, weight, layer.bias)
            else:
                x = layer._conv_forward(x, weight, layer.bias)
        return x if self.tail is None else self.tail(x.flatten(1))


def own_input(module):
    return hasattr(module, "set_waiting")


def mlp(n=3, params=None, seed=0, width=8, **options):
    torch.manual_seed(seed)
    data = torch.randn(64, 6) + 0.2
    sizes = [6] + [width] * n
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return Net(layers, params, data=data, **options)


def run_epoch(net, optimizer, epoch, total=None, steps=2):
    """Two steps of an ordinary loop."""
    losses = []
    for step in range(steps):
        set_progress(net, Progress(epoch * steps + step, epoch, total and total * steps, total))
        target = torch.arange(len(net.data)) % 3
        loss = F.cross_entropy(net(net.data), target)
        reg = net.stages.regularization()
        loss = loss if reg is None else loss + reg
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(net, lr=1e-2, **options):
    return torch.optim.Adam(net.parameters(), lr, **options)


def start(net, epoch=0, **progress):
    set_progress(net, Progress(epoch=epoch, **progress))
    return net


# -- schedule --------------------------------------------------------------------------------------------------------
def test_stages_go_bottom_up_and_layers_below_stay_bit_identical():
    net = mlp(3, {"epochs_per_layer": 2})
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    kept = {}
    for epoch in range(8):
        above = [layer.weight.detach().clone() for layer in net.layers]
        run_epoch(net, optimizer, epoch)
        stage = min(epoch // 2, 3)
        phases = [q._phase for q in net.quant]
        assert phases == ([FIXED] * stage + [FREE] + [WAITING] * (2 - stage) if stage < 3 else [SCALES] * 3)
        for i, q in enumerate(net.quant):
            if i < stage < 3:
                value = q.freeze(net.layers[i].weight)
                value = value.form.decode(value.codes)
                assert torch.equal(kept.setdefault(i, value), value)  # whatever momentum and decay did
                assert torch.equal(net.quant[i](net.layers[i].weight), value)
            if stage < i:  # full precision and trained along
                assert not torch.equal(net.layers[i].weight, above[i])
    # final phase: signs stay, scales train from where they were kept
    for i, q in enumerate(net.quant):
        codes, form = q.freeze(net.layers[i].weight)
        if i in kept:
            assert torch.equal(form.decode(codes).sign(), kept[i].sign())
            assert not torch.equal(form.decode(codes), kept[i])


def test_waiting_layers_are_float_in_training_and_deployed_in_evaluation():
    net = start(mlp(3))
    waiting, weight = net.quant[2], net.layers[2].weight
    assert torch.equal(waiting(weight), weight)
    net.eval()
    codes, form = waiting.freeze(weight)
    assert torch.equal(waiting(weight), form.decode(codes))
    torch.testing.assert_close(form.scale, weight.abs().mean(1))
    x = torch.randn(4, 8)
    net.train()
    assert torch.equal(net.act[2](x), x)  # progressive: the binarizer comes with the stage
    net.eval()
    assert set(net.act[2](x).unique().tolist()) <= {-1.0, 1.0}


def test_calibration_passes_see_the_partly_quantized_network():
    net = mlp(2, {"train_transform": False})
    seen = []
    observe = net.quant[0].observe_input
    net.quant[0].observe_input = lambda x: (seen.append((x.clone(), net.training)), observe(x))
    waiting = []
    original = net.act[1].quantize
    net.act[1].quantize = lambda x: (waiting.append(torch.equal(original(x), x)), original(x))[1]
    start(net)
    assert net.passes == 2  # beta, then statistics behind it
    ((x, training),) = seen
    assert not training and set(x.unique().tolist()) <= {-1.0, 1.0}
    assert all(waiting) and net.training


@pytest.mark.parametrize(
    "total,params,expected",
    [
        (10, {}, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]),
        (None, {}, [0, 1, 2, 3, 3]),
        (20, {"epochs_per_layer": 3}, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (12, {"act_schedule": "first", "activation_epochs": 2}, [-1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (8, {"act_schedule": "first"}, [-1, -1, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_schedule(total, params, expected):
    stages = mlp(3, params).stages
    assert [stages.stage_of(Progress(epoch=e, total_epochs=total)) for e in range(len(expected))] == expected


def test_short_runs_still_binarize_every_layer():
    stages = mlp(5).stages
    found = [stages.stage_of(Progress(step=s, epoch=s // 10, total_steps=20, total_epochs=2)) for s in range(20)]
    assert found == sorted(found) and set(found) == {0, 1, 2, 3, 4, 5} and found[14] == 5


def test_first_binarizes_all_activations_before_any_weight():
    net = start(mlp(3, {"act_schedule": "first", "activation_epochs": 1}))
    assert [a._waiting for a in net.act] == [False] * 3 and [q._phase for q in net.quant] == [WAITING] * 3
    start(net, 1)
    assert [q._phase for q in net.quant] == [FREE, WAITING, WAITING]


def test_joint_finetune_trains_signs_again_from_where_they_were():
    net = mlp(2, {"joint_finetune": True})
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.5)
    for epoch in range(2):
        run_epoch(net, optimizer, epoch)
    before = [q.freeze(layer.weight).codes for q, layer in zip(net.quant, net.layers, strict=True)]
    start(net, 2)
    assert [q._phase for q in net.quant] == [FREE, FREE]
    for q, layer, codes in zip(net.quant, net.layers, before, strict=True):
        assert torch.equal(q.freeze(layer.weight).codes, codes)
    assert float(net.stages.regularization().detach()) == 0  # J off
    run_epoch(net, optimizer, 2)
    assert net.layers[0].weight.grad.abs().max() > 0


def test_skipped_epochs_go_through_every_stage_and_time_never_runs_back():
    net = start(mlp(3), 2)
    assert [q._phase for q in net.quant] == [FIXED, FIXED, FREE]
    start(net, 0)
    assert net.stages._stage == 2


def test_without_a_driven_schedule_every_layer_is_binary_from_the_start():
    net = mlp(2)
    for q, layer in zip(net.quant, net.layers, strict=True):
        assert torch.equal(q(layer.weight).detach().abs().unique(dim=1), q.alpha.detach().unsqueeze(1))


@pytest.mark.parametrize(
    "params", [{}, {"mode": "penalty"}, {"train_transform": False}, {"max_dimensions": 4}], ids=str
)
def test_resume_in_the_middle_of_a_stage_is_exact(params):
    net = mlp(4, {"epochs_per_layer": 2, **params})
    optimizer = adam(net)
    for epoch in range(3):
        run_epoch(net, optimizer, epoch)
    state, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    fresh = mlp(4, {"epochs_per_layer": 2, **params}, seed=7)
    fresh.data = net.data
    set_progress(fresh, Progress(), begun=False)  # what a host does before a checkpoint is loaded
    assert fresh.stages._stage == -2 and fresh.passes == 0
    fresh.load_state_dict(state)
    again = adam(fresh)
    again.load_state_dict(moments)
    for epoch in range(3, 9):
        assert run_epoch(fresh, again, epoch) == run_epoch(net, optimizer, epoch)
    assert torch.equal(fresh.eval()(net.data), net.eval()(net.data))


def test_state_dict_survives_safetensors():
    from safetensors.torch import load, save

    net = start(mlp(2), 1)
    other = mlp(2, seed=3)
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(other.eval()(net.data), net.eval()(net.data)) and other.stages._stage == 1


def test_copies_have_no_data_of_the_original():
    net = mlp(2)
    clone = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="layer0: no calibration data reached the coordinator; the signs come from"):
        start(clone)
    assert net.passes == 0 and net.stages._stage == -2
    assert clone.stages.layers[0].weight is clone.quant[0]


def test_every_parameter_has_a_gradient_in_every_phase():
    """DistributedDataParallel would stall on a parameter that takes no part."""
    net = mlp(3)
    for epoch in range(4):
        run_epoch(net, adam(net), epoch, steps=1)
        assert all(p.grad is not None for p in net.parameters())


# -- the loss --------------------------------------------------------------------------------------------------------
def grown(params=None, k_max=256):
    """A coordinator in the second stage of its block."""
    return start(mlp(3, {"max_dimensions": k_max, **(params or {})}), 1)


def test_block_error_is_the_sum_of_the_layers_at_the_start():
    m1, m2 = metric(X), metric(X2)
    total = m1.objective((W - plain(W))[None]) + m2.objective((W2 - plain(W2))[None])
    assert float(total) == pytest.approx(0.163973, abs=5e-7)
    # and so it is in a coordinator whose basis has not been trained
    for k in (256, 4):
        net = mlp(2, {"max_dimensions": k})
        start(net)
        first = float(net.stages.block_error().detach())
        start(net, 1)
        second = net.stages
        own = metric_of(net, 1)
        error = second.reference.double() - maths.to_columns(
            net.quant[1](net.layers[1].weight).double(), net.quant[1].spec
        )
        assert float(second.block_error().detach()) == pytest.approx(
            first + float(own.objective(error.detach())), rel=1e-4
        )


def metric_of(net, i):
    q = net.quant[i]
    q.collect()
    net.stages._run()
    moments = q.collected()
    mean, sigma = moments.covariance()
    import zlib

    seed = zlib.crc32(f"0 {q.spec.name}".encode())
    return maths.make_metric(mean, sigma, float(moments.count), eps=1e-4, k_max=q.params.max_dimensions, seed=seed)


def test_off_diagonal_entries_judge_an_error_in_directions_of_the_layers_below():
    net = grown({"mode": "penalty"})
    stages = net.stages
    before = float(stages.block_error().detach())
    d = stages.basis.shape[-1]
    with torch.no_grad():
        rotation = stages.rotation[: d * d].view(1, d, d)
        low = stages.error0.shape[1]
        assert (rotation[0, :low, low:] == 0).all() and (rotation[0, low:, :low] == 0).all()
        rotation[0, low:, :low] += 0.3
    assert float(stages.block_error().detach()) > before
    stages.block_error().backward()
    assert stages.rotation.grad.view(-1)[: d * d].view(d, d)[low:, :low].abs().max() > 0


def test_gradients_of_the_objective():
    """Section 4.1 and 4.2, against autograd in float64."""
    m = metric(X)
    basis, s, w = m.basis[0].clone(), m.importance[0].clone(), W
    theta = (0.5 * wave(6, 3, a=0.9)).requires_grad_()
    alpha = torch.full((3,), 0.13, dtype=torch.float64, requires_grad=True)
    t, v = s.log().requires_grad_(), basis.requires_grad_()
    quantizer = BITAT.make_weight(TensorSpec("weight", 1, shape=(3, 6))).double()
    quantizer.alpha.data = alpha.detach().clone()
    what = quantizer(theta.T).T
    what.retain_grad()
    j = (t.exp().unsqueeze(1) * (v.T @ (w - what))).square().sum()
    j.backward()
    error = (w - what).detach()
    dense = basis.detach() @ torch.diag(s.square()) @ basis.detach().T
    dwhat = -2 * dense @ error
    torch.testing.assert_close(what.grad, dwhat)
    torch.testing.assert_close(theta.grad, dwhat)  # all |theta| <= 1
    torch.testing.assert_close(quantizer.alpha.grad, (dwhat * maths.sign(theta.detach())).sum(0))
    torch.testing.assert_close(t.grad, 2 * s.square() * (basis.detach().T @ error).square().sum(1))
    torch.testing.assert_close(v.grad, 2 * error @ error.T @ basis.detach() @ torch.diag(s.square()))


def test_error_term_reaches_weight_scale_and_transform():
    net = start(mlp(2))
    net.stages.regularization().backward()
    assert all(p.grad.abs().max() > 0 for p in (net.layers[0].weight, net.quant[0].alpha))
    assert all(p.grad.abs().max() > 0 for p in (net.stages.rotation, net.stages.log_importance))
    # relative to ||diag(s) V' W||^2 the middle term starts below 1
    assert 0 < float(net.stages.regularization().detach()) < 1


def test_constraints_hold_in_mode_exact():
    net = mlp(3)
    optimizer = adam(net, 0.05)
    start(net)
    stages = net.stages
    assert float(stages.penalty().detach()) < 1e-9
    basis, log_s = (t.detach() for t in stages._transform())
    torch.testing.assert_close(basis, stages.basis)  # start parameter 0: V is V_0 exactly
    for _ in range(100):
        run_epoch(net, optimizer, 0, steps=1)
    basis, log_s = (t.detach() for t in stages._transform())
    assert (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max() < 1e-5
    assert not torch.allclose(basis, stages.basis, atol=1e-3)
    torch.testing.assert_close(log_s.sum(1), stages.start.sum(1), rtol=1e-4, atol=1e-4)
    assert (stages.log_importance[: log_s.numel()].detach() - stages.start.flatten()).abs().max() <= 2.0
    start(net)  # the drift is bounded by log 4
    own = stages.log_importance[: log_s.numel()].detach() - stages.start.flatten()
    assert own.abs().max() <= math.log(4) + 1e-6


def test_mode_penalty_starts_at_zero_and_pulls_back():
    net = start(mlp(2, {"mode": "penalty"}))
    stages = net.stages
    assert float(stages.penalty().detach()) < 1e-9
    with torch.no_grad():
        stages.rotation.mul_(1.5)
    assert float(stages.penalty().detach()) > 0.1
    plain_loss = float(stages.regularization().detach())
    stages.params = stages.params.model_copy(update={"basis_penalty": 0.0, "importance_penalty": 0.0})
    assert plain_loss > float(stages.regularization().detach())


def test_cayley_is_orthogonal_and_the_identity_at_zero():
    a = torch.randn(2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(cayley(a) @ cayley(a).mT, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    assert torch.equal(cayley(torch.zeros(1, 4, 4)), torch.eye(4)[None])
    from torch.nn.utils.parametrizations import orthogonal

    layer = orthogonal(nn.Linear(5, 5, bias=False).double(), orthogonal_map="cayley", use_trivialization=False)
    own = layer.parametrizations.weight.original.detach()
    torch.testing.assert_close(cayley(-own[None])[0], layer.weight.detach())


def test_terms_can_be_left_out():
    net = start(mlp(2, {"train_transform": False, "error_weight": 0.0}))
    assert net.stages.rotation is None and not list(net.stages.parameters())
    assert float(net.stages.regularization()) == 0
    only = start(mlp(2, {"error_weight": 0.0, "l1_weight": 0.5}))
    expected = 0.5 * only.layers[0].weight.abs().mean()
    torch.testing.assert_close(only.stages.regularization(), expected)


def test_transform_learns_at_a_tenth_of_the_rate_without_decay():
    from fat_plugins.network import param_groups

    net = mlp(2)
    groups = param_groups(net, 0.1, 1e-4)
    where = {id(p): g for g in groups for p in g["params"]}
    assert where[id(net.stages.rotation)]["lr"] == pytest.approx(0.01)
    assert where[id(net.stages.rotation)]["weight_decay"] == where[id(net.quant[0].alpha)]["weight_decay"] == 0
    assert where[id(net.layers[0].weight)]["weight_decay"] == 1e-4


def test_autocast_changes_nothing_in_the_loss():
    net = start(mlp(2, {"max_dimensions": 4}))
    expected = net.stages.regularization()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.stages.regularization(), expected)


def test_no_host_synchronisation_in_the_loss(no_host_sync):
    net = start(mlp(3), 1)
    with no_host_sync():
        net.stages.regularization().backward()


# -- the start of a stage --------------------------------------------------------------------------------------------
def test_start_values_of_a_stage():
    net = mlp(1, {"train_transform": False})
    reference = net.layers[0].weight.detach().clone()
    start(net)
    theta = net.layers[0].weight.detach()
    torch.testing.assert_close(theta.abs(), reference.abs())  # Theta = B |W|
    signs, alpha, _ = maths.solve(reference.T.double()[None], metric_of(net, 0))
    assert torch.equal(theta.sign().T.double(), signs[0])
    torch.testing.assert_close(net.quant[0].alpha.detach(), alpha[0].float())
    torch.testing.assert_close(net.stages.reference[0], reference.T)


def test_output_error_without_training_beats_the_plain_signs():
    """Section 3.5: what the method measurably buys is the start point."""
    torch.manual_seed(0)
    x = torch.randn(512, 32) @ torch.randn(32, 32)
    layer = nn.Linear(32, 16)
    net = Net([layer], {"calibration_samples": 512}, activations=False, data=x, tail=False)
    wanted = F.linear(x, layer.weight, layer.bias).detach()
    plain_error = F.linear(x, maths.sign(layer.weight) * layer.weight.abs().mean(1, keepdim=True), layer.bias) - wanted
    start(net)
    found = net.eval()(x) - wanted
    assert found.square().mean() < 0.65 * plain_error.square().mean()


def test_bias_takes_what_the_mean_input_loses():
    x = torch.randn(256, 6) + 3
    for norm in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(6, 4)
        bias, reference = layer.bias.detach().clone(), layer.weight.detach().clone()
        net = Net([layer], {"calibration_samples": 256}, activations=False, data=x, tail=False, followed_by_norm=norm)
        start(net)
        lost = x.mean(0) @ (reference - net.quant[0](layer.weight).detach()).T
        torch.testing.assert_close(layer.bias.detach(), bias if norm else bias + lost, rtol=1e-4, atol=1e-4)


def test_blocks_hold_three_layers_and_grouped_layers_stand_alone():
    assert [len(b) for b in mlp(5).stages.blocks] == [3, 2]
    assert [len(b) for b in mlp(5, {"block_size": 2}).stages.blocks] == [2, 2, 1]
    convs = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    net = Net(convs, activations=False, data=torch.randn(4, 4, 6, 6))
    assert [len(b) for b in net.stages.blocks] == [1, 1, 2]
    for epoch in range(5):
        run_epoch(net, adam(net), epoch, steps=1)
    assert [q._phase for q in net.quant] == [SCALES] * 4


# -- pitfalls (section 10) -------------------------------------------------------------------------------------------
GEOMETRIES = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    "padded": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 7, 6)),
    "same": (nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=(2, 0)), (2, 3, 7, 6)),
    "1x1": (nn.Conv2d(3, 4, 1), (2, 3, 5, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear3d": (nn.Linear(5, 3), (2, 7, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 4, 5)),
    "transposed_dilated": (nn.ConvTranspose2d(3, 4, 2, stride=(1, 2), dilation=2), (2, 3, 4, 5)),
    "grouped_transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 4, 4)),
}


def spec_of(layer, **more):
    axis = 1 if getattr(layer, "transposed", False) else 0
    return TensorSpec("weight", 1, "layer", tuple(layer.weight.shape), axis, **module_geometry(layer), **more)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_times_columns_are_the_layer(name):
    """Every geometry: patches in the order of the weight's columns, padded zeros included."""
    layer, shape = GEOMETRIES[name]
    x, spec = torch.randn(shape, generator=torch.Generator().manual_seed(0)), spec_of(layer)
    rows, columns = maths.input_rows(x, spec), maths.to_columns(layer.weight.detach(), spec)
    assert torch.equal(maths.from_columns(columns, spec), layer.weight)
    with torch.no_grad():
        out = layer(x)
    bias = per_channel_view(layer.bias, out.ndim, out.ndim - 1 if "linear" in name else 1)
    out = (out - bias).detach()
    if "linear" in name:
        wanted = out.reshape(1, -1, out.shape[-1])
    elif name == "grouped_transposed":  # the groups share columns: each output reads its own block of inputs
        half = rows.shape[-1] // 2
        found = torch.cat([rows[..., g * half : (g + 1) * half] @ columns[:, g * half : (g + 1) * half]
                           for g in (0, 1)], 2)  # fmt: skip
        torch.testing.assert_close(found[0], out.movedim(1, -1).reshape(-1, 6))
        return
    else:
        g = maths.groups_of(spec)
        wanted = out.reshape(len(out), g, -1, *out.shape[2:]).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(rows @ columns, wanted)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_stage_of_every_geometry_lowers_the_output_error(name):
    layer, shape = copy.deepcopy(GEOMETRIES[name])
    x = torch.randn(16, *shape[1:], generator=torch.Generator().manual_seed(0)).relu()
    spec = spec_of(layer)
    quantizer = BITAT.make_weight(spec, {"train_transform": True})
    quantizer.calibrate(layer.weight)
    stages = BITAT.make_coordinator([LayerQuantizers("layer", quantizer, None, dict(layer.named_parameters()))])
    stages.set_calibration(lambda samples: quantizer.observe_input(x))
    before = layer.weight.detach().clone()
    plain_error = maths.to_columns((before - quantizer(before)).detach(), spec).double()
    stages.on_progress(Progress())
    error = maths.to_columns((before - quantizer(layer.weight)).detach(), spec).double()
    quantizer.collect()
    quantizer.observe_input(x)
    moments = quantizer.collected()
    blocks = 2 if name == "grouped_transposed" else 1
    m = maths.make_metric(*moments.covariance(), float(moments.count), eps=1e-4, k_max=256, blocks=blocks)
    assert m.objective(error) <= m.objective(plain_error) + 1e-9
    assert stages.regularization().isfinite()


def test_statistics_subsample_large_inputs():
    spec = spec_of(nn.Conv2d(2, 2, 3))
    rows = maths.input_rows(torch.randn(3, 2, 102, 102), spec)
    assert rows.shape[1] <= 3 * 196 and rows.shape[1] > 3 * 150
    moments = maths.Moments(1, 2, torch.device("cpu"))
    moments.add(torch.ones(1, 150_000, 2))
    moments.add(torch.ones(1, 150_000, 2))
    assert float(moments.count) == 200_000


def test_streaming_equals_one_pass():
    moments = maths.Moments(1, 6, torch.device("cpu"))
    for part in X.split(10):
        moments.add(part[None])
    mean, sigma = moments.covariance()
    torch.testing.assert_close(mean[0], X.mean(0))
    torch.testing.assert_close(sigma[0], torch.cov(X.T, correction=0))


def test_wrong_channels_are_one_clear_line():
    with pytest.raises(QuantizationError, match=r"layer: input of shape \[2, 5, 7, 7\]; expected 3 channels at axis 1"):
        maths.input_rows(torch.zeros(2, 5, 7, 7), spec_of(nn.Conv2d(3, 4, 3)))
    with pytest.raises(QuantizationError, match="layer: the input is smaller than the kernel"):
        maths.input_rows(torch.zeros(2, 3, 2, 2), spec_of(nn.Conv2d(3, 4, 3)))


def test_rank_deficiency_dead_and_duplicated_inputs():
    x = torch.randn(200, 5, dtype=torch.float64)
    x[:, 1] = 0.7  # dead
    x[:, 3] = x[:, 2]  # duplicate
    m = metric(x)
    assert m.importance.min() >= 0.01 - 1e-12 and m.importance.log().isfinite().all()
    w = torch.randn(1, 5, 4, dtype=torch.float64)
    signs, alpha, _ = maths.solve(w, m)
    assert torch.linalg.eigvalsh(m.times(torch.eye(5, dtype=torch.float64)[None])).min() > 0
    assert alpha.isfinite().all() and signs.abs().eq(1).all()
    few = metric(torch.randn(3, 8, dtype=torch.float64))  # fewer rows than dimensions
    assert few.importance.isfinite().all() and few.diagonal().min() > 0


def test_small_calibration_sets_are_shrunk():
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    sigma = torch.cov(x.T, correction=0)
    level = sigma.trace() / 6
    rho = 6 / 30
    expected = (1 - rho) * sigma / level + rho * torch.eye(6, dtype=torch.float64)
    found = metric(x).times(torch.eye(6, dtype=torch.float64)[None])[0]
    torch.testing.assert_close(found, expected)


def test_constant_input_falls_back_to_the_identity_with_a_warning():
    m = metric(torch.full((50, 4), 0.3, dtype=torch.float64))
    assert m.blind and torch.allclose(m.times(torch.eye(4, dtype=torch.float64)[None])[0], torch.eye(4).double())
    net = mlp(1, activations=False, width=4)
    net.data = torch.ones(64, 6)
    with pytest.warns(UserWarning, match="layer0: its input does not vary"):
        start(net)
    net = mlp(1, activations=False)
    net.stages.set_calibration(lambda samples: None)
    with pytest.warns(UserWarning, match="layer0: its input was not seen"):
        start(net)


def test_all_zero_filter_has_the_floor_scale():
    w = torch.zeros(1, 6, 2, dtype=torch.float64)
    signs, alpha, _ = maths.solve(w, metric(X))
    assert (alpha == 1e-8).all() and signs.abs().eq(1).all()
    net = mlp(1)
    with torch.no_grad():
        net.layers[0].weight.zero_()
    start(net)
    assert net.stages.regularization().isfinite()
    run_epoch(net, adam(net), 0)
    _codes, form = net.quant[0].freeze(net.layers[0].weight)
    assert (form.scale >= 1e-8).all()


def test_sign_of_zero_is_plus_one():
    quantizer = BITAT.make_weight(TensorSpec("weight", 1, shape=(1, 3))).eval()
    w = torch.tensor([[0.0, -0.0, -1.0]])
    quantizer.calibrate(w)
    assert (quantizer(w) > 0).tolist() == [[True, True, False]]
    assert torch.equal(quantizer.freeze(w).form.decode(quantizer.freeze(w).codes), quantizer(w))
    activation = BITAT.make_activation(TensorSpec("activation", 1, channel_axis=1)).eval()
    activation.calibrate_range(-1.0, 1.0)
    assert activation(torch.tensor([[0.0, -0.0, -1e-20, 1e-20]])).tolist() == [[1, 1, -1, 1]]


def test_quantizers_of_other_algorithms_keep_their_inputs():
    """W1A-k: the weight method only needs its input."""
    net = mlp(2, activations=False)
    lsq = get_algorithm("lsq").make_activation(TensorSpec("activation", 4, "in0"))
    lsq.calibrate(net.data)
    net.act[0] = lsq
    net.stages.layers[0].input_activation = lsq
    start(net)
    assert not hasattr(lsq, "_waiting") and net.quant[0]._phase == FREE and net.passes == 1


def test_a_layer_of_other_algorithms_has_no_stage():
    other = LayerQuantizers("x", get_algorithm("lsq").make_weight(TensorSpec("weight", 4, shape=(2, 2))))
    stages = BITAT.make_coordinator([other])
    stages.on_progress(Progress())
    assert stages.regularization() is None and not stages.layers


def test_a_host_without_the_float_weight_is_refused():
    quantizer = BITAT.make_weight(TensorSpec("weight", 1, "conv1", (2, 2)))
    stages = BITAT.make_coordinator([LayerQuantizers("conv1", quantizer)])
    with warnings.catch_warnings(), pytest.raises(QuantizationError, match="conv1: the host gave no float weight"):
        warnings.simplefilter("ignore")
        stages.on_progress(Progress())


def test_sparsity_is_refused():
    with pytest.raises(QuantizationError, match="conv1: the grid has no zero, so sparsity cannot be kept"):
        BITAT.make_weight(TensorSpec("weight", 1, "conv1", (2, 2), keep_zeros=True))


def test_one_scale_per_tensor():
    net = mlp(1, per_channel=False)
    start(net)
    assert net.quant[0].alpha.numel() == 1
    assert net.quant[0](net.layers[0].weight).detach().abs().unique().numel() == 1


def test_mean_abs_scale_is_recomputed_without_gradient():
    net = start(mlp(2, {"alpha": "mean_abs"}))
    q, w = net.quant[0], net.layers[0].weight
    assert not list(q.parameters())
    torch.testing.assert_close(q.grid_scale(w), w.detach().abs().mean(1))
    start(net, 1)
    kept = q.grid_scale(w).clone()
    with torch.no_grad():
        w.mul_(3)
    assert torch.equal(q.grid_scale(w), kept)  # fixed with its stage


# -- activations -----------------------------------------------------------------------------------------------------
def test_activation_gradient_of_the_polynomial():
    quantizer = BITAT.make_activation(TensorSpec("activation", 1, channel_axis=1))
    quantizer.calibrate_range(-1.0, 1.0)
    x = torch.tensor([[-1.5, -1, -0.75, -0.25, 0, 0.25, 0.75, 1, 1.5]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 0.5, 1.5, 2, 1.5, 0.5, 0, 0]]
    assert quantizer.beta.grad.tolist() == [6.0]


def test_beta_of_relu_outputs_and_of_centred_inputs():
    x = torch.randn(8, 3, 5, 5)
    centred = BITAT.make_activation(TensorSpec("activation", 1, channel_axis=1))
    centred.calibrate(x)
    assert centred.beta.tolist() == [0, 0, 0]
    relu = BITAT.make_activation(TensorSpec("activation", 1, channel_axis=1))
    relu.calibrate(x[:4].relu())
    relu.calibrate(x[4:].relu())  # later batches refine
    torch.testing.assert_close(relu.beta.detach(), -x.relu().mean((0, 2, 3)))
    out = relu(x.relu())
    assert all(set(out[:, c].unique().tolist()) == {-1.0, 1.0} for c in range(3))
    with pytest.raises(QuantizationError, match=r"input of shape \[4\] has no channels at axis 1"):
        relu(torch.zeros(4))
    one = BITAT.make_activation(TensorSpec("activation", 1, channel_axis=1, per_channel=False))
    one.calibrate(x.relu())
    torch.testing.assert_close(one.beta.detach(), -x.relu().mean().reshape(1))


def test_beta_is_set_anew_at_the_start_of_its_stage():
    net = mlp(2)
    before = net.act[1].beta.detach().clone()
    net.act[1].spec = TensorSpec("activation", 1, "in1", channel_axis=1, signed=False)
    start(net)
    assert torch.equal(net.act[1].beta, before)
    inputs = []
    net.act[1].register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    start(net, 1)
    torch.testing.assert_close(net.act[1].beta.detach(), -inputs[0].mean(0), rtol=1e-4, atol=1e-5)


def test_forms():
    net = start(mlp(1))
    form = net.act[0].form()
    assert isinstance(form, Staircase) and form.levels.tolist() == [-1, 1] and form.scale.tolist() == [1.0]
    assert form.thresholds.shape == (6, 1) and form.channels == 6
    weight = net.quant[0].freeze(net.layers[0].weight).form
    assert isinstance(weight, Codebook) and weight.levels.tolist() == [-1, 1] and weight.scale.shape == (8,)


def test_nothing_of_training_is_left_in_what_is_frozen():
    net = start(mlp(1))
    codes, form = net.quant[0].freeze(net.layers[0].weight)
    assert set(vars(form)) == {"bits", "levels", "scale", "channel_axis"}
    signs = torch.where(codes > 0, 1.0, -1.0)
    x = net.act[0](net.data)
    expected = F.linear(x, signs * form.scale.unsqueeze(1), net.layers[0].bias)
    assert torch.equal(F.linear(x, form.decode(codes), net.layers[0].bias), expected)


def test_rprelu():
    layer = RPReLU(3)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), F.leaky_relu(x, 0.25))
    with torch.no_grad():
        layer.before.copy_(torch.tensor([0.5, 0.0, -1.0]))
        layer.after.fill_(2.0)
    shifted = x + torch.tensor([0.5, 0.0, -1.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(layer(x), torch.where(shifted > 0, shifted, 0.25 * shifted) + 2)
    assert layer(torch.randn(5, 3)).shape == (5, 3)


def test_distillation_loss():
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = distillation_loss(student, teacher)
    expected = F.cross_entropy(student, teacher.detach().softmax(1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


# -- labels ----------------------------------------------------------------------------------------------------------
def test_label_says_what_it_is():
    assert "reconstruction from the abstract and the method figure" in BITAT.fidelity
    assert "not verified against the authors' code or tables" in BITAT.fidelity
    with pytest.raises(ConfigError, match="has no 4-bit weights; allowed: 1 to 1"):
        BITAT.make_weight(TensorSpec("weight", 4, "conv1", (2, 2)))


def test_geometry_in_torch_spelling():
    assert conv_geometry((), 1) == {}
    assert conv_geometry((3, 3), 2, 1, 1, 4) == {
        "groups": 4, "stride": (2, 2), "dilation": (1, 1), "padding": (1, 1, 1, 1)
    }  # fmt: skip
    assert conv_geometry((2, 3), padding="same")["padding"] == (0, 1, 1, 1)
    assert conv_geometry((3,), padding="valid")["padding"] == (0, 0)
    assert module_geometry(nn.Linear(2, 2)) == {}
    spec = spec_of(nn.Conv2d(4, 4, 3, groups=2, padding=1))
    assert TensorSpec.from_dict(spec.to_dict()) == spec
