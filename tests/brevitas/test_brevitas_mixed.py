"""Several algorithms in one model on Brevitas: per layer, per section of a list, per role."""

from __future__ import annotations

import crossgen
import fat_brevitas
import pytest
import torch
from mixed import BACK, CASES, FRONT, found, section, two

from fat_plugins import ConfigError


def trained(config):
    torch.manual_seed(0)
    model = fat_brevitas.quantize(crossgen.build_net(), {"compression": config}, crossgen.loader())
    controller = fat_brevitas.Controller(model)
    optimizer = torch.optim.SGD(fat_brevitas.param_groups(model, 0.01), 0.01)
    model.train()
    controller.scheduler.total_epochs = 2
    for _ in range(2):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        loss = model(crossgen.batch()).square().mean() + controller.loss()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*(sum of|levels):UserWarning")  # what such grids cost
@pytest.mark.parametrize(("config", "weights", "activations"), CASES)
def test_mixed_models_train_export_and_come_back(tmp_path, config, weights, activations):
    model = trained(config)
    assert found(model, "weight") == sorted(weights) and found(model, "activation") == sorted(activations)
    x = crossgen.batch()
    fat_brevitas.export_qonnx(model, tmp_path / "net.onnx", x)
    report = fat_brevitas.verify_qonnx(model, tmp_path / "net.onnx", x)
    assert report.ok and len(report.weights) == 5, report.detail
    again = fat_brevitas.rebuild(crossgen.build_net(), model.compression_state)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([section("fat", 4, target_scopes=[FRONT]), section("lsq", 3, target_scopes=["{re}conv1", BACK])],
         r"compression\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize layer 'conv1'; give them"),
        ([section("lsq", 3, target_scopes=[BACK]), section("fat", 4)], "both quantize every layer"),
        ([two()[0] | {"quantize_inputs": False}, two()[1] | {"quantize_inputs": True}],
         r"compression\[1\].quantize_inputs: True differs from compression\[0\]'s False"),
        ([two()[0], section("lsq", 3, target_scopes=["pww"])], r"compression\[1\].target_scopes: scope 'pww'"),
        ([two()[0], section("fat", 1, target_scopes=[BACK])], r"compression\[1\].weights.*no 1-bit"),
    ],
)  # fmt: skip
def test_contradictions_give_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        fat_brevitas.quantize(crossgen.build_net(), {"compression": config}, crossgen.loader())
    assert "\n" not in str(caught.value)


def test_layers_of_no_section_stay_float():
    parts = [section("fat", 4, target_scopes=["dw"]), section("lsq", 3, target_scopes=["conv2"], last_layer="same")]
    model = fat_brevitas.quantize(crossgen.build_net(), {"compression": parts}, crossgen.loader())
    assert found(model, "weight") == ["FATWeight 4", "LSQWeight 3"]
    assert found(model, "activation") == ["FATActivation 4", "LSQActivation 3"]
    assert type(model.fc) is torch.nn.Linear
