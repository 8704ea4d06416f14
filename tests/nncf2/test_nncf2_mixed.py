"""Several algorithms in one model on NNCF 2: per layer, per section of a list, per role, beside sparsity."""

from __future__ import annotations

import fat_nncf
import pytest
import torch
from crossgen import batch
from legacy_models import compress, evaluate, optimizer, quantizers, train_step
from mixed import CASES, found, section, two

from fat_plugins import ConfigError

SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def trained(compression):
    torch.manual_seed(0)
    ctrl, model = compress(compression)
    opt = optimizer(model)
    for _ in range(2):
        ctrl.scheduler.epoch_step()
        train_step(model.train(), ctrl, opt)
    return ctrl, model.eval()


@pytest.mark.filterwarnings("ignore:.*(sum of|levels):UserWarning")  # what such grids cost
@pytest.mark.parametrize(("compression", "weights", "activations"), CASES)
def test_mixed_models_train_export_and_come_back(tmp_path, compression, weights, activations):
    ctrl, model = trained(compression)
    assert found(model, "weight") == sorted(weights) and found(model, "activation") == sorted(activations)
    fat_nncf.export_openvino(model, tmp_path / "net.xml", batch())
    report = fat_nncf.verify_openvino(model, tmp_path / "net.xml", batch())
    assert report.ok and len(report.weights) == 5, report.detail
    _, again = compress(compression, compression_state=ctrl.get_compression_state(), data=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(again), evaluate(model))


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [1, 2, 0]])
def test_sections_beside_sparsity(order):
    parts = [SPARSITY, *two()]
    ctrl, model = trained([parts[i] for i in order])
    assert all(q.spec.keep_zeros for q in quantizers(model, "weight").values())
    assert found(model, "weight") == ["FATWeight 4", "LSQWeight 3", "LSQWeight 3"]
    statistics = ctrl.statistics()
    assert statistics.quantization.num_wq_per_bitwidth == {8: 2, 4: 1, 3: 2}
    assert statistics.magnitude_sparsity is not None


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ([two()[0], section("lsq", 3, ignored_scopes=["{re}pw"])],
         r"compression\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize layer 'conv1'; give them"),
        ([two()[0] | {"overflow_fix": "enable"}, two()[1] | {"overflow_fix": "disable"}],
         r"compression\[1\].overflow_fix: 'disable' differs from compression\[0\]'s 'enable'"),
        ([two()[0], section("lsq", 3, target_scopes=["{re}pww"])], r"compression\[1\].target_scopes: '\{re\}pww'"),
    ],
)  # fmt: skip
def test_contradictions_give_one_line(compression, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compress(compression)
    assert "\n" not in str(caught.value)
