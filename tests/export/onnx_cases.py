"""Models and checks for both exporters of the ONNX family; ``module`` is the exporter (QONNX or standard ONNX)."""

from __future__ import annotations

import json

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from frozen_nets import Layer, Single, activation_grid, build, codebook, powers, staircase, weight_grid
from torch import nn

from fat_plugins.export._onnx_file import KEY
from fat_plugins.forms import Codebook, SumOfGrids, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight

BIPOLAR = torch.tensor([-1, 1])
#: layers by name: channels in and out, and how they are made
KINDS = {
    "conv": (3, 4, {}),
    "depthwise": (4, 8, {"groups": 4}),
    "grouped": (4, 6, {"groups": 2}),
    "point": (3, 4, {"kernel": 1}),
    "transposed": (4, 6, {"kind": "transposed", "stride": 2, "groups": 2}),
    "linear": (6, 4, {"kind": "linear"}),
}


def layers(kind, per_channel):
    """Bits, a frozen layer and an input, at 2, 4 and 8 bits."""
    inputs, outputs, how = KINDS[kind]
    x = torch.randn(2, inputs) if kind == "linear" else torch.randn(2, inputs, 5, 5)
    for bits in (2, 4, 8):
        model = build(Single, "layer", inputs, outputs, bits=bits, per_channel=per_channel, norm=bits == 4, **how)
        yield bits, model, x


def two_bases(axis=0, per_channel=True):
    """Form of a weight as the sum of two binary grids."""

    def form(weight):
        magnitude = weight.detach().abs()
        scale = magnitude.movedim(axis, 0).flatten(1).mean(1) if per_channel else magnitude.mean().reshape(1)
        return SumOfGrids([Codebook(1, BIPOLAR, scale, axis), Codebook(1, BIPOLAR, scale * 0.37, axis)])

    return form


def sign_and_rest(weight):
    """Form of a weight as ternary signs with one scale and a 3-bit rest with another."""
    largest = weight.detach().abs().max().reshape(1)
    sign = Codebook(2, torch.tensor([-1, 0, 1]), largest * 0.3, 0)
    return SumOfGrids([sign, UniformGrid(3, True, True, largest * 0.23)])


def binary(weight):
    """Plus and minus one scale per channel."""
    return Codebook(1, BIPOLAR, weight.detach().abs().flatten(1).mean(1), 0)


def powers_of_two(weight):
    """Codebook {0, 1, 2, 4} with signs."""
    return codebook(weight, 3, powers(3, True))


def minus_one_or_zero(weight):
    """A signed uniform grid of one bit."""
    return UniformGrid(1, True, False, weight.detach().abs().max()[None])


class Forms(nn.Module):
    """Every form of weight and activation in one network."""

    def __init__(self):
        super().__init__()
        self.pot = Layer(
            "pot", 3, 8, form=lambda w: codebook(w, 3, powers(3, True)), activation=activation_grid(8, True)
        )
        self.binary = Layer("binary", 8, 8, form=binary, activation=staircase(3, powers(4, False)))
        self.bases = Layer("bases", 8, 8, form=two_bases(), activation=staircase(4, powers(3, True), shift=0.1))
        self.up = Layer("up", 8, 8, kind="transposed", stride=2, form=two_bases(1), bias=True, norm=False)
        self.rest = Layer("rest", 8, 8, groups=8, form=sign_and_rest)
        self.one = Layer(
            "one", 8, 8, kernel=1, form=lambda w: UniformGrid(1, True, False, w.detach().abs().max()[None])
        )
        self.hidden = Layer("hidden", 8, 6, kind="linear", form=two_bases(), bias=True, norm=False)
        self.head = Layer("head", 6, 5, kind="linear", form=sign_and_rest, norm=False, relu=False)

    def forward(self, x):
        x = self.bases(self.binary(self.pot(x)))
        x = self.one(self.rest(self.up(x)))
        return self.head(self.hidden(x.mean((2, 3))))


