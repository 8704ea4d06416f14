"""Small frozen models of every algorithm in the registry: many layers side by side in one model, a *bank*.

Each branch of a bank has an input of its own: quantizer, layer, batch norm, second quantizer. So what differs in one
branch cannot spread to another, and every file holds dozens of combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from universal import LAYERS, OPTIONS, Case, Layer

from fat_plugins import ConfigError, algorithms
from fat_plugins.frozen import FrozenActivation, FrozenWeight

WIDTHS = range(1, 9)
#: quantizes the side that an algorithm leaves alone
PARTNER = "minmax"
#: what the quantizers are calibrated on
DATA = ("random", "zeros", "constant")
#: pools of images, 2x2 or global; every third branch with images has one
POOLS = tuple(product(("max", "average", "global"), ("before", "behind")))


@dataclass(frozen=True)
class Plan:
    """One branch: a weight, an activation and what stands around them.

    :param weight, activation: settings of the quantizers; one of the two may be of :data:`PARTNER`.
    :param size: spatial extent of the input.
    :param edge: the weight's values lie on the thresholds of the quantizer that was calibrated on it.
    :param data: what the quantizers are calibrated on, one of :data:`DATA`.
    :param pool: of :data:`POOLS`, and where: before the layer, between two quantizers that both have codes, or behind.
    """

    algorithm: str
    weight: Case
    activation: Case
    layer: Layer
    signed: bool
    norm: bool
    size: int
    edge: bool = False
    data: str = "random"
    pool: tuple[str, str] | None = None

    def __str__(self) -> str:
        words = [self.algorithm, self.layer.name, f"w{self.weight.bits}a{self.activation.bits}"]
        words += [str(case.options) for case in (self.weight, self.activation) if case.algorithm == self.algorithm]
        words += ["signed" if self.signed else "unsigned"] + ["per channel"] * bool(self.weight.per_channel)
        words += ["norm"] * self.norm + ["edge"] * self.edge + ([self.data] if self.data != "random" else [])
        words += [" pool ".join(self.pool)] if self.pool else []
        return " ".join(words)


def settings(name: str, role: str) -> list[Case]:
    """Every option, width and granularity that an algorithm itself allows."""
    algorithm, found = algorithms()[name], []
    for options, bits, per_channel in product(range(len(OPTIONS.get(name, [{}]))), WIDTHS, (False, True)):
        case = Case(name, options, bits, role, per_channel)
        try:
            algorithm.check(case.spec(), algorithm.parse_params(case.params))
        except ConfigError:
            continue
        found.append(case)
    return found


def plans(name: str, seed: int = 0, everything: bool = False) -> list[Plan]:
    """Branches of one algorithm: every weight and every activation that it has, with and without a sign, for each of
    its options; layers, sizes, batch norms and data take turns.

    :param everything: every weight with every activation, instead of each of them once or more.
    """
    random = Random(f"{seed}/{name}")
    weights, activations = (settings(name, role) for role in ("weight", "activation"))
    eight = [[c for c in settings(PARTNER, role) if c.bits == 8] for role in ("weight", "activation")]
    found, layers, around = [], cycle(LAYERS), cycle(product((True, False), (5, 7, 1, 4)))
    pools = cycle((None, None, *(p for pool in POOLS for p in (pool, None, None))))
    for options in sorted({c.options for c in (*weights, *activations)}):
        own = [[c for c in side if c.options == options] for side in (weights, activations)]
        some, others = (mine or other for mine, other in zip(own, eight, strict=True))
        pairs = list(product(some, others)) if everything else _each_once(some, others, random)
        for (weight, activation), signed in product(pairs, (False, True)):
            norm, size = next(around)
            data = random.choice(DATA) if random.random() < 0.1 else DATA[0]
            layer = next(layers)
            pool = next(pools) if len(layer.shape) == 4 else None
            found.append(Plan(name, weight, activation, layer, signed, norm, size, random.random() < 0.5, data, pool))
    random.shuffle(found)
    return found


def _each_once(some: list, others: list, random: Random) -> list[tuple]:
    """Pairs in which every element occurs."""
    some, others = random.sample(some, len(some)), random.sample(others, len(others))
    return [(some[i % len(some)], others[i % len(others)]) for i in range(max(len(some), len(others)))]


# --------------------------------------------------------------------------------------------------------------------
# models
# --------------------------------------------------------------------------------------------------------------------
#: groups, stride and padding of the layers that are called like that
_GEOMETRY = {
    "conv3x3": (1, 1, 1), "depthwise": (6, 1, 1), "grouped": (4, 2, 1), "transposed": (1, 2, 1),
    "grouped_transposed": (2, 1, 0), "depthwise1x1": (6, 1, 0),
}  # fmt: skip


def _apply(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    groups, stride, padding = _GEOMETRY.get(layer.name, (1, 1, 0))
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    functions = {(3, 0): F.conv1d, (4, 0): F.conv2d, (4, 1): F.conv_transpose2d}
    return functions[weight.ndim, layer.axis](x, weight, bias, stride, padding, groups=groups)


def channels(layer: Layer) -> tuple[int, int]:
    """Channels that a layer reads and gives."""
    groups, shape = _GEOMETRY.get(layer.name, (1, 1, 0))[0], layer.shape
    return (shape[0], shape[1] * groups) if layer.axis else (shape[1] * groups, shape[0])


def input_shape(plan: Plan, batch: int) -> tuple[int, ...]:
    """Shape of a branch's input; odd, and not square."""
    spatial = {2: (), 3: (max(plan.size, 5),), 4: (plan.size, plan.size + 2)}[len(plan.layer.shape)]
    return (batch, channels(plan.layer)[0], *spatial)


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "global":
        return F.adaptive_avg_pool2d(x, 1)
    function, size = (F.max_pool2d if kind == "max" else F.avg_pool2d), min(2, *x.shape[2:])
    return function(x, size, stride=1)


