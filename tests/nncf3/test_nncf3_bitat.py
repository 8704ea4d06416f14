"""Algorithms that act in stages on data: the coordinator's passes, exact resumption, deployment of one-bit layers."""

from __future__ import annotations

import json

import fat_nncf
import pytest
import torch
from nncf3_nets import Small, Zoo, batch, compress, config, loader, section, train
from safetensors.torch import load_model, save_model

SECTION = section("bitat", 1, params={"calibration_samples": 8})
W1A4 = {**SECTION, "activations": {"algorithm": "lsq", "bits": 4}}


def phases(controller):
    return [layer.weight._phase for layer in controller.coordinators[0].layers]


def test_layers_as_the_coordinator_sees_them():
    controller, model = compress(SECTION, net=Zoo())
    layers = controller.coordinators[0].layers
    assert [layer.name for layer in layers] == [
        "body.0", "body.3", "blocks.0", "blocks.1", "shared", "up", "table"
    ]  # fmt: skip
    assert layers[0].parameters["body.0.bias"] is model.body[0].bias and list(layers[-1].parameters) == ["table"]
    assert layers[0].weight.spec.groups == 8 and layers[0].weight.spec.padding == (1, 1, 1, 1)
    assert layers[5].weight.spec.stride == (2, 2)


@pytest.mark.parametrize("net", [Small, Zoo])
def test_stages_pass_the_host_s_data(net):
    controller, model = compress(SECTION, net=net())
    seen = []
    for layer in controller.coordinators[0].layers:
        observe = layer.weight.observe_input
        layer.weight.observe_input = lambda x, f=observe, n=layer.name: (
            seen.append((n, set(x.unique().tolist()))),
            f(x),
        )
    keys = set(model.state_dict())
    count = len(controller.coordinators[0].layers)
    for stage in range(count + 1):
        train(controller, model)
        assert phases(controller) == ([2] * stage + [0] + [1] * (count - 1 - stage) if stage < count else [3] * count)
    names = [layer.name for layer in controller.coordinators[0].layers]
    assert list(dict.fromkeys(n for n, _ in seen)) == names  # bottom-up
    assert all(values <= {-1.0, 1.0} for _, values in seen)  # behind the binarizer
    assert set(model.state_dict()) == keys  # nothing is left in the hooks


@pytest.mark.parametrize("compression", [SECTION, W1A4], ids=["w1a1", "w1a4"])
def test_resume_in_the_middle_of_a_stage_is_bitwise(compression, tmp_path):
    controller, model = compress(compression)
    train(controller, model)
    state = json.loads(json.dumps(controller.get_compression_state()))
    save_model(model, str(tmp_path / "model.safetensors"))
    resumed, fresh = fat_nncf.create_compressed_model(Small(), config(compression), compression_state=state)
    assert phases(resumed) == [0, 0] and resumed.coordinators[0]._stage == -2  # nothing begins before the tensors
    load_model(fresh, tmp_path / "model.safetensors")
    assert phases(resumed) == phases(controller) == [0, 1]
    assert torch.equal(fresh.eval()(batch()), model(batch()))
    for _ in range(3):
        assert train(resumed, fresh) == train(controller, model)
    assert torch.equal(fresh(batch()), model(batch())) and phases(resumed) == [3, 3]


@pytest.mark.parametrize("compression", [SECTION, W1A4], ids=["w1a1", "w1a4"])
@pytest.mark.parametrize("stage", [0, 3])
def test_deployed_is_what_evaluation_gives(compression, stage, tmp_path):
    pytest.importorskip("openvino")
    controller, model = compress(compression)
    for _ in range(stage):
        train(controller, model)
    model.eval()
    frozen = fat_nncf.freeze(model)
    torch.testing.assert_close(frozen(batch()), model(batch()))
    report = fat_nncf.export_openvino(model, tmp_path / "m.xml", batch())
    assert {r.storage for r in report.layers if r.kind == "weight"} == {"u1", "i8"}
    verified = fat_nncf.verify_openvino(model, tmp_path / "m.xml", batch())
    assert verified.ok
    assert sum(a.differences for a in verified.activations) == sum(w.differences for w in verified.weights) == 0
    from fat_plugins.export import openvino

    assert {k.speed for k in openvino.kernels(tmp_path / "m.xml")} == {"int8"}
    assert torch.equal(controller.strip()(batch()), model(batch()))
    names = [type(m).__name__ for m in [*frozen.modules(), *controller.strip().modules()]]
    assert not any("BiTAT" in n for n in names)


def test_quantize_drives_the_stages_too():
    import nncf

    import fat_plugins

    model = fat_nncf.quantize(
        Small(), nncf.Dataset([x for x, _ in loader()]), "bitat", {"bits": 1}, {"bits": 1}, {"calibration_samples": 8}
    ).train()
    (stages,) = fat_plugins.network.coordinators(model)
    fat_plugins.set_progress(model, fat_plugins.Progress())
    assert stages._stage == 0
    fat_plugins.regularization(model).backward()
    assert stages.rotation.grad.abs().max() > 0
