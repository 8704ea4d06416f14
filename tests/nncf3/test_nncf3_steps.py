"""Training steps and evaluations on NNCF 3: no waits, nothing computed twice, nothing added."""

from __future__ import annotations

import pytest
import torch
from fat_nncf.modern_hooks import PluginQuantizer
from nncf3_nets import compress as compress_small
from stepping import SHAPE, StepsOfAHost, batch, build_net, check_added_operations, section, weight_quantizers

MASKS = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


class TestNNCF3(StepsOfAHost):
    @staticmethod
    def compress(algorithm, *others, **more):
        sections = [*others, section(algorithm, **more)]
        return compress_small(sections, build_net(), data=[batch(5)], input_info={"sample_size": list(SHAPE)})

    @classmethod
    def compress_masked(cls):
        controller, model = cls.compress("lsq", MASKS)
        quantizers = weight_quantizers(model)
        assert all(q.spec.keep_zeros for q in quantizers)
        return controller, model, {q.spec.name for q in quantizers}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_hook_adds_no_operation(mode):
    _, model = TestNNCF3.compress("lsq")
    getattr(model, mode)()
    x = torch.rand(4, 8, 12, 12, requires_grad=True)
    hooks = {m.core.role: m for m in model.modules() if isinstance(m, PluginQuantizer) and m.core.bits == 4}
    weight = torch.randn(hooks["weight"].core.spec.shape, requires_grad=True)
    for hook, tensor in ((hooks["weight"], weight), (hooks["activation"], x)):
        assert not check_added_operations(lambda h=hook, t=tensor: h(t), lambda h=hook, t=tensor: h.core(t))
