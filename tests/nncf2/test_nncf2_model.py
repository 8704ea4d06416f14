"""Placement, training, schedules, resume: what an NNCF script does with a model that holds our quantizers."""

import copy
import io
import json
import sys
import types
import warnings
from pathlib import Path

import fat_nncf
import pytest
import torch
from legacy_models import (
    BITS4,
    Branches,
    Net,
    Zoo,
    batch,
    bits,
    build_net,
    compress,
    evaluate,
    fat,
    make_config,
    optimizer,
    quantizers,
    train_step,
)
from torch import nn

from fat_plugins.errors import CheckpointError, ConfigError, HostError, QuantizationError
from fat_plugins.placed import float_weights


def test_default_placement_has_8_bit_edges():
    ctrl, model = compress(fat())
    assert bits(model, "weight") == {"conv1": 8, "dw": 4, "pw": 4, "conv2": 4, "fc": 8}
    found = bits(model, "activation")
    assert {n: b for n, b in found.items() if "mean" not in n} == {
        "input of conv1": 8,
        "input of dw": 4,
        "input of pw": 4,
        "input of conv2": 4,
        "input of fc": 8,
    }
    assert [b for n, b in found.items() if "mean" in n] == [8]  # feeds no weighted layer
    weights = quantizers(model, "weight")
    assert weights["conv1"].spec.followed_by_norm and not weights["conv2"].spec.followed_by_norm
    assert all(q.calibrated for q in quantizers(model).values())
    assert len(weights["dw"](model.dw.weight).detach().unique()) <= 15
    assert not ctrl.loss().requires_grad and float(ctrl.loss()) == 0.0


@pytest.mark.parametrize("device", [None, "TRIAL", "CPU", "GPU"])
def test_low_bits_on_every_target_device(device):
    top = {} if device is None else {"target_device": device}
    _, model = compress(fat(weights={"bits": 2}, activations={"bits": 3}), **top)
    assert bits(model, "weight")["pw"] == 2 and bits(model, "activation")["input of pw"] == 3


def test_edges_as_the_rest_or_float():
    _, model = compress(fat(first_layer="same", last_layer="float"))
    assert bits(model, "weight") == {"conv1": 4, "dw": 4, "pw": 4, "conv2": 4}
    assert "input of fc" not in bits(model, "activation") and bits(model, "activation")["input of conv1"] == 4


def test_scopes_and_overrides():
    section = fat(
        ignored_scopes=["{re}.*\\[dw\\].*"],
        scope_overrides={
            "weights": {"{re}.*\\[pw\\].*": {"bits": 3}, "{re}.*\\[fc\\].*": {"algorithm": "lsq", "bits": 5}},
            "activations": {"{re}.*\\[conv2\\].*": {"bits": 6, "params": {"activation_alpha": 1.5}}},
        },
    )
    _, model = compress(section)
    assert bits(model, "weight") == {"conv1": 8, "pw": 3, "conv2": 4, "fc": 5}
    found = quantizers(model)
    assert type(found["fc"]).__name__ == "LSQWeight"
    assert found["input of conv2"].spec.bits == 6 and found["input of conv2"].alpha.item() == 1.5
    assert found["input of pw"].spec.bits == 4


def test_target_scopes_and_group_scopes():
    _, model = compress(fat(target_scopes=["{re}.*\\[(pw|conv2)\\].*"]))
    assert set(bits(model, "weight")) == {"pw", "conv2"}
    _, model = compress(fat(weights={"bits": 4, "ignored_scopes": "{re}.*\\[pw\\].*"}))
    assert "pw" not in bits(model, "weight") and "input of pw" in bits(model, "activation")


