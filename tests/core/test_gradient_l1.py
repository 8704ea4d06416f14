"""Gradient l1 (gradient_l1.md): the objective, its gradients, what it looks at, and what it refuses."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, relu
from torch.utils.checkpoint import checkpoint

import fat_plugins
from fat_plugins import ConfigError, QuantizationError, TensorSpec, algorithms, get_algorithm, get_penalty, penalties
from fat_plugins.observed import without_inplace
from fat_plugins.penalties import Penalty

GradientL1 = get_penalty("gradient_l1")


def smooth(seed=0):
    """Twice differentiable everywhere, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3)).double()


def batch(shape=(8, 5), classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.arange(shape[0]) % classes


class Convolutional(nn.Module):
    """Convolution, batch norm, ReLU, pooling and a shortcut."""

    def __init__(self, inplace=False, wrap=lambda f, x: f(x)):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace))
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.last, self.head, self.wrap = nn.ReLU(inplace), nn.Linear(4, 3), wrap

    def forward(self, x):
        x = self.pool(self.first(x))
        out = self.wrap(self.second, x)
        if self.last.inplace:
            out += x
        else:
            out = out + x
        return self.head(self.last(out).mean((2, 3)))


def images(dtype=torch.float32):
    return batch((6, 2, 8, 8), dtype=dtype)


def gradients(model, x, y, **params):
    """Total loss and the gradients of all parameters."""
    penalty = GradientL1(model, **params)
    model.zero_grad()
    loss = penalty(cross_entropy(model(x), y))
    loss.backward()
    penalty.remove()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


# -- section 11 ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalise", ["none", "numel"])  # the step is a constant of the gradient
def test_gradient_of_the_total_equals_finite_differences(normalise):
    model, (x, y) = smooth(), batch()
    options = {"lambda_weights": 0.3, "lambda_activations": 0.7, "normalise": normalise}
    _, found = gradients(model, x, y, **options)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        for index in range(0, parameter.numel(), 3):
            ends = []
            for move in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += move
                ends.append(float(gradients(model, x, y, **options)[0]))
                with torch.no_grad():
                    parameter.view(-1)[index] -= move
            assert float(gradient.view(-1)[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_gradient_of_the_norm_is_the_hessian_times_the_signs():
    model, (x, y) = smooth(), batch()
    weight = model[2].weight

    def loss_of(w):
        return cross_entropy(torch.func.functional_call(model, {"2.weight": w}, (x,)), y)

    for name, p in model.named_parameters():
        p.requires_grad_(name == "2.weight")  # what is frozen is no part of the sum
    hessian = torch.autograd.functional.hessian(loss_of, weight.detach()).reshape(weight.numel(), -1)
    plain = torch.autograd.grad(loss_of(weight), weight)[0]
    penalty = GradientL1(model, lambda_weights=1.0, lambda_activations=0.0)
    penalty(cross_entropy(model(x), y)).backward()
    wanted = hessian @ plain.sign().reshape(-1)
    torch.testing.assert_close((weight.grad - plain).reshape(-1), wanted, rtol=1e-10, atol=1e-12)


def test_the_norm_bounds_what_a_step_can_do_to_first_order():
    model, (x, y) = smooth(), batch()
    penalty = GradientL1(model, lambda_weights=1.0, lambda_activations=0.0)
    loss = cross_entropy(model(x), y)
    step = 1e-3
    predicted = step / 2 * float(penalty.term(loss).detach())
    weights = [model[i].weight for i in (0, 2, 4)]
    signs = [g.sign() for g in torch.autograd.grad(cross_entropy(model(x), y), weights)]
    with torch.no_grad():
        before = float(cross_entropy(model(x), y))
        for weight, sign in zip(weights, signs, strict=True):
            weight.add_(sign, alpha=step / 2)
        rise = float(cross_entropy(model(x), y)) - before
        assert rise == pytest.approx(predicted, rel=0.01) and predicted > 1e-4
        # no other perturbation of that size does more
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            for weight, sign in zip(weights, signs, strict=True):
                other = torch.randint(0, 2, sign.shape, generator=generator).double() * 2 - 1
                weight.add_(other - sign, alpha=step / 2)
                sign.copy_(other)
            assert float(cross_entropy(model(x), y)) - before < rise


def test_batch_norm_relu_and_pooling_are_differentiated_twice():
    model, (x, y) = Convolutional(), images()
    loss, found = gradients(model, x, y, lambda_weights=0.01, lambda_activations=0.01)
    plain, without = gradients(model, x, y, lambda_weights=0.0, lambda_activations=0.0)
    assert float(loss) > float(plain)
    assert all(bool(torch.isfinite(g).all()) for g in found)
    assert all(not torch.equal(a, b) for a, b in zip(found[:-1], without[:-1], strict=True))


def test_without_lambda_training_is_the_plain_one_bit_for_bit():
    def trained(penalise):
        model, (x, y) = Convolutional(), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        penalty = GradientL1(model, lambda_weights=0, lambda_activations=0) if penalise else lambda loss: loss
        for _ in range(3):
            optimizer.zero_grad()
            penalty(cross_entropy(model(x), y)).backward()
            optimizer.step()
        return model

    plain, penalised = trained(False), trained(True)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), penalised.state_dict().values(), strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in penalised.modules())
    model, (x, y) = Convolutional(), images()
    loss = cross_entropy(model(x), y)
    assert GradientL1(model, lambda_weights=0, lambda_activations=0)(loss) is loss


