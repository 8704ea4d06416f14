"""One model at several widths: switching all of it, and batch norms that follow."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fat_plugins
from fat_plugins import (
    CheckpointError,
    ConfigError,
    QuantizationError,
    TensorSpec,
    get_algorithm,
    reestimate_batch_norms,
)
from fat_plugins.switchable_norms import SwitchableBatchNorm2d, norm_statistics, switchable
from fat_plugins.switching import follow_quantizers

WIDTHS = [8, 4, 2]


class Net(nn.Module):
    """A convolution at several widths, its norm and an activation, then a layer that stays at 8 bits."""

    def __init__(self, algorithm="one_model_for_all", norm_widths=WIDTHS, bits=4, act_bits=None, **params):
        super().__init__()
        torch.manual_seed(0)
        options = {"bit_set": WIDTHS, **params} if algorithm == "one_model_for_all" else {}
        make = get_algorithm(algorithm).make
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = switchable(nn.BatchNorm2d(6), norm_widths) if norm_widths else nn.BatchNorm2d(6)
        self.act = make(TensorSpec("activation", act_bits or bits, name="act"), options)
        self.last = nn.Linear(6, 3)
        weight = make(TensorSpec("weight", bits, name="conv", shape=(6, 4, 3, 3)), options)
        last = get_algorithm("minmax").make(TensorSpec("weight", 8, name="last", shape=(3, 6)))
        for module, quantizer in ((self.conv, weight), (self.last, last)):
            quantizer.calibrate(module.weight)
            parametrize.register_parametrization(module, "weight", quantizer)
        self.act.calibrate(torch.rand(8, 6))

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x)).relu()).mean((2, 3)))


def images(seed=0):
    return torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained(**options):
    """Some steps at every width, so that all of them differ."""
    net = Net(**options)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(3):
        optimizer.zero_grad()
        for bits in fat_plugins.widths(net):
            fat_plugins.set_active_bits(net, bits)
            net(images(step)).square().mean().backward()
        optimizer.step()
    return net.eval()


# -- the whole model -------------------------------------------------------------------------------------------------
def test_all_that_has_several_widths_is_switched_and_the_rest_stays():
    net = Net()
    assert fat_plugins.widths(net) == (8, 4, 2)
    fat_plugins.set_active_bits(net, 2)
    found = {q.spec.name: q.bits for _, q in fat_plugins.named_quantizers(net)}
    assert found == {"conv": 2, "act": 2, "last": 8} and net.norm.active_bits == 2


def test_there_and_back_is_the_same_model_bit_for_bit():
    net, x = trained(), images(9)
    with torch.no_grad():  # as evaluation runs: quantized weights are kept
        first = {bits: (fat_plugins.set_active_bits(net, bits), net(x))[1] for bits in WIDTHS}
        assert not torch.equal(first[8], first[2]) and not torch.equal(first[8], first[4])
        for bits in (2, 8, 4, 2):
            fat_plugins.set_active_bits(net, bits)
            assert torch.equal(net(x), first[bits])


def test_training_at_one_width_leaves_the_norms_of_others_alone():
    net = trained()
    before = {k: v.clone() for k, v in net.norm.state_dict().items()}
    fat_plugins.set_active_bits(net, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.zero_grad()
    net.train()(images(5)).square().mean().backward()
    optimizer.step()
    changed = {k for k, v in net.norm.state_dict().items() if not torch.equal(v, before[k])}
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{name}_4" for name in names}


def test_a_width_that_is_missing_somewhere_is_none_of_the_model():
    net = Net(norm_widths=[8, 4])
    assert fat_plugins.widths(net) == (8, 4)
    for bad in (2, 3, True, "8", None):
        with pytest.raises(QuantizationError, match=r"the model: it does not compute at .* bits; allowed: 8, 4$"):
            fat_plugins.set_active_bits(net, bad)
    assert {q.bits for q in (net.act, net.norm) if hasattr(q, "bits")} == {4}  # nothing was switched half


def test_a_model_of_one_width_has_nothing_to_switch():
    for net in (nn.Linear(2, 2), Net("lsq"), Net("lsq", norm_widths=None)):
        assert fat_plugins.widths(net) == ()
        with pytest.raises(QuantizationError, match=r"no quantizer of this .* has several bit widths"):
            fat_plugins.set_active_bits(net, 4)
    quantizer = Net("lsq").act
    assert quantizer.widths == (4,)
    quantizer.set_active_bits(4)
    with pytest.raises(QuantizationError, match="act: it does not compute at 2 bits; allowed: 4"):
        quantizer.set_active_bits(2)


def test_at_bits_gives_every_part_its_own_width_back():
    net = Net(act_bits=2)
    with pytest.raises(KeyError), fat_plugins.at_bits(net, 8):
        assert net.act.bits == net.conv.parametrizations.weight[0].bits == net.norm.active_bits == 8
        raise KeyError
    assert (net.act.bits, net.conv.parametrizations.weight[0].bits) == (2, 4)


def test_norms_follow_the_quantizers():
    net = Net(bits=2)
    assert net.norm.active_bits == 8
    follow_quantizers(net)
    assert net.norm.active_bits == 2
    with pytest.raises(QuantizationError, match=r"quantizers stand at \[2, 4\]"):
        follow_quantizers(Net(act_bits=2))
    with pytest.raises(QuantizationError, match="norm: it does not compute at 2 bits; allowed: 8, 4"):
        follow_quantizers(Net(bits=2, norm_widths=[8, 4]))
    plain = Net("lsq", bits=2)
    follow_quantizers(plain)
    assert plain.norm.active_bits == 8


def test_the_width_is_a_mode_and_no_part_of_the_state():
    net, x = trained(), images(9)
    fat_plugins.set_active_bits(net, 2)
    fresh = Net().eval()
    fresh.load_state_dict(net.state_dict())
    assert fresh.act.bits == 4 and copy.deepcopy(net).act.bits == 2
    fat_plugins.set_active_bits(fresh, 2)
    assert torch.equal(fresh(x), net(x))


def test_accumulate_shares_a_weight_within_one_width_only():
    gradients = []
    for shared in (False, True):
        net = trained().train()
        with fat_plugins.accumulate(net) if shared else torch.enable_grad():
            for bits in WIDTHS:
                fat_plugins.set_active_bits(net, bits)
                for part in images().chunk(2):
                    net(part).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# -- batch norms -----------------------------------------------------------------------------------------------------
def plain_norm():
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.add_(torch.rand(6, generator=torch.Generator().manual_seed(1)))
    return norm


def test_every_width_computes_what_a_plain_norm_does():
    plain, x = plain_norm(), torch.randn(4, 6, 3, 3)
    ours = switchable(copy.deepcopy(plain), WIDTHS)
    assert isinstance(ours, SwitchableBatchNorm2d) and isinstance(ours, nn.BatchNorm2d)
    others = {b: copy.deepcopy(plain) for b in WIDTHS}
    for bits, factor in ((8, 1.0), (2, 5.0), (8, 2.0), (4, 3.0)):
        ours.set_active_bits(bits)
        assert torch.equal(ours.train()(x * factor), others[bits].train()(x * factor))
    for bits, other in others.items():
        ours.set_active_bits(bits)
        assert torch.equal(ours.eval()(x), other.eval()(x))
        assert ours.num_batches_tracked == other.num_batches_tracked


def test_the_first_width_has_the_tensors_of_the_norm_and_the_others_copies():
    plain = plain_norm()
    ours = switchable(plain, [2, 8])
    assert ours.weight_8 is plain.weight and ours.weight_2 is not plain.weight
    assert torch.equal(ours.weight_2, plain.weight)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(ours.state_dict()) == {f"{name}_{bits}" for name in names for bits in (8, 2)}


def test_states_of_plain_norms_load_into_all_widths():
    plain, ours = plain_norm(), switchable(nn.BatchNorm2d(6), WIDTHS)
    ours.load_state_dict(plain.state_dict())
    for bits in WIDTHS:
        ours.set_active_bits(bits)
        assert torch.equal(ours.running_var, plain.running_var) and torch.equal(ours.weight, plain.weight)
    with torch.no_grad():
        ours.weight_4.fill_(7.0)
    again = switchable(nn.BatchNorm2d(6), WIDTHS)
    again.load_state_dict(ours.state_dict())
    assert (again.weight_4 == 7).all() and torch.equal(again.weight_8, plain.weight)
    with pytest.raises(RuntimeError, match="running_mean_2"):
        again.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "running_mean_2"})


def test_what_is_no_usual_batch_norm_stays():
    class Own(nn.BatchNorm2d):
        pass

    for module in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), Own(3)):
        assert switchable(module, WIDTHS) is module
    without = switchable(nn.BatchNorm1d(3, affine=False), WIDTHS)
    assert without.weight is None and without(torch.randn(4, 3)).shape == (4, 3)
    for bad in ([], [4, 4]):
        with pytest.raises(ConfigError, match=r"bit_set: .*; allowed: distinct bit widths, at least one"):
            switchable(nn.BatchNorm2d(3), bad)


def test_reestimation_renews_the_active_width_alone():
    net, batches = trained(), [images(1), images(2)]
    before = {k: v.clone() for k, v in norm_statistics(net).items()}
    fat_plugins.set_active_bits(net, 4)
    assert reestimate_batch_norms(net, batches) == 1
    changed = {k for k, v in norm_statistics(net).items() if not torch.equal(v, before[k])}
    assert changed == {"norm.running_mean_4", "norm.running_var_4"}
    assert int(net.norm.num_batches_tracked) == 2


# -- the rewrite -----------------------------------------------------------------------------------------------------
def float_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), plain_norm(), nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False)))


def test_the_rewrite_keeps_the_function_and_can_be_repeated_on_a_fresh_model():
    net, x = float_net().eval(), images()
    before = net(x)
    (report,) = fat_plugins.rewrite(net, "switchable_norm", params={"bit_set": [4, 8]})
    assert torch.equal(net(x), before)
    assert (report.changed, report.left) == ({"1": {"channels": 6}}, {"2.0": "it has no running statistics"})
    with torch.no_grad():
        net[1].running_mean_4.add_(1.0)
    fresh = float_net()
    fat_plugins.rebuild(fresh, json.loads(json.dumps([report.to_dict()])))
    fresh.load_state_dict(net.state_dict())
    for each in (net, fresh.eval()):
        each[1].set_active_bits(4)
    assert torch.equal(fresh(x), net(x)) and not torch.equal(net(x), before)


def test_rewrites_that_are_refused():
    def rewritten(model, params):
        fat_plugins.rewrite(model, "switchable_norm", params=params)

    for params, message in (
        ({}, "params.bit_set: this key is required"),
        ({"bit_set": [4, 4]}, r"params.bit_set: \[4, 4\] repeat each other"),
        ({"bit_set": [0]}, "params.bit_set.0: must be greater than or equal to 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            rewritten(float_net(), params)
    with pytest.raises(ConfigError, match="switchable_norm: the model has no batch norm with running statistics"):
        rewritten(nn.Sequential(nn.Linear(2, 2)), {"bit_set": [4]})
    report = {"name": "switchable_norm", "params": {"bit_set": [4]}, "changed": {}, "left": {}}
    for layer, message in (("0", "layer '0' is a Conv2d"), ("2.0", "of which there is no switchable form")):
        with pytest.raises(CheckpointError, match=message):
            fat_plugins.rebuild(float_net(), [{**report, "changed": {layer: {}}}])
