"""What a training step costs, in figures that no machine's mood changes: operations, kept bytes, graphs, stalls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from universal import DRAWS_NOISE, cases, run, sample

from fat_plugins import TensorSpec, algorithms, get_algorithm, get_backend, kernels, set_backend
from fat_plugins import functional as F
from fat_plugins.quantizer import Progress

#: dynamo's own use of what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")

EACH = pytest.mark.parametrize("case", cases(bits=(4,)), ids=str)


@pytest.fixture(autouse=True)
def _backend():
    before = get_backend()
    yield
    set_backend(before)
    kernels._compiled.clear()
    torch._dynamo.reset()


class Counted(TorchDispatchMode):
    """The operations that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Without views and the like, which read no memory."""
        free = ("view", "detach", "alias", "reshape", "permute", "expand", "as_strided", "empty", "select", "slice")
        return sum(n for name, n in self.names.items() if not any(f in name for f in free))


def trained(case, shape=None):
    """A quantizer in the middle of a training, and an input."""
    quantizer, x = case.ready()
    quantizer.train()
    quantizer.on_progress(Progress(step=3, epoch=1, total_steps=8, total_epochs=4))
    return quantizer, x


# -- stalls ----------------------------------------------------------------------------------------------------------
STALLS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "_to_host")


@EACH
def test_no_operation_of_a_training_step_waits_for_the_device(case):
    quantizer, x = trained(case)
    leaf = x.clone().requires_grad_()
    with Counted() as counted:
        quantizer(leaf).backward(torch.ones_like(x))
        if (term := quantizer.regularization()) is not None:
            term.backward()
    assert counted.total
    stalls = [name for name in counted.names if any(name.startswith(f"aten::{s}") for s in STALLS)]
    assert not stalls


def test_the_stall_test_sees_a_stall():
    with Counted() as counted:
        bool((torch.ones(3) > 0).any())
        torch.ones(3)[torch.ones(3) > 0]
    assert {"aten::_local_scalar_dense"} <= set(counted.names)


@pytest.mark.gpu
@EACH
def test_no_operation_of_a_training_step_waits_for_a_gpu(case):
    quantizer, x = trained(case)
    quantizer, leaf = quantizer.cuda(), x.cuda().requires_grad_()
    quantizer(leaf).sum().backward()  # whatever is set up once
    grad = torch.ones_like(leaf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantizer(leaf).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- operations and memory -------------------------------------------------------------------------------------------
#: operations of forward and backward over a 4-bit tensor, by algorithm and role: raise one only for a reason
MOST = {}


def operations(case) -> tuple[int, int]:
    set_backend("eager", block=0)
    quantizer, x = trained(case)
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)
    with Counted() as forward:
        out = quantizer(leaf)
    with Counted() as backward:
        out.backward(grad)
    return forward.total, backward.total


@pytest.mark.parametrize("case", [c for c in cases(bits=(4,)) if not c.options and not c.per_channel], ids=str)
def test_operations_of_a_step(case):
    assert operations(case) <= MOST[case.algorithm, case.role]