# -- what it looks at ------------------------------------------------------------------------------------------------
def observed(model, x, **params):
    penalty = GradientL1(model, **params)
    model(x)
    found = [(s.owner, s.role) for s in penalty.observer.take()]
    penalty.remove()
    return found


def test_a_float_model_shows_weights_of_its_layers_and_their_inputs():
    found = observed(Convolutional(), images()[0])
    layers = ["first.0", "second.0", "head"]
    assert [name for name, role in found if role == "weight"] == layers  # no biases, no batch norms
    assert [name for name, role in found if role == "activation"] == layers[1:]  # images have no gradient


def test_penalty_is_the_sum_by_hand():
    model, (x, y) = smooth(), batch()
    hidden = []
    handles = [model[i].register_forward_hook(lambda m, a, out: hidden.append(out)) for i in (1, 3)]
    loss = cross_entropy(model(x), y)
    weights = [model[i].weight for i in (0, 2, 4)]
    by_weights, by_hidden = (sum(g.abs().sum() for g in torch.autograd.grad(loss, t, retain_graph=True))
                             for t in (weights, hidden))  # fmt: skip
    for handle in handles:
        handle.remove()
    penalty = GradientL1(model, lambda_weights=2.0, lambda_activations=3.0)
    loss = cross_entropy(model(x), y)
    total = penalty(loss)
    torch.testing.assert_close(total - loss, 2 * by_weights + 3 * by_hidden)
    torch.testing.assert_close(penalty.values(), {"weight": by_weights, "activation": by_hidden})


def test_normalisations():
    model, (x, y) = smooth(), batch()
    loss = cross_entropy(model(x), y)
    weights = [model[i].weight for i in (0, 2, 4)]
    norms = [g.abs().sum() for g in torch.autograd.grad(loss, weights)]
    for normalise, factors in (
        ("numel", [1 / w.numel() for w in weights]),
        ("step", [w.abs().max().detach() / 3 / 2 for w in weights]),
    ):
        penalty = GradientL1(model, lambda_weights=1, lambda_activations=0, normalise=normalise, bits=3)
        wanted = sum(n * f for n, f in zip(norms, factors, strict=True))
        torch.testing.assert_close(penalty.term(cross_entropy(model(x), y)).detach(), wanted)


def test_steps_of_activations_know_the_sign():
    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.act, self.b = nn.Linear(5, 4), act, nn.Linear(4, 3)

        def forward(self, x):
            self.hidden = self.act(self.a(x))
            return self.b(self.hidden)

    for act, levels in ((nn.Softplus(), 15), (nn.Tanh(), 7)):
        model, (x, y) = Net(act).double(), batch()
        penalty = GradientL1(model, lambda_weights=0, lambda_activations=1, normalise="step")
        loss = cross_entropy(model(x), y)
        (g,) = torch.autograd.grad(loss, model.hidden, retain_graph=True)
        wanted = g.abs().sum() * model.hidden.detach().abs().max() / levels / 2
        torch.testing.assert_close(penalty.term(loss).detach(), wanted)


