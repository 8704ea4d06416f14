"""Brevitas as the host of a recipe."""

from __future__ import annotations

import json

import crossgen
import fat_brevitas
import pytest
import torch
from brevitas_whole import LSQ, Residual, step

from fat_plugins import CheckpointError, ConfigError, HostError
from fat_plugins.recipes.hosts import get_host

CONFIG = crossgen.configs()["fat_power_of_two"]


@pytest.fixture
def host():
    return get_host("brevitas")


def compress(host, state=None, net=None, config=CONFIG):
    return host.compress(net or crossgen.build_net(), config, crossgen.loader(), crossgen.batch(), state)


def test_a_saved_model_is_rebuilt_without_calibration(host):
    assert host.versions() == {"brevitas": ".".join(map(str, fat_brevitas.BREVITAS_VERSION))}
    controller, model = compress(host)
    step(model, crossgen.batch())
    state = json.loads(json.dumps(host.compression_state(controller)))
    _, again = compress(host, state)
    again.eval().load_state_dict(model.state_dict())
    assert torch.equal(again(crossgen.batch()), model(crossgen.batch()))
    again.train(), model.train()  # the next training batch initialises nothing
    assert torch.equal(again(crossgen.batch()), model(crossgen.batch()))
    model.eval()
    assert torch.equal(host.freeze(model)(crossgen.batch()), model(crossgen.batch()))


def test_merged_batch_norms_are_merged_again():
    model = fat_brevitas.quantize(crossgen.build_net(), LSQ, crossgen.loader(), merge_bn=True)
    again = fat_brevitas.rebuild(crossgen.build_net(), model.compression_state)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(crossgen.batch()), model.eval()(crossgen.batch()))


def test_controller_counts(host):
    controller, model = compress(host)
    seen = []
    quantizer = model.dw.weight_quant.quantizer
    quantizer.on_progress = lambda p: seen.append((p.step, p.epoch, p.total_steps, p.total_epochs))
    controller.scheduler.total_steps, controller.scheduler.total_epochs = 6, 2
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    controller.scheduler.step()
    controller.scheduler.epoch_step(1)
    assert seen == [(0, 0, 6, 2), (0, 0, 6, 2), (1, 0, 6, 2), (1, 1, 6, 2)]
    assert controller.loss().item() == 0 and controller.model is model


def test_refusals(host):
    with pytest.raises(ConfigError, match="sample_size is"):
        host.check({**CONFIG, "input_info": {"sample_size": [1, 1, 8, 8]}}, crossgen.batch())
    with pytest.raises(ConfigError, match="preset"):
        host.check({"compression": {**CONFIG["compression"], "preset": "mixed"}}, crossgen.batch())
    controller, _ = compress(host)
    with pytest.raises(CheckpointError, match="the model is another one; it differs in"):
        compress(host, host.compression_state(controller), Residual())
    with pytest.raises(CheckpointError, match="no state of a model"):
        compress(host, {"format": 9})
    with pytest.raises(HostError, match="was not quantized by"):
        fat_brevitas.Controller(crossgen.build_net())
