"""The package that "Writing an algorithm" shows works on hosts, and is exported exactly."""

import json

import numpy as np
import pytest
import torch
from pages import DOCS, blocks, generation

from fat_plugins import TensorSpec, get_algorithm
from fat_plugins.network import named_quantizers

PAGE = DOCS / "writing_an_algorithm.md"


@pytest.fixture
def ternary(files_of):
    files_of(PAGE)
    return get_algorithm("ternary")


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU
    conv, norm, relu = layers
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)
    return torch.nn.Sequential(
        conv(3, 8, 3), norm(8), relu(), conv(8, 8, 3), norm(8), relu(), conv(8, 8, 1), relu(), *head
    )


def batches(count=2, shape=(8, 3, 12, 12)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def section():
    return json.loads(blocks(PAGE, "json")[0]["code"])["compression"]


@pytest.mark.parametrize(("shape", "axis"), [((8, 4, 3, 3), 0), ((5, 12), 0), ((4, 6, 3, 3), 1)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_levels_against_float64(ternary, shape, axis, per_channel):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    quantizer = ternary.make(TensorSpec("weight", 2, shape=shape, channel_axis=axis, per_channel=per_channel))
    quantizer.calibrate(weight)
    w = np.moveaxis(weight.double().numpy(), axis, 0)
    rows = w.reshape(shape[axis] if per_channel else 1, -1)
    kept = abs(rows) > 0.7 * abs(rows).mean(1, keepdims=True)
    scale = (abs(rows) * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    expected = np.moveaxis((np.sign(rows) * kept * scale).reshape(w.shape), 0, axis)
    assert np.allclose(quantizer(weight).numpy(), expected, rtol=1e-5, atol=0)
    codes, form = quantizer.eval().freeze(weight)
    assert torch.equal(form.decode(codes), quantizer(weight))
    assert torch.equal(form.encode(form.decode(codes)), codes)


def ternary_layers(model):
    kinds = [type(q).__name__ for _, q in named_quantizers(model) if q.spec.role == "weight"]
    return kinds.count("TernaryWeight")


@pytest.mark.skipif(generation("nncf") != 3, reason="needs NNCF 3")
def test_nncf_to_openvino(ternary, net, tmp_path):
    import fat_nncf

    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8)
    config = fat_nncf.NNCFConfig.from_dict({"input_info": {"sample_size": [1, 3, 12, 12]}, "compression": section()})
    ctrl, model = fat_nncf.create_compressed_model(net, fat_nncf.register_default_init_args(config, loader))
    (model(batches()[0]).square().mean() + ctrl.loss()).backward()
    assert ternary_layers(model) == 2  # the first and the last layer have 8 bits
    report = fat_nncf.export_openvino(model.eval(), tmp_path / "model.xml", batches()[0][:1])
    assert report.weights_bytes < report.float_bytes
    assert fat_nncf.verify_openvino(model, tmp_path / "model.xml", batches()[0]).ok


@pytest.mark.skipif(generation("brevitas") is None, reason="needs Brevitas")
def test_brevitas_to_qonnx(ternary, net, tmp_path):
    import fat_brevitas

    model = fat_brevitas.quantize(net, section(), calibration=batches())
    model.train()(batches()[0]).square().mean().backward()
    assert ternary_layers(model) == 2
    fat_brevitas.export_qonnx(model.eval(), tmp_path / "model.onnx", batches()[0][:1])
    assert fat_brevitas.verify_qonnx(model, tmp_path / "model.onnx", batches()[0]).ok
