"""Training steps and evaluations on Brevitas: no waits, nothing computed twice, little added."""

from __future__ import annotations

import dataclasses
from collections import Counter

import fat_brevitas
import pytest
import torch
from brevitas_nets import Net as ByHand
from fat_brevitas.proxies import PluginActQuantProxy, PluginWeightQuantProxy
from stepping import StepsOfAHost, batch, build_net, check_added_operations, section
from torch.nn.utils import prune

from fat_plugins import forms


class TestBrevitas(StepsOfAHost):
    @staticmethod
    def compress(algorithm, net=None, **more):
        model = fat_brevitas.quantize(net or build_net(), section(algorithm, **more), [batch(5)])
        return fat_brevitas.Controller(model), model

    @classmethod
    def compress_masked(cls):
        net = build_net()
        prune.l1_unstructured(net.pw, "weight", 0.5)
        return *cls.compress("lsq", net), {"pw"}


def test_what_a_proxy_adds_in_training_is_the_scale_alone():
    proxies = {
        m.quantizer.role: m
        for m in TestBrevitas.compress("lsq")[1].train().modules()
        if isinstance(m, (PluginWeightQuantProxy, PluginActQuantProxy)) and m.quantizer.algorithm == "lsq"
    }
    scale = Counter(["aten.clamp_min.default", "aten.detach.default", "aten.view.default"])
    # Brevitas's own: its QuantTensor makes tensors of "signed" and "training"; the ReLU, which keeps its output
    own = {"weight": ["aten.lift_fresh.default"] * 2}
    own["activation"] = [*own["weight"], "aten.relu.default", "aten.detach.default"]
    for role, proxy in proxies.items():
        shape = proxy.quantizer.spec.shape or (4, 8, 12, 12)
        x = torch.rand(shape, requires_grad=True)
        added = check_added_operations(lambda p=proxy, x=x: p(x), lambda p=proxy, x=x: p.quantizer(x))
        wanted = scale + Counter(own[role])
        for count in (added, wanted):  # a detach copies nothing, and torch 2.8 has one more
            del count["aten.detach.default"]
        assert added == wanted, role


def test_evaluation_looks_at_forms_and_scales_once(monkeypatch):
    _, model = TestBrevitas.compress("fat")
    model.eval()
    made = []
    plain = forms.UniformGrid.__post_init__
    monkeypatch.setattr(forms.UniformGrid, "__post_init__", lambda self: (made.append(self), plain(self))[1])
    with torch.no_grad():
        model(batch()[0])
        assert made
        made.clear()
        model(batch(2)[0])
    assert len(made) <= sum(isinstance(m, PluginActQuantProxy) for m in model.modules()), "scales of activations"


@pytest.mark.parametrize("change", ["scale", "bits"])
def test_evaluation_sees_what_changes_between_two_batches(change):
    net = ByHand("lsq")
    x = torch.rand(2, 3, 8, 8)
    net.train()(x)
    net.eval()
    quantizer = net.act2.act_quant.quantizer
    layer = net.act2
    layer.return_quant_tensor = True
    y = torch.rand(2, 6, 4, 4)
    with torch.no_grad():
        before = layer(y)
        if change == "scale":
            quantizer.step.mul_(2)
        else:
            quantizer.spec = dataclasses.replace(quantizer.spec, bits=3)
            quantizer.narrowed = True  # a plain attribute, as algorithms keep what they learn
        after = layer(y)
    if change == "scale":
        assert torch.equal(after.scale, 2 * before.scale)
    else:
        assert (float(before.bit_width), float(after.bit_width)) == (4, 3)
