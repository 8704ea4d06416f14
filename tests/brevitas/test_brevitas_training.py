"""Schedules, regularisation, coordinators and the callback."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import crossgen
import fat_brevitas
import pytest
import torch
from brevitas_whole import LSQ
from torch import nn

from fat_plugins import Progress, named_quantizers, registry
from fat_plugins.algorithms import lsq
from fat_plugins.quantizer import Coordinator


class Watcher(Coordinator):
    """Remembers where training stands, in the state dict, and pulls weights of all layers together."""

    def __init__(self, layers):
        super().__init__(layers)
        self.strength = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(4))

    def on_progress(self, progress):
        values = (progress.step, progress.epoch, progress.total_steps or -1, progress.total_epochs or -1)
        self.seen.copy_(torch.tensor([float(v) for v in values]))

    def regularization(self):
        return self.strength * sum(p.square().sum() for layer in self.layers for p in layer.parameters.values())


class Hungry(lsq.LSQWeight):
    """Looks at the inputs of its layer, adds to the loss and follows a schedule."""

    needs_input = True

    def __init__(self, spec, params):
        super().__init__(spec, params)
        self.inputs, self.progress = [], None

    def observe_input(self, x):
        self.inputs.append(tuple(x.shape))

    def on_progress(self, progress):
        self.progress = progress

    def regularization(self):
        return self.step.sum() * 2


class Watched(lsq.LSQ):
    """LSQ with the two above."""

    name = "watched"
    title = "watched"
    weight_quantizer = Hungry
    coordinator = Watcher


@pytest.fixture
def watched(monkeypatch):
    known, broken = registry._load()
    monkeypatch.setattr(registry, "_load", lambda: ({**known, "watched": Watched}, broken))
    section = {**LSQ, "algorithm": "watched"}
    return fat_brevitas.quantize(crossgen.build_net(), section, crossgen.loader())


def test_coordinators_see_layers_in_order_and_are_saved(watched):
    (found,) = [m for m in watched.modules() if isinstance(m, Coordinator)]
    assert [(x.name, list(x.parameters)) for x in found.layers] == [
        ("dw", ["dw.weight"]), ("pw", ["pw.weight"]), ("conv2", ["conv2.weight", "conv2.bias"])
    ]  # fmt: skip
    assert [x.input_activation.spec.name for x in found.layers] == ["relu", "relu_1", "relu_2"]
    assert found.layers[0].weight is watched.dw.weight_quant.quantizer
    assert found.layers[0].parameters["dw.weight"] is watched.dw.weight
    key = "fat_plugins_coordinators.watched.strength"
    assert key in watched.state_dict()
    clone = copy.deepcopy(watched)
    (copied,) = [m for m in clone.modules() if isinstance(m, Coordinator)]
    assert copied.layers[0].weight is clone.dw.weight_quant.quantizer and clone.compression_state
    assert clone.load_state_dict(watched.state_dict()).missing_keys == []
    assert not any(isinstance(m, Coordinator) for m in fat_brevitas.frozen(watched).modules())


def test_progress_and_regularization_reach_everybody(watched):
    fat_brevitas.set_progress(watched, step=3, epoch=1, total_steps=10, total_epochs=4)
    (coordinator,) = [m for m in watched.modules() if isinstance(m, Coordinator)]
    quantizer = watched.dw.weight_quant.quantizer
    assert quantizer.progress == Progress(3, 1, 10, 4) and coordinator.seen.tolist() == [3, 1, 10, 4]
    fat_brevitas.set_progress(watched, Progress(5))
    assert quantizer.progress == Progress(5) and coordinator.seen.tolist() == [5, 0, -1, -1]
    loss = fat_brevitas.regularization(watched)
    steps = sum(2 * q.step.sum() for _, q in named_quantizers(watched) if isinstance(q, Hungry))
    torch.testing.assert_close(loss, steps + coordinator.regularization())
    loss.backward()
    assert watched.pw.weight.grad is not None and quantizer.step.grad.item() == 2


def test_weight_quantizers_that_look_at_inputs_get_them(watched):
    assert watched.pw.weight_quant.quantizer.inputs == [(4, 8, 12, 12)]
    assert not watched.pw._forward_pre_hooks


def test_nothing_to_regularize_is_zero():
    loss = fat_brevitas.regularization(fat_brevitas.quantize(crossgen.build_net(), LSQ))
    assert loss.shape == () and loss.item() == 0
    assert fat_brevitas.regularization(nn.Identity()).item() == 0


def test_callback(watched):
    callback = fat_brevitas.QuantizationCallback()
    trainer = SimpleNamespace(
        global_step=7, current_epoch=2, max_epochs=-1, estimated_stepping_batches=float("inf"), callbacks=[callback]
    )
    quantizer = watched.dw.weight_quant.quantizer
    callback.setup(trainer, watched, stage="fit")
    callback.on_train_start(trainer, watched)
    assert quantizer.progress == Progress(7, 2, None, None)
    trainer.max_epochs, trainer.estimated_stepping_batches, trainer.global_step = 5, 50, 8
    callback.on_train_batch_start(trainer, watched, batch=None, batch_idx=0)
    assert quantizer.progress == Progress(8, 2, 50, 5)
    trainer.current_epoch = 3
    callback.on_train_epoch_start(trainer, watched)
    assert quantizer.progress.epoch == 3
    callback.on_validation_end(trainer, watched)
    callback.load_state_dict(callback.state_dict())
    with pytest.raises(AttributeError):
        callback.something_else  # noqa: B018