def test_shared_weights_and_shared_inputs_count_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 3)
            self.d = nn.Linear(5, 5)
            self.d.weight = self.a.weight

        def forward(self, x):
            x = relu(self.a(relu(self.a(self.d(x)))))
            return self.b(x) + self.c(x)

    model = Shared().double()
    found = observed(model, batch()[0])
    assert [n for n, role in found if role == "weight"] == ["d", "b", "c"]  # that of a is d's
    assert [n for n, role in found if role == "activation"] == ["a", "a", "b"]


def test_parametrized_weights_are_those_that_the_layer_uses():
    model, (x, y) = smooth(), batch()
    nn.utils.parametrizations.weight_norm(model[2])
    penalty = GradientL1(model, lambda_weights=1, lambda_activations=0)
    assert len([s for s in (model(x), penalty.observer.take())[1] if s.path == "2"]) == 1
    found = float(penalty.term(cross_entropy(model(x), y)).detach())
    bare = smooth()
    with torch.no_grad():
        bare[2].weight.copy_(model[2].weight)
    assert found == pytest.approx(float(GradientL1(bare, lambda_weights=1, lambda_activations=0).term(
        cross_entropy(bare(x), y)).detach()))  # fmt: skip


def quantized(name, role=None, bits=4):
    """A small network whose middle layer has a quantizer of an algorithm, or both of them."""

    def make(kind, role, *args, **keys):
        low, high = getattr(kind, f"{role}_bits")
        return kind.make(TensorSpec(role, min(max(bits, low), high), *args, **keys))

    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.b, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
            self.weight = self.act = nn.Identity()
            kind = algorithms()[name]
            if role != "activation":
                shape = tuple(self.b.weight.shape)
                self.weight = make(kind, "weight", "middle", shape, followed_by_norm=True)
                self.weight.calibrate(self.b.weight)
            if role != "weight":
                self.act = make(kind, "activation", "input", channel_axis=1)
                self.act.calibrate(torch.rand(4, 4, 6, 6))

        def forward(self, x):
            x = relu(self.norm(self.a(x)))
            return self.head(relu(conv2d(self.act(x), self.weight(self.b.weight), self.b.bias)).mean((2, 3)))

    return Quantized()


def test_a_model_with_quantizers_shows_what_they_quantize():
    assert observed(quantized("lsq"), images()[0]) == [("input", "activation"), ("middle", "weight")]


def test_masked_weights_of_one_quantizer_are_one_tensor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(5, 5))
            self.quantizer = get_algorithm("minmax").make(TensorSpec("weight", 4, "w", (5, 5)))
            self.quantizer.enabled = False

        def forward(self, x):
            for _ in range(2):
                x = x @ self.quantizer(self.weight * torch.ones(5, 5))
            return x

    model = Twice().double()
    x, y = batch(classes=5)
    found = GradientL1(model, lambda_weights=1, lambda_activations=0).term(cross_entropy(model(x), y))
    (wanted,) = torch.autograd.grad(cross_entropy(model(x), y), model.weight)
    torch.testing.assert_close(found.detach(), wanted.abs().sum())


# -- quantizers with a second derivative -----------------------------------------------------------------------------
#: quantizers that can be differentiated twice; others may be refused
TWICE = {
    *((name, "weight") for name in ("lq_nets", "lsq", "lsq_plus", "minmax")),
    *((name, "activation") for name in ("apot", "dorefa", "fat", "lsq", "minmax", "pact", "slb", "squantizer")),
}
PAIRS = [
    (name, role)
    for name, kind in algorithms().items()
    for role in ("weight", "activation")
    if getattr(kind, f"{role}_quantizer") is not None
]


