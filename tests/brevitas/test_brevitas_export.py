"""Brevitas's own exporters with our quantizers: what runs is what was trained, or the exporter refuses in one line."""

from __future__ import annotations

import brevitas.nn as qnn
import fat_brevitas
import numpy as np
import pytest
import torch
from brevitas_exports import (
    STANDARD,
    VERSION,
    Chain,
    calibrated,
    chain,
    each_algorithm,
    each_case,
    each_width,
    example,
    execute,
    export_qonnx,
    file_weights,
    load,
    operators,
    same_codes,
    test_algorithms,  # noqa: F401
    torch_weights,
    weight_types,
    widths,
)
from brevitas_nets import build, each_layer
from torch import nn

from fat_plugins import ExportError
from fat_plugins.forms import Staircase

needs_dynamo = pytest.mark.skipif(VERSION < (0, 13), reason="Brevitas exports through dynamo from 0.13 on")
needs_onnx_qcdq = pytest.mark.skipif(
    VERSION < (0, 13) and tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 9),
    reason="ONNX QCDQ of Brevitas up to 0.12 asks torch for a module that is gone (torch.onnx._globals)",
)
needs_inference_mode = pytest.mark.skipif(VERSION < (0, 11), reason="quant_inference_mode came with Brevitas 0.11")


def intact(model: nn.Module, x: torch.Tensor, before: torch.Tensor) -> None:
    """No trace of an export is left."""
    assert not any(getattr(m, "export_mode", False) for m in model.modules())
    assert all(getattr(m, "export_handler", None) is None for m in model.modules())
    assert torch.equal(model(x), before)


# --------------------------------------------------------------------------------------------------------------------
# QONNX
# --------------------------------------------------------------------------------------------------------------------
@each_case
def test_qonnx_gives_the_codes_of_torch(algorithm, bits, per_channel, tmp_path):
    model, x = chain(algorithm, bits, per_channel)
    y = model(x)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), y, float(model.out.act_quant.scale()))
    for written, trained in zip(file_weights(file), torch_weights(model), strict=True):
        fits = written.shape == tuple(trained.shape)
        np.testing.assert_array_equal(written if fits else written.T, trained.numpy())
    assert set(operators(file)) <= {"Quant", *STANDARD} and operators(file)["Quant"] == 7
    assert weight_types(file) == [f"INT{n}" for n in widths(model)]
    intact(model, x, y)


@each_layer
def test_every_kind_of_layer(layer, tmp_path):
    made, x = build(layer, fat_brevitas.FATWeightQuant, return_quant_tensor=False)
    made.eval()
    file = load(export_qonnx(made, x, tmp_path / "m.onnx"))
    np.testing.assert_allclose(execute(file, x), made(x).detach().numpy(), atol=1e-5)
    assert operators(file)["Quant"] == 1


@needs_dynamo
@each_algorithm
def test_dynamo(algorithm, bits, per_channel, tmp_path):
    model, x = chain(algorithm, bits, per_channel)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx", dynamo=True))
    same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))
    intact(model, x, model(x))


def test_power_of_two_weights(tmp_path):
    model, x = chain("fat", 4, levels="power_of_two")
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))
    scale = float(model.conv1.weight_quant.scale())
    levels = {0.0, *(s * 2.0**k for s in (-1, 1) for k in range(7))}
    assert set(np.unique(np.round(file_weights(file)[0] / scale))) <= levels
    assert weight_types(file) == ["INT8"] * 3