def test_layer_kinds_train_and_hold_few_levels():
    ctrl, model = compress(fat(), Zoo(), shape=(2, 3, 8, 8))
    found = quantizers(model, "weight")
    assert set(found) == {"first", "grouped", "depthwise", "pointwise", "up", "up_grouped", "mid", "last"}
    assert found["up"].spec.channel_axis == 1 and found["up_grouped"].spec.shape == (4, 2, 2, 2)
    opt = optimizer(model)
    x = torch.randn(2, 3, 8, 8)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model.train(), ctrl, opt, x)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name in ("grouped", "depthwise", "pointwise", "up", "up_grouped", "mid"):
        layer = model.get_submodule(name)
        assert found[name].transform.grad.abs().sum() > 0
        assert len(found[name].eval()(layer.weight).unique()) <= 15


def test_unified_scales_and_shared_layers():
    ctrl, model = compress(fat(), Branches(), shape=(2, 3, 8, 8))
    stored = list(model.nncf.external_quantizers.items())
    unified = [(key, q) for key, q in stored if ";" in key]
    assert len(unified) == 1 and "input of shared" in unified[0][1].core.spec.name
    assert list(quantizers(model, "weight")).count("shared") == 1
    train_step(model.train(), ctrl, optimizer(model), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(evaluate(fat_nncf.freeze(model), x), evaluate(model, x), atol=1e-6)
    assert torch.allclose(evaluate(ctrl.strip(), x), evaluate(model, x), atol=1e-6)


def test_names_are_unique():
    _, model = compress(fat(), Branches(), shape=(2, 3, 8, 8))
    frozen = [m for m in fat_nncf.freeze(model).modules() if hasattr(m, "form")]
    names = [(type(m), m.name) for m in frozen]
    assert len(names) == len(set(names)) >= 8


def test_training_forward_never_reads_the_device(monkeypatch):
    ctrl, model = compress(fat())
    model.train()

    def guarded(name, original):
        def call(*args, **kwargs):
            frame = sys._getframe(1)
            while frame is not None:  # NNCF itself reads the padding value of every convolution
                if {"fat_plugins", "fat_nncf"} & set(Path(frame.f_code.co_filename).parts):
                    raise AssertionError(f"our forward reads the device: Tensor.{name}")
                frame = frame.f_back
            return original(*args, **kwargs)

        return call

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, guarded(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "nonzero", guarded("nonzero", torch.Tensor.nonzero))
    (model(batch()).square().mean() + ctrl.loss()).backward()


@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_resume_is_bitwise(algorithm):
    section = {"algorithm": algorithm, **BITS4}
    ctrl, model = compress(section)
    opt = optimizer(model)
    model.train()
    ctrl.scheduler.epoch_step()
    for _ in range(2):
        train_step(model, ctrl, opt)
    buffer = io.BytesIO()
    torch.save(
        {"compression": ctrl.get_compression_state(), "model": model.state_dict(), "opt": opt.state_dict()}, buffer
    )
    expected = [train_step(model, ctrl, opt) for _ in range(2)]

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)  # nothing in it needs code to load
    json.dumps(saved["compression"]["builder_state"])  # JSON types only
    ctrl2, model2 = compress(section, Net(), data=False, compression_state=saved["compression"])
    model2.load_state_dict(saved["model"])
    opt2 = optimizer(model2)
    opt2.load_state_dict(saved["opt"])
    model2.train()
    assert (ctrl2.scheduler.current_step, ctrl2.scheduler.current_epoch) == (1, 0)
    assert [train_step(model2, ctrl2, opt2) for _ in range(2)] == expected
    assert torch.equal(evaluate(model2), evaluate(model))


def test_load_state_of_nncf_and_state_dict_round_trip():
    from nncf.torch import load_state

    ctrl, model = compress(fat())
    train_step(model.train(), ctrl, optimizer(model))
    reference = evaluate(model)
    _, other = compress(fat(), Net())
    load_state(other, model.state_dict(), is_resume=True)
    assert torch.equal(evaluate(other), reference)
    assert torch.equal(evaluate(copy.deepcopy(model)), reference)


