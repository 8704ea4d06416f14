"""Stages that look at data, on Brevitas: driven by ``set_progress``, resumed exactly, written as BipolarQuant."""

from __future__ import annotations

import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from fat_brevitas.deployed import frozen
from fat_brevitas.model import rebuild
from torch import nn

from fat_plugins.errors import HostError
from fat_plugins.export import qonnx
from fat_plugins.network import coordinators, named_quantizers

SECTION = {
    "algorithm": "bitat",
    "weights": {"bits": 1},
    "activations": {"bits": 1},
    "params": {"calibration_samples": 8},
}
DATA = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Net(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


def train(model: nn.Module, epochs: range) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for epoch in epochs:
        fat_brevitas.set_progress(model, epoch=epoch, step=epoch, total_epochs=6, total_steps=6)
        model.train()
        loss = model(DATA[epoch % 3]).square().mean() + fat_brevitas.regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def test_stages_resume_and_deployment(tmp_path):
    model = fat_brevitas.quantize(Net(), SECTION, DATA)
    (stages,) = coordinators(model)
    assert [layer.name for layer in stages.layers] == ["conv2", "conv3"]
    assert stages.layers[0].weight.spec.stride == (2, 2) and "conv2.bias" in stages.layers[0].parameters
    train(model, range(3))
    assert [layer.weight._phase for layer in stages.layers] == [2, 0]
    again = rebuild(Net(), model.compression_state, DATA)
    again.load_state_dict(model.state_dict())
    again.eval()
    assert torch.equal(again(DATA[0]), model(DATA[0]))
    assert train(again, range(3, 6)) == train(model, range(3, 6))
    assert torch.equal(again(DATA[0]), model(DATA[0])) and stages._stage == 2
    deployed = frozen(model)
    torch.testing.assert_close(deployed(DATA[0]), model(DATA[0]))
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("qonnx")
    qonnx.export(deployed, tmp_path / "m.onnx", DATA[0], dynamic_batch=False)
    report = qonnx.verify(deployed, tmp_path / "m.onnx", DATA[0])
    assert report.ok and not any(c.differences for c in [*report.weights, *report.activations])
    kinds = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("BipolarQuant") == 4 and "MultiThreshold" not in kinds


class ByHand(nn.Module):
    """Two binary layers, registered in another order than they run in; a pooling stands before the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = fat_brevitas.weight_quant("bitat", bit_width=1, calibration_samples=8)
        act = fat_brevitas.act_quant("bitat", bit_width=1, calibration_samples=8)
        self.fc = qnn.QuantLinear(54, 5, bias=True, weight_quant=weight)
        self.act2 = qnn.QuantIdentity(act_quant=act)
        self.conv = qnn.QuantConv2d(3, 6, 3, weight_quant=weight)
        self.act1 = qnn.QuantIdentity(act_quant=act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act2(self.conv(self.act1(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


def test_built_by_hand():
    model = ByHand()
    controller = fat_brevitas.Controller(model, DATA)
    (stages,) = coordinators(model)
    assert [layer.name for layer in stages.layers] == ["conv", "fc"]
    assert [layer.input_activation for layer in stages.layers] == [
        m.act_quant.quantizer for m in (model.act1, model.act2)
    ]
    assert "fc.bias" in stages.layers[1].parameters and model.training
    assert all(q.calibrated for _, q in named_quantizers(model))
    train(model, range(3))
    assert stages._stage == 1 and [layer.weight._phase for layer in stages.layers] == [2, 0]
    assert controller.loss().item() > 0
    again = ByHand()
    fat_brevitas.Controller(again, DATA)
    again.load_state_dict(model.state_dict())
    again.eval()
    assert torch.equal(again(DATA[0]), model(DATA[0]))
    fat_brevitas.Controller(again, DATA)  # a second one finds what is there
    assert train(again, range(3, 6)) == train(model, range(3, 6))
    assert stages._stage == 2 and len(list(coordinators(again))) == 1
    with pytest.raises(HostError, match="ByHand is built by hand"):
        controller.compression_state()


def test_built_by_hand_without_coordinator():
    model = ByHand()
    with pytest.raises(HostError, match=r"'bitat' .* needs data: Controller\(model, calibration\)"):
        fat_brevitas.Controller(model)
    with pytest.raises(HostError, match=r"nn\.Sequential cannot hold"):
        fat_brevitas.Controller(nn.Sequential(model), DATA)
    with pytest.warns(UserWarning, match=r"'bitat' acts on the whole network, but its layers train alone"):
        model(DATA[0])