@pytest.mark.skipif(VERSION < (0, 12), reason="Brevitas wrote quantized weights itself up to 0.12.0")
def test_the_stock_handler_would_write_wrong_weights(tmp_path, monkeypatch):
    """The fault that our handlers are there for; should Brevitas mend it, they may go."""
    from brevitas.export.onnx.qonnx.handler import BrevitasWeightQuantProxyHandler
    from brevitas.export.onnx.qonnx.manager import QONNXManager
    from fat_brevitas.proxies import PluginWeightQuantProxy

    model, x = chain("fat", 4)
    export_qonnx(model, x, tmp_path / "right.onnx")  # registers ours
    right = load(str(tmp_path / "right.onnx"))
    raw = type("Raw", (BrevitasWeightQuantProxyHandler,), {"handled_layer": PluginWeightQuantProxy})
    monkeypatch.setattr(QONNXManager, "handlers", [raw, *QONNXManager.handlers])
    wrong = load(export_qonnx(model, x, tmp_path / "wrong.onnx"))
    trained = torch_weights(model)[0].numpy()
    np.testing.assert_array_equal(file_weights(right)[0], trained)
    assert np.abs(file_weights(wrong)[0] - trained).max() > 0.05 * np.abs(trained).max()


class Shared(nn.Module):
    """Two layers behind one weight quantizer, whose scale depends on the weight."""

    def __init__(self, algorithm: str) -> None:
        super().__init__()
        self.a = qnn.QuantConv2d(3, 3, 3, weight_quant=fat_brevitas.weight_quant(algorithm, bit_width=4))
        self.b = qnn.QuantConv2d(3, 3, 3, weight_quant=self.a.weight_quant)
        with torch.no_grad():
            self.b.weight.mul_(3)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=needs_dynamo)])
@pytest.mark.parametrize("algorithm", ["fat", "minmax"])
def test_shared_quantizer(algorithm, dynamo, tmp_path):
    torch.manual_seed(0)
    model, x = Shared(algorithm).eval(), example(2, 3, 8, 8)
    y = model(x)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx", dynamo))
    np.testing.assert_allclose(execute(file, x), y.detach().numpy(), atol=1e-5)
    for written, trained in zip(file_weights(file), torch_weights(model), strict=True):
        np.testing.assert_array_equal(written, trained.numpy())
    if VERSION >= (0, 11):
        check_inference_mode(model, x, y)


@pytest.mark.parametrize("per_channel", [False, True])
def test_one_bit_is_bipolar(per_channel, tmp_path, test_algorithms):  # noqa: F811
    model, x = chain("sign", 1, per_channel, act=fat_brevitas.act_quant("lsq", bit_width=4))
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    assert operators(file)["BipolarQuant"] == 3
    same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))
    for written, trained in zip(file_weights(file)[:2], torch_weights(model), strict=False):
        np.testing.assert_array_equal(written, trained.numpy())


def test_sum_of_grids_is_a_sum_of_quant_nodes(tmp_path, test_algorithms):  # noqa: F811
    model, x = chain("sum", 4, act=fat_brevitas.act_quant("lsq", bit_width=4))
    y = model(x)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    assert operators(file)["Quant"] == 6 + 4 and operators(file)["Add"] == 3
    same_codes(execute(file, x), y, float(model.out.act_quant.scale()))
    from brevitas.export import export_torch_qcdq

    with pytest.raises(ExportError, match=r"^conv1: export_torch_qcdq cannot write the weight's SumOfGrids: .*qonnx$"):
        export_torch_qcdq(model, x)
    intact(model, x, y)


# --------------------------------------------------------------------------------------------------------------------
# staircases
# --------------------------------------------------------------------------------------------------------------------
POWERS = {"levels": "power_of_two", "bit_width": 3}


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=needs_dynamo)])
def test_staircase_is_multithreshold(dynamo, tmp_path):
    model, x = chain("lsq", 3, act=fat_brevitas.act_quant("fat", **POWERS))
    y = model(x)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx", dynamo))
    kinds = operators(file)
    assert kinds["MultiThreshold"] == 3 and kinds["Quant"] == 4 and kinds["Mul"] == 3
    assert kinds["Relu"] == 0, "thresholds above zero are the ReLU"
    assert kinds["Add"] == 1, "the last activation is signed"
    same_codes(execute(file, x), y, float(model.out.act_quant.form().scale))
    intact(model, x, y)


