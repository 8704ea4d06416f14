"""Quantized weights that are computed once: for an evaluation, and for the parts of a training batch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fat_plugins import (
    Progress,
    QuantizationError,
    TensorSpec,
    WeightQuantizer,
    accumulate,
    algorithms,
    get_weight_cache,
    set_progress,
    set_weight_cache,
)
from fat_plugins.quantizer import Params

SHAPE = (6, 4, 3, 3)
WEIGHTS = [n for n, a in algorithms().items() if a.weight_quantizer is not None]


def make(name: str = "lsq", keep_zeros: bool = False, seed: int = 0):
    """A calibrated quantizer that counts how often it computes, and a weight."""
    algorithm = algorithms()[name]
    bits = min(max(4, algorithm.weight_bits[0]), algorithm.weight_bits[1])
    quantizer = algorithm.make_weight(TensorSpec("weight", bits, "conv", SHAPE, keep_zeros=keep_zeros))
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.2)
    quantizer.calibrate(weight)
    quantizer.calls = []  # not a number, which would be part of its state
    plain = quantizer.compute

    def compute(w):
        quantizer.calls.append(1)
        return plain(w)

    quantizer.compute = compute
    return quantizer, weight


def evaluated(quantizer, weight):
    with torch.no_grad():
        return quantizer(weight)


# --------------------------------------------------------------------------------------------------------------------
# evaluation
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WEIGHTS)
def test_evaluation_computes_once(name):
    quantizer, weight = make(name)
    quantizer.eval()
    first = evaluated(quantizer, weight)
    again = [evaluated(quantizer, weight) for _ in range(3)]
    del quantizer.compute
    assert len(quantizer.calls) == 1
    assert all(torch.equal(a, first) for a in again)
    assert torch.equal(quantizer.compute(weight).detach(), first)


def _unseen(quantizer, weight):
    """Other memory that differs where no sample is taken."""
    other = weight.detach().clone()
    other.view(-1)[1] += 1
    weight.data = other


def _to_half(quantizer, weight):
    weight.data = weight.data.half()


CHANGES = {
    "weight": lambda q, w: w.mul_(2),
    "weight, without a version": lambda q, w: w.data.mul_(2),
    "one weight, without a version": lambda q, w: w.data.view(-1)[1].add_(1),
    "one weight": lambda q, w: w.view(-1)[1].add_(1),
    "memory of one weight": _unseen,
    "weight's memory": lambda q, w: setattr(w, "data", w.data * 2),
    "weight's dtype": _to_half,
    "parameter": lambda q, w: q.step.mul_(2),
    "buffer": lambda q, w: q.status.add_(0),
    "load": lambda q, w: q.load_state_dict({k: v * 2 if k == "step" else v for k, v in q.state_dict().items()}),
    "assign": lambda q, w: q.load_state_dict(
        {k: v * 2 if k == "step" else v for k, v in q.state_dict().items()}, assign=True
    ),
    "mode": lambda q, w: q.eval(),
    "moved": lambda q, w: q.float(),
    "attribute": lambda q, w: setattr(q, "high", q.high - 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    quantizer, weight = make()
    quantizer.eval()
    evaluated(quantizer, weight)
    with torch.no_grad():
        CHANGES[change](quantizer, weight)
    found = evaluated(quantizer, weight)
    assert len(quantizer.calls) == 2
    assert torch.equal(found, quantizer.quantize(weight).detach())


def test_channels_last_weights_are_sampled_too():
    quantizer, weight = make()
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    quantizer.eval()
    kept = evaluated(quantizer, weight)
    assert kept.is_contiguous(memory_format=torch.channels_last)
    weight.data.neg_()
    assert not torch.equal(evaluated(quantizer, weight), kept)


def test_another_weight_and_computed_weights_are_not_mistaken():
    quantizer, weight = make()
    quantizer.eval()
    first = evaluated(quantizer, weight)
    other = nn.Parameter(weight.detach() * 2)
    assert not torch.equal(evaluated(quantizer, other), first)
    masked = weight.detach() * 0.5
    assert not torch.equal(evaluated(quantizer, masked), first)
    before = len(quantizer.calls)
    evaluated(quantizer, masked)
    evaluated(quantizer, masked)
    assert len(quantizer.calls) == before + 2  # nothing says that they are the same
    part = weight[:3].detach()
    assert evaluated(quantizer, part).shape == part.shape


def test_a_view_of_the_whole_parameter_is_the_parameter():
    quantizer, weight = make()
    quantizer.eval()
    with torch.no_grad():
        whole = [quantizer(weight[slice(None)]) for _ in range(2)]
        turned = quantizer(weight.transpose(2, 3))
    assert len(quantizer.calls) == 2 and torch.equal(*whole)
    assert torch.equal(turned, whole[0].transpose(2, 3))


def test_what_was_kept_is_not_spoilt_by_who_writes_into_it():
    quantizer, weight = make()
    quantizer.eval()
    first = evaluated(quantizer, weight)
    wanted = first.clone()
    first.zero_()
    assert torch.equal(evaluated(quantizer, weight), wanted)


def test_kept_nowhere_else_than_in_an_evaluation_without_gradient():
    quantizer, weight = make()
    for _ in range(2):
        evaluated(quantizer, weight)
    assert len(quantizer.calls) == 2, "training mode"
    quantizer.eval()
    evaluated(quantizer, weight)
    out = quantizer(weight)
    out.sum().backward()
    assert len(quantizer.calls) == 4 and weight.grad is not None and quantizer.step.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        quantizer(weight)
    assert len(quantizer.calls) == 5, "under autocast"


def test_inference_mode():
    quantizer, weight = make()
    quantizer.eval()
    with torch.inference_mode():
        first, again = quantizer(weight), quantizer(weight[slice(None)])
    assert len(quantizer.calls) == 1 and torch.equal(first, again)
    assert torch.equal(evaluated(quantizer, weight), first) and len(quantizer.calls) == 1


def test_not_saved_and_not_copied():
    algorithm = algorithms()["lsq"]
    quantizer = algorithm.make_weight(TensorSpec("weight", 4, "conv", SHAPE)).eval()
    weight = make()[1]
    quantizer.calibrate(weight)
    keys, size = set(quantizer.state_dict()), _pickled(quantizer)
    evaluated(quantizer, weight)
    assert quantizer._kept._entry is not None
    assert set(quantizer.state_dict()) == keys and _pickled(quantizer) == size
    clone = copy.deepcopy(quantizer)
    assert clone._kept._entry is None and torch.equal(evaluated(clone, weight), evaluated(quantizer, weight))
    quantizer.train()
    assert quantizer._kept._entry is None


def _pickled(module) -> int:
    file = io.BytesIO()
    torch.save(module, file)
    return len(file.getvalue())


def test_switch():
    quantizer, weight = make()
    quantizer.eval()
    assert get_weight_cache() is None
    evaluated(quantizer, weight)
    set_weight_cache(False)
    try:
        evaluated(quantizer, weight)
        evaluated(quantizer, weight)
        assert len(quantizer.calls) == 3 and quantizer._kept._entry is None
    finally:
        set_weight_cache(None)


def test_a_trace_sees_the_quantizer():
    quantizer, weight = make()
    quantizer.eval()
    quantizer.requires_grad_(False)
    weight.requires_grad_(False)
    evaluated(quantizer, weight)
    with torch.no_grad():
        torch.jit.trace(lambda x: quantizer(weight) * x, torch.ones(1), check_trace=False)
    assert len(quantizer.calls) == 2


# --------------------------------------------------------------------------------------------------------------------
# parts of a training batch
# --------------------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two convolutions under the quantizers of one algorithm."""

    def __init__(self, name: str, keep_zeros: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)])
        algorithm = algorithms()[name]
        bits = min(max(4, algorithm.weight_bits[0]), algorithm.weight_bits[1])
        for i, conv in enumerate(self.convs):
            shape = tuple(conv.weight.shape)
            with torch.no_grad():
                conv.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.3)
                if keep_zeros:
                    conv.weight[0, 0] = 0
            quantizer = algorithm.make_weight(TensorSpec("weight", bits, f"conv{i}", shape, keep_zeros=keep_zeros))
            quantizer.calibrate(conv.weight)
            parametrize.register_parametrization(conv, "weight", quantizer, unsafe=True)

    def forward(self, x):
        return self.convs[1](torch.relu(self.convs[0](x)))