@pytest.mark.parametrize("name,role", PAIRS)
def test_quantizers_are_differentiated_twice_or_refused_in_one_line(name, role):
    model, (x, y) = quantized(name, role), images()
    options = {"lambda_weights": float(role == "weight"), "lambda_activations": float(role == "activation")}
    penalty = GradientL1(model, **options)
    loss = cross_entropy(model(x), y)
    try:
        penalty(loss).backward()
    except QuantizationError as error:
        assert (name, role) not in TWICE
        assert re.search(r"cannot be differentiated twice; disable|of its own in the place", str(error))
    else:
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_the_penalty_of_a_quantized_model_equals_finite_differences():
    """The gradient of the sum with respect to what lies behind the quantizers, where the codes stay what they are."""
    model, (x, y) = quantized("minmax").double().eval(), images(torch.float64)
    options = {"lambda_weights": 0.5, "lambda_activations": 0.5}
    _, found = gradients(model, x, y, **options)
    bias = [name for name, _ in model.named_parameters()].index("head.bias")
    for index in range(3):
        ends = []
        for move in (1e-6, -1e-6):
            with torch.no_grad():
                model.head.bias[index] += move
            ends.append(float(gradients(model, x, y, **options)[0]))
            with torch.no_grad():
                model.head.bias[index] -= move
        assert float(found[bias][index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_lost_graphs_are_noticed():
    class Lossy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad.detach()

    class Net(nn.Linear):
        def forward(self, x):
            return Lossy.apply(super().forward(x))

    model, (x, y) = Net(5, 3).double(), batch()
    penalty = GradientL1(model, lambda_activations=0)
    with pytest.raises(QuantizationError, match="gradient_l1: Lossy cannot be differentiated twice"):
        penalty(cross_entropy(model(x), y))


# -- in place, checkpointing, half precision -------------------------------------------------------------------------
def test_inplace_layers_behind_what_is_read_change_nothing():
    x, y = images()
    plain, inplace = (gradients(Convolutional(flag), x, y) for flag in (False, True))
    torch.testing.assert_close(plain, inplace)


def test_what_is_changed_after_it_was_read_is_refused():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), get_algorithm("minmax").make(TensorSpec("activation", 4, "input of c"))
            self.c, self.act = nn.Linear(5, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.c(self.act(self.b(self.a(x))))  # the quantizer is not calibrated: the same tensor comes out

    model, (x, y) = Changing().double(), batch()
    penalty = GradientL1(model, lambda_weights=0)
    with pytest.raises(QuantizationError, match=r"input of c: its activation is changed in place .*without_inplace"):
        penalty(cross_entropy(model(x), y))
    assert without_inplace(model) is model and not model.act.inplace
    penalty(cross_entropy(model(x), y)).backward()


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's checkpoint about itself
def test_checkpointing_changes_no_gradient_and_its_old_kind_is_refused():
    x, y = images()
    options = {"lambda_weights": 0.1, "lambda_activations": 0.1}
    plain = gradients(Convolutional(), x, y, **options)
    kept = gradients(Convolutional(wrap=lambda f, x: checkpoint(f, x, use_reentrant=False)), x, y, **options)
    torch.testing.assert_close(kept, plain)
    model = Convolutional(wrap=lambda f, x: checkpoint(f, x, use_reentrant=True))
    with pytest.raises(
        QuantizationError, match=r"^gradient_l1: [^\n]*gradient checkpointing needs use_reentrant=False"
    ):
        gradients(model, x, y, **options)


def test_half_precision_has_the_sums_of_full_precision():
    x, y = images()

    def sums(dtype, scaler=None):
        model = Convolutional()
        penalty = GradientL1(model)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = cross_entropy(model(x).float(), y)
            total = penalty(loss, scaler)
        (total if scaler is None else scaler.scale(total)).backward()
        scale = 1.0 if scaler is None else scaler.get_scale()
        return torch.stack(list(penalty.values().values())), torch.cat(
            [p.grad.reshape(-1) for p in model.parameters()]
        ) / scale

    full, bf16 = sums(None), sums(torch.bfloat16)
    fp16 = sums(torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for half in (bf16, fp16):
        assert half[0].dtype == torch.float32
        torch.testing.assert_close(half[0], full[0], rtol=0.03, atol=0)
        assert float(torch.nn.functional.cosine_similarity(half[1], full[1], dim=0)) > 0.99


def test_the_scale_is_taken_out_of_the_sums():
    model, (x, y) = smooth(), batch()
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        penalty = GradientL1(model)
        found.append(penalty.term(cross_entropy(model(x), y), scaler).detach())
    torch.testing.assert_close(found[0], found[1])


def test_gradients_that_overflow_leave_the_loss_a_number():
    model, (x, y) = smooth().float(), batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    penalty = GradientL1(model)
    loss = cross_entropy(1e3 * model(x), y)
    total = penalty(loss, scaler)
    assert torch.equal(total, loss)


# -- schedule, copies, errors ----------------------------------------------------------------------------------------
def test_start_and_warmup():
    model, (x, y) = smooth(), batch()
    penalty = GradientL1(model, start=2, warmup=4)
    with pytest.raises(ConfigError, match=r"start and warmup count epochs; call set_epoch"):
        penalty(cross_entropy(model(x), y))
    always = GradientL1(model)
    full = always.term(cross_entropy(model(x), y))
    for epoch, factor in ((1.99, 0), (2.0, 0), (3.0, 0.25), (5.0, 0.75), (6.0, 1), (50, 1)):
        penalty.set_epoch(epoch)
        assert penalty.factor == factor
        loss = cross_entropy(model(x), y)
        if factor:
            torch.testing.assert_close(penalty(loss) - loss, factor * full)
        else:
            assert penalty(loss) is loss


def test_copies_of_a_model_are_free_of_its_hooks():
    model, (x, _) = smooth(), batch()
    penalty = GradientL1(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        assert not penalty.observer.take()
    penalty.remove()
    model(x)
    assert not penalty.observer.take()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_kept_of_a_forward_without_gradient():
    model, (x, y) = smooth(), batch()
    penalty = GradientL1(model)
    with torch.no_grad():
        model(x)
    with pytest.raises(QuantizationError, match=r"expected the loss of a forward with gradient.*without gradient"):
        penalty(torch.tensor(1.0))
    loss = cross_entropy(model(x), y)
    penalty(loss)
    with pytest.raises(
        QuantizationError, match=r"showed no activation with gradient; call it after .* lambda_activations: 0"
    ):
        penalty(loss)
    with pytest.raises(QuantizationError, match=r"a scalar; got a tensor of shape \[8, 3\]"):
        penalty(model(x))


def test_an_example_shows_at_once_what_cannot_be_penalised():
    model, (x, _) = quantized("fat", "weight"), images()
    with pytest.raises(QuantizationError, match="_Gate cannot be differentiated twice"):
        GradientL1(model, example=x, lambda_activations=0)
    model = Convolutional().train()
    model.first[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    penalty = GradientL1(model, example=x, start=3)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and not model.first[1].training
    assert all(p.grad is None for p in model.parameters()) and penalty._epoch is None and penalty.values() == {}


def test_functions_of_torch_without_a_second_derivative_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            # torch's CTC loss has a first derivative only
            steps = self.b(relu(self.a(x))).log_softmax(1)[:, None]
            targets, lengths = torch.ones(1, 2, dtype=torch.long), (len(x),)
            return nn.functional.ctc_loss(steps, targets, lengths, (2,), reduction="sum")

    model, (x, _) = Model().double(), batch()
    with pytest.raises(QuantizationError, match=r"^gradient_l1: no second derivative: [^\n]*ctc[^\n]*SDPBackend.MATH"):
        GradientL1(model)(model(x))


@pytest.mark.parametrize(
    "params,text",
    [
        ({"lambda_weight": 1}, "params.lambda_weight: unknown key; allowed: bits, lambda_activations, lambda_weights"),
        ({"lambda_weights": -1.0}, "params.lambda_weights: must be greater than or equal to 0"),
        (
            {"normalise": "steps"},
            "params.normalise: expected 'none', 'numel' or 'step', got 'steps'; did you mean 'step'?",
        ),
        ({"bits": 1}, "params.bits: must be greater than or equal to 2"),
        ({"lambda_weights": float("nan")}, "params.lambda_weights: must be a finite number"),
    ],
)
def test_wrong_options_in_one_line(params, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        GradientL1(smooth(), **params)


def test_registry():
    assert penalties()["gradient_l1"] is GradientL1 and issubclass(GradientL1, Penalty)
    assert callable(fat_plugins.penalties)  # not the module of that name
    with pytest.raises(
        ConfigError, match=r"unknown penalty 'gradient_l2'; allowed: gradient_l1; did you mean 'gradient_l1'"
    ):
        get_penalty("gradient_l2")
