"""An algorithm that leaves no float weight (direct) on Brevitas: the parameter holds what is deployed."""

from __future__ import annotations

import fat_brevitas
import pytest
import torch
from brevitas_nets import Net, batch
from fat_brevitas import layers
from torch import nn

from fat_plugins import ConfigError, QuantizationError

# without a grid, activation levels are 16 bits wide, and the exporters say so
pytestmark = pytest.mark.filterwarnings("ignore:.* 0 .. 65535 :UserWarning", "ignore::DeprecationWarning")


class Float(nn.Module):
    """Three convolutions, one of them depthwise, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.conv3 = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 1)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act2(self.conv2(self.act1(self.bn(self.conv1(x)))))
        return self.fc(self.act3(self.conv3(x)).mean((2, 3)))


def quantized(bits=2, **params):
    torch.manual_seed(0)
    section = {"algorithm": "direct", "weights": {"bits": bits}, "activations": {"bits": bits}, "params": params}
    return fat_brevitas.quantize(Float(), section, calibration=[batch(), batch()])


def train(model, steps=3):
    groups = fat_brevitas.param_groups(model, 1e-2)
    handed = {id(p) for group in groups for p in group["params"]}
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch()), torch.arange(len(batch())) % 4).backward()
        optimizer.step()
    return handed


def owned(model):
    """Layers whose weight was taken over."""
    found = [m for m in model.modules() if hasattr(m, "weight_quant") and m.weight_quant.quantizer.owns_weight]
    assert found
    return found


@pytest.mark.parametrize("params", [{}, {"levels": "tied"}, {"grid": 8}], ids=str)
def test_train_rebuild_freeze(params):
    model = quantized(**params)
    before = {layer: layer.weight.clone() for layer in owned(model)}
    assert all(torch.equal(layer.weight, layer.weight_quant.quantizer(layer.weight)) for layer in before)
    handed = train(model)
    model.eval()
    with torch.no_grad():
        reference = model(batch())
        assert torch.equal(fat_brevitas.frozen(model)(batch()), reference)
    for layer, old in before.items():
        quantizer = layer.weight_quant.quantizer
        assert not layer.weight.requires_grad and layer.weight.grad is None and id(layer.weight) not in handed
        assert {id(quantizer.z), id(quantizer.basis)} <= handed
        # the first forward after training writes the value back
        assert torch.equal(layer.weight, quantizer(layer.weight)) and not torch.equal(layer.weight, old)
    again = fat_brevitas.rebuild(Float(), model.compression_state)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(batch()), reference)
    assert all(not layer.weight.requires_grad for layer in owned(again))


def test_layers_take_their_weights_over_when_built():
    net = Net("direct", 2)
    assert not any(layer.weight.requires_grad for layer in owned(net))
    before = net.conv1.weight.clone()
    net.train()(batch())
    assert not torch.equal(net.conv1.weight, before) and len(net.conv1.weight[0].unique()) <= 4


@pytest.mark.parametrize("target", ["qonnx", "onnx", "openvino"])
@pytest.mark.parametrize("bits,params", [(1, {}), (2, {}), (3, {"levels": "tied"}), (3, {"grid": 8})], ids=str)
def test_targets_run_what_was_trained(bits, params, target, tmp_path):
    for module in {"qonnx": ["qonnx"], "onnx": ["onnx", "onnxruntime"], "openvino": ["openvino"]}[target]:
        pytest.importorskip(module)
    model = quantized(bits, **params)
    train(model)
    model.eval()
    path = tmp_path / ("model.xml" if target == "openvino" else "model.onnx")
    getattr(fat_brevitas, f"export_{target}")(model, path, batch())
    report = getattr(fat_brevitas, f"verify_{target}")(model, path, batch())
    assert report.ok and sum(c.differences for c in report.activations) == 0


def test_there_is_no_float_weight_to_begin_with_or_to_prune():
    weight = fat_brevitas.weight_quant("direct", bit_width=2, quant_delay_steps=10)
    with pytest.raises(ConfigError, match="quant_delay_steps: 'direct' has no float weight to begin with"):
        layers.layer_class("direct", "Linear")(4, 4, bias=True, weight_quant=weight)
    with pytest.raises(QuantizationError, match="the grid has no zero, so sparsity cannot be kept"):
        layers.layer_class("direct", "Linear")(
            4, 4, bias=True, weight_quant=fat_brevitas.weight_quant("direct", keep_zeros=True)
        )
