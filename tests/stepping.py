"""What a training step and an evaluation must be on every host: no wait for the device, each weight computed once."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from crossgen import Net, build_net, formula
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fat_plugins import accumulate, algorithms, named_quantizers
from fat_plugins.quantizer import WeightQuantizer

SHAPE = (4, 3, 12, 12)
ALGORITHMS = list(algorithms())
#: on a GPU each of these makes Python wait
_WAITING = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
    "_unique2",
)
_OURS = ("/fat_plugins/", "/fat_nncf/", "/fat_brevitas/")


def section(algorithm: str, **more: Any) -> dict[str, Any]:
    """Config of an algorithm at 4 bits, or the nearest that it has."""
    found, bits = algorithms()[algorithm], {}
    for key, maker, (low, high) in (
        ("weights", found.weight_quantizer, found.weight_bits),
        ("activations", found.activation_quantizer, found.activation_bits),
    ):
        bits[key] = {"bits": 4 if maker is None else min(max(4, low), high)}
    return {"algorithm": algorithm, **bits, **more}


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and labels by formula."""
    return 2 * formula(SHAPE, seed), torch.arange(SHAPE[0]) % 5


class Waits(TorchDispatchMode):
    """Where our code waits for the device, as lines of a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in _WAITING:
            frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in _OURS)]
            if frames:
                self.found.append(f"{func}: {frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """How often each ATen operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, controller: Any, optimizer: torch.optim.Optimizer, seed: int = 1) -> None:
    """One training step as scripts write it, without reading the loss."""
    images, labels = batch(seed)
    controller.scheduler.step()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels) + controller.loss()
    loss.backward()
    optimizer.step()


def check_no_wait(model: nn.Module, controller: Any) -> None:
    """The third training step does not wait for the device (the first ones may still build something)."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    model.train()
    controller.scheduler.epoch_step()
    for seed in (1, 2):
        step(model, controller, optimizer, seed)
    with Waits() as waits:
        step(model, controller, optimizer, 3)
    assert not waits.found, waits.found


def check_no_wait_on_gpu(model: nn.Module, controller: Any) -> None:
    """The same as torch itself sees it: anything in the step that waits is an error."""
    model.cuda().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    images, labels = (t.cuda() for t in batch())
    controller.scheduler.epoch_step()
    for turn in range(3):  # kernels are compiled in the first ones
        torch.cuda.set_sync_debug_mode("error" if turn == 2 else "default")
        try:
            controller.scheduler.step()
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(images), labels) + controller.loss()).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@contextmanager
def computations(model: nn.Module):
    """Counts by layer how often weights are really quantized meanwhile."""
    count: Counter[str] = Counter()
    plain = WeightQuantizer.compute

    def compute(self, weight):
        count[self.spec.name] += 1
        return plain(self, weight)

    WeightQuantizer.compute = compute
    try:
        yield count
    finally:
        WeightQuantizer.compute = plain


def weight_quantizers(model: nn.Module) -> list[WeightQuantizer]:
    """Those of the core."""
    return [q for _, q in named_quantizers(model) if q.role == "weight"]


def check_evaluation(model: nn.Module) -> None:
    """Weights are quantized in the first batch only, again after a change, and the outputs are those of no cache."""
    from fat_plugins import set_weight_cache

    names = {q.spec.name for q in weight_quantizers(model)}
    model.eval()
    with torch.no_grad():
        set_weight_cache(False)
        try:
            wanted = [model(batch(seed)[0]).clone() for seed in (1, 2)]
        finally:
            set_weight_cache(None)
        with computations(model) as count:
            found = [model(batch(seed)[0]).clone() for seed in (1, 2)]
        assert count == Counter(names)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        first = next(iter(p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 4))
        first.mul_(-1)
        with computations(model) as count:
            other = model(batch(2)[0])
        assert sum(count.values()) == 1 and not torch.equal(other, wanted[1])


def check_accumulation(model: nn.Module, loss: Callable[[], Tensor], each: float = 1e-6) -> None:
    """The gradients of three parts are those of the plain way, and every weight is quantized once."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # which would see every batch twice

    def all_parts() -> None:
        for seed in (1, 2, 3):
            images, labels = batch(seed)
            ((nn.functional.cross_entropy(model(images), labels) + loss()) / 3).backward()

    def gradients() -> dict[str, Tensor]:
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    before = deepcopy(model.state_dict())
    model.zero_grad()
    all_parts()
    plain = gradients()
    model.load_state_dict(before)  # ranges follow the batches
    model.zero_grad()
    with computations(model) as count, accumulate(model):
        all_parts()
    shared = gradients()
    assert count == Counter({q.spec.name for q in weight_quantizers(model)})
    assert set(plain) == set(shared)
    for key, value in plain.items():
        assert (shared[key] - value).abs().max() <= each * max(float(value.abs().max()), 1e-3), key