def gradients(net: nn.Module, parts: list[torch.Tensor], shared: bool) -> dict[str, torch.Tensor]:
    net.zero_grad()
    if shared:
        with accumulate(net):
            for x in parts:
                net(x).square().mean().backward()
    else:
        for x in parts:
            net(x).square().mean().backward()
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 4, 5, 5, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_gradients_are_those_of_the_plain_way(name, keep_zeros):
    if keep_zeros and not algorithms()[name].weight_quantizer.has_zero:
        pytest.skip("no zero on its grid")
    net = Net(name, keep_zeros)
    set_progress(net, Progress(1, 0, 10, 1))
    plain, shared = (gradients(net, batches(), way) for way in (False, True))
    assert set(plain) == set(shared)
    for key, value in plain.items():
        assert (shared[key] - value).abs().max() <= 1e-6 * value.abs().max() + 1e-12, key


class Noisy(WeightQuantizer):
    """Another random number in every forward."""

    def quantize(self, weight):
        return weight * torch.rand(())


def test_random_quantizers_share_one_draw():
    quantizer, weight = Noisy(TensorSpec("weight", 4, "conv", SHAPE), Params()), make()[1]
    assert not torch.equal(quantizer(weight), quantizer(weight))
    with accumulate(quantizer):
        assert torch.equal(quantizer(weight), quantizer(weight))


