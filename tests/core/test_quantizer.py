"""What an adapter relies on: specs, quantizers found in a model, their losses, schedules and optimizer groups."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fat_plugins import Progress, TensorSpec, get_algorithm, named_quantizers, param_groups, regularization
from fat_plugins import set_progress as announce
from fat_plugins.quantizer import LayerQuantizers, Params, WeightQuantizer


class Layer(nn.Module):
    """A linear layer as an adapter might build it."""

    def __init__(self, n_in=6, n_out=4, algorithm="fat", **params):
        super().__init__()
        make = get_algorithm(algorithm).make
        self.linear = nn.Linear(n_in, n_out)
        self.w = make(TensorSpec("weight", 4, shape=(n_out, n_in), followed_by_norm=True), params)
        self.a = make(TensorSpec("activation", 4), params)
        self.norm = nn.BatchNorm1d(n_out)
        self.w.calibrate(self.linear.weight)

    def forward(self, x):
        return self.norm(nn.functional.linear(self.a(x), self.w(self.linear.weight), self.linear.bias))


class Scheduled(WeightQuantizer):
    """A quantizer with a loss and a schedule."""

    def __init__(self, spec, params):
        super().__init__(spec, params)
        self.logit = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def quantize(self, x):
        return x

    def regularization(self):
        return self.logit.square()

    def on_progress(self, progress):
        self.seen.append((progress.step, progress.epoch))


def test_specs_survive_json():
    spec = TensorSpec("weight", 3, "layer1.conv", (8, 4, 3, 3), 1, True, None, True, True)
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert TensorSpec.from_dict({"role": "activation", "bits": 4}) == TensorSpec("activation", 4)


def test_quantizers_of_a_model_are_found_once_even_when_shared():
    model = nn.ModuleDict({"a": Layer(), "b": Layer()})
    model["b"].a = model["a"].a
    assert [n for n, _ in named_quantizers(model)] == ["a.w", "a.a", "b.w"]


def test_regularization_sums_what_is_there():
    assert regularization(Layer()) is None
    spec = TensorSpec("weight", 4, shape=(2, 2))
    model = nn.ModuleList([Scheduled(spec, Params()), Layer(), Scheduled(spec, Params())])
    loss = regularization(model)
    assert loss.item() == 8.0 and loss.shape == ()
    loss.backward()
    assert model[0].logit.grad == 4.0
    model[0].enabled = False
    assert regularization(model).item() == 4.0


def test_progress_reaches_every_quantizer():
    model = nn.ModuleList([Scheduled(TensorSpec("weight", 4, shape=(2, 2)), Params()), Layer()])
    announce(model, Progress(step=3, epoch=1))
    announce(model, Progress(step=4, epoch=1))
    model[0](torch.ones(2, 2))  # forwards do not count
    assert model[0].seen == [(3, 1), (4, 1)]


@pytest.mark.parametrize("algorithm", ["fat", "lsq", "minmax"])
def test_every_parameter_stands_in_exactly_one_group(algorithm):
    model = nn.Sequential(Layer(algorithm=algorithm), Layer(4, 4, algorithm=algorithm))
    model[1].a = model[0].a  # shared
    groups = param_groups(model, lr=0.04, weight_decay=5e-4)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    options = [tuple(sorted((k, v) for k, v in g.items() if k != "params")) for g in groups]
    assert len(set(options)) == len(options)  # equal ones are merged
    torch.optim.SGD(groups, momentum=0.9).step()


def test_frozen_and_unwanted_parameters_are_left_out():
    model = Layer()
    model.linear.weight.requires_grad_(False)
    model.w.alpha.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    kept = {names[id(p)] for g in param_groups(model, 0.1) for p in g["params"]}
    assert kept == set(names.values()) - {"linear.weight", "w.alpha"}
    only_bias = param_groups(model, 0.1, keep=lambda p: p is model.linear.bias)
    assert [[names[id(p)] for p in g["params"]] for g in only_bias] == [["linear.bias"]]


def test_gradient_factor_skips_frozen_parameters_and_zero_stops_learning():
    model = Layer()
    model.w.alpha.requires_grad_(False)
    model.w.set_lr_multiplier(0.0)
    model(torch.randn(8, 6)).square().sum().backward()
    assert model.w.alpha.grad is None and not model.w.transform.grad.any()
    assert model.linear.weight.grad.any()


@pytest.mark.parametrize("algorithm", ["fat", "lsq", "minmax"])
def test_training_lowers_the_loss_and_a_checkpoint_resumes_it_bit_for_bit(algorithm):
    torch.manual_seed(1)
    x = torch.rand(64, 6)
    y = x @ torch.randn(6, 4)

    def step(model, optimizer):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def build():
        model = Layer(algorithm=algorithm)
        return model, torch.optim.SGD(param_groups(model, 0.05, 1e-4), momentum=0.9)

    model, optimizer = build()
    model.a.calibrate(x)
    losses = [step(model, optimizer) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    again, resumed = build()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [step(model, optimizer) for _ in range(3)] == [step(again, resumed) for _ in range(3)]
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_layers_as_a_coordinator_sees_them():
    layer = Layer()
    entry = LayerQuantizers("fc", layer.w, layer.a, {"weight": layer.linear.weight})
    assert entry.weight is layer.w and entry.input_activation is layer.a


def test_quantizers_say_what_they_are():
    weight = get_algorithm("lsq").make(TensorSpec("weight", 3, name="conv1", shape=(2, 2), per_channel=True))
    assert repr(weight) == "LSQWeight(conv1, lsq, bits=3, shape=(2, 2), per channel, not calibrated)"
    weight.calibrate(torch.ones(2, 2))
    weight.enabled = False
    assert repr(weight) == "LSQWeight(conv1, lsq, bits=3, shape=(2, 2), per channel, disabled)"
    activation = get_algorithm("lsq").make(TensorSpec("activation", 4))
    activation.calibrate(torch.rand(4))
    assert repr(activation) == "LSQActivation(activation, lsq, bits=4, unsigned)"
