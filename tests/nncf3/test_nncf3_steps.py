"""Training steps and evaluations on NNCF 3: no waits, nothing computed twice, nothing added."""

from __future__ import annotations

import pytest
import torch
from fat_nncf.modern_hooks import PluginQuantizer
from nncf3_nets import compress as compress_small
from stepping import (
    ALGORITHMS,
    SHAPE,
    batch,
    build_net,
    check_accumulation,
    check_added_operations,
    check_channels_last,
    check_evaluation,
    check_no_wait,
    check_no_wait_on_gpu,
    computations,
    needs_gpu,
    section,
    weight_quantizers,
)


def compress(algorithm: str, *others, **more):
    sections = [*others, section(algorithm, **more)]
    return compress_small(sections, build_net(), data=[batch(5)], input_info={"sample_size": list(SHAPE)})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_training_step_waits_for_nothing(algorithm):
    controller, model = compress(algorithm)
    check_no_wait(model, controller)


@needs_gpu
@pytest.mark.parametrize("algorithm", ["lsq", "fat"])
def test_a_training_step_waits_for_nothing_on_a_gpu(algorithm):
    controller, model = compress(algorithm)
    check_no_wait_on_gpu(model, controller)


@pytest.mark.parametrize("algorithm", ["lsq", "fat", "dropbits"])
def test_evaluation_quantizes_weights_once(algorithm):
    check_evaluation(compress(algorithm)[1])


@pytest.mark.parametrize("more", [{}, {"compression_lr_multiplier": 0.3}])
@pytest.mark.parametrize("algorithm", ["lsq", "fat"])
def test_accumulation(algorithm, more):
    controller, model = compress(algorithm, **more)
    check_accumulation(model, controller.loss)


def test_accumulation_of_masked_weights():
    masks = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    controller, model = compress("lsq", masks)
    assert all(q.spec.keep_zeros for q in weight_quantizers(model))
    check_accumulation(model, controller.loss)


def test_masked_weights_are_quantized_in_every_evaluation():
    """They are other tensors each time, of which nothing says that they are equal."""
    _, model = compress("lsq", {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5})
    model.eval()
    with torch.no_grad(), computations(model) as count:
        first, again = model(batch()[0]), model(batch()[0])
    assert torch.equal(first, again) and set(count.values()) == {2}


def test_channels_last_is_kept():
    check_channels_last(compress("lsq")[1])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_hook_adds_no_operation(mode):
    _, model = compress("lsq")
    getattr(model, mode)()
    x = torch.rand(4, 8, 12, 12, requires_grad=True)
    hooks = {m.core.role: m for m in model.modules() if isinstance(m, PluginQuantizer) and m.core.bits == 4}
    weight = torch.randn(hooks["weight"].core.spec.shape, requires_grad=True)
    for hook, tensor in ((hooks["weight"], weight), (hooks["activation"], x)):
        assert not check_added_operations(lambda h=hook, t=tensor: h(t), lambda h=hook, t=tensor: h.core(t))
