"""Stages that look at data, on NNCF 2: passes through the network as it stands, exact resumption, deployment."""

import fat_nncf
import pytest
import torch
from legacy_models import batch, compress, evaluate, optimizer, train_step

SECTION = {
    "algorithm": "bitat",
    "weights": {"bits": 1},
    "activations": {"bits": 1},
    "params": {"calibration_samples": 8},
}


def epoch(ctrl, model, opt):
    ctrl.scheduler.epoch_step()
    model.train()
    return train_step(model, ctrl, opt)


def stages(ctrl):
    return ctrl.parts()[-1]


def test_stages_and_resume_in_the_middle_of_one():
    ctrl, model = compress(SECTION)
    inputs = []
    for layer in stages(ctrl).layers:
        observe = layer.weight.observe_input
        layer.weight.observe_input = lambda x, f=observe, n=layer.name: (inputs.append((n, x)), f(x))
    opt = optimizer(model)
    for expected in (0, 1):
        epoch(ctrl, model, opt)
        assert stages(ctrl)._stage == expected
    assert list(dict.fromkeys(n for n, _ in inputs)) == [layer.name for layer in stages(ctrl).layers][:2]
    assert all(set(x.unique().tolist()) <= {-1.0, 1.0} for _, x in inputs)
    again, fresh = compress(SECTION, compression_state=ctrl.get_compression_state())
    assert stages(again)._stage == -2
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(fresh), evaluate(model))
    # momentum is not part of a compression state: both go on with new optimizers
    mine, other = optimizer(model), optimizer(fresh)
    for _ in range(3):
        assert epoch(again, fresh, other) == epoch(ctrl, model, mine)
    assert torch.equal(evaluate(fresh), evaluate(model))
    assert stages(again)._stage == len(stages(again).layers)


def test_deployed_is_what_evaluation_gives(tmp_path):
    pytest.importorskip("openvino")
    ctrl, model = compress(SECTION)
    epoch(ctrl, model, optimizer(model))
    out = evaluate(model)
    frozen = fat_nncf.freeze(model)
    torch.testing.assert_close(frozen(batch()), out)
    assert not any("BiTAT" in type(m).__name__ for m in frozen.modules())
    fat_nncf.export_openvino(model, tmp_path / "m.xml", batch())
    report = fat_nncf.verify_openvino(model, tmp_path / "m.xml", batch())
    assert report.ok and not any(c.differences for c in [*report.weights, *report.activations])