def test_disabled_quantizers_stay_disabled_after_loading():
    ctrl, model = compress(fat())
    ctrl.disable_weight_quantization()
    float_weights = evaluate(model)
    _, other = compress(fat())
    assert not torch.equal(evaluate(other), float_weights)
    other.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(other), float_weights)
    ctrl.enable_weight_quantization()
    assert all(p.requires_grad for q in quantizers(model).values() for p in q.parameters())


def test_scheduler_drives_progress_and_restores_it(monkeypatch):
    from fat_plugins.algorithms.fat import FATWeight

    seen = []
    monkeypatch.setattr(FATWeight, "on_progress", lambda self, p: seen.append((p.step, p.epoch, p.total_epochs)))
    ctrl, _ = compress(fat())
    assert set(seen) == {(0, 0, None)}
    ctrl.scheduler.total_epochs = 7
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.step()
    ctrl.scheduler.step()
    assert seen[-1] == (1, 0, 7)
    ctrl.scheduler.epoch_step()
    assert seen[-1] == (1, 1, 7)
    state = ctrl.get_compression_state()
    seen.clear()
    compress(fat(), data=False, compression_state=state)
    assert seen[-1] == (1, 1, 7)


def test_regularization_and_coordinator_reach_the_loss(monkeypatch):
    from fat_plugins.algorithms.fat import FAT, FATWeight
    from fat_plugins.quantizer import Coordinator

    class Budget(Coordinator):
        def __init__(self, layers):
            super().__init__(layers)
            self.register_buffer("seen", torch.zeros(1))

        def on_progress(self, progress):
            self.seen.fill_(progress.step)

        def regularization(self):
            return torch.tensor(0.5)

    monkeypatch.setattr(FATWeight, "regularization", lambda self: self.alpha.square())
    monkeypatch.setattr(FAT, "coordinator", Budget)
    ctrl, model = compress(fat())
    coordinator = ctrl.parts()[-1]
    clips = [layer.weight.alpha.item() for layer in coordinator.layers]
    assert ctrl.loss().item() == pytest.approx(sum(clip**2 for clip in clips) + 0.5)
    assert [layer.name for layer in coordinator.layers] == ["dw", "pw", "conv2"]
    assert coordinator.layers[0].input_activation is quantizers(model)["input of dw"]
    assert coordinator.layers[2].parameters["bias"] is model.conv2.bias
    ctrl.scheduler.step(5)
    assert [float(v) for k, v in model.state_dict().items() if k.endswith("seen")] == [5.0]
    ctrl.loss().backward()
    assert float(quantizers(model)["dw"].alpha.grad) == pytest.approx(2 * clips[0])


def test_lr_multiplier_scales_gradients():
    gradients = []
    for factor in (None, 10.0):
        section = fat() if factor is None else fat(compression_lr_multiplier=factor)
        _, model = compress(section)
        model.eval()(batch()).square().sum().backward()
        gradients.append(quantizers(model)["pw"].alpha.grad.clone())
    assert torch.allclose(gradients[1], 10 * gradients[0])


@pytest.mark.parametrize("fix, expected", [(None, 8), ("disable", 8), ("enable", 7), ("first_layer_only", 7)])
def test_overflow_fix_halves_the_range_of_8_bit_weights(fix, expected):
    _, model = compress(fat(**({} if fix is None else {"overflow_fix": fix})))
    found = bits(model, "weight")
    assert found["conv1"] == expected and found["pw"] == 4
    assert found["fc"] == (7 if fix == "enable" else 8)


@pytest.mark.parametrize("kind", ["min_max", "mixed_min_max", "mean_min_max", "percentile", "mean_percentile"])
def test_range_initializers_of_nncf(kind):
    section = fat(initializer={"range": {"num_init_samples": 4, "type": kind}})
    _, model = compress(section)
    alpha = float(quantizers(model)["input of dw"].alpha.detach())
    net = build_net().eval().requires_grad_(False)
    top = float(torch.relu(net.bn1(net.conv1(batch()))).max())
    assert 0 < alpha <= top * 1.0001
    if kind == "min_max":
        assert alpha == pytest.approx(top, rel=1e-5)


