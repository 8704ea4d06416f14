"""Training steps and evaluations on NNCF 2: no waits, nothing computed twice, nothing added."""

from __future__ import annotations

import pytest
import torch
from fat_nncf.legacy_quantizer import PluginQuantizer
from legacy_models import compress as compress_small
from stepping import SHAPE, StepsOfAHost, build_net, check_added_operations, section, weight_quantizers

MASKS = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


class TestNNCF2(StepsOfAHost):
    @staticmethod
    def compress(algorithm, *others, **more):
        sections = [*others, section(algorithm, **more)]
        return compress_small(sections if others else sections[0], build_net(), shape=SHAPE)

    @classmethod
    def compress_masked(cls):
        controller, model = cls.compress("lsq", MASKS)
        quantizers = weight_quantizers(model)
        assert all(q.spec.keep_zeros for q in quantizers)
        return controller, model, {q.spec.name for q in quantizers}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_module_adds_no_operation(mode):
    _, model = TestNNCF2.compress("lsq")
    getattr(model, mode)()
    modules = {m.core.role: m for m in model.modules() if isinstance(m, PluginQuantizer) and m.core.bits == 4}
    for module in modules.values():
        x = torch.rand(module.spec.shape or (4, 8, 12, 12), requires_grad=True)
        assert not check_added_operations(lambda m=module, x=x: m(x), lambda m=module, x=x: m.core(x))
