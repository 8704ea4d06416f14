"""Frozen, stripped and exported models compute what was trained."""

from __future__ import annotations

import os

import fat_nncf
import nncf
import numpy as np
import pytest
import torch
from fat_nncf.modern_hooks import PluginQuantizer, carry, plugin_hooks
from nncf3_nets import Small, Zoo, batch, compress, section, train
from torch import nn

from fat_plugins import ConfigError, ExportError
from fat_plugins.forms import Staircase, UniformGrid
from fat_plugins.frozen import FrozenActivation, FrozenWeight

SECTIONS = {
    "fat": section(),
    "fat3": section(bits=3, first_layer=3, last_layer="same"),
    "power_of_two": section(params={"levels": "power_of_two"}),
    "lsq": section("lsq", weights={"bits": 2, "per_channel": True}),
}


# torch deprecates the tracer that OpenVINO and ONNX conversion use, and torchao has a bad docstring
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=SECTIONS)
def trained(request):
    """Controller, model in evaluation mode, its output."""
    torch.manual_seed(0)
    controller, model = compress(SECTIONS[request.param], net=Zoo())
    train(controller, model)
    with torch.no_grad():
        return controller, model, model(batch())


def openvino_output(source) -> np.ndarray:
    """Float32 output on the CPU plugin."""
    ov = pytest.importorskip("openvino")
    compiled = ov.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(batch().numpy())[0]


def test_freeze(trained):
    _, model, reference = trained
    frozen = fat_nncf.freeze(model)
    kinds = {type(m) for m in frozen.modules()}
    assert FrozenWeight in kinds and FrozenActivation in kinds and PluginQuantizer not in kinds
    assert not frozen.training
    with torch.no_grad():
        assert torch.equal(frozen(batch()), reference)
        assert torch.equal(model(batch()), reference)
    names = [m.name for m in frozen.modules() if isinstance(m, FrozenWeight)]
    assert len(set(names)) == len(names) and {"stem", "body.0", "blocks.0", "shared", "up", "fc"} <= set(names)


def test_freeze_keeps_uncalibrated_activations_as_identities():
    with pytest.warns(UserWarning):
        _, model = compress(data=False)
    frozen = fat_nncf.freeze(model)
    assert all(m.form is None for m in frozen.modules() if isinstance(m, FrozenActivation))
    assert torch.equal(frozen(batch()), model.eval()(batch()))


def test_strip(trained):
    controller, model, reference = trained
    stripped = controller.strip()
    with torch.no_grad():
        assert torch.allclose(stripped(batch()), reference, atol=1e-6, rtol=0)
        assert torch.equal(model(batch()), reference)
    modules = list(stripped.modules())
    assert not any(isinstance(m, (PluginQuantizer, FrozenWeight)) for m in modules)
    uniform = controller.statistics().to_str().count("staircase") == 0
    ours = [m for m in modules if type(m).__module__.startswith(("fat_nncf", "fat_plugins"))]
    assert not ours if uniform else all(isinstance(m, FrozenActivation) for m in ours)
    levels = stripped.blocks[0].weight.unique().numel()
    assert levels <= 16 * (8 if "lsq" in {h.algorithm for h in plugin_hooks(model)} else 1)
    assert not any(
        name.startswith("__nncf_hooks.pre_hooks") for name, _ in stripped.named_modules() if "." in name[13:]
    )


def test_prepare_for_export_strips_in_place():
    controller, model = compress()
    reference = model.eval()(batch())
    controller.prepare_for_export()
    assert not plugin_hooks(model)
    assert torch.allclose(model(batch()), reference, atol=1e-6)


def test_a_weight_that_something_else_reads_is_not_overwritten():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
            return y + self.fc.weight.sum(1)

    controller, model = compress(net=Tied())
    reference = model.eval()(batch())
    assert torch.allclose(controller.strip()(batch()), reference, atol=1e-6)


def test_openvino_converts_the_trained_model(trained):
    ov = pytest.importorskip("openvino")
    _, model, reference = trained
    converted = ov.convert_model(model, example_input=batch())
    assert np.abs(openvino_output(converted) - reference.numpy()).max() < 1e-5
    kinds = {node.get_type_name() for node in converted.get_ops()}
    assert "FakeQuantize" in kinds


