"""One model at several bit widths on Brevitas."""

from __future__ import annotations

import fat_brevitas
import pytest
import several_widths as widths
import torch

import fat_plugins
from fat_plugins import QuantizationError
from fat_plugins.export import qonnx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_switched_trained_and_deployed_at_every_width(tmp_path):
    pytest.importorskip("qonnx")
    model = fat_brevitas.quantize(widths.float_model(), widths.CONFIG, widths.batches())

    def export(frozen):
        path = tmp_path / "model.onnx"
        qonnx.export(frozen, path, widths.images()[:1])
        return qonnx.verify(frozen, path, widths.images())

    widths.check(model, fat_brevitas.Controller(model).loss, fat_brevitas.frozen, export)


def test_brevitas_is_told_the_width_in_force_in_training_too():
    model = fat_brevitas.quantize(widths.float_model(), widths.CONFIG, widths.batches()).train()
    weight, act = model.conv1.weight_quant, model.relu.act_quant
    for bits in (8, 1, 4, 2):
        fat_plugins.set_active_bits(model, bits)
        assert int(weight(model.conv1.weight).bit_width) == bits
        assert int(act(widths.images()).bit_width) == bits


def test_norms_of_several_widths_are_not_merged():
    model = fat_brevitas.quantize(widths.float_model(), widths.CONFIG, widths.batches(), merge_bn=True)
    assert model.norm1.widths == (8, 4, 2, 1)
    again = fat_brevitas.rebuild(widths.float_model(), model.compression_state)
    again.load_state_dict(model.state_dict())
    for bits in (2, 8):
        for each in (model, again):
            fat_plugins.set_active_bits(each.eval(), bits)
        assert torch.equal(model(widths.images()), again(widths.images()))


def test_a_norm_without_the_width_of_the_quantizers_is_one_line():
    torch.manual_seed(0)
    net = widths.Net()
    fat_plugins.rewrite(net, "switchable_norm", params={"bit_set": [8, 4]})
    with pytest.raises(QuantizationError, match="norm0: it does not compute at 2 bits; allowed: 8, 4"):
        fat_brevitas.quantize(net, widths.CONFIG, widths.batches())
