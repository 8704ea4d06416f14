"""Thousands of steps of every algorithm on a net of a few hundred weights, and what ill batches and settings do to it.

    python tests/faults/longrun.py --steps 5000 [--algorithm fat] [--check endurance] [--host nncf] [--host brevitas]

Prints one line per algorithm with what every check found; exit code 1 if one failed. The checks are the functions of
:data:`CHECKS`; each raises ``AssertionError`` or an error of the algorithm.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

import fat_plugins
from fat_plugins import FatPluginsError, TensorSpec, algorithms, get_algorithm
from fat_plugins.export.common import check_model
from fat_plugins.frozen import FrozenActivation, FrozenWeight
from fat_plugins.network import named_quantizers, param_groups, set_progress
from fat_plugins.quantizer import Progress, WeightQuantizer
from fat_plugins.recipes.hosts import get_host
from fat_plugins.recipes.parts import Precision

#: width to train at, where the method has it
BITS = 3
#: what a process may grow by after the warm-up, in bytes: allocators keep some
GROWTH = 8 * 2**20


# --------------------------------------------------------------------------------------------------------------------
# a net with quantizers, without a host
# --------------------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two convolutions and a linear layer, no batch norm; every weight and every input but the first quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2)
        self.head = nn.Linear(8, 3)
        self.inputs = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs[0](self.conv1(x).relu())
        x = self.inputs[1](self.conv2(x).relu())
        return self.head(x.mean((2, 3)))


def near(limits: tuple[int, int]) -> int:
    """The width among those that an algorithm allows that is nearest to :data:`BITS`."""
    return min(max(BITS, limits[0]), limits[1])


def build(name: str, example: Tensor, seed: int = 0) -> Net:
    """The net with quantizers of an algorithm, calibrated on ``example``."""
    torch.manual_seed(seed)
    net, algorithm = Net(), get_algorithm(name)
    for layer_name in ("conv1", "conv2", "head"):
        layer = getattr(net, layer_name)
        spec = TensorSpec("weight", near(algorithm.weight_bits), name=layer_name, shape=tuple(layer.weight.shape))
        quantizer = algorithm.make_weight(spec)
        quantizer.calibrate(layer.weight)
        parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
        quantizer.fold_into(layer.parametrizations.weight.original)
    if algorithm.activation_quantizer is None:
        return net
    for i in range(len(net.inputs)):
        spec = TensorSpec("activation", near(algorithm.activation_bits), name=f"input{i}", channel_axis=1)
        quantizer = algorithm.make_activation(spec)
        handle = net.inputs[i].register_forward_hook(lambda m, a, out, q=quantizer: q.calibrate(out))
        with torch.no_grad():
            net.eval()(example)
        handle.remove()
        net.inputs[i] = quantizer
    return net


def images(count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images N x 1 x 8 x 8 of three kinds, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 1, 8, 8, generator=generator) * 0.5 + labels.view(-1, 1, 1, 1) * 0.5, labels


@dataclass
class Loop:
    """A training loop of few lines around a net."""

    net: nn.Module
    lr: float = 0.01
    total: int = 100
    amp: str | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(param_groups(self.net, self.lr), lr=self.lr, momentum=0.9)
        self.precision = Precision(self.amp, torch.device("cpu"))
        self.done = 0

    def gradients(self, x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
        """Add the gradients of a batch; returns its loss."""
        with self.precision.autocast():
            logits = self.net(x)
        loss = cross_entropy(logits.float(), y)
        more = fat_plugins.regularization(self.net)
        loss = loss if more is None else loss + more
        self.precision.backward(loss * share)
        return loss.detach()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the optimizer."""
        self.net.train()
        set_progress(self.net, Progress(self.done, 0, self.total, 1))
        self.optimizer.zero_grad()
        loss = self.gradients(x, y)
        self.precision.step(self.optimizer)
        self.done += 1
        return loss


def weights(net: nn.Module) -> list[tuple[WeightQuantizer, Tensor]]:
    """Weight quantizers with their float weights."""
    layers = [m for m in net.modules() if parametrize.is_parametrized(m, "weight")]
    return [(m.parametrizations.weight[0], m.parametrizations.weight.original) for m in layers]


def deployed(net: nn.Module) -> list[Tensor]:
    """Codes and scales of everything that would be deployed.

    :raises FatPluginsError: what is deployed would not be finite.
    """
    frozen = nn.ModuleList()
    for quantizer, weight in weights(net):
        frozen.append(FrozenWeight(*quantizer.freeze(weight), name=quantizer.spec.name))
    for _, quantizer in named_quantizers(net):
        if quantizer.role == "activation":
            frozen.append(FrozenActivation(quantizer.form(), quantizer.spec.name))
    biases = nn.ParameterList([p for n, p in net.named_parameters() if n.endswith("bias")])
    check_model(nn.ModuleList([frozen, biases]))
    return [b.clone() for b in frozen.buffers()]


