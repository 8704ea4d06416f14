"""Training steps and evaluations on NNCF 2: no waits, nothing computed twice, nothing added."""

from __future__ import annotations

import pytest
import torch
from fat_nncf.legacy_quantizer import PluginQuantizer
from legacy_models import compress as compress_small
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

MASKS = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def compress(algorithm: str, *others, **more):
    sections = [*others, section(algorithm, **more)]
    return compress_small(sections if others else sections[0], build_net(), shape=SHAPE)


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
    controller, model = compress("lsq", MASKS)
    assert all(q.spec.keep_zeros for q in weight_quantizers(model))
    check_accumulation(model, controller.loss)


def test_masked_weights_are_quantized_in_every_evaluation():
    """They are other tensors each time, of which nothing says that they are equal."""
    _, model = compress("lsq", MASKS)
    model.eval()
    with torch.no_grad(), computations(model) as count:
        first, again = model(batch()[0]), model(batch()[0])
    assert torch.equal(first, again) and set(count.values()) == {2}


def test_channels_last_is_kept():
    check_channels_last(compress("lsq")[1])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_module_adds_no_operation(mode):
    _, model = compress("lsq")
    getattr(model, mode)()
    modules = {m.core.role: m for m in model.modules() if isinstance(m, PluginQuantizer) and m.core.bits == 4}
    for module in modules.values():
        x = torch.rand(module.spec.shape or (4, 8, 12, 12), requires_grad=True)
        assert not check_added_operations(lambda m=module, x=x: m(x), lambda m=module, x=x: m.core(x))