def test_data_calibration_and_explicit_range():
    _, by_data = compress({"algorithm": "lsq", **BITS4})
    step = quantizers(by_data)["input of dw"].step.detach()
    net = build_net().eval().requires_grad_(False)
    x = torch.relu(net.bn1(net.conv1(batch())))
    assert float(step) == pytest.approx(float(2 * x.mean() / 15**0.5), rel=1e-5)
    section = {"algorithm": "lsq", **BITS4, "initializer": {"range": {"num_init_samples": 4, "type": "min_max"}}}
    _, by_range = compress(section)
    assert float(quantizers(by_range)["input of dw"].step.detach()) == pytest.approx(float(x.max()) / 15, rel=1e-5)


def test_init_range_again_on_other_data():
    no_adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    ctrl, model = compress({"algorithm": "lsq", **BITS4, "initializer": no_adaptation})
    old = float(quantizers(model)["input of dw"].step.detach())
    with torch.no_grad():
        model.bn1.weight.mul_(3), model.bn1.bias.mul_(3)
    ctrl.init_range()
    assert float(quantizers(model)["input of dw"].step.detach()) == pytest.approx(3 * old, rel=1e-4)


def test_batchnorm_adaptation_runs():
    section = fat(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 4}})
    _, adapted = compress(section)
    _, plain = compress(fat(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}))
    assert not torch.equal(adapted.bn1.running_mean, plain.bn1.running_mean)
    assert torch.equal(plain.bn1.running_mean, torch.zeros(8))


def test_without_data_warns_once_and_says_what_to_do():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctrl, model = compress(fat(), data=False)
    ours = [w for w in caught if "until they are calibrated" in str(w.message)]
    assert len(ours) == 1 and "register_default_init_args" in str(ours[0].message)
    assert all(q.calibrated for q in quantizers(model, "weight").values())
    with pytest.raises(QuantizationError, match=r"input of .*not calibrated.*register_default_init_args"):
        ctrl.strip()


def test_explicit_range_without_data():
    with pytest.raises(ConfigError, match=r"initializer.range needs data"):
        compress(fat(initializer={"range": {"num_init_samples": 4}}), data=False)