def test_multiplied_gradients_are_multiplied_once():
    net = Net("lsq")
    for module in net.modules():
        if hasattr(module, "set_lr_multiplier"):
            module.set_lr_multiplier(0.5)
    plain, shared = (gradients(net, batches(), way) for way in (False, True))
    assert all(torch.allclose(shared[k], v, rtol=1e-6, atol=1e-9) for k, v in plain.items())


def test_computed_once_for_all_parts():
    quantizer, weight = make()
    with accumulate(quantizer):
        for _ in range(3):
            quantizer(weight).square().sum().backward()
            assert weight.grad is None
    assert len(quantizer.calls) == 1 and weight.grad is not None
    quantizer(weight)
    assert len(quantizer.calls) == 2 and quantizer.shared is None


def test_masked_weights_are_one_weight_and_other_weights_are_others():
    quantizer, weight = make()
    other = make(seed=1)[1]
    mask = (torch.arange(weight.numel()).reshape(SHAPE) % 3 > 0).float()

    def all_parts():
        quantizer.zero_grad()
        weight.grad = other.grad = None
        for _ in range(2):
            (quantizer(weight * mask).square().sum() + quantizer(other).sum() + quantizer(weight).sum()).backward()

    all_parts()
    plain = [weight.grad, other.grad, quantizer.step.grad.clone()]
    quantizer.calls.clear()
    with accumulate(quantizer):
        all_parts()
    assert len(quantizer.calls) == 3
    for found, wanted in zip([weight.grad, other.grad, quantizer.step.grad], plain, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_a_step_inside_is_refused():
    quantizer, weight = make()
    with pytest.raises(QuantizationError, match=r"conv: .*inside accumulate"), accumulate(quantizer):
        quantizer(weight).sum().backward()
        with torch.no_grad():
            weight.add_(1)
        quantizer(weight)
    assert quantizer.shared is None


def test_one_inside_another_is_refused():
    quantizer, _ = make()
    with pytest.raises(QuantizationError, match="inside another"), accumulate(quantizer), accumulate(quantizer):
        pass
    assert quantizer.shared is None


def test_an_exception_passes_nothing_back():
    quantizer, weight = make()
    with pytest.raises(KeyError), accumulate(quantizer):
        quantizer(weight).sum().backward()
        raise KeyError
    assert weight.grad is None and quantizer.shared is None


def test_evaluation_inside_is_an_evaluation():
    quantizer, weight = make()
    with accumulate(quantizer):
        quantizer(weight).sum().backward()
        quantizer.eval()
        assert not evaluated(quantizer, weight).requires_grad
        quantizer.train()
    assert weight.grad is not None


def test_refused_under_distributed_data_parallel(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net("lsq"))
        with pytest.raises(QuantizationError, match=r"conv0: .*DistributedDataParallel"), accumulate(model):
            model(batches(1)[0])
        with accumulate(model.module):  # without the wrapper's forward nothing is averaged
            model.module(batches(1)[0]).sum().backward()
        assert model.module.convs[0].parametrizations.weight.original.grad is not None
    finally:
        distributed.destroy_process_group()
