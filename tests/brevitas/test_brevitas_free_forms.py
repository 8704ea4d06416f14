"""Registered algorithms whose weights are sums of grids or whose activations have free thresholds.

Their numbers survive what Brevitas does with a model; where it cannot hold them, the refusal says so.
"""

from __future__ import annotations

from importlib.util import find_spec

import fat_brevitas
import pytest
import torch
from brevitas_exports import FREE, VERSION, chain, execute, export_qonnx, load, same_codes

from fat_plugins import ExportError

each_free = pytest.mark.parametrize(("algorithm", "bits"), FREE)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")


@each_free
def test_qonnx_gives_the_codes_of_torch(algorithm, bits, tmp_path):
    model, x = chain(algorithm, bits)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))


@pytest.mark.filterwarnings("ignore:.*as many layers, whose outputs are added:UserWarning")
@pytest.mark.parametrize("kind", ["qonnx", pytest.param("openvino", marks=needs_openvino)])
@each_free
def test_our_files_are_verified(algorithm, bits, kind, tmp_path):
    model, x = chain(algorithm, bits)
    path = tmp_path / ("m.onnx" if kind == "qonnx" else "m.xml")
    getattr(fat_brevitas, f"export_{kind}")(model, path, x)
    report = getattr(fat_brevitas, f"verify_{kind}")(model, path, x)
    assert report.ok, report.detail


@pytest.mark.skipif(VERSION < (0, 11), reason="quant_inference_mode came with Brevitas 0.11")
@each_free
def test_inference_mode(algorithm, bits):
    from brevitas.export.inference import quant_inference_mode

    model, x = chain(algorithm, bits)
    y = model(x)
    for cache in (False, True):
        with torch.no_grad(), quant_inference_mode(model, cache_quant_weight=cache):
            model(x)  # the forward that collects
            assert torch.equal(model(x), y)


@each_free
def test_stock_models_cannot_hold_them_and_the_refusal_names_the_layer(algorithm, bits):
    model, _ = chain(algorithm, bits)
    with pytest.raises(ExportError, match=r"(conv1|act1): no stock Brevitas quantizer holds the"):
        fat_brevitas.freeze(model)