def test_empty_loader():
    data = torch.utils.data.TensorDataset(torch.zeros(0, 3, 12, 12), torch.zeros(0))
    with pytest.raises(ConfigError, match="gives no batch"):
        compress(fat(), data=torch.utils.data.DataLoader(data, batch_size=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    net = build_net()
    with torch.no_grad():
        net.pw.weight[0, 0] = value
    with pytest.raises(QuantizationError, match=r"pw: weight holds NaN or infinite"):
        compress(fat(), net)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights_stay_finite(value):
    net = build_net()
    with torch.no_grad():
        net.pw.weight.fill_(value)
    ctrl, model = compress(fat(), net)
    assert torch.isfinite(torch.tensor(train_step(model.train(), ctrl, optimizer(model))))
    assert torch.isfinite(evaluate(model)).all()


def test_checkpoints_of_something_else():
    state = compress(fat())[0].get_compression_state()
    with pytest.raises(CheckpointError, match=r"saved for fat, the config asks for 'lsq'"):
        compress({"algorithm": "lsq", **BITS4}, data=False, compression_state=state)
    with pytest.raises(CheckpointError, match=r"another model: it quantizes '.*', which this model does not have"):
        compress(fat(), nn.Sequential(nn.Conv2d(3, 4, 3)), data=False, compression_state=state)
    for point in state["builder_state"]["fat"]["quantizer_setup"]["quantization_points"].values():
        point["qspec"] = {k: v for k, v in point["qspec"].items() if k != "plugin"}  # as NNCF's own quantization saves
    with pytest.raises(CheckpointError, match="fat-plugins did not write"):
        compress(fat(), data=False, compression_state=state)


def test_config_round_trip_of_nncf():
    """NNCF's newer way to save a compressed model: get_config and load_from_config."""
    _, model = compress(fat())
    reference = evaluate(model)
    state = model.state_dict()
    config = json.loads(json.dumps(model.nncf.get_config()))
    from nncf.torch import load_from_config

    other = load_from_config(build_net(), config, batch())
    other.load_state_dict(state)
    assert torch.equal(evaluate(other), reference)


def test_accuracy_aware_training_early_exit(monkeypatch):
    transforms = types.ModuleType("torchvision.transforms")
    transforms.ToTensor = object  # NNCF's loop imports it for pictures on TensorBoard
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    from nncf.common.accuracy_aware_training import create_accuracy_aware_training_loop

    params = {"maximal_absolute_accuracy_degradation": 0.2, "maximal_total_epochs": 5}
    config = make_config(fat(), accuracy_aware_training={"mode": "early_exit", "params": params})
    ctrl, model = fat_nncf.create_compressed_model(build_net(), config, dump_graphs=False)
    trained, accuracies = [], iter([0.3, 0.5, 0.9, 0.9])

    def train_epoch(ctrl, model, epoch, optimizer, lr_scheduler, **_):  # NNCF's loop calls epoch_step itself
        trained.append(train_step(model.train(), ctrl, optimizer))

    loop = create_accuracy_aware_training_loop(config, ctrl, uncompressed_model_accuracy=1.0)
    best = loop.run(
        model,
        train_epoch_fn=train_epoch,
        validate_fn=lambda model, epoch=None, **_: next(accuracies),
        configure_optimizers_fn=lambda: (optimizer(model), None),
        log_dir="logs",
    )
    assert len(trained) == 2 and ctrl.scheduler.current_epoch == 1  # 0.9 is within 0.2 of 1.0: exit
    assert torch.isfinite(evaluate(best)).all()


def test_distributed_broadcast_keeps_the_quantizers():
    ctrl, model = compress(fat())
    reference = evaluate(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ctrl.distributed()
    finally:
        torch.distributed.destroy_process_group()
    assert all(q.calibrated for q in quantizers(model).values())
    assert torch.equal(evaluate(model), reference)


def test_training_under_autocast():
    ctrl, model = compress(fat())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = train_step(model.train(), ctrl, optimizer(model))
    assert torch.isfinite(torch.tensor(loss))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_statistics_show_our_bits():
    ctrl, _ = compress(fat(weights={"bits": 3}, activations={"bits": 5}))
    stats = ctrl.statistics().quantization
    assert stats.num_wq_per_bitwidth == {8: 2, 3: 3} and stats.num_aq_per_bitwidth == {8: 3, 5: 3}
    assert stats.wq_counter.num_asymmetric == 0 and stats.wq_counter.num_per_channel == 2
    text = ctrl.statistics().to_str()
    assert "bitwidth distribution" in text
    assert "Statistics by layer" in text and "FATWeight" not in text and " fat " in text
    layers = {row.name: row for row in stats.summary.layers if row.role == "weight"}
    assert {row.bits for row in layers.values()} == {3, 8} and all(row.sqnr_db for row in layers.values())
    assert "Statistics by layer" not in ctrl.statistics(quickly_collected_only=True).to_str()


def test_statistics_tell_the_compression_rate():
    ctrl, model = compress({"algorithm": "squantizer", "weights": {"bits": 3}, "activations": {"bits": 4}})
    facts = ctrl.statistics().quantization.summary.facts
    assert facts["compression rate as published (all parameters at k bits, no index)"] > 3
    assert "compression rate, other parameters at 32 bits" in ctrl.statistics().to_str()
    assert len(float_weights(model)) == len(quantizers(model, "weight"))


def test_quantize_and_freeze_refuse_clearly():
    with pytest.raises(HostError, match="needs NNCF 3"):
        fat_nncf.quantize(build_net(), None)
    with pytest.raises(HostError, match="no quantizer of fat-plugins"):
        fat_nncf.freeze(build_net())
