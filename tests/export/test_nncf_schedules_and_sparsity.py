"""Quantization Networks, SQuantizer and SDQ end to end on whichever generation of NNCF is installed: schedules from the
controller, export with equal codes, zeros in the statistics, a mask of NNCF's own, a checkpoint within a schedule."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("openvino")
pytest.importorskip("nncf")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import crossgen
import fat_nncf
import nncf
from fat_nncf.export import verify_openvino
from test_nncf_export import LAYERS, Residual, _own_folder, write  # noqa: F401

from fat_plugins import named_quantizers
from fat_plugins.export.openvino import kernels
from fat_plugins.frozen import FrozenWeight, frozen_modules
from fat_plugins.quantizer import WeightQuantizer

OLD = nncf.__version__.startswith("2.")
pytestmark = pytest.mark.filterwarnings("ignore")


def compress(algorithm, bits, sparsity=None, state=None, **params):
    torch.manual_seed(0)
    section = {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}, "params": params}
    config = fat_nncf.NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": list(crossgen.INPUT_SHAPE)},
            "compression": [sparsity, section] if sparsity else section,
        }
    )
    config = fat_nncf.register_default_init_args(config, crossgen.loader())
    return fat_nncf.create_compressed_model(Residual(), config, compression_state=state)


def train(controller, model, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for _ in range(2):
            controller.scheduler.step()
            optimizer.zero_grad()
            (model(crossgen.batch()).square().mean() + controller.loss()).backward()
            optimizer.step()
    return model


def weights(model):
    return [q for _, q in named_quantizers(model) if isinstance(q, WeightQuantizer) and q.spec.bits < 8]


@pytest.mark.parametrize(
    ("algorithm", "bits", "params"),
    [
        ("quantization_networks", 1, {}),
        ("quantization_networks", 3, {"weight_epochs": 1, "activation_epochs": 1}),
        ("quantization_networks", 2, {"uniform_thresholds": True}),
        ("squantizer", 4, {}),
        ("squantizer", 2, {"alpha": None}),
        ("squantizer", 4, {"grid": "aligned", "delay_epochs": 1}),
        ("sdq", 3, {"pruning_ratio": 0.5}),
        ("sdq", 2, {"tau": 0.7, "alpha": "mse", "activation_alpha": "mse"}),
        ("sdq", 3, {"levels": "power_of_two"}),
        ("sdq", 4, {"levels": "power_of_two", "pruning_ratio": 0.5}),
    ],
    ids=str,
)
def test_trained_models_are_exported_with_the_same_codes(algorithm, bits, params, tmp_path):
    controller, model = compress(algorithm, bits, **params)
    train(controller, model, 3)
    report = write(model, tmp_path / "m.xml", crossgen.batch())
    assert [r.name for r in report.layers if r.kind == "weight"] == LAYERS
    assert {k.speed for k in kernels(tmp_path / "m.xml")} == {"int8"}
    result = verify_openvino(model, tmp_path / "m.xml", torch.randn(8, 3, 12, 12))
    assert result.ok, result.detail


def test_phases_follow_the_controller():
    controller, model = compress("quantization_networks", 2, weight_epochs=1, activation_epochs=1)
    seen = []
    for _ in range(3):
        train(controller, model, 1)
        seen.append({(q.still, q.clock.item()) for q in weights(model)})
    assert seen == [{(False, 1)}, {(True, 1)}, {(False, 2)}]


def test_a_delay_survives_a_checkpoint():
    controller, model = compress("squantizer", 4, delay_epochs=2)
    train(controller, model, 1)
    assert all(q.waiting for q in weights(model))
    saved = controller.scheduler.get_state()
    other, resumed = compress("squantizer", 4, delay_epochs=2)
    assert all(q.waiting for q in weights(resumed))
    train(other, resumed, 2)
    other.scheduler.epoch_step()
    assert not any(q.waiting for q in weights(resumed))
    other.scheduler.load_state(saved)
    assert all(q.waiting for q in weights(resumed)) and other.scheduler.current_epoch == 0
    # evaluation passes do not count
    with torch.no_grad():
        for _ in range(5):
            resumed.eval()(crossgen.batch())
    assert all(q.waiting for q in weights(resumed))


@pytest.mark.parametrize("algorithm,params", [("squantizer", {}), ("sdq", {"pruning_ratio": 0.55})])
def test_statistics_show_the_zeros(algorithm, params):
    controller, _ = compress(algorithm, 4, **params)
    statistics = controller.statistics()
    if OLD:
        sparse = statistics.const_sparsity.model_statistics
        shares = {s.name: s.sparsity_level for s in sparse.sparsified_layers_summary}
        assert 0.2 < sparse.sparsity_level < sparse.sparsity_level_for_layers
        assert controller.statistics(quickly_collected_only=True).const_sparsity is None
        assert compress("quantization_networks", 3)[0].statistics().const_sparsity is None
    else:
        shares = {t.name: t.zeros for t in statistics.tensors if t.algorithm == algorithm and t.role == "weight"}
    assert set(shares) == {"conv1", "conv2", "hidden"} and all(0.4 < s < 0.7 for s in shares.values())


@pytest.mark.parametrize("algorithm", ["squantizer", "sdq"])
def test_masks_of_nncf_replace_the_threshold(algorithm, tmp_path):
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.8, "params": {"sparsity_target": 0.8}}
    controller, model = compress(
        algorithm, 4, sparsity, **({"tau": 9.0, "levels": "power_of_two"} if algorithm == "sdq" else {})
    )
    assert all(q.spec.keep_zeros for q in weights(model))
    train(controller, model, 1)
    write(model, tmp_path / "m.xml", crossgen.batch())
    result = verify_openvino(model, tmp_path / "m.xml", torch.randn(4, 3, 12, 12))
    assert result.ok, result.detail
    statistics = controller.statistics()
    if OLD:
        assert statistics.const_sparsity is None
        summary = statistics.magnitude_sparsity.model_statistics.sparsified_layers_summary
        masks = {s.name.split("[")[1].split("]")[0]: s.sparsity_level for s in summary}
    else:
        found = nncf.pruning_statistic(model).pruned_tensors
        masks = {t.tensor_name.split(".")[0]: t.pruned_ratio for t in found}
    zeros = {m.name: (m.form.decode(m.codes) == 0).float().mean().item() for m in frozen_modules(fat_nncf.freeze(model))
             if isinstance(m, FrozenWeight)}  # fmt: skip
    for name in ("conv1", "conv2", "hidden"):
        assert zeros[name] == pytest.approx(masks[name], abs=1e-6) and zeros[name] > 0.2
