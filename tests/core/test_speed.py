"""What a training step costs, in figures that no machine's mood changes: operations, kept bytes, graphs, stalls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from universal import Layer, cases, run, sample

from fat_plugins import ConfigError, TensorSpec, algorithms, get_algorithm, get_backend, kernels, set_backend
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
        moved = {k: n for k, n in self.names.items() if k != "aten::set_"}  # another name for the same memory
        return sum(n for name, n in moved.items() if not any(f in name for f in free))


def trained(case):
    """A quantizer in the middle of a training, and an input."""
    quantizer, x = case.ready()
    quantizer.train()
    quantizer.on_progress(Progress(step=3, epoch=1, total_steps=20, total_epochs=10))
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
#: operations of forward and backward over a 4-bit tensor (1 bit: BiTAT), by algorithm and role. Direct and Relaxed
#: Quantization and DropBits go through the points of the grid one by one. Raise a number only for a reason.
MOST = {
    ("apot", "weight"): (93, 88),
    ("apot", "activation"): (71, 77),
    ("bitat", "weight"): (9, 9),
    ("bitat", "activation"): (13, 8),
    ("cfws", "weight"): (8, 1),
    ("cfws", "activation"): (7, 4),
    ("direct", "weight"): (26, 59),
    ("direct", "activation"): (301, 5),
    ("daq", "weight"): (40, 2),
    ("daq", "activation"): (30, 4),
    ("dorefa", "weight"): (15, 35),
    ("dorefa", "activation"): (5, 4),
    ("dropbits", "weight"): (122, 1187),
    ("dropbits", "activation"): (10, 198),
    ("fat", "weight"): (37, 32),
    ("fat", "activation"): (6, 9),
    ("gpfq", "weight"): (7, 1),
    ("gpfq", "activation"): (14, 4),
    ("lq_nets", "weight"): (110, 1),
    ("lq_nets", "activation"): (286, 3),
    ("lsq", "weight"): (5, 12),
    ("lsq", "activation"): (5, 12),
    ("lsq_plus", "weight"): (5, 12),
    ("lsq_plus", "activation"): (9, 20),
    ("minmax", "weight"): (8, 1),
    ("minmax", "activation"): (14, 4),
    ("one_model_for_all", "weight"): (19, 40),
    ("one_model_for_all", "activation"): (5, 12),
    ("pact", "weight"): (15, 35),
    ("pact", "activation"): (6, 12),
    ("quantization_networks", "weight"): (81, 128),
    ("quantization_networks", "activation"): (86, 136),
    ("rq", "weight"): (287, 583),
    ("rq", "activation"): (287, 583),
    ("sdq", "weight"): (31, 17),
    ("sdq", "activation"): (29, 12),
    ("slb", "weight"): (7, 10),
    ("slb", "activation"): (6, 12),
    ("squantizer", "weight"): (49, 3),
    ("squantizer", "activation"): (6, 12),
}
#: bytes per element that the graph keeps beside the tensor itself and the quantizer's own: DoReFa's weight behind tanh,
#: FAT's half spectrum (complex) and gate with the transformed weight, APoT's normalised weight, the weight behind the
#: gains of a width
KEPT = {
    **dict.fromkeys([(name, "weight") for name in ("apot", "dorefa", "one_model_for_all", "pact")], 4),
    ("fat", "weight"): 12,
}
DEFAULTS = [c for c in cases(bits=(4,)) if not c.options and not c.per_channel]
each_default = pytest.mark.parametrize("case", DEFAULTS, ids=str)


@each_default
def test_operations_of_a_step(case):
    set_backend("eager", block=0)
    quantizer, x = trained(case)
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)
    with Counted() as forward:
        out = quantizer(leaf)
    with Counted() as backward:
        out.backward(grad)
    most = MOST[case.algorithm, case.role]
    assert forward.total <= most[0] and backward.total <= most[1]


def kept_bytes(quantizer, leaf) -> int:
    """Bytes of the storages that the graph of a forward keeps, without those that are there anyway."""
    known = {t.untyped_storage().data_ptr() for t in (leaf, *quantizer.parameters(), *quantizer.buffers())}
    found: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t, storage  # held, so that no later tensor gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        out = quantizer(leaf)
    del out
    return sum(found.values())


@each_default
def test_bytes_that_a_forward_keeps(case):
    layer = Layer("conv", (32, 32, 3, 3))
    quantizer, x = case.ready(layer)
    x = x if case.role == "weight" else sample((4, 3, 40, 40), "activation")
    leaf = x.clone().requires_grad_()
    kept = kept_bytes(quantizer.train(), leaf)
    assert kept <= KEPT.get((case.algorithm, case.role), 0) * x.numel() + 1024  # and some numbers


def test_blocks_need_no_more_operations_than_there_are_blocks():
    def count(block):
        set_backend("eager", block=block)
        x, scale = torch.randn(4096, requires_grad=True), torch.tensor(0.5, requires_grad=True)
        with Counted() as counted:
            F.fake_quantize(x, scale, -8, 7).backward(torch.ones(4096))
        return counted.total

    one, two, four = count(2048), count(1024), count(512)
    assert two - one == (four - two) / 2  # the same for every block


# -- the ways to run a kernel ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", cases(bits=(3,)), ids=str)
def test_blocks_change_no_number(case, dtype):
    quantizer, x = trained(case)
    quantizer, x = quantizer.to(dtype), x.to(dtype)
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    grad = sample(x.shape, seed=5).to(dtype)
    results = []
    for size in (0, 7, 64):
        set_backend("eager", block=size)
        quantizer.load_state_dict(state)
        results.append(run(quantizer, x, grad))
    for fast in results[1:]:
        same(results[0], fast, 1e-12 if dtype == torch.float64 else 1e-6)


def same(expected, actual, tolerance):
    """Values and gradients of the tensor elementwise; gradients of parameters are sums, whose terms may cancel."""
    for name in ("out", "dx"):
        size = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance * size, msg=name)
    for name, gradient in expected["params"].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(
            actual["params"][name], gradient, rtol=tolerance, atol=100 * tolerance * size, msg=name
        )


#: random numbers are drawn outside of graphs; the weights of Direct Quantization are loops over bit planes, those of
#: GPFQ are not trained, those of LQ-Nets sorted searches, those of SLB a softmax and a product, those of SQuantizer
#: masks and two moments
NOT_COMPILED = {
    *(("rq", role) for role in ("weight", "activation")),
    *((name, "weight") for name in ("direct", "gpfq", "lq_nets", "slb", "squantizer")),
}


@pytest.mark.parametrize("case", [c for c in cases(bits=(3,)) if not c.options], ids=str)
def test_compilation_changes_no_number_and_breaks_no_graph(case):
    quantizer, x = trained(case)
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    grad = sample(x.shape, seed=5)
    set_backend("eager", block=0)
    expected = run(quantizer, x, grad)
    quantizer.load_state_dict(state)
    torch._dynamo.utils.counters.clear()
    kernels._compiled.clear()
    set_backend("compile", "eager")
    same(expected, run(quantizer, x, grad), 1e-6)
    assert not torch._dynamo.utils.counters["graph_break"] and not kernels._broken
    assert kernels._compiled or (case.algorithm, case.role) in NOT_COMPILED


def test_layers_share_compiled_kernels():
    """Shapes, widths and granularities: a handful of graphs, whatever the number of layers."""
    counters = torch._dynamo.utils.counters
    set_backend("compile", "eager")
    shapes = [(16, 3, 7, 7), (32, 16, 3, 3), (8, 12), (24, 8, 1, 1)]

    def graphs(bits):
        counters.clear()
        for b in bits:
            for shape in shapes:
                for per_channel in (False, True):
                    spec = TensorSpec("weight", b, "w", shape, 0, per_channel)
                    quantizer = get_algorithm("lsq").make(spec, {})
                    w = torch.randn(shape)
                    quantizer.calibrate(w)
                    quantizer(w.requires_grad_()).sum().backward()
        return counters["stats"]["unique_graphs"]

    assert graphs((2, 3, 4)) <= 12  # 24 layers, forward and backward
    assert graphs((5, 6, 7, 8)) == 0


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_kernels_stay_out_of_the_compilation_of_others(algorithm):
    set_backend("compile", "eager")
    case = next(c for c in cases("activation", bits=(3,)) if c.algorithm == algorithm)
    quantizer, x = trained(case)
    kernels._compiled.clear()  # of the calibration
    torch.compile(quantizer, backend="eager")(x.clone().requires_grad_())
    assert not kernels._compiled


def test_kernels_stay_out_of_traces():
    set_backend("compile", "eager")
    scale = torch.tensor(0.5)
    traced = torch.jit.trace(lambda t: F.fake_quantize(t, scale, -8, 7), torch.randn(100), check_trace=False)
    assert not kernels._compiled
    x = torch.randn(50)
    assert torch.equal(traced(x), F.fake_quantize(x, scale, -8, 7)) and kernels._compiled


def test_a_compiler_that_fails_leaves_one_warning_and_the_eager_kernels():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nsecond line")

    set_backend("compile", broken)
    x = torch.randn(100, requires_grad=True)
    with pytest.warns(UserWarning, match="torch.compile .* failed: .*; kernels run eagerly from now on") as caught:
        out = F.fake_quantize(x, torch.tensor(0.5), -8, 7)
        out.sum().backward()
    assert len(caught) == 1
    set_backend("eager")
    assert torch.equal(out, F.fake_quantize(x, torch.tensor(0.5), -8, 7))


@pytest.mark.parametrize(
    "x,scale",
    [
        (torch.randn(6, 4, 5, 3).to(memory_format=torch.channels_last), torch.rand(1, 4, 1, 1) + 0.5),
        (torch.randn(6, 4, 5, 3), torch.rand(6, 1, 1, 1) + 0.5),
        (torch.randn(6, 4, 5, 3), torch.rand(4, 1, 1) + 0.5),
        (torch.randn(6, 4, 5, 3), torch.rand(3) + 0.5),
        (torch.randn(6, 4, 5, 3)[:, ::2], torch.tensor([0.5])),
        (torch.randn(6, 40).T, torch.tensor([[0.5]])),
        (torch.randn(6, 40), torch.rand(6, 40) + 0.5),
        (torch.randn(1, 7), torch.rand(1, 7) + 0.5),
        (torch.randn(6, 40).bfloat16(), torch.rand(6, 1) + 0.5),
        (torch.randn(0, 4), torch.tensor(0.5)),
        (torch.tensor(3.0), torch.tensor(0.5)),
    ],
    ids=lambda t: f"{tuple(t.shape)}{t.stride()}",
)
@pytest.mark.parametrize("way", [("eager", "inductor", 8), ("eager", "inductor", 50), ("compile", "eager")], ids=str)
def test_layouts_and_granularities(x, scale, way):
    grad = torch.randn_like(x).contiguous()  # in another layout than x
    results = []
    for chosen in (("eager", "inductor", 0), way):
        set_backend(*chosen)
        leaf, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = F.fake_quantize(leaf, s, -4, 3)
        out.backward(grad)
        results.append((out, leaf.grad, s.grad))
    (out, by_x, by_scale), fast = results
    assert torch.equal(fast[0], out) and fast[0].stride() == out.stride() and torch.equal(fast[1], by_x)
    torch.testing.assert_close(fast[2], by_scale, rtol=1e-6, atol=1e-5)


def test_sums_of_many_blocks_are_exact_to_float32():
    set_backend("eager", block=100)
    x, scale = torch.rand(200_000) * 8, torch.tensor(1.0, requires_grad=True)
    F.fake_quantize(x, scale, -8, 7, residual_scale_grad=True).backward(torch.full_like(x, 1e-3))
    exact = ((x.clamp(max=7).round() - x * (x <= 7)).double() * float(torch.tensor(1e-3))).sum()
    assert float(scale.grad) == pytest.approx(float(exact), rel=3e-7)


def test_negative_blocks_are_refused():
    with pytest.raises(ConfigError, match="block: -1; allowed"):
        set_backend("eager", block=-1)


WAYS = {"plain": ("eager", "inductor", 0), "blocks": ("eager", "inductor", 7), "compiled": ("compile", "eager", None)}


@pytest.mark.parametrize("mode", ["waiting", "training", "evaluation"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases("activation", bits=(3,)), ids=str)
def test_outputs_may_be_changed_in_place(case, way, mode):
    """As ``out += shortcut`` does in residual networks."""
    quantizer, x = trained(case)
    quantizer.train(mode != "evaluation")
    if mode == "waiting":  # for other quantizers to learn first
        quantizer.on_progress(Progress(total_steps=20, total_epochs=10))
    set_backend(*WAYS[way])
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        out = quantizer(leaf * 1)
        expected = out.detach() + 1
        out += torch.ones_like(leaf)
        assert torch.equal(out.detach(), expected) and out.stride() == leaf.stride()
        out.sum().backward()