class Shared(nn.Module):
    """One weight that two convolutions read, and one layer called twice."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(4, 4, 3, 3)
        form = weight_grid(weight, 4)
        self.weight, self.quantize = nn.Parameter(weight), FrozenWeight(form.encode(weight), form, "shared")
        self.act = FrozenActivation(activation_grid(4), "act")
        self.again = Layer("again", 4, 4, norm=False)

    def forward(self, x):
        w, q = self.quantize(self.weight), self.act(x)
        x = F.conv2d(q, w, padding=1) + F.conv2d(q, w, padding=2, dilation=2)
        # twice with the same input: the exporter would like to merge these
        return self.again(self.again(x)) + self.again(x)


class Only(nn.Module):
    """One activation quantizer between input and output."""

    def __init__(self, form):
        super().__init__()
        self.act = FrozenActivation(form, "act")

    def forward(self, x):
        return self.act(x)


class Sequence(nn.Module):
    """Linear layers on a sequence: three dimensions."""

    def __init__(self):
        super().__init__()
        self.a = Layer("a", 6, 8, kind="linear", norm=False, bias=True, per_channel=True)
        self.b = Layer("b", 8, 4, kind="linear", norm=False, relu=False, activation=staircase(3, powers(3, False)))

    def forward(self, x):
        return self.b(self.a(x))


class Reshaped(nn.Module):
    """Shapes from the input's, one tensor as two outputs, and a parameter with the name of an output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Layer("a", 3, 4), Layer("b", 256, 5, kind="linear", norm=False)
        self.output0 = nn.Parameter(torch.ones(5))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.a(x), 8)
        y = self.b(x.view(x.size(0), -1)) * self.output0
        return y, y


class ChannelsLast(nn.Module):
    """Linear layers on four dimensions, a layer norm, outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.a = Layer("a", 3, 6, kind="linear", norm=False)
        self.b, self.c = Layer("b", 3, 6, kernel=1, norm=False), Layer("c", 6, 4, kind="linear", norm=False)

    def forward(self, x):
        x = self.a(x.permute(0, 2, 3, 1)) + self.b(x).permute(0, 2, 3, 1)
        return {"out": self.c(F.layer_norm(F.gelu(x), (6,)))}


class Branches(nn.Module):
    """One quantizer on two tensors, upsampling, concatenation, slices."""

    def __init__(self):
        super().__init__()
        self.a, self.act = Layer("a", 3, 4), FrozenActivation(activation_grid(4), "act")

    def forward(self, x):
        x = F.interpolate(self.a(x), scale_factor=2)
        return F.hardswish(torch.cat([self.act(x), self.act(x * 2)], 1))[:, ::2].flatten(1)


ODD = [Reshaped, ChannelsLast, Branches]


def written(path):
    """The model and the description inside a file."""
    proto = onnx.load(str(path))
    return proto, json.loads({p.key: p.value for p in proto.metadata_props}[KEY])


def operations(path):
    """Types of all nodes."""
    return [n.op_type for n in onnx.load(str(path)).graph.node]


def exact(module, model, path, x):
    """Export ``model`` and prove that every code agrees; returns both reports."""
    report = module.export(model, path, x[:1])
    verdict = module.verify(model, path, x)
    assert verdict.ok, f"{verdict.first_difference}: {verdict.detail}"
    assert sum(w.elements for w in verdict.weights) > 0 and all(a.elements for a in verdict.activations)
    with torch.no_grad():
        wanted = model(x)
    (found,) = module.execute(path, [x.numpy()])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
    return report, verdict


def near_thresholds(form, thresholds):
    """Inputs on, just below and just above every threshold, far away, and zeros; 2-d, one row per channel axis 1."""
    scale = form.scale.float().numpy().reshape(1, -1)
    centre = (np.asarray(thresholds, np.float32).reshape(-1, 1) * scale).astype(np.float32)
    points, up, down = [centre], centre, centre
    for _ in range(4):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(-np.inf))
        points += [up, down]
    far = np.float32([[0.0], [-0.0], [1e30], [-1e30], [1e-40]]) + np.zeros_like(scale)
    return torch.from_numpy(np.concatenate([*points, far]).astype(np.float32))


def assert_codes(module, form, x, path):
    """The exported quantizer gives torch's codes for every element of ``x``: no tie guard."""
    model = Only(form)
    module.export(model, path, x[:1])
    (found,) = module.execute(path, [x.numpy()])
    assert torch.equal(torch.from_numpy(found), model(x)), form


def tamper(path, tensor, change):
    """Rewrite one initializer of a file."""
    proto = onnx.load(str(path))
    for i, item in enumerate(proto.graph.initializer):
        if item.name == tensor:
            array = onnx.numpy_helper.to_array(item).copy()
            kept = array.dtype
            proto.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(change(array).astype(kept), tensor))
            onnx.save(proto, str(path))
            return
    raise AssertionError(f"no tensor {tensor}")


def grown(array):
    """Five percent more."""
    return np.asarray(array * 1.05)
