"""One model at several bit widths, on whichever generation of NNCF is installed."""

from __future__ import annotations

import fat_nncf
import pytest
import several_widths as widths
import torch

import fat_plugins
from fat_plugins.export import openvino, verify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def compressed(state=None):
    config = fat_nncf.NNCFConfig.from_dict(widths.CONFIG)
    config = fat_nncf.register_default_init_args(config, widths.batches())
    return fat_nncf.create_compressed_model(widths.float_model(), config, compression_state=state)


def test_switched_trained_and_deployed_at_every_width(tmp_path):
    controller, model = compressed()

    def export(frozen):
        path = tmp_path / "model.xml"
        openvino.export(frozen, path, widths.images()[:1])
        return verify.verify(frozen, path, widths.images())

    widths.check(model, controller.loss, fat_nncf.freeze, export)


def test_a_rebuilt_model_stands_at_its_width_and_switches():
    controller, model = compressed()
    widths.train(model, controller.loss)
    state, compression_state = model.state_dict(), controller.get_compression_state()
    _, again = compressed(compression_state)
    again.load_state_dict(state)
    again.eval()
    x = widths.images()
    for bits in (2, 8, 1):
        if bits != 2:
            for each in (model, again):
                fat_plugins.set_active_bits(each, bits)
        assert torch.equal(model(x), again(x))