def finite(net: nn.Module) -> bool:
    """Whether the whole state is."""
    return all(bool(torch.isfinite(t).all()) for t in net.state_dict().values() if t.is_floating_point())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal, NaN to NaN."""
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# checks
# --------------------------------------------------------------------------------------------------------------------
def resident() -> int:
    """Memory of this process in bytes (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def live_tensors() -> int:
    """Tensors that Python knows."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def endurance(name: str, steps: int) -> str:
    """Memory is flat after a warm-up, everything stays finite, and the net has learned its eight images."""
    x, y = images()
    net = build(name, x)
    loop = Loop(net, total=steps)
    first, warm = float(loop.step(x, y)), max(steps // 4, 50)
    for _ in range(warm):
        loss = loop.step(x, y)
    before = resident(), live_tensors()
    for _ in range(steps - warm):
        loss = loop.step(x, y)
    after = resident(), live_tensors()
    assert after[1] <= before[1], f"{after[1] - before[1]} tensors more"
    assert after[0] - before[0] < GROWTH, f"{(after[0] - before[0]) / 2**20:.1f} MiB more"
    assert finite(net), "not finite"
    assert float(loss) < first, f"loss {first:.3f} to {float(loss):.3f}"
    deployed(net)
    return f"{(after[0] - before[0]) / 2**20:+.1f} MiB, loss {first:.2f} to {float(loss):.2f}"


def follows_weights(net: torch.nn.Module) -> bool:
    """Whether weight quantizers have levels that follow the weights by themselves, gradient or not."""
    quantizers = [q for _, q in named_quantizers(net.train()) if q.role == "weight"]
    before = [b.clone() for q in quantizers for b in q.buffers()]
    copied = copy.deepcopy(quantizers)
    for quantizer in copied:
        with torch.no_grad():
            quantizer(torch.ones(quantizer.spec.shape))
    return not same(before, [b for q in copied for b in q.buffers()])


def rate_zero(name: str, steps: int) -> str:
    """With a learning rate of 0 nothing moves: parameters, codes, scales, outputs."""
    x, y = images()
    net = build(name, x)
    if follows_weights(net):
        loop = Loop(net, lr=0.0, total=10**9)
        parameters = [p.detach().clone() for p in net.parameters()]
        for _ in range(min(steps, 300)):
            loop.step(x, y)
        assert same(parameters, list(net.parameters())), "parameters moved"
        return "levels follow the weights, parameters do not move"
    loop = Loop(net, lr=0.0, total=10**9)
    loop.step(x, y)
    before, parameters = deployed(net), [p.detach().clone() for p in net.parameters()]
    out = net.eval()(x).detach()
    for _ in range(min(steps, 300)):
        loop.step(x, y)
    assert same(parameters, list(net.parameters())), "parameters moved"
    assert same(before, deployed(net)), "what is deployed moved"
    assert torch.equal(out, net.eval()(x)), "outputs moved"
    return "nothing moved"


def zeros(name: str, steps: int) -> str:
    """Batches of zeros, in training and in calibration."""
    x, y = images()
    for example in (x, torch.zeros_like(x)):
        net = build(name, example)
        if example is not x:
            for layer in (net.conv1, net.conv2):
                layer.bias.data.zero_()
        loop = Loop(net)
        for _ in range(min(steps, 50)):
            assert torch.isfinite(loop.step(torch.zeros_like(x), y)), "loss not finite"
        assert finite(net), "not finite"
        deployed(net)
        assert torch.isfinite(net.eval()(x)).all(), "outputs not finite"
    return "finite"


def single(name: str, steps: int) -> str:
    """Batches of one image, in training and in calibration."""
    x, y = images(1)
    net = build(name, x)
    loop = Loop(net)
    for _ in range(min(steps, 50)):
        assert torch.isfinite(loop.step(x, y)), "loss not finite"
    assert finite(net), "not finite"
    deployed(net)
    return "finite"


def exploding(name: str, steps: int) -> str:
    """A learning rate that is far too large: what is deployed is finite, or an error of one line says it is not."""
    x, y = images()
    found = []
    for lr in (10.0, 1e6, 1e20, 1e30):
        net = build(name, x)
        loop = Loop(net, lr=lr)
        for _ in range(10):
            loop.step(x, y)
        try:
            tensors = deployed(net)
        except FatPluginsError as error:
            assert "\n" not in str(error), f"several lines: {error}"
            found.append("refused")
        else:
            assert all(bool(torch.isfinite(t.double()).all()) for t in tensors), f"lr {lr}: not finite, and not refused"
            with torch.no_grad():
                assert not net.eval()(x).isnan().any(), f"lr {lr}: NaN, and not refused"
            found.append("finite")
    return ", ".join(found)


def frozen_layer(name: str, steps: int) -> str:
    """A layer that does not train keeps its weight and its quantizer bit by bit; the others train."""
    x, y = images()
    net = build(name, x)
    net.conv2.requires_grad_(False)
    own = {k for k, _ in net.named_parameters()} if follows_weights(net) else set(net.state_dict())
    before = {k: v.clone() for k, v in net.state_dict().items() if k in own}
    loop = Loop(net)
    for _ in range(min(steps, 50)):
        loop.step(x, y)
    state = net.state_dict()
    moved = [k for k in before if not torch.equal(before[k], state[k])]
    assert not [k for k in moved if k.startswith("conv2")], f"moved: {moved}"
    assert [k for k in moved if k.startswith("conv1")], "nothing trained"
    return f"{len(moved)} other tensors trained"


def accumulation(name: str, steps: int) -> str:
    """Two halves of a batch give the gradients of the whole, where no random numbers are drawn."""
    x, y = images(6)
    net = build(name, x)
    loop = Loop(net)
    if any(quantizer.noisy for _, quantizer in named_quantizers(net.train())):
        return "draws random numbers"
    whole, halves = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    before = [b.clone() for b in whole.buffers()]
    whole(x * 2)
    if not same(before, list(whole.buffers())):
        return "follows the data, as a batch norm does"
    for model, parts in ((whole, (slice(0, 6),)), (halves, (slice(0, 3), slice(3, 6)))):
        loop.net = model
        for part in parts:
            loop.gradients(x[part], y[part], len(y[part]) / len(y))
    largest = 0.0
    for (key, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            apart = float((a.grad - b.grad).abs().max() / a.grad.abs().max().clamp_min(1e-6))
            assert apart < 1e-3, f"{key}: gradients {apart:.2g} apart"
            largest = max(largest, apart)
    return f"{largest:.0e} apart"


def mixed(name: str, steps: int) -> str:
    """bf16, and fp16 where gradients overflow: that step is left out, the state stays finite, and training goes on."""
    x, y = images()
    for amp in ("bf16", "fp16"):
        net = build(name, x)
        loop = Loop(net, amp=amp)
        if amp == "fp16":
            loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
            before = [p.detach().clone() for p in net.parameters()]
            loop.step(x, y)
            assert same(before, list(net.parameters())), "fp16: the step that overflowed was made"
            assert loop.precision.scaler.get_scale() == 2.0**126, "fp16: the scale did not fall"
            loop.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            loop.step(x * 1e6, y)  # beyond what half precision holds: infinite activations
            assert finite(net), "fp16: a batch that overflows left something that is not finite"
        for _ in range(min(steps, 30)):
            loss = loop.step(x, y)
        assert torch.isfinite(loss), f"{amp}: loss {float(loss)}"
        assert finite(net), f"{amp}: not finite"
        deployed(net)
    return "finite, skipped"


def hosted(name: str, steps: int, host_name: str) -> str:
    """:func:`endurance` on a host, with its schedules and coordinators."""
    host, (x, y) = get_host(host_name), images()
    torch.manual_seed(0)
    bits = [near(limits) for limits in (algorithms()[name].weight_bits, algorithms()[name].activation_bits)]
    section = {"algorithm": name, "weights": {"bits": bits[0]}, "activations": {"bits": bits[1]}}
    config = {"compression": {**section, "initializer": {"range": {"num_init_samples": 8}}}}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    controller, net = host.compress(Net(), config, loader, x[:1])
    optimizer = torch.optim.SGD(param_groups(net, 0.01), lr=0.01, momentum=0.9)
    per_epoch = max(steps // 10, 1)
    for each in (controller.scheduler, *getattr(controller.scheduler, "child_schedulers", ())):
        for key, value in (("total_epochs", 10), ("total_steps", steps)):
            if hasattr(each, key):
                setattr(each, key, value)
    readings = []
    for step in range(steps):
        if step % per_epoch == 0:
            readings.append((resident(), live_tensors()))
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        loss = cross_entropy(net.train()(x), y) + controller.loss()
        loss.backward()
        optimizer.step()
        loss = float(loss)
    # stages of some methods make tensors of their own; the last quarter has none
    early, late = readings[-3], readings[-1]
    assert late[1] <= early[1], f"{late[1] - early[1]} tensors more"
    assert late[0] - early[0] < GROWTH, f"{(late[0] - early[0]) / 2**20:.1f} MiB more"
    assert finite(net), "not finite"
    host.freeze(net.eval())
    return f"{(late[0] - early[0]) / 2**20:+.1f} MiB, loss {loss:.2f}"


CHECKS: dict[str, Callable[[str, int], str]] = {
    "endurance": endurance,
    "rate_zero": rate_zero,
    "zeros": zeros,
    "single": single,
    "exploding": exploding,
    "frozen_layer": frozen_layer,
    "accumulation": accumulation,
    "mixed": mixed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--algorithm", action="append", choices=sorted(algorithms()))
    parser.add_argument("--check", action="append", choices=CHECKS)
    parser.add_argument("--host", action="append", default=[], help="also train on this host; repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in args.algorithm or algorithms():
        checks = {check: CHECKS[check] for check in args.check or CHECKS}
        checks |= {host: partial(hosted, host_name=host) for host in args.host}
        for check, run in checks.items():
            result: Any
            try:
                result = run(name, args.steps)
            except Exception as error:  # whatever it is, the other checks are made
                result, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
            print(f"{name:<22}{check:<14}{result}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
