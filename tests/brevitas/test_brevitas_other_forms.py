"""Registered algorithms whose grids are not plain: sums, codebooks, free thresholds.

Their numbers survive what Brevitas does with a model, or the refusal says why.
"""

from __future__ import annotations

import fat_brevitas
import pytest
import torch
from brevitas_exports import OPTIONS, OTHER, VERSION, chain, execute, export_qonnx, load, same_codes

from fat_plugins import ExportError
from fat_plugins.forms import Staircase, SumOfGrids
from fat_plugins.quantizer import WeightQuantizer, named_quantizers

each_other = pytest.mark.parametrize(("algorithm", "bits"), OTHER)


def other(algorithm, bits):
    act = fat_brevitas.act_quant(algorithm, bit_width=bits, **OPTIONS.get(algorithm, {}))
    model, x = chain(algorithm, bits, act=act)
    with torch.no_grad():
        model.fc.weight.mul_(8)  # so that no output is all zeros, whatever the algorithm's range
    return model, x


def deployed(model):
    """Forms of all quantizers of the model but the plain one of the input."""
    weights = {id(m.weight_quant.quantizer): m.weight for m in model.modules() if hasattr(m, "weight_quant")}
    return [
        q.freeze(weights[id(q)]).form if isinstance(q, WeightQuantizer) else q.form()
        for _, q in named_quantizers(model)
    ]


@each_other
def test_qonnx_gives_the_codes_of_torch(algorithm, bits, tmp_path):
    model, x = other(algorithm, bits)
    file = load(export_qonnx(model, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))


@pytest.mark.filterwarnings("ignore:.*as many layers, whose outputs are added:UserWarning")
@each_other
def test_our_qonnx_and_openvino_files_are_verified(algorithm, bits, tmp_path):
    model, x = other(algorithm, bits)
    for kind in ("qonnx", "openvino"):
        path = tmp_path / ("m.onnx" if kind == "qonnx" else "m.xml")
        getattr(fat_brevitas, f"export_{kind}")(model, path, x)
        report = getattr(fat_brevitas, f"verify_{kind}")(model, path, x)
        assert report.ok, report.detail


@pytest.mark.skipif(VERSION < (0, 11), reason="quant_inference_mode came with Brevitas 0.11")
@each_other
def test_inference_mode(algorithm, bits):
    from brevitas.export.inference import quant_inference_mode

    model, x = other(algorithm, bits)
    y = model(x)
    for cache in (False, True):
        with torch.no_grad(), quant_inference_mode(model, cache_quant_weight=cache):
            model(x)  # the forward that collects
            assert torch.equal(model(x), y)


@each_other
def test_stock_models_hold_them_or_the_refusal_names_the_layer(algorithm, bits):
    model, x = other(algorithm, bits)
    if any(isinstance(form, (SumOfGrids, Staircase)) for form in deployed(model)):
        with pytest.raises(ExportError, match=r"(conv1|act1|out): no stock Brevitas quantizer holds the"):
            fat_brevitas.freeze(model)
        return
    assert torch.equal(fat_brevitas.freeze(model)(x), model(x))
