"""Brevitas rebuilds quantizers (states loaded, batch norms merged, weights registered): ours stay what they are."""

from __future__ import annotations

import copy

import brevitas.config
import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from brevitas.nn.utils import merge_bn
from brevitas_nets import Net, batch, build, each_weight, quantizers, trained, without_scale
from fat_brevitas import FATWeightQuant, LSQWeightQuant
from safetensors.torch import load, save
from torch import nn

from fat_plugins import CheckpointError


def learned(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{q}.{n}": p for q, module in quantizers(net).items() for n, p in module.named_parameters()}


@each_weight
def test_state_dict_round_trip_through_safetensors(algorithm):
    net = trained(algorithm)
    state = load(save({k: v.clone().contiguous() for k, v in net.state_dict().items()}))
    other = Net(algorithm).eval()
    assert not torch.equal(other(batch()), net(batch()))
    other.load_state_dict(state)
    assert torch.equal(other(batch()), net(batch()))
    # nothing is initialised again by the next training batch
    other.train(), net.train()
    assert torch.equal(other(batch()), net(batch()))


def test_an_optimizer_built_before_loading_trains_what_was_loaded():
    net, source = Net("lsq"), trained("lsq")
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    before = {k: id(p) for k, p in net.named_parameters()}
    net.load_state_dict(source.state_dict())
    assert {k: id(p) for k, p in net.named_parameters()} == before
    values = {k: p.detach().clone() for k, p in learned(net).items()}
    assert values.keys() == learned(source).keys() and all(
        torch.equal(v, learned(source)[k]) for k, v in values.items()
    )
    net.train()(batch()).square().mean().backward()
    optimizer.step()
    changed = [k for k, p in learned(net).items() if not torch.equal(p, values[k])]
    assert len(changed) == len(values)


@pytest.mark.parametrize("mode", [True, False])
def test_loading_keeps_the_mode(mode):
    net = trained().train(mode)
    net.load_state_dict(net.state_dict())
    assert all(m.training is mode for m in net.modules())


@pytest.mark.parametrize("quantizer", [FATWeightQuant, LSQWeightQuant])
def test_merged_batch_norm_keeps_parameters_and_looks_at_the_new_weights(quantizer):
    layer, x = build("conv2d", quantizer)
    bn = nn.BatchNorm2d(8)
    with torch.no_grad():
        bn.weight.fill_(3.0)
    layer.eval(), bn.eval()
    layer(x)
    core = layer.weight_quant.quantizer
    before, old_scale = [id(p) for p in core.parameters()], layer.quant_weight().scale.clone()
    merge_bn(layer, bn)
    assert layer.weight_quant.quantizer is core and [id(p) for p in core.parameters()] == before
    assert not layer.weight_quant.training
    assert torch.allclose(layer.quant_weight().scale, 3 * old_scale, rtol=1e-4)
    assert layer.quant_weight().is_valid


def test_registering_a_weight_keeps_parameters():
    layer, x = build("conv2d", FATWeightQuant)
    layer(x)
    core = layer.weight_quant.quantizer
    layer.register_parameter("weight", nn.Parameter(layer.weight.detach() * 2))
    assert layer.weight_quant.quantizer is core
    assert torch.isfinite(layer(x)).all() and layer.quant_weight().is_valid


def test_layers_built_on_the_meta_device_become_real():
    layer = qnn.QuantConv2d(3, 8, 3, weight_quant=FATWeightQuant, device="meta")  # as Brevitas's graph utilities do
    assert layer.weight.is_meta
    real, x = build("conv2d", FATWeightQuant)
    layer.register_parameter("weight", nn.Parameter(real.weight.detach().clone()))
    layer.register_parameter("bias", nn.Parameter(real.bias.detach().clone()))
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.weight_quant.tensor_quant.buffers()))
    assert torch.equal(layer.eval()(x), real.eval()(x))


@each_weight
def test_float_checkpoints_start_the_quantizers_anew(algorithm, monkeypatch):
    net = trained(algorithm)
    floats = {k: v * 2 for k, v in net.state_dict().items() if "quant" not in k}
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(floats)
    monkeypatch.setattr(brevitas.config, "IGNORE_MISSING_KEYS", True)
    net.load_state_dict(floats)
    fresh = Net(algorithm)
    fresh.load_state_dict(floats)
    for layer in ("conv1", "conv2", "fc"):
        ours, theirs = (getattr(n.eval(), layer).quant_weight() for n in (net, fresh))
        if without_scale(ours) is None:
            assert ours.is_valid
        ours, theirs = getattr(ours, "value", ours), getattr(theirs, "value", theirs)
        if getattr(net, layer).weight.requires_grad:  # else the quantizer has written its own value there
            assert torch.equal(getattr(net, layer).weight, floats[f"{layer}.weight"])
        if algorithm != "fat":  # FAT's clip and transform do not come from the weight: they keep what was learned
            assert torch.equal(ours, theirs)


def test_states_of_another_package_version_are_refused():
    net = trained()
    state = copy.deepcopy(net.state_dict())
    key = next(k for k in state if k.endswith("status"))
    state[key][0] = 99
    with pytest.raises(CheckpointError, match="layout 99 is newer"):
        net.load_state_dict(state)


def test_states_without_the_reinitialisation_of_brevitas(monkeypatch):
    monkeypatch.setattr(brevitas.config, "REINIT_ON_STATE_DICT_LOAD", False)
    net, other = trained(), Net().eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(batch()), net(batch()))


def test_progress_of_calibration_is_part_of_the_state():
    act = fat_brevitas.act_quant("lsq", collect_stats_steps=3)
    layer = qnn.QuantReLU(act_quant=act)
    for seed in range(3):
        layer.train()(batch(seed))
    scale = layer.act_quant.scale().clone()
    other = qnn.QuantReLU(act_quant=act)
    other.load_state_dict(layer.state_dict())
    other.train()(batch(9) * 100)
    assert torch.equal(other.act_quant.scale(), scale)
