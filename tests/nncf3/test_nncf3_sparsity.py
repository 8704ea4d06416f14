"""Sparsity algorithms of the same config: masks, schedules, zeros that stay zeros."""

from __future__ import annotations

import json

import fat_nncf
import pytest
import torch
from fat_nncf.modern_controller import CompressionStage
from fat_nncf.modern_hooks import plugin_hooks, quantizer_input
from fat_nncf.modern_sparsity import parse_sparsity
from nncf3_nets import Small, batch, bits, compress, config, quantizers, section, train
from safetensors.torch import load_file, save_file

from fat_plugins.frozen import FrozenWeight

MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.3,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "schedule": "polynomial", "power": 1.0},
}


def shifted() -> Small:
    """Weights whose mean is far from 0: an algorithm that subtracts it would revive pruned weights."""
    net = Small()
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.conv3):
            layer.weight.add_(0.2)
    return net


def zero_share(model) -> float:
    """Share of zeros among the weights behind the masks."""
    weights = [quantizer_input(model, h, s[0]) for h, s in plugin_hooks(model).items() if h.tensor]
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def assert_zeros_are_kept(model) -> None:
    """Weights that the masks remove are exact zeros of the quantized weight and of the codes."""
    frozen = {m.name: m for m in fat_nncf.freeze(model).modules() if isinstance(m, FrozenWeight)}
    for hook, slots in plugin_hooks(model).items():
        if hook.tensor:
            weight = quantizer_input(model, hook, slots[0])
            zeros = weight == 0
            assert zeros.any() or hook.name in ("fc", "conv1"), hook.name
            assert not hook.core(weight)[zeros].any()
            assert not frozen[hook.name].form.integers(frozen[hook.name].codes)[zeros].any()


@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_magnitude_sparsity_follows_its_schedule(algorithm):
    controller, model = compress([MAGNITUDE, section(algorithm)], net=shifted())
    assert bits(model) == {"conv1": 8, "conv2": 4, "conv3": 4, "fc": 8}
    assert zero_share(model) == pytest.approx(0.3, abs=0.01)
    assert_zeros_are_kept(model)
    levels = []
    for _ in range(4):
        train(controller, model)
        levels.append(zero_share(model))
        assert controller.statistics().sparsity_level == pytest.approx(levels[-1], abs=1e-6)
    assert levels == pytest.approx([0.3, 0.45, 0.6, 0.6], abs=0.01)
    assert_zeros_are_kept(model)
    assert "sparsity of the masked weights: 60.0%" in controller.statistics().to_str()


def test_frozen_and_stripped_models_hold_no_masks():
    controller, model = compress([MAGNITUDE, section()])
    train(controller, model)
    reference = model(batch())
    for net in (fat_nncf.freeze(model), controller.strip()):
        assert not any("Mask" in type(m).__name__ for m in net.modules())
        assert torch.allclose(net(batch()), reference, atol=1e-6)
    stripped = controller.strip()
    assert (stripped.conv2.weight == 0).sum() >= 0.3 * stripped.conv2.weight.numel() * 0.5


def test_masks_apply_to_layers_that_stay_float():
    controller, model = compress([{**MAGNITUDE, "sparsity_init": 0.5}, section(ignored_scopes=["conv3"])])
    reference = model.eval()(batch())
    frozen = fat_nncf.freeze(model)
    assert "conv3" not in bits(model)
    assert torch.allclose(frozen(batch()), reference, atol=1e-6)
    assert torch.allclose(controller.strip()(batch()), reference, atol=1e-6)


def test_scopes_of_the_sparsity_section():
    _, model = compress([{**MAGNITUDE, "ignored_scopes": ["conv2"]}, section()])
    masked = {n.split("__nncf_hooks.post_hooks.")[1] for n, m in model.named_modules() if "Mask" in type(m).__name__}
    assert masked == {"conv1:weight__0.0", "conv3:weight__0.0", "fc:weight__0.0"}
    _, model = compress([{**MAGNITUDE, "target_scopes": ["{re}conv3"]}, section()])
    assert sum("Mask" in type(m).__name__ for m in model.modules()) == 1


def test_levels_per_layer():
    local = {**MAGNITUDE, "params": {"sparsity_level_setting_mode": "local", "schedule": "multistep",
                                     "multistep_steps": [1], "multistep_sparsity_levels": [0.25, 0.5]}}  # fmt: skip
    controller, model = compress([local, section()])
    for expected in (0.25, 0.25, 0.5):
        for hook, slots in plugin_hooks(model).items():
            if hook.tensor:
                share = float((quantizer_input(model, hook, slots[0]) == 0).float().mean())
                assert share == pytest.approx(expected, abs=0.03), hook.name
        controller.scheduler.epoch_step()


