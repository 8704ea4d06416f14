"""Strip, freeze and NNCF's own exports of a trained model."""

import copy
import inspect

import fat_nncf
import pytest
import torch
from fat_nncf.legacy_quantizer import PluginQuantizer
from fat_nncf.versions import nncf_version
from legacy_models import BITS4, batch, build_net, compress, evaluate, fat, make_config, optimizer, train_step
from torch import nn

from fat_plugins import Quantizer
from fat_plugins.errors import ExportError
from fat_plugins.frozen import FrozenActivation, FrozenWeight

POWER_OF_TWO = {"params": {"levels": "power_of_two"}}
SECTIONS = {
    "fat": fat(),
    "fat_power_of_two": fat(**POWER_OF_TWO),
    "fat_2_3": fat(weights={"bits": 2}, activations={"bits": 3}),
    "lsq": {"algorithm": "lsq", **BITS4},
    "lsq_per_channel": {"algorithm": "lsq", "weights": {"bits": 4, "per_channel": True}, "activations": {"bits": 4}},
}


@pytest.fixture(scope="module", params=SECTIONS)
def trained(request):
    """(name, controller, model) after three steps."""
    torch.manual_seed(0)
    ctrl, model = compress(SECTIONS[request.param])
    opt = optimizer(model)
    for _ in range(3):
        train_step(model.train(), ctrl, opt)
    return request.param, ctrl, model


def inputs(seed=5):
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_strip_folds_and_equals_eval(trained):
    name, ctrl, model = trained
    before = copy.deepcopy(model.state_dict())
    stripped = ctrl.strip()
    assert not any(isinstance(m, (PluginQuantizer, Quantizer)) for m in stripped.modules())
    assert not any(len(m.pre_ops) for m in stripped.modules() if hasattr(m, "pre_ops"))
    kinds = {type(m).__name__ for m in stripped.nncf.external_quantizers.values()}
    assert kinds == ({"FakeQuantize", "FrozenActivation"} if name == "fat_power_of_two" else {"FakeQuantize"})
    for x in (batch(), inputs()):
        assert torch.allclose(evaluate(stripped, x), evaluate(model, x), atol=1e-6)
    assert len(stripped.pw.weight.unique()) <= (12 * 15 if "per_channel" in name else 16)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the original is untouched


def test_freeze_equals_eval_and_leaves_the_model_alone(trained):
    _, _, model = trained
    model.train()
    frozen = fat_nncf.freeze(model)
    assert model.training and not frozen.training
    kinds = [type(m) for m in frozen.modules()]
    assert kinds.count(FrozenWeight) == 5 and kinds.count(FrozenActivation) == 6
    assert not any(isinstance(m, (PluginQuantizer, Quantizer)) for m in frozen.modules())
    for x in (batch(), inputs()):
        assert torch.equal(evaluate(frozen, x), evaluate(model, x))


def test_onnx_and_openvino_compute_what_eval_computes(trained, tmp_path):
    ov = pytest.importorskip("openvino")
    _, ctrl, model = trained
    core = ov.Core()
    ctrl.export_model("model.onnx")
    from_onnx = core.read_model("model.onnx")
    from_onnx.reshape([4, 3, 12, 12])
    converted = {"onnx": from_onnx, "direct": ov.convert_model(model, example_input=batch())}
    # convert_model runs the transformations that save_model runs, too
    converted["onnx converted"] = ov.convert_model("model.onnx", input=[4, 3, 12, 12])
    for name, ir in converted.items():
        assert any(op.get_type_name() == "FakeQuantize" for op in ir.get_ops())
        run = core.compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for seed in (5, 6):
            out = torch.from_numpy(run(inputs(seed).numpy())[0])
            assert torch.allclose(out, evaluate(model, inputs(seed)), atol=2e-6), name


def test_stripped_model_converts(trained):
    ov = pytest.importorskip("openvino")
    name, ctrl, model = trained
    if name == "fat_power_of_two":  # no FakeQuantize holds its activations: our own export does
        import fat_nncf

        with pytest.warns(UserWarning, match="do not fit 8 bits"):
            fat_nncf.export_openvino(model, "model.xml", batch())
        ir = ov.Core().read_model("model.xml")
    else:
        ir = ov.convert_model(ctrl.strip(), example_input=batch())
    run = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert torch.allclose(torch.from_numpy(run(inputs().numpy())[0]), evaluate(model, inputs()), atol=2e-6)


def test_export_restores_torch(tmp_path):
    export = torch.onnx.export
    ctrl, _ = compress(fat())
    ctrl.export_model("model.onnx")
    assert torch.onnx.export is export and (tmp_path / "model.onnx").stat().st_size > 0


def test_export_of_several_algorithms(tmp_path):
    """The composite controller of NNCF exports by itself."""
    ctrl, _ = compress([{"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}, fat()])
    ctrl.export_model("model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_disabled_quantizers_are_left_out():
    ctrl, model = compress(fat())
    ctrl.disable_activation_quantization()
    reference = evaluate(model)
    frozen = fat_nncf.freeze(model)
    assert not any(isinstance(m, FrozenActivation) for m in frozen.modules())
    assert torch.equal(evaluate(frozen), reference)
    stripped = ctrl.strip()
    assert any(isinstance(m, nn.Identity) for m in stripped.nncf.external_quantizers.values())
    assert torch.allclose(evaluate(stripped), reference, atol=1e-6)


def test_uncalibrated_activations_are_frozen_without_a_form():
    with pytest.warns(UserWarning, match="until they are calibrated"):
        _, model = compress(fat(), data=False)
    frozen = fat_nncf.freeze(model)
    assert all(m.form is None for m in frozen.modules() if isinstance(m, FrozenActivation))
    assert torch.equal(evaluate(frozen), evaluate(model))


def test_strip_format_dq_is_refused():
    nncf = pytest.importorskip("nncf")
    if not hasattr(nncf, "StripFormat"):
        pytest.skip("this NNCF has one format only")
    ctrl, _ = compress(fat())
    with pytest.raises(ExportError, match="DQ has no low-bit form"):
        ctrl.strip(strip_format=nncf.StripFormat.DQ)


def test_nncf_strip_function():
    import nncf

    _, model = compress(fat())
    assert torch.allclose(evaluate(nncf.strip(model)), evaluate(model), atol=1e-6)


def test_other_models_export_as_before(monkeypatch):
    """Our choice of exporter is for models with our quantizers only."""
    config = make_config({"algorithm": "const_sparsity"})
    ctrl, _ = fat_nncf.create_compressed_model(build_net(), config, dump_graphs=False)
    seen = {}

    def record(*args, **kwargs):
        seen.update(kwargs)

    record.__signature__ = inspect.signature(torch.onnx.export)
    monkeypatch.setattr(torch.onnx, "export", record)
    ctrl.export_model("model.onnx")
    assert ("dynamo" in seen) == (nncf_version() >= (2, 18))  # from then on NNCF chooses the exporter itself
