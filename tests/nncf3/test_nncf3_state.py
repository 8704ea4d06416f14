"""Saving, resuming, copying, several processes, training."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import fat_nncf
import nncf
import pytest
import torch
from fat_nncf.modern_hooks import PluginQuantizer, plugin_hooks
from nncf.torch.function_hook import get_hook_storage
from nncf3_nets import Small, Zoo, batch, compress, config, loader, quantizers, section, train
from safetensors.torch import load_file, load_model, save_file, save_model

from fat_plugins import CheckpointError

SECTIONS = {
    "fat": section(),
    "power_of_two": section(params={"levels": "power_of_two"}),
    "lsq": section("lsq"),
}


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", SECTIONS)
def test_resume_is_bitwise(name, tmp_path):
    controller, model = compress(SECTIONS[name], net=Zoo())
    train(controller, model)
    state = through_json(controller.get_compression_state())
    save_model(model, str(tmp_path / "model.safetensors"))  # unlike save_file it stores shared quantizers once
    torch.manual_seed(99)
    resumed, fresh = fat_nncf.create_compressed_model(Zoo(), config(SECTIONS[name]), compression_state=state)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(batch()), model(batch()))
    assert resumed.scheduler.get_state() == controller.scheduler.get_state()
    assert resumed.scheduler.current_step == 1 and resumed.scheduler.current_epoch == 0
    # and training goes on the same
    assert train(resumed, fresh) == train(controller, model)
    assert torch.equal(fresh(batch()), model(batch()))


def test_safetensors_of_the_state_dict(tmp_path):
    controller, model = compress()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = through_json(controller.get_compression_state())
    _, fresh = fat_nncf.create_compressed_model(Small(), config(), compression_state=state)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh.eval()(batch()), model.eval()(batch()))


def test_torch_save_of_the_state(tmp_path):
    controller, model = compress()
    torch.save({"model": model.state_dict(), "state": controller.get_compression_state()}, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    _, fresh = fat_nncf.create_compressed_model(Small(), config(), compression_state=saved["state"])
    fresh.load_state_dict(saved["model"])
    assert torch.equal(fresh.eval()(batch()), model.eval()(batch()))


def test_state_of_shared_quantizers():
    controller, model = compress(net=Zoo())
    _, fresh = fat_nncf.create_compressed_model(
        Zoo(), config(), compression_state=through_json(controller.get_compression_state())
    )
    slots = lambda m: sorted(sorted(s) for s in plugin_hooks(m).values())  # noqa: E731
    assert slots(fresh) == slots(model)


def load_from_config(model, cfg):
    """NNCF changed the arguments in 3.1."""
    parameters = inspect.signature(nncf.torch.load_from_config).parameters
    if "allowed_modules" in parameters:
        return nncf.torch.load_from_config(model, cfg, allowed_modules=("nncf.*", "fat_nncf.*"))
    return nncf.torch.load_from_config(model, cfg, batch())


def test_nncf_get_config_and_load_from_config():
    controller, model = compress([{"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}, section()], net=Zoo())
    train(controller, model)
    restored = load_from_config(Zoo(), through_json(nncf.torch.get_config(model)))
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.eval()(batch()), model(batch()))


def test_nncf_refuses_our_modules_unless_allowed():
    if "allowed_modules" not in inspect.signature(nncf.torch.load_from_config).parameters:
        pytest.skip("NNCF 3.0 has no allow list")
    _, model = compress()
    with pytest.raises(nncf.InternalError, match="untrusted"):
        nncf.torch.load_from_config(Small(), nncf.torch.get_config(model))


def test_deepcopy_is_independent():
    _, model = compress(section(compression_lr_multiplier=10.0), net=Zoo())
    clone = copy.deepcopy(model)
    assert torch.equal(clone.eval()(batch()), model.eval()(batch()))
    mine, others = quantizers(model), quantizers(clone)
    assert all(mine[k] is not others[k] for k in mine)
    for net in (model, clone):
        net.train()(batch()).sum().backward()
    key = ("weight", "blocks.0")
    assert torch.equal(mine[key].alpha.grad, others[key].alpha.grad) and mine[key].alpha.grad != 0
    with torch.no_grad():
        others[key].alpha.mul_(2)
    assert mine[key].alpha != others[key].alpha
    # the copy's hooks read the copy's own parameters
    with torch.no_grad():
        clone.fc.weight.zero_()
        clone.fc.bias.zero_()
    assert clone.eval()(batch()).abs().max() == 0 and model.eval()(batch()).abs().max() > 0


def test_training_moves_weights_and_quantizers():
    controller, model = compress()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = train(controller, model, epochs=8, lr=0.02)
    assert sum(losses[-2:]) < sum(losses[:2])
    after = model.state_dict()
    for name in ("conv2.weight", "fc.weight"):
        assert not torch.equal(before[name], after[name])
    for key in (k for k in before if k.endswith((".alpha", ".transform"))):
        assert not torch.equal(before[key], after[key]), key


def test_param_groups_hold_every_parameter_once():
    _, model = compress()
    groups = fat_nncf.param_groups(model, lr=0.04, weight_decay=5e-4)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g["lr"] for g in groups} == {0.04, 0.02, 0.1}


@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_training_forward_never_waits_for_the_device(algorithm, no_host_sync):
    controller, model = compress(section(algorithm), net=Zoo())
    model.train()
    x = batch()
    with no_host_sync():
        loss = model(x).square().sum() + controller.loss()
        loss.backward()
        controller.scheduler.step()
    assert torch.isfinite(loss)


def test_batch_norm_adaptation_of_nncf():
    _, model = compress(section(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}))
    hooks = copy.deepcopy(get_hook_storage(model).state_dict())
    nncf.batch_norm_adaptation(model, calibration_dataset=nncf.Dataset([b[0] for b in loader()]))
    assert model.bn1.running_mean.abs().max() > 0
    assert all(torch.equal(v, hooks[k]) for k, v in get_hook_storage(model).state_dict().items())


def test_schedules_reach_the_quantizers():
    seen = []
    controller, model = compress()
    quantizer = quantizers(model)["weight", "conv2"]
    quantizer.on_progress = lambda progress: seen.append((progress.step, progress.epoch, progress.total_epochs))
    controller.scheduler.total_epochs = 7
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    controller.scheduler.step()
    controller.scheduler.epoch_step(5)
    controller.scheduler.step(40)
    assert seen == [(0, 0, 7), (0, 0, 7), (1, 0, 7), (1, 5, 7), (40, 5, 7)]
    state = controller.scheduler.get_state()
    other, _ = compress()
    other.scheduler.load_state(state)
    assert other.scheduler.get_state() == state == {
        "current_step": 40, "current_epoch": 5, "total_steps": None, "total_epochs": 7,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="counters are missing"):
        other.scheduler.load_state({})


def test_regularization_joins_the_loss(monkeypatch):
    controller, model = compress()
    assert controller.loss().shape == () and controller.loss() == 0
    quantizer = quantizers(model)["weight", "conv2"]
    quantizer.regularization = lambda: quantizer.alpha * 2
    assert controller.loss().item() == pytest.approx(2 * quantizer.alpha.item())
    controller.loss().backward()
    assert quantizer.alpha.grad == 2


def test_coordinators(monkeypatch):
    """An algorithm may act on the whole network; the adapter builds, drives, trains and saves what it brings."""
    from fat_plugins.quantizer import Coordinator
    from fat_plugins.registry import get_algorithm

    class Watcher(Coordinator):
        def __init__(self, layers):
            super().__init__(layers)
            self.names = [layer.name for layer in layers]
            self.inputs = [q.spec.name if (q := layer.input_activation) is not None else None for layer in layers]
            self.budget = torch.nn.Parameter(torch.tensor(1.5))
            self.progress = None

        def on_progress(self, progress):
            self.progress = (progress.step, progress.epoch)

        def regularization(self):
            return self.budget**2

    monkeypatch.setattr(get_algorithm("fat"), "coordinator", Watcher)
    controller, model = compress()
    (watcher,) = controller.coordinators
    assert watcher.names == ["conv2", "conv3"] and watcher.inputs == ["input of conv2", "input of conv3"]
    assert watcher.budget in set(model.parameters())
    assert controller.loss().item() == pytest.approx(2.25)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    assert watcher.progress == (0, 0)
    with torch.no_grad():
        watcher.budget.fill_(3.0)
    resumed, fresh = fat_nncf.create_compressed_model(
        Small(), config(), compression_state=controller.get_compression_state()
    )
    fresh.load_state_dict(model.state_dict())
    assert resumed.loss().item() == pytest.approx(9.0)
    assert not any(
        isinstance(m, Watcher) for net in (fat_nncf.freeze(model), controller.strip()) for m in net.modules()
    )


@pytest.mark.parametrize("algorithm", ["fat", "direct"])
def test_progress_of_several_processes(algorithm, tmp_path):
    """DistributedDataParallel over two gloo processes; rank 1 was calibrated on other data."""
    script = Path(__file__).with_name("nncf3_ddp.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path), algorithm], env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    # DistributedDataParallel hands out moving statistics before a forward, so they differ after the last one
    moving = ("running_mean", "running_var", "largest")
    differing = [k for k in first if not torch.equal(first[k], second[k]) and not k.endswith(moving)]
    assert not differing
    assert any({"fat": "alpha", "direct": "core.basis"}[algorithm] in k for k in first)


def test_graph_of_a_compressed_model_shows_quantizers_to_nncf():
    """NNCF's own tools walk through our hooks as through its own."""
    _, model = compress()
    x = batch()
    reference = model.eval()(x)
    pruned = nncf.prune(copy.deepcopy(model), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=x)
    masked = [type(m).__name__ for m in pruned.modules()].count("UnstructuredPruningMask")
    assert masked == 4
    assert not torch.equal(pruned(x), reference)
    assert sum(isinstance(m, PluginQuantizer) for m in pruned.modules()) == len(plugin_hooks(model))