def test_freezing_the_masks():
    params = {"sparsity_target": 0.6, "sparsity_target_epoch": 4, "sparsity_freeze_epoch": 2, "schedule": "exponential"}
    controller, model = compress([{**MAGNITUDE, "params": params}, section()])
    shares = []
    for _ in range(4):
        controller.scheduler.epoch_step()
        shares.append(zero_share(model))
    assert shares[0] < shares[1] == shares[2] == shares[3]


def test_const_sparsity_keeps_the_zeros_that_are_there():
    net = Small()
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.conv3):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.4)
    zeros = {name: getattr(net, name).weight == 0 for name in ("conv1", "conv2", "conv3")}
    controller, model = compress([{"algorithm": "const_sparsity"}, section()], net=net)
    train(controller, model, epochs=2, lr=0.1)
    assert_zeros_are_kept(model)
    for hook, slots in plugin_hooks(model).items():
        if hook.name in zeros:
            assert torch.equal(quantizer_input(model, hook, slots[0]) == 0, zeros[hook.name])
    assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED


def test_rb_sparsity_has_a_loss_and_learned_masks():
    rb = {"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 3,
                                                 "schedule": "multistep", "multistep_steps": [2],
                                                 "multistep_sparsity_levels": [0.2, 0.5]}}  # fmt: skip
    controller, model = compress([rb, section()])
    assert controller.loss().item() == pytest.approx((0.2 / 0.05) ** 2, rel=1e-4)
    controller.loss().backward()
    masks = [m.mask for m in model.modules() if type(m).__name__ == "RBPruningMask"]
    assert len(masks) == 4 and all(m.grad.abs().max() > 0 for m in masks)
    assert controller.compression_stage() == CompressionStage.PARTIALLY_COMPRESSED
    for _ in range(3):
        controller.scheduler.epoch_step()
    assert controller.loss().item() == pytest.approx((0.5 / 0.05) ** 2, rel=1e-4)
    assert controller.compression_stage() == CompressionStage.FULLY_COMPRESSED
    with torch.no_grad():
        for mask in masks:
            mask[mask.flatten(1).mean(1) > -9, ...] += 0
            mask.view(-1)[::3] = -10.0
    assert zero_share(model) == pytest.approx(1 / 3, abs=0.02)
    assert_zeros_are_kept(model)
    assert torch.isfinite(torch.tensor(train(controller, model))).all()


def test_rb_multiplier():
    grads = []
    for factor in (1.0, 4.0):
        rb = {"algorithm": "rb_sparsity", "compression_lr_multiplier": factor}
        controller, model = compress([rb, section()])
        controller.scheduler.epoch_step(100)
        controller.loss().backward()
        grads.append(next(m.mask.grad for m in model.modules() if type(m).__name__ == "RBPruningMask"))
    assert torch.allclose(grads[1], 4 * grads[0])


@pytest.mark.parametrize("kind", ["magnitude_sparsity", "rb_sparsity", "const_sparsity"])
def test_resume(kind, tmp_path):
    sparsity = MAGNITUDE if kind == "magnitude_sparsity" else {"algorithm": kind}
    controller, model = compress([sparsity, section()])
    train(controller, model, epochs=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed, fresh = fat_nncf.create_compressed_model(Small(), config([sparsity, section()]), compression_state=state)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh.eval()(batch()), model(batch()))
    assert resumed.loss().item() == pytest.approx(controller.loss().item())
    controller.scheduler.epoch_step()
    resumed.scheduler.epoch_step()
    assert torch.equal(fresh(batch()), model(batch()))
    assert zero_share(fresh) == zero_share(model)


def test_masks_that_the_user_put_there():
    import nncf

    net = nncf.prune(Small(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=batch())
    _, model = compress(net=net)
    assert all(q.spec.keep_zeros for (role, _), q in quantizers(model).items() if role == "weight")
    assert zero_share(model) == pytest.approx(0.5, abs=0.03)
    assert_zeros_are_kept(model)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"schedule": "polynomial", "power": 0.9}, lambda t: 0.5 - 0.4 * (1 - t) ** 0.9),
        ({"schedule": "polynomial", "power": 3, "concave": False}, lambda t: 0.1 + 0.4 * t**3),
        ({"schedule": "exponential"}, lambda t: 1 - 0.9 * (0.5 / 0.9) ** t),
    ],
)
def test_schedules(params, expected):
    plan = parse_sparsity(
        {"algorithm": "magnitude_sparsity", "sparsity_init": 0.1, "params": {"sparsity_target_epoch": 10, **params}},
        "c",
    )
    assert plan.level(-1) == 0.1 and plan.level(10) == plan.level(50) == 0.5
    for epoch in range(10):
        assert plan.level(epoch) == pytest.approx(expected(epoch / 10)), epoch


def test_level_zero_prunes_nothing():
    _, model = compress([{"algorithm": "magnitude_sparsity"}, section()])
    assert zero_share(model) == 0.0