@pytest.mark.parametrize("signed", [False, True])
def test_thresholds_are_exact(signed):
    """The codes of ``x >= T`` are those of ``encode`` at every threshold and its neighbours in float32."""
    from fat_brevitas.handlers import MultiThreshold

    for scale in (0.1, 0.0371, 1.7e-3, 3.0):
        levels = torch.tensor([-4, -1, 0, 1, 2, 8] if signed else [0, 1, 2, 4, 8])
        thresholds = ((levels[1:] + levels[:-1]) / 2).double() + 0.123
        form = Staircase(3, levels, thresholds, torch.tensor([scale]))
        node = MultiThreshold(form)
        near = np.float32((thresholds * scale).numpy())
        x = np.concatenate([near, *(near + np.float32(k) * np.spacing(near) for k in range(-6, 7) if k), [0.0]])
        count = (x.astype(np.float32)[:, None] >= node.thresholds.numpy()).sum(1)
        wanted = form.integers(form.encode(torch.from_numpy(x.astype(np.float32))))
        np.testing.assert_array_equal(count + node.lowest, wanted.numpy())


def test_staircase_in_qcdq_is_refused_before_anything_happens(tmp_path):
    from brevitas.export import export_onnx_qcdq, export_torch_qcdq

    model, x = chain("lsq", 3, act=fat_brevitas.act_quant("fat", **POWERS))
    y = model(x)
    path = tmp_path / "m.onnx"
    for export, arguments in ((export_onnx_qcdq, {"dynamo": False, "opset_version": 13}), (export_torch_qcdq, {})):
        with pytest.raises(ExportError) as error:
            export(model, x, str(path), **arguments)
        text = str(error.value)
        assert text.startswith("act1: ") and "Staircase" in text and "uniform" in text and "export_qonnx" in text
        assert "\n" not in text and not path.exists()
        intact(model, x, y)
    # another exporter must not find the handlers of the one that refused
    same_codes(execute(load(export_qonnx(model, x, path)), x), y, float(model.out.act_quant.form().scale))


# --------------------------------------------------------------------------------------------------------------------
# refusals
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quant_tensor", [False, True])
def test_uncalibrated_activation(quant_tensor, tmp_path):
    from brevitas.export import export_torch_qcdq

    model, x = Chain("fat", 4).eval(), example()
    model.act2.return_quant_tensor = quant_tensor
    path = tmp_path / "m.onnx"
    for export in (lambda: export_qonnx(model, x, path), lambda: export_torch_qcdq(model, x, str(path))):
        with pytest.raises(ExportError, match=r"^inp: the activation quantizer is not calibrated; .*$"):
            export()
        assert not path.exists() and not any(getattr(m, "export_mode", False) for m in model.modules())
    calibrated(model, x)
    model.act2.return_quant_tensor = False
    same_codes(execute(load(export_qonnx(model, x, path)), x), model(x), float(model.out.act_quant.scale()))


def test_wide_levels_and_one_bit_do_not_fit_qcdq(test_algorithms):  # noqa: F811
    from brevitas.export import export_torch_qcdq

    act = fat_brevitas.act_quant("lsq", bit_width=4)
    wide, x = chain("fat", 5, act=act, levels="power_of_two")
    with pytest.raises(ExportError, match=r"^conv1: .*need 16 bits and 8 is the most"):
        export_torch_qcdq(wide, x)
    one, x = chain("sign", 1, act=act)
    with pytest.raises(ExportError, match=r"^conv1: .*no 1-bit type"):
        export_torch_qcdq(one, x)


# --------------------------------------------------------------------------------------------------------------------
# QCDQ and the inference mode
# --------------------------------------------------------------------------------------------------------------------
@needs_onnx_qcdq
@each_width
def test_onnx_qcdq_in_onnx_runtime(algorithm, bits, per_channel, tmp_path):
    import onnxruntime
    from brevitas.export import export_onnx_qcdq

    model, x = chain(algorithm, bits, per_channel)
    scale, path = float(model.out.act_quant.scale()), str(tmp_path / "m.onnx")
    if max(widths(model)) > 8:
        with pytest.raises(ExportError, match=r"^conv1: .*need 9 bits and 8 is the most"):
            export_onnx_qcdq(model, x, path, dynamo=False, opset_version=13)
        return
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # dynamo takes seconds; Brevitas up to 0.12 fails there with its own quantizers too
    for dynamo in (False, True) if (algorithm, bits) == ("fat", 3) and VERSION >= (0, 13) else (False,):
        options = {"opset_version": 18, "optimize": True, "verbose": False} if dynamo else {"opset_version": 13}
        export_onnx_qcdq(model, x, path, dynamo=dynamo, **options)
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        same_codes(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], model(x), scale)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
@each_algorithm
def test_torch_qcdq(algorithm, bits, per_channel):
    from brevitas.export import export_torch_qcdq

    model, x = chain(algorithm, bits, per_channel)
    y = model(x)
    assert torch.equal(export_torch_qcdq(model, x)(x), y)
    intact(model, x, y)


