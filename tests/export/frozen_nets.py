"""Small torch models that call frozen quantizers themselves, as an adapter's wrapped model does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight


def weight_grid(weight: torch.Tensor, bits: int, *, per_channel=False, axis=0, narrow=True) -> UniformGrid:
    """Symmetric grid over the largest magnitude."""
    magnitude = weight.detach().abs()
    largest = magnitude.movedim(axis, 0).flatten(1).amax(1) if per_channel else magnitude.max().reshape(1)
    return UniformGrid(bits, True, narrow, largest / (2 ** (bits - 1) - 1), axis)


def activation_grid(bits: int, signed: bool = False, reach: float = 3.0) -> UniformGrid:
    """Grid that reaches to ``reach``."""
    codes = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return UniformGrid(bits, signed, signed, torch.tensor([reach / codes]), 1)


def powers(count: int, signed: bool) -> torch.Tensor:
    """Integer power-of-two levels."""
    positive = [2**i for i in range(count)]
    return torch.tensor(([-v for v in reversed(positive)] if signed else []) + [0, *positive], dtype=torch.int64)


def codebook(weight: torch.Tensor, bits: int, levels: torch.Tensor) -> Codebook:
    """Codebook whose largest level reaches the largest magnitude."""
    return Codebook(bits, levels, weight.detach().abs().max().reshape(1) / float(levels[-1]), 0)


def staircase(bits: int, levels: torch.Tensor, reach: float = 3.0, shift: float = 0.0) -> Staircase:
    """Thresholds halfway between the levels, or ``shift`` of a gap beside it."""
    gaps = levels.diff().double()
    return Staircase(
        bits, levels, levels[:-1].double() + gaps * (0.5 + shift), torch.tensor([reach / float(levels[-1])])
    )


class Layer(nn.Module):
    """Quantized convolution or linear layer, optional batch norm behind it, ReLU.

    :param kind: ``"conv"``, ``"transposed"`` or ``"linear"``.
    :param form: of the weight; by default a per-tensor grid of ``bits``.
    :param activation: form of the input's quantizer; ``None`` leaves the input as it is.
    """

    def __init__(
        self, name, inputs, outputs, *, kind="conv", kernel=3, groups=1, bits=4, form=None, per_channel=False,
        activation: Form | str | None = "default", norm=True, bias=False, stride=1, relu=True,
    ):  # fmt: skip
        super().__init__()
        self.kind, self.groups, self.stride, self.pad, self.relu = kind, groups, stride, kernel // 2, relu
        shapes = {
            "conv": (outputs, inputs // groups, kernel, kernel),
            "transposed": (inputs, outputs // groups, kernel, kernel),
            "linear": (outputs, inputs),
        }
        self.weight = nn.Parameter(torch.randn(shapes[kind]) * 0.2)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.2) if bias else None
        axis = 1 if kind == "transposed" else 0
        form = form(self.weight) if form else weight_grid(self.weight, bits, per_channel=per_channel, axis=axis)
        self.quantize_weight = FrozenWeight(form.encode(self.weight.detach()), form, name)
        if activation == "default":
            activation = activation_grid(bits)
        self.quantize_input = FrozenActivation(activation, f"{name}.input") if activation else nn.Identity()
        self.norm = None
        if norm:
            self.norm = nn.BatchNorm1d(outputs) if kind == "linear" else nn.BatchNorm2d(outputs)
            nn.init.normal_(self.norm.weight)  # both signs
            nn.init.normal_(self.norm.bias)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x, w = self.quantize_input(x), self.quantize_weight(self.weight)
        if self.kind == "conv":
            x = F.conv2d(x, w, self.bias, self.stride, self.pad, groups=self.groups)
        elif self.kind == "transposed":
            x = F.conv_transpose2d(x, w, self.bias, self.stride, groups=self.groups)
        else:
            x = F.linear(x, w, self.bias)
        x = self.norm(x) if self.norm else x
        return F.relu(x) if self.relu else x


class Net(nn.Module):
    """3x3, depthwise, 1x1 and grouped convolutions, a residual add, pooling, 8-bit ends."""

    def __init__(self, bits=4, width=16):
        super().__init__()
        self.stem = Layer("stem", 3, width, bits=8, activation=activation_grid(8, signed=True))
        self.full = Layer("block.full", width, width, bits=bits)
        self.depthwise = Layer("block.depthwise", width, width, groups=width, bits=bits)
        self.point = Layer("block.point", width, 2 * width, kernel=1, bits=bits, bias=True)
        self.grouped = Layer("block.grouped", 2 * width, 2 * width, groups=4, bits=bits, per_channel=True)
        self.head = Layer("head", 2 * width, 10, kind="linear", bits=8, norm=False, bias=True, relu=False)

    def forward(self, x):
        x = self.stem(x)
        x = self.full(x) + self.depthwise(x)
        x = self.grouped(F.max_pool2d(self.point(x), 2))
        return self.head(x.mean((2, 3)))


class Single(nn.Module):
    """One layer between input and output."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.layer = Layer(*args, **kwargs)

    def forward(self, x):
        return self.layer(x)


def build(factory, *args, seed=0, **kwargs):
    """A model in evaluation mode with seeded weights."""
    torch.manual_seed(seed)
    return factory(*args, **kwargs).eval()