def check_channels_last(model: nn.Module) -> None:
    """Activation quantizers give and take gradients in the layout of their input; weights keep theirs."""
    last = torch.channels_last
    model.to(memory_format=last).train()
    seen: list[tuple[str, str, bool]] = []

    def look(quantizer, inputs, out):
        x, name = inputs[0], quantizer.spec.name
        if x.ndim != 4 or min(x.shape[1:]) == 1 or x.is_contiguous():
            return
        seen.append((name, "output", out.is_contiguous(memory_format=last)))
        if x.requires_grad:
            given: list[bool] = []  # the layer behind may have another layout, as the mean over the image has
            out.register_hook(lambda g: given.append(g.is_contiguous(memory_format=last)))
            x.register_hook(lambda g: seen.append((name, "gradient", like_last(g) or not all(given))))

    def like_last(x: Tensor) -> bool:
        return x.is_contiguous(memory_format=last)

    hooks = [q.register_forward_hook(look) for _, q in named_quantizers(model)]
    model(batch()[0].to(memory_format=last)).square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert {what for _, what, _ in seen} == {"output", "gradient"}
    wrong = [(name, what) for name, what, kept in seen if not kept]
    assert not wrong, wrong


def check_added_operations(run: Callable[[], Any], core: Callable[[], Any]) -> Counter[str]:
    """ATen operations that an adapter runs beyond those of the core's quantizer."""
    run(), core()  # the first one may calibrate
    with Operations() as whole:
        run()
    with Operations() as own:
        core()
    assert not own.count - whole.count
    return whole.count - own.count


class StepsOfAHost:
    """The tests of every host. A host's own class, whose name begins with ``Test``, says how it makes its models."""

    @staticmethod
    def compress(algorithm: str, **more: Any) -> tuple[Any, nn.Module]:
        """Controller and model; ``more`` are keys of the section."""
        raise NotImplementedError

    @staticmethod
    def compress_masked() -> tuple[Any, nn.Module, set[str]]:
        """The same for LSQ behind masks, and the layers that have one."""
        raise NotImplementedError

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_a_training_step_waits_for_nothing(self, algorithm):
        controller, model = self.compress(algorithm)
        check_no_wait(model, controller)

    @needs_gpu
    @pytest.mark.parametrize("algorithm", ["lsq", "fat"])
    def test_a_training_step_waits_for_nothing_on_a_gpu(self, algorithm):
        controller, model = self.compress(algorithm)
        check_no_wait_on_gpu(model, controller)

    @pytest.mark.parametrize("algorithm", ["lsq", "fat", "dropbits"])
    def test_evaluation_quantizes_weights_once(self, algorithm):
        check_evaluation(self.compress(algorithm)[1])

    @pytest.mark.parametrize("more", [{}, {"compression_lr_multiplier": 0.3}])
    @pytest.mark.parametrize("algorithm", ["lsq", "fat"])
    def test_accumulation(self, algorithm, more):
        controller, model = self.compress(algorithm, **more)
        check_accumulation(model, controller.loss)

    def test_accumulation_of_masked_weights(self):
        controller, model, _ = self.compress_masked()
        check_accumulation(model, controller.loss)

    def test_masked_weights_are_quantized_in_every_evaluation(self):
        """They are other tensors each time, of which nothing says that they are equal."""
        _, model, masked = self.compress_masked()
        model.eval()
        with torch.no_grad(), computations(model) as count:
            first, again = model(batch()[0]), model(batch()[0])
        names = {q.spec.name for q in weight_quantizers(model)}
        assert torch.equal(first, again) and masked
        assert count == {name: 2 if name in masked else 1 for name in names}

    def test_channels_last_is_kept(self):
        check_channels_last(self.compress("lsq")[1])


__all__ = [
    "ALGORITHMS",
    "Net",
    "StepsOfAHost",
    "batch",
    "build_net",
    "check_accumulation",
    "check_added_operations",
    "check_channels_last",
    "check_evaluation",
    "check_no_wait",
    "check_no_wait_on_gpu",
    "computations",
    "needs_gpu",
    "section",
    "step",
    "weight_quantizers",
]
