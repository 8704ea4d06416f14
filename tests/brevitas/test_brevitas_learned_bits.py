"""Bit widths that layers learn, on Brevitas: what layers report, and what is written."""

from __future__ import annotations

import fat_brevitas
import pytest
import torch
from brevitas_whole import Residual, images
from torch import nn

from fat_plugins import reestimate_batch_norms

pytest.importorskip("qonnx")
pytest.importorskip("openvino")

WANTED = {"c1": 3, "c2": 2, "down.0": 4}
#: logits of the gates of levels 2, 3 and 4 that stand for these widths
GATES = {3: [3.0, 3.0, -3.0], 2: [3.0, -3.0, 3.0], 4: [3.0, 3.0, 3.0]}
SECTION = {
    "algorithm": "dropbits", "weights": {"bits": 4}, "activations": {"bits": 4},
    "params": {"mask": "hierarchical", "learn_epochs": 1, "bit_penalty": 0.1},
}  # fmt: skip


def train(controller: fat_brevitas.Controller, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(fat_brevitas.param_groups(model, 0.01), lr=0.01)
    controller.scheduler.epoch_step()
    for i in range(2):
        controller.scheduler.step()
        model.train()
        loss = nn.functional.cross_entropy(model(images(seed=i)), torch.arange(4)) + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def widths(model: nn.Module) -> dict[str, int]:
    return {name: int(model.get_submodule(name).quant_weight().bit_width) for name in WANTED}


def test_learned_widths_reach_the_layers_and_the_files(tmp_path):
    torch.manual_seed(0)
    model = fat_brevitas.quantize(Residual(), SECTION, [images()])
    controller = fat_brevitas.Controller(model)
    assert controller.loss().item() > 0.5  # three layers with three gates of 0.9
    train(controller, model)
    assert set(widths(model).values()) == {4}
    for name, bits in WANTED.items():
        with torch.no_grad():
            model.get_submodule(name).weight_quant.quantizer.phi.copy_(torch.tensor(GATES[bits]))
    model.train()
    controller.scheduler.epoch_step(1)
    assert widths(model) == WANTED  # at once, though the mode did not change
    train(controller, model)
    assert controller.loss().item() == 0
    assert reestimate_batch_norms(model, [images()]) == 4
    model.eval()

    again = fat_brevitas.rebuild(Residual(), model.compression_state).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images())) and widths(again) == WANTED

    for write, check, file in (
        (fat_brevitas.export_qonnx, fat_brevitas.verify_qonnx, "m.onnx"),
        (fat_brevitas.export_openvino, fat_brevitas.verify_openvino, "m.xml"),
    ):
        report = write(model, tmp_path / file, images())
        written = {r.name: r.bits for r in report.layers if r.kind == "weight"}
        assert {name: written[name] for name in WANTED} == WANTED
        result = check(model, tmp_path / file, images(8, seed=5))
        assert result.ok, result.detail