def test_onnx(trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    controller, _, reference = trained
    path = tmp_path / "model.onnx"
    controller.export_model(path, model_args=(batch(),), input_names=["image"], output_names=["scores"])
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {n.domain for n in model.graph.node} == {""}  # standard operators only
    assert [i.name for i in model.graph.input] == ["image"] and [o.name for o in model.graph.output] == ["scores"]
    ov = pytest.importorskip("openvino")
    assert np.abs(openvino_output(ov.Core().read_model(path)) - reference.numpy()).max() < 1e-5
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_onnx_runtime(trained, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    controller, _, reference = trained
    controller.export_model(str(tmp_path / "m.onnx"), "onnx_18", model_args=(batch(),))
    options = runtime.SessionOptions()
    # its own fusions requantize in other places than the model says
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "m.onnx", options)
    out = session.run(None, {session.get_inputs()[0].name: batch().numpy()})[0]
    assert np.abs(out - reference.numpy()).max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*do not fit 8 bits:UserWarning")  # power-of-two levels up to 2^14
def test_openvino_ir_holds_the_trained_codes(trained, tmp_path):
    pytest.importorskip("openvino")
    from fat_nncf.export import verify_openvino

    _, model, _ = trained
    fat_nncf.export_openvino(model, tmp_path / "model.xml", batch())
    assert verify_openvino(model, tmp_path / "model.xml", batch()).ok


def test_bad_export_targets(tmp_path):
    controller, _ = compress()
    with pytest.raises(ExportError, match="no such directory"):
        controller.export_model(tmp_path / "none" / "m.onnx")
    with pytest.raises(ExportError, match="is a directory"):
        controller.export_model(tmp_path)
    with pytest.raises(ConfigError, match="save_format"):
        controller.export_model(tmp_path / "m.onnx", "tf")


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    controller, _ = compress()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        controller.export_model(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.onnx"]


def test_nncf_strip_leaves_our_hooks_working(trained):
    _, model, reference = trained
    stripped = nncf.strip(model, do_copy=True, example_input=batch())
    with torch.no_grad():
        assert torch.equal(stripped(batch()), reference)


@pytest.mark.parametrize(
    "form",
    [
        UniformGrid(4, False, False, torch.tensor([0.1])),
        UniformGrid(4, True, True, torch.tensor([0.07])),
        UniformGrid(2, True, False, torch.tensor([0.1, 0.2, 0.3]), 1),
        UniformGrid(8, False, False, torch.tensor([0.01])),
        Staircase(2, torch.tensor([0, 1, 4, 7]), torch.tensor([0.5, 2.0, 6.0]), torch.tensor([0.2])),
    ],
    ids=repr,
)
def test_what_a_tracer_sees_equals_the_form(form):
    x = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(carry(x, form), form.decode(form.encode(x)), atol=1e-7)


def test_statistics_and_rates():
    controller, _ = compress()
    statistics = controller.statistics()
    rows = [line.split()[:5] for line in statistics.to_str().splitlines()]
    assert ["conv2", "weight", "fat", "4", "uniform"] in rows and ["fc", "weight", "minmax", "8", "uniform"] in rows
    by_name = {t.name: t for t in statistics.tensors}
    assert by_name["conv2"].elements == 6 * 8 * 9 and by_name["conv2"].form == "uniform"
    assert statistics.to_dict()["tensors"][0]["name"]
    assert statistics.facts == {}
    sparse, _ = compress(section("squantizer", 3))
    assert "compression rate as published" in sparse.statistics().to_str()
    assert sparse.statistics(quickly_collected_only=True).facts == {}
    weights = {"conv1": (162, 8), "conv2": (432, 4), "conv3": (64, 4), "fc": (40, 8)}
    rate = 1 - sum(n * b for n, b in weights.values()) / (32 * sum(n for n, _ in weights.values()))
    assert controller.compression_rate == pytest.approx(rate) == controller.maximal_compression_rate
    assert controller.name == "fat" and controller.compression_stage() == 2
    assert Small().conv2.weight.numel() == 432
