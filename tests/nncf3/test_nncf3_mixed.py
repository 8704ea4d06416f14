"""Several algorithms in one model on NNCF 3: per layer, per section of a list, per role, beside sparsity."""

from __future__ import annotations

import crossgen
import fat_nncf
import pytest
import torch
from mixed import CASES, FRONT, found, section, two
from nncf3_nets import config, quantizers

from fat_plugins import ConfigError

SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def compress(compression, state=None):
    settings = config(compression, crossgen.loader(), input_info={"sample_size": list(crossgen.INPUT_SHAPE)})
    return fat_nncf.create_compressed_model(crossgen.build_net(), settings, compression_state=state)


def trained(compression):
    torch.manual_seed(0)
    controller, model = compress(compression)
    optimizer = torch.optim.SGD(fat_nncf.param_groups(model, 0.01), 0.01)
    controller.scheduler.total_epochs = 2
    model.train()
    for _ in range(2):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        (model(crossgen.batch()).square().mean() + controller.loss()).backward()
        optimizer.step()
    return controller, model.eval()


@pytest.mark.filterwarnings("ignore:.*(sum of|levels):UserWarning")  # what such grids cost
@pytest.mark.parametrize(("compression", "weights", "activations"), CASES)
def test_mixed_models_train_export_and_come_back(tmp_path, compression, weights, activations):
    controller, model = trained(compression)
    assert found(model, "weight") == sorted(weights) and found(model, "activation") == sorted(activations)
    x = crossgen.batch()
    fat_nncf.export_openvino(model, tmp_path / "net.xml", x)
    report = fat_nncf.verify_openvino(model, tmp_path / "net.xml", x)
    assert report.ok and len(report.weights) == 5, report.detail
    _, again = compress(compression, controller.get_compression_state())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))


def test_sections_beside_sparsity(tmp_path):
    _, model = trained([SPARSITY, *two()])
    weights = {name: q for (role, name), q in quantizers(model).items() if role == "weight"}
    assert all(q.spec.keep_zeros for q in weights.values())
    assert found(model, "weight") == ["FATWeight 4", "LSQWeight 3", "LSQWeight 3"]
    fat_nncf.export_openvino(model, tmp_path / "net.xml", crossgen.batch())
    assert fat_nncf.verify_openvino(model, tmp_path / "net.xml", crossgen.batch()).ok


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ([two()[0], section("lsq", 3, ignored_scopes=["{re}pw"])],
         r"compression\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize layer 'conv1'; give them"),
        ([two()[0] | {"overflow_fix": "enable"}, two()[1] | {"overflow_fix": "disable"}],
         r"compression\[1\].overflow_fix: 'disable' differs from compression\[0\]'s 'enable'"),
        ([two()[0], section("lsq", 3, target_scopes=["pww"])], r"compression\[1\].target_scopes: scope 'pww'"),
    ],
)  # fmt: skip
def test_contradictions_give_one_line(compression, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compress(compression)
    assert "\n" not in str(caught.value)


def test_a_bad_number_names_its_section():
    with pytest.raises(ConfigError, match=r"compression\[1\].initializer.range.num_init_samples"):
        compress([section("fat", 4, target_scopes=[FRONT]),
                  two()[1] | {"initializer": {"range": {"num_init_samples": -1}}}])  # fmt: skip