def check_inference_mode(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    from brevitas.export.inference import quant_inference_mode

    for cache in (False, True):
        with torch.no_grad(), quant_inference_mode(model, cache_quant_weight=cache):
            model(x)  # the forward that collects
            assert any(m.export_mode for m in model.modules() if hasattr(m, "export_mode"))
            assert torch.equal(model(x), y)
    assert torch.equal(model(x), y)


@needs_inference_mode
@each_algorithm
def test_inference_mode(algorithm, bits, per_channel):
    model, x = chain(algorithm, bits, per_channel)
    check_inference_mode(model, x, model(x).detach())


@needs_inference_mode
def test_inference_mode_of_other_forms(test_algorithms):  # noqa: F811
    model, x = chain("sum", 4, act=fat_brevitas.act_quant("fat", **POWERS))
    check_inference_mode(model, x, model(x).detach())


# --------------------------------------------------------------------------------------------------------------------
# surroundings
# --------------------------------------------------------------------------------------------------------------------
class Tensors(nn.Module):
    """Scales passed from layer to layer, an integer bias, ReLU6 and a residual addition."""

    def __init__(self, algorithm: str) -> None:
        from brevitas.quant import Int32Bias

        super().__init__()
        weight = fat_brevitas.weight_quant(algorithm, bit_width=4)
        act = fat_brevitas.act_quant(algorithm, bit_width=4)
        self.inp = qnn.QuantIdentity(act_quant=fat_brevitas.MinMaxActQuant, bit_width=8, return_quant_tensor=True)
        self.conv1 = qnn.QuantConv2d(3, 3, 3, padding=1, bias=True, weight_quant=weight, bias_quant=Int32Bias)
        self.act1 = qnn.QuantReLU(act_quant=act, calibration_max=6.0, return_quant_tensor=True)
        self.conv2 = qnn.QuantConv2d(3, 3, 3, padding=1, bias=True, weight_quant=weight, bias_quant=Int32Bias)
        self.add = qnn.QuantIdentity(act_quant=act)

    def forward(self, x):
        x = self.act1(self.conv1(self.inp(x)))
        value = getattr(x, "value", x)
        return self.add(self.conv2(x) + value)


@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_quant_tensors_integer_bias_and_residual(algorithm, tmp_path):
    torch.manual_seed(2)
    x = example(2, 3, 6, 6) * 8
    model = calibrated(Tensors(algorithm), x)
    y = model(x)
    assert float(model.act1.act_quant.scale()) * 15 <= 6.0 + 1e-4 or algorithm == "lsq"
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), y, float(model.add.act_quant.scale()))
    assert operators(file)["Quant"] == 2 + 2 + 3, "weights, biases, activations"
    intact(model, x, y)


def test_a_disabled_quantizer_is_not_exported(tmp_path):
    model, x = chain("fat", 4)
    model.act1.act_quant.disable_quant = True
    y = model(x)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    assert operators(file)["Quant"] == 6
    same_codes(execute(file, x), y, float(model.out.act_quant.scale()))


def test_we_import_no_exporter_of_our_own_accord():
    """``import fat_brevitas`` must not cost what ``import brevitas.export`` costs, nor need onnx."""
    import ast
    from pathlib import Path

    for file in Path(fat_brevitas.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not any(n.split(".")[0] == "onnx" or n.startswith("brevitas.export") for n in names), file.name