class Branch(nn.Module):
    """Quantizer, layer, batch norm, quantizer; perhaps with a pool, and a third quantizer behind an average."""

    def __init__(self, plan: Plan, name: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = channels(plan.layer)[1]
        self.plan, self.name = plan, name
        self.weight = nn.Parameter(torch.randn(plan.layer.shape, generator=generator) * 0.2)
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator) * 0.2) if plan.size % 2 else None
        self.norm = _norm(len(plan.layer.shape), outputs, generator) if plan.norm else None
        self.first, self.middle, self.second = (plan.activation.make(signed=plan.signed) for _ in range(3))
        if plan.pool is None or plan.pool[1] == "behind" or plan.pool[0] == "max":
            self.middle = None
        self.weights = plan.weight.make(plan.layer, followed_by_norm=plan.norm)
        self._calibrate(generator)

    def _calibrate(self, generator: torch.Generator) -> None:
        plan = self.plan
        x = random_input(plan, 4, generator)
        if plan.data != "random":
            x = torch.full_like(x, 0.3 if plan.data == "constant" else 0.0)
            with torch.no_grad():
                self.weight.fill_(0.2 if plan.data == "constant" else 0.0)
        self.weights.calibrate(self.weight)
        self.first.calibrate(x)
        for quantizer in (self.weights, self.first):
            _move(quantizer, generator)
        if self.middle is not None:
            with torch.no_grad():
                self.middle.calibrate(_pool(self.first(x), plan.pool[0]))
            _move(self.middle, generator)
        if plan.edge and plan.data == "random":
            self._put_on_thresholds(generator)
        self.eval()
        with torch.no_grad():
            self.second.calibrate(self._layer(x))
        _move(self.second, generator)
        self.eval()

    def _put_on_thresholds(self, generator: torch.Generator) -> None:
        """Half of the weights move to where the code changes, by bisection, so whatever the algorithm does first."""
        low, high = self.weight.detach().clone(), self.weight.detach() + 0.3
        first = self.weights.freeze(low).codes
        for _ in range(40):
            middle = (low + high) / 2
            same = self.weights.freeze(middle).codes == first
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        chosen = torch.rand(low.shape, generator=generator) < 0.5
        with torch.no_grad():
            self.weight.copy_(torch.where(chosen, torch.where(low.frac() > 0, low, high), self.weight))

    def _layer(self, x: Tensor) -> Tensor:
        kind, where = self.plan.pool or ("", "")
        x = self.first(x)
        x = _pool(x, kind) if where == "before" else x
        x = x if self.middle is None else self.middle(x)
        y = _apply(self.plan.layer, x, self.weights(self.weight), self.bias)
        y = self.norm(y) if self.norm is not None else y
        y = y if self.plan.signed else F.relu(y)
        return _pool(y, kind) if where == "behind" else y

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self._layer(x))

    @property
    def activations(self) -> list[nn.Module]:
        """Quantizers in the order of execution."""
        return [q for q in (self.first, self.middle, self.second) if q is not None]

    def freeze(self) -> None:
        """Put the deployed forms in the quantizers' places."""
        self.weights = FrozenWeight(*self.weights.freeze(self.weight), self.name)
        for name in ("first", "middle", "second"):
            quantizer = getattr(self, name)
            if quantizer is not None:
                setattr(self, name, FrozenActivation(quantizer.form(), f"{self.name}.{name}"))


def _norm(ndim: int, size: int, generator: torch.Generator) -> nn.Module:
    norm = (nn.BatchNorm2d if ndim == 4 else nn.BatchNorm1d)(size)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):  # gains of both signs
            tensor.copy_(torch.randn(size, generator=generator))
        norm.weight[0] = 0.0
        norm.running_var.copy_(0.5 + torch.rand(size, generator=generator))
    return norm


def _move(quantizer: nn.Module, generator: torch.Generator) -> None:
    """As training does: off the initial values."""
    with torch.no_grad():
        for p in quantizer.parameters():
            p.mul_(1 - 0.4 * torch.rand(p.shape, generator=generator))


def random_input(plan: Plan, batch: int, generator: torch.Generator) -> Tensor:
    """Values as of an activation."""
    x = torch.randn(input_shape(plan, batch), generator=generator)
    return x if plan.signed else x.relu()


class Bank(nn.Module):
    """Branches side by side, one input and one output each."""

    def __init__(self, some: list[Plan], seed: int = 0) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(p, f"b{i}", 1000 * seed + i) for i, p in enumerate(some))
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))

    def freeze(self) -> Bank:
        """The frozen model (this one)."""
        for branch in self.branches:
            branch.freeze()
        return self

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of all branches."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(random_input(b.plan, batch, generator) for b in self.branches)
