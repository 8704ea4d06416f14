"""Sparsity and pruning of NNCF before our quantizers: zeros stay zero, statistics stay NNCF's."""

import fat_nncf
import pytest
import torch
from legacy_models import compress, evaluate, fat, optimizer, quantizers, train_step

from fat_plugins.frozen import FrozenWeight

HIDDEN = ("dw", "pw", "conv2")


def zeros_that_reach(model):
    """Boolean mask by layer of the weights that other algorithms have set to zero."""
    from fat_nncf.legacy_calibration import operand, quantized_layers

    return {q.spec.name: operand(module, q)[0] == 0 for module, _, q in quantized_layers(model)}


@pytest.mark.parametrize(
    "first",
    [
        {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5},
        {"algorithm": "rb_sparsity", "sparsity_init": 0.5},
    ],
    ids=lambda s: s["algorithm"],
)
def test_zeros_stay_zero(first):
    ctrl, model = compress([first, fat()])
    assert all(q.spec.keep_zeros for q in quantizers(model, "weight").values())
    for module in model.modules():
        if first["algorithm"] == "rb_sparsity" and "0" in getattr(module, "pre_ops", {}):
            operation = module.pre_ops["0"].op
            learned = operation.mask.data.clone()
            learned.flatten()[::2] = -5.0
            with torch.no_grad():
                operation.mask = learned  # as after training; the setter renews the binary mask
    opt = optimizer(model)
    ctrl.scheduler.epoch_step()
    for _ in range(2):
        train_step(model.train(), ctrl, opt)
    reference = evaluate(model)
    zero = zeros_that_reach(model)
    assert sum(int(z.sum()) for z in zero.values()) > 0
    frozen = fat_nncf.freeze(model)
    for module in frozen.modules():
        if isinstance(module, FrozenWeight):
            assert not module.form.decode(module.codes)[zero[module.name]].any()
    stats = ctrl.statistics()
    assert stats.quantization.num_wq_per_bitwidth == {8: 2, 4: 3}
    sparse = getattr(stats, first["algorithm"]).model_statistics
    assert sparse.sparsity_level > 0.05
    assert torch.allclose(evaluate(frozen), reference, atol=1e-6)
    assert torch.allclose(evaluate(ctrl.strip()), reference, atol=1e-6)


def test_weights_are_calibrated_after_the_masks():
    """LSQ's step is 2 mean|w| / sqrt(Q): half of the weights at zero halve it."""
    sparsity = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.6}
    lsq = {"algorithm": "lsq", "weights": {"bits": 4}, "activations": {"bits": 4}}
    _, model = compress([sparsity, lsq])
    from fat_nncf.legacy_calibration import operand, quantized_layers

    for module, _, quantizer in quantized_layers(model):
        if quantizer.spec.name in HIDDEN:
            masked = operand(module, quantizer)[0]
            assert (masked == 0).float().mean() > 0.2
            expected = 2 * masked.abs().mean() / 7**0.5
            assert float(quantizer.core.step.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_const_sparsity_keeps_the_zeros_of_a_checkpoint():
    from nncf.torch import load_state

    sparse = compress({"algorithm": "magnitude_sparsity", "sparsity_init": 0.5})[1].state_dict()
    ctrl, model = compress([{"algorithm": "const_sparsity"}, fat()])
    load_state(model, sparse, is_resume=False)
    opt = optimizer(model)
    for _ in range(2):
        train_step(model.train(), ctrl, opt)
    zero = zeros_that_reach(model)
    assert all(torch.equal(z, sparse[f"{n}.pre_ops.0.op._binary_mask"] == 0) for n, z in zero.items())
    assert 0.1 < float(zero["pw"].float().mean()) < 0.7
    for module in fat_nncf.freeze(model).modules():
        if isinstance(module, FrozenWeight):
            assert not module.form.decode(module.codes)[zero[module.name]].any()
    assert ctrl.statistics().const_sparsity.model_statistics.sparsity_level > 0.3


def test_filter_pruning():
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"pruning_target": 0.5, "schedule": "baseline"},
    }
    ctrl, model = compress([pruning, fat()])
    train_step(model.train(), ctrl, optimizer(model))
    reference = evaluate(model)
    pruned = {n: z for n, z in zeros_that_reach(model).items() if z.flatten(1).all(1).any()}
    assert pruned
    frozen = fat_nncf.freeze(model)
    assert torch.allclose(evaluate(frozen), reference, atol=1e-6)
    for module in frozen.modules():
        if isinstance(module, FrozenWeight) and module.name in pruned:
            assert not module.form.decode(module.codes)[pruned[module.name]].any()
    assert ctrl.statistics().filter_pruning is not None
    assert torch.allclose(evaluate(ctrl.strip()), reference, atol=1e-6)


def test_resume_with_sparsity_is_exact():
    sections = [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, fat()]
    ctrl, model = compress(sections)
    train_step(model.train(), ctrl, optimizer(model))
    reference = evaluate(model)
    _, other = compress(sections, data=False, compression_state=ctrl.get_compression_state())
    other.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(other), reference)
