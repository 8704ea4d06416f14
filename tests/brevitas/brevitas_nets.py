"""Small Brevitas networks and a few words on which algorithms there are, shared by the tests of this folder."""

from __future__ import annotations

import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from torch import nn

from fat_plugins import algorithms

#: those that know the 4 bits of these tests; the one-bit ones have tests of their own
WEIGHTS = [n for n, a in algorithms().items() if a.weight_quantizer is not None and a.weight_bits[1] >= 4]
ACTIVATIONS = [n for n, a in algorithms().items() if a.activation_quantizer is not None and a.activation_bits[1] >= 4]
each_weight = pytest.mark.parametrize("algorithm", WEIGHTS)
each_activation = pytest.mark.parametrize("algorithm", ACTIVATIONS)

#: layers by name: how they are made, and an input
LAYERS = {
    "conv1d": (lambda **k: qnn.QuantConv1d(4, 6, 3, **k), (2, 4, 9)),
    "conv2d": (lambda **k: qnn.QuantConv2d(3, 8, 3, **k), (2, 3, 7, 7)),
    "depthwise": (lambda **k: qnn.QuantConv2d(6, 6, 3, groups=6, **k), (2, 6, 7, 7)),
    "grouped": (lambda **k: qnn.QuantConv2d(4, 6, 1, groups=2, **k), (2, 4, 5, 5)),
    "transposed": (lambda **k: qnn.QuantConvTranspose2d(4, 6, 3, **k), (2, 4, 5, 5)),
    "grouped_transposed": (lambda **k: qnn.QuantConvTranspose2d(4, 6, 3, groups=2, **k), (2, 4, 5, 5)),
    "linear": (lambda **k: qnn.QuantLinear(6, 5, bias=True, **k), (3, 6)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def build(layer: str, quantizer: type | None, **keywords) -> tuple[nn.Module, torch.Tensor]:
    """A layer whose weights ``quantizer`` quantizes, and an input for it."""
    make, shape = LAYERS[layer]
    generator = torch.Generator().manual_seed(len(layer))
    made = make(weight_quant=quantizer, **keywords)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * 0.3)
    return made, torch.randn(shape, generator=generator)


class Net(nn.Module):
    """conv, batch norm, quantized ReLU, conv, quantized ReLU, linear; every quantizer of one algorithm."""

    def __init__(self, algorithm: str = "fat", bits: int = 4) -> None:
        super().__init__()
        weight = fat_brevitas.weight_quant(algorithm, bit_width=bits)
        act = fat_brevitas.act_quant(algorithm, bit_width=bits)
        self.inp = qnn.QuantIdentity(act_quant=fat_brevitas.act_quant("minmax", bit_width=8))
        self.conv1 = qnn.QuantConv2d(3, 6, 3, bias=False, weight_quant=weight)
        self.bn = nn.BatchNorm2d(6)
        self.act1 = qnn.QuantReLU(act_quant=act)
        self.conv2 = qnn.QuantConv2d(6, 6, 3, groups=2, weight_quant=weight)
        self.act2 = qnn.QuantReLU(act_quant=act)
        self.fc = qnn.QuantLinear(6, 4, bias=True, weight_quant=weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn(self.conv1(self.inp(x))))
        return self.fc(self.act2(self.conv2(x)).mean((2, 3)))


def batch(seed: int = 3) -> torch.Tensor:
    """Input of :class:`Net`."""
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(algorithm: str = "fat", bits: int = 4, steps: int = 2) -> Net:
    """A :class:`Net` after a few optimizer steps, in evaluation mode."""
    torch.manual_seed(0)
    net = Net(algorithm, bits)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        optimizer.step()
    return net.eval()


def quantizers(net: nn.Module) -> dict[str, nn.Module]:
    """Core quantizers by module path."""
    from fat_plugins import named_quantizers

    return dict(named_quantizers(net))


def without_scale(quantized) -> torch.Tensor | None:
    """Values of a quantized tensor for which Brevitas has no scale (a plain tensor, an empty one up to 0.10)."""
    if type(quantized) is torch.Tensor:
        return quantized
    return quantized.value if quantized.scale is None else None
