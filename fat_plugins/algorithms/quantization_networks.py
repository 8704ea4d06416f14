"""Quantization Networks (Yang et al., CVPR 2019, arXiv 1911.09464): a staircase of sigmoids that hardens in training.

In training a quantizer is ``alpha * (Y_1 + sum_i s_i sigmoid(T (beta x - b_i)))`` with a steepness ``T`` that grows
with the epoch; in evaluation the sigmoids are steps. ``alpha`` and ``beta`` are learned, the thresholds ``b`` are set
once. No straight-through estimator: the gradient is that of the soft function. Sections quoted below are those of the
project's Quantization Networks specification.

Choices of our own where paper and code say nothing: how fast activations harden, signed ones take the weights' form,
activations with ``uniform_thresholds`` tie ``beta`` to ``1/alpha``, thresholds keep a least distance, and ``alpha`` and
``beta`` stay positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import ConfigError
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.functional import level_index, positive, uniform_codes, wide
from fat_plugins.kernels import evaluate, no_view, total
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, Progress, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: the authors' clip of the sigmoids' argument (section 3)
_CLIP = 10.0
#: the authors' cap on T, for weights only (section 3)
_CAP = 2000.0
#: thresholds beside zero for weights, and the one of 1-bit activations (section 6)
_MIDDLE = 0.05
#: points of the curves in reports
_CURVE = 241
#: alpha and beta are plain parameters: keep them positive (section 10)
_FLOOR = 1e-37
#: largest magnitudes outside of these would take alpha or beta out of float32
_LEAST, _MOST = 1e-30, 1e36
#: T of activations at the end of a training of known length, where no K is given. The gradient's spread grows with the
#: root of T in every layer; beyond about 60 nothing is learned at the rates that other methods take.
_LAST = 40.0
#: more sigmoids than this are not worth the compiler's time (it unrolls the loop); the block of the uncompiled ones
_UNROLLED, _BLOCK = 63, 2**16
#: values that k-means looks at, and activations that are kept of one calibration batch
_SAMPLES, _BATCH = 2**17, 2**13


class QNParams(Params):
    """Options of ``"algorithm": "quantization_networks"`` (JSON section ``params``)."""

    levels: Literal["auto", "uniform", "+-2", "+-4"] = Field(
        "auto",
        description="Levels of the weights. 'uniform': all integers of the bit width (ternary, -3..3, -7..7, -15..15). "
        "'+-2', '+-4': the paper's sets of 3 bits, the latter -4, -2, -1, 0, 1, 2, 4. 'auto': '+-4' at 3 bits.",
    )
    temperature: float = Field(
        10.0, gt=0, description="K: the steepness T is K times the epoch. The paper: 10 (AlexNet, SSD), 5 (ResNet)."
    )
    activation_temperature: float | None = Field(
        None,
        gt=0,
        description="K of the activations; null: that of the weights, or less, so that T ends at 40 in a training of "
        "known length (above one bit).",
    )
    backward: Literal["auto", "true", "t1"] = Field(
        "auto",
        description="Gradient of the weights. 'true': the derivative. 't1': T times the derivative at T = 1, which "
        "never saturates. 'auto': 't1' for 1-bit weights, else 'true'.",
    )
    activation_backward: Literal["true", "t1"] = Field("true", description="Gradient of the activations.")
    uniform_thresholds: bool = Field(
        False,
        description="Equally spaced thresholds instead of k-means (the paper's 'linear' ablation). For activations "
        "also beta = 1/alpha, so that one uniform quantizer is deployed.",
    )
    symmetric_thresholds: bool = Field(
        False, description="Make the weights' thresholds symmetric about zero. An extension, not in the paper."
    )
    strict: bool = Field(
        False, description="A value on a threshold stays below it, as in the authors' code; the paper puts it above."
    )
    weight_epochs: int = Field(0, ge=0, description="Epochs of the first phase: weights only, activations are float.")
    activation_epochs: int = Field(
        0, ge=0, description="Epochs of the second phase: activations learn, weights stand still. Then both learn."
    )
    restart_temperature: bool = Field(
        False, description="The third phase begins again with T = K, as the authors' separate program runs did."
    )


# --------------------------------------------------------------------------------------------------------------------
# levels and thresholds
# --------------------------------------------------------------------------------------------------------------------
def weight_levels(bits: int, levels: str = "auto") -> tuple[int, ...]:
    """Ascending integer levels Y of the weights (section 2)."""
    if bits == 1:
        return (-1, 1)
    if levels == "+-4" or (levels == "auto" and bits == 3):
        return (-4, -2, -1, 0, 1, 2, 4)
    top = 2 if levels == "+-2" else 2 ** (bits - 1) - 1
    return tuple(range(-top, top + 1))


def activation_levels(bits: int, signed: bool) -> tuple[int, ...]:
    """Ascending integer levels of activations: ``0 .. 2^b - 1``, or the weights' uniform set when signed."""
    return weight_levels(bits, "uniform") if signed else tuple(range(2**bits))


def uniform_thresholds(levels: tuple[int, ...]) -> Tensor:
    """Equally spaced thresholds (float64, one fewer than levels): as many equal cells as levels over half a step more
    than their span. Halfway between the levels where these are equally spaced by one."""
    n = len(levels) - 1
    width = (levels[-1] - levels[0] + 1) / (n + 1) if n > 1 else float(levels[-1] - levels[0])
    centre = (levels[0] + levels[-1]) / 2
    return centre + (torch.arange(1, n + 1, dtype=torch.float64) - (n + 1) / 2) * width


def kmeans(values: Tensor, clusters: int, iterations: int = 300) -> Tensor | None:
    """Ascending centres (float64) of ``clusters`` clusters of numbers, ``None`` when fewer distinct values are there.

    Lloyd's algorithm from two deterministic starts, of which the better result is taken: quantiles of the distinct
    values, and splitting the cluster of the greatest error at its mean until there are enough.
    """
    v = values.detach().double().flatten().cpu().sort().values
    if v.numel() > _SAMPLES:
        v = v[torch.linspace(0, v.numel() - 1, _SAMPLES).round().long()]
    distinct = v.unique()
    if distinct.numel() < clusters:
        return None
    sums = torch.cat([v.new_zeros(1), v.cumsum(0)])
    quantiles = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters * distinct.numel()
    best, least = None, float("inf")
    for centres in (distinct[quantiles.long()], _split(v, sums, clusters)):
        for _ in range(iterations):
            inner = torch.searchsorted(v, (centres[1:] + centres[:-1]) / 2)
            edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), v.numel())])
            count = edges.diff()
            means = torch.where(count > 0, sums[edges].diff() / count.clamp_min(1), centres)
            if torch.equal(means, centres):
                break
            centres = means
        nearest = torch.bucketize(v, (centres[1:] + centres[:-1]) / 2)
        error = float((v - centres[nearest]).square().sum())
        if error < least:
            best, least = centres, error
    return best


def _split(v: Tensor, sums: Tensor, clusters: int) -> Tensor:
    """Means of ``clusters`` parts of the sorted ``v`` (prefix sums ``sums``), each part split off the worst one."""
    squares = torch.cat([v.new_zeros(1), v.square().cumsum(0)])
    edges = torch.tensor([0, v.numel()])
    while True:
        totals, count = sums[edges].diff(), edges.diff()
        if count.numel() == clusters:
            return totals / count
        error = squares[edges].diff() - totals.square() / count
        error[v[edges[:-1]] == v[edges[1:] - 1]] = -1  # equal values cannot be told apart
        worst = int(error.argmax())
        first, last = int(edges[worst]), int(edges[worst + 1])
        middle = first + int(torch.searchsorted(v[first:last], totals[worst] / count[worst]))
        middle = min(max(middle, first + 1), last - 1)
        edges = torch.cat([edges[: worst + 1], torch.tensor([middle]), edges[worst + 1 :]])


def fitted_thresholds(scaled: Tensor, levels: tuple[int, ...], middle: bool) -> Tensor:
    """Thresholds by k-means (section 6): midpoints of neighbouring centres.

    :param scaled: the tensor times beta.
    :param middle: put the two thresholds around zero at -0.05 and 0.05 (weights). Where the others would no longer
        ascend, or too few distinct values are there, the thresholds are equally spaced instead (section 10).
    """
    n = len(levels) - 1
    centres = kmeans(scaled, n + 1)
    if centres is None:
        return uniform_thresholds(levels)
    b = (centres[1:] + centres[:-1]) / 2
    if middle:
        i = n // 2
        b[i - 1], b[i] = -_MIDDLE, _MIDDLE
        if bool((b[: i - 1] >= -_MIDDLE).any()) or bool((b[i + 1 :] <= _MIDDLE).any()):
            return uniform_thresholds(levels)
    return b


def _apart(b: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Ascending thresholds that float32 can tell apart."""
    gaps = torch.arange(b.numel(), dtype=b.dtype, device=b.device) * (1e-6 * max(abs(v) for v in levels))
    return (b - gaps).cummax(0).values + gaps


# --------------------------------------------------------------------------------------------------------------------
# the soft staircase
# --------------------------------------------------------------------------------------------------------------------
def _sigmoid(r: Tensor, threshold: Tensor, temperature: Tensor | None) -> Tensor:
    t = r - threshold
    return (t if temperature is None else t.mul_(temperature)).clamp_(-_CLIP, _CLIP).sigmoid_()


def _soft(
    out, x: Tensor, alpha: Tensor, beta: Tensor, b: Tensor, temperature: Tensor, steps: tuple[int, ...], low: int
):
    r = wide(x) * beta
    level = torch.full_like(r, low)
    for threshold, step in zip(b.unbind(), steps, strict=True):
        level.add_(_sigmoid(r, threshold, temperature), alpha=step)
    return torch.mul(level, alpha, out=out), ()


def _soft_backward(
    out, grad: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, b: Tensor, temperature: Tensor,
    steps: tuple[int, ...], low: int, t1: bool,
):  # fmt: skip
    """Section 4: dL/dx, and the sums of ``G * y / alpha`` and ``G * beta x * D``."""
    g, r = wide(grad), wide(x) * beta
    level, slope = torch.full_like(r, low), torch.zeros_like(r)
    for threshold, step in zip(b.unbind(), steps, strict=True):
        s = _sigmoid(r, threshold, temperature)
        level.add_(s, alpha=step)
        if t1:
            s = _sigmoid(r, threshold, None)
        slope.add_(s.mul_(1 - s), alpha=step)
    slope.mul_(temperature).mul_(g)
    by_x = torch.mul(slope, alpha * beta, out=out)
    return by_x, (total(level.mul_(g), alpha), total(r.mul_(slope), alpha))


def _run(fn: Callable, tensors: tuple[Tensor, ...], alpha: Tensor, beta: Tensor, args: tuple):
    steps = args[2]
    return evaluate(fn, tensors, (alpha, beta), args, block=_BLOCK if len(steps) > _UNROLLED else None)


def _gaps(levels: tuple[int, ...]) -> tuple[int, ...]:
    # by index: the compiler of torch 2.4 knows no itertools.pairwise
    return tuple(levels[i] - levels[i - 1] for i in range(1, len(levels)))


class _SoftStaircase(torch.autograd.Function):
    """One node that keeps x and recomputes one sigmoid after the other in the backward.

    :param hard: what the forward gives instead of the soft value (evaluation); the gradients stay those of the soft.
    :param tied: ``beta`` is ``1/alpha``, through which alpha has a gradient too.
    :param still: nothing learns (second phase): all gradients are zero, so that every rank still has some.
    """

    @staticmethod
    def forward(ctx, x, alpha, beta, b, temperature, hard, steps, low, t1, tied, still):
        ctx.save_for_backward(x, alpha, beta, b, temperature)
        ctx.args = (steps, low, t1)
        ctx.tied, ctx.still = tied, still
        if hard is not None:
            return no_view(hard)
        return _run(_soft, (x,), alpha, beta, (b, temperature, steps, low))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, alpha, beta, b, temperature = ctx.saved_tensors
        rest = (None,) * 8
        if ctx.still:
            return torch.zeros_like(grad), torch.zeros_like(alpha), torch.zeros_like(beta), *rest
        grad_x, (grad_alpha, relative) = _run(_soft_backward, (grad, x), alpha, beta, (b, temperature, *ctx.args))
        if ctx.tied:
            return grad_x, grad_alpha - relative, None, *rest
        # d/dbeta = alpha sum(G x D); float32 holds it for every tensor that is not at its very ends
        grad_beta = ((alpha / beta).clamp_max(1e30) * relative).clamp(-1e37, 1e37)
        return grad_x, grad_alpha, grad_beta, *rest


class _Idle(torch.autograd.Function):
    """x itself; the parameters get a gradient of zero, for hosts that expect every parameter to take part."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.clone()  # a view could not be changed in place, as residual networks do

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class _Steps(nn.Module):
    """What weights and activations have in common: alpha, beta, thresholds and the clock of the temperature."""

    params: QNParams

    @property
    def noisy(self) -> bool:
        """Training is soft, what is deployed is hard."""
        return True

    def _add_state(self, count: int, tied: bool) -> None:
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = None if tied else nn.Parameter(torch.ones(()))
        # bits of float64 numbers: a model cast to half precision must not round them
        self.register_buffer("threshold_bits", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("clock", torch.ones((), dtype=torch.int64), persistent=False)

    def thresholds(self) -> Tensor:
        """Thresholds b (float64, 1-d), in units of ``beta x``."""
        return self.threshold_bits.view(torch.float64)[: len(self.levels) - 1]

    def set_thresholds(self, b: Tensor) -> None:
        """Set the thresholds: ascending, in units of ``beta x``, one fewer than levels."""
        filled = torch.full(self.threshold_bits.shape, torch.inf, dtype=torch.float64)
        filled[: b.numel()] = _apart(b.double().cpu(), self.levels)
        self.threshold_bits.copy_(filled.view(torch.int64))

    def _scales(self) -> tuple[Tensor, Tensor]:
        """alpha and beta, positive, in full precision."""
        alpha = positive(wide(self.alpha), _FLOOR)
        return alpha, alpha.detach().reciprocal() if self.beta is None else positive(wide(self.beta), _FLOOR)

    def _start(self, largest: Tensor) -> Tensor:
        """``beta = 5/4 p / q``, ``alpha = 1/beta`` (section 6), guarded at the ends of float32; returns beta."""
        beta = 1.25 * max(abs(v) for v in self.levels) / largest.double().clamp(_LEAST, _MOST)
        self.alpha.copy_(beta.reciprocal())
        if self.beta is not None:
            self.beta.copy_(beta)
        return beta

    def _staircase(self, x: Tensor, k: float, cap: float, t1: bool, still: bool = False) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            alpha, beta = self._scales()
            with torch.no_grad():
                hard = None if self.training else self._hard(x, alpha, beta)
                dtype = torch.promote_types(wide(x).dtype, beta.dtype)
                temperature = (self.clock.to(dtype) * k).clamp_max(cap)
            steps = _gaps(self.levels)
            b = self.thresholds().to(dtype)
            tied = self.beta is None
            return _SoftStaircase.apply(x, alpha, beta, b, temperature, hard, steps, self.levels[0], t1, tied, still)

    def _limits(self) -> tuple[float, float]:
        """K and the cap of the temperature."""
        raise NotImplementedError

    def _temperature(self) -> float:
        k, cap = self._limits()
        return min(float(self.clock) * k, cap)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the temperature T, which grows with the epochs and hardens the steps."""
        return {**super().monitor(weight), "temperature": self._temperature()}

    @torch.no_grad()
    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """The soft function of training at the present temperature, and the steps that are deployed."""
        alpha, beta = (v.detach().cpu().double() for v in self._scales())
        b = self.thresholds().cpu()
        margin = 0.25 * max(float(b[-1] - b[0]), 1.0)
        r = torch.linspace(float(b[0]) - margin, float(b[-1]) + margin, _CURVE, dtype=torch.float64)
        steps = _gaps(self.levels)
        temperature = torch.tensor(self._temperature(), dtype=torch.float64)
        soft, _ = _soft(None, r / beta, alpha, beta, b, temperature, steps, self.levels[0])
        hard = torch.tensor(self.levels)[torch.bucketize(r, b)] * alpha
        series = {"training": soft, "deployed": hard}
        return [Figure.curve("Soft steps and deployed steps", r / beta, series, "input", "output")]


class QNWeight(_Steps, WeightQuantizer):
    """Weights, sections 3, 4 and 6. Parameters: ``alpha`` and ``beta``, one of each per layer."""

    params: QNParams
    accepts_slices = True

    def __init__(self, spec: TensorSpec, params: QNParams) -> None:
        super().__init__(spec, params)
        self.levels = weight_levels(spec.bits, params.levels)
        self.t1 = params.backward == "t1" or (params.backward == "auto" and len(self.levels) == 2)
        self.still = False
        self._add_state(len(self.levels) - 1, tied=False)
        self.set_thresholds(uniform_thresholds(self.levels))

    def init_from_weight(self, weight: Tensor) -> None:
        """Section 6. One bit: b = 0; ternary: -0.05 and 0.05; else k-means with these two in the middle."""
        beta = self._start(wide(weight).abs().amax())
        if len(self.levels) == 2 or self.params.uniform_thresholds:
            b = uniform_thresholds(self.levels)
        elif len(self.levels) == 3:
            b = torch.tensor([-_MIDDLE, _MIDDLE], dtype=torch.float64)
        else:
            b = fitted_thresholds(weight.double() * beta, self.levels, middle=True)
        self.set_thresholds((b - b.flip(0)) / 2 if self.params.symmetric_thresholds else b)

    def on_progress(self, progress: Progress) -> None:
        """Section 7: T = K * epoch, epochs counted from 1; it waits while the activations learn alone."""
        p, epoch = self.params, progress.epoch
        begin = p.weight_epochs + p.activation_epochs  # of the third phase
        self.still = p.weight_epochs <= epoch < begin
        if epoch < begin:
            clock = min(epoch + 1, p.weight_epochs)
        else:
            clock = epoch + 1 - (begin if p.restart_temperature else p.activation_epochs)
        self.clock.fill_(clock)

    def _index(self, weight: Tensor, beta: Tensor) -> Tensor:
        r = wide(weight) * beta
        return torch.bucketize(r.contiguous(), self.thresholds().to(r.dtype), right=not self.params.strict)

    def _hard(self, weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        values = self._level_tensor()[self._index(weight, beta)].to(alpha.dtype) * alpha
        return torch.where(torch.isnan(weight), weight, values.to(weight.dtype))  # NaN stays visible

    def _level_tensor(self) -> Tensor:
        return torch.tensor(self.levels, device=self.threshold_bits.device)

    def quantize(self, weight: Tensor) -> Tensor:
        """Eq. 7 in training, Eq. 12 in evaluation; gradients of section 4."""
        return self._staircase(weight, *self._limits(), self.t1, self.still)

    def _limits(self) -> tuple[float, float]:
        return self.params.temperature, _CAP

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._scales()[0].detach().reshape(1)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Integers times alpha (section 8); beta, thresholds and T are gone."""
        alpha, beta = self._scales()
        scale, bits, axis = alpha.detach().reshape(1), self.spec.bits, self.spec.channel_axis
        index = self._index(weight, beta)
        if len(self.levels) == self.levels[-1] - self.levels[0] + 1:
            return FrozenTensor((index + self.levels[0]).to(torch.int32), UniformGrid(bits, True, True, scale, axis))
        return FrozenTensor(index.to(torch.int32), Codebook(bits, self._level_tensor(), scale, axis))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """alpha and beta without decay (section 3, canonical implementation)."""
        return [{"params": [self.alpha, self.beta], "lr": lr, "weight_decay": 0.0}]


class QNActivation(_Steps, ActivationQuantizer):
    """Activations, section 5. Parameters: ``alpha`` and, unless ``uniform_thresholds``, ``beta``."""

    params: QNParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: QNParams) -> None:
        super().__init__(spec, params)
        self.waiting = False
        self.k = params.activation_temperature or params.temperature
        self._samples: Tensor | None = None
        self._add_state(2**spec.bits - 1, tied=params.uniform_thresholds)
        self.set_thresholds(uniform_thresholds(self.levels))

    @property
    def levels(self) -> tuple[int, ...]:
        """Integer levels, by the sign that calibration found."""
        return activation_levels(self.spec.bits, self.signed)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """Section 6: the largest magnitude and k-means over samples of all batches so far."""
        largest, flat = x.abs().amax().reshape(1), x.flatten()
        some = torch.cat([largest, flat[:: max(1, flat.numel() // _BATCH)][:_BATCH]]).cpu()
        # the largest magnitude stands first, it only sets the range
        if not first and self._samples is not None:
            some = torch.cat([torch.maximum(some[:1], self._samples[:1]), self._samples[1:], some[1:]])
        self._samples = some[: 1 + 16 * _BATCH]
        beta = self._start(some[:1].squeeze(0))
        b = self._fixed_thresholds()
        self.set_thresholds(fitted_thresholds(some[1:].double() * beta, self.levels, middle=False) if b is None else b)

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: equally spaced thresholds."""
        self._start(torch.tensor(max(abs(low), abs(high))))
        b = self._fixed_thresholds()
        self.set_thresholds(uniform_thresholds(self.levels) if b is None else b)

    def _fixed_thresholds(self) -> Tensor | None:
        """Thresholds that depend on no data: of one bit, and uniform ones."""
        if self.params.uniform_thresholds or (self.spec.bits == 1 and self.signed):
            return uniform_thresholds(self.levels)
        return torch.tensor([_MIDDLE], dtype=torch.float64) if self.spec.bits == 1 else None

    def on_progress(self, progress: Progress) -> None:
        """T = K * epoch, counted from the second phase on; the identity before, in training."""
        p, epoch = self.params, progress.epoch
        self.waiting = epoch < p.weight_epochs
        begin = p.weight_epochs
        if p.restart_temperature and epoch >= begin + p.activation_epochs:
            begin += p.activation_epochs
        self.clock.fill_(max(epoch + 1 - begin, 1))
        # a single threshold stands near zero, where only a steep sigmoid resembles a step
        if p.activation_temperature is None and self.spec.bits > 1 and progress.total_epochs:
            self.k = min(p.temperature, _LAST / max(progress.total_epochs - begin, 1))

    @property
    def _tied(self) -> bool:
        """Whether one uniform grid is deployed."""
        return self.beta is None and len(self.levels) == self.levels[-1] - self.levels[0] + 1

    def _in_steps(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """Thresholds in units of alpha (float64). The form counts those strictly below, so a value on one counts when
        the threshold is taken down by the least bit."""
        t = (self.thresholds() / (alpha.double() * beta.double())).to(alpha.dtype)
        return (t if self.params.strict else torch.nextafter(t, torch.full_like(t, -torch.inf))).double()

    def _hard(self, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        if self._tied:
            return (uniform_codes(x, alpha, self.levels[0], self.levels[-1]) * alpha).to(x.dtype)
        levels = torch.tensor(self.levels, device=x.device)
        values = levels[level_index(x, alpha, self._in_steps(alpha, beta))].to(alpha.dtype) * alpha
        return torch.where(torch.isnan(x), x, values.to(x.dtype))

    def quantize(self, x: Tensor) -> Tensor:
        """Eq. 7 in training (the identity in the first phase), steps in evaluation."""
        if self.training and self.waiting:
            return _Idle.apply(x, *self.parameters())
        return self._staircase(x, *self._limits(), self.params.activation_backward == "t1")

    def _limits(self) -> tuple[float, float]:
        return self.k, float("inf")

    def grid_scale(self) -> Tensor:
        return self._scales()[0].detach().reshape(1)

    def form(self) -> Form:
        """Arbitrary thresholds: a staircase; with ``uniform_thresholds`` one uniform grid (section 8)."""
        scale, bits = self.grid_scale(), self.spec.bits
        if self._tied:
            return UniformGrid(bits, self.signed, self.signed, scale, 1)
        alpha, beta = (v.detach() for v in self._scales())
        levels = torch.tensor(self.levels, device=scale.device)
        return Staircase(bits, levels, self._in_steps(alpha, beta), scale)


class QuantizationNetworks(Algorithm):
    """Registry entry of Quantization Networks."""

    name = "quantization_networks"
    title = "Quantization Networks: soft steps that harden"
    paper = "Yang, Shen, Xing, Tian, Li, Deng, Huang, Hua: Quantization Networks, CVPR 2019"
    arxiv = "1911.09464"
    fidelity = "A: an implementation of the paper, with the deviations that its page names"
    Params = QNParams
    weight_quantizer = QNWeight
    activation_quantizer = QNActivation
    weight_bits = (1, 5)
    activation_bits = (1, 8)
    bits_reason = "one level is no quantizer"

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses levels that another bit width has, and a second phase without a first."""
        super().check(spec, params)
        params = params or cls.Params()
        if spec.role == "weight" and params.levels in ("+-2", "+-4") and spec.bits != 3:
            raise ConfigError(
                f"{spec.name or 'weight'}: levels '{params.levels}' are 3-bit levels, not {spec.bits}-bit; "
                "allowed: 'auto', 'uniform'"
            )
        if params.activation_epochs and not params.weight_epochs:
            raise ConfigError(
                f"{spec.name or spec.role}: params.activation_epochs {params.activation_epochs} needs weight_epochs: "
                "the weights learn first"
            )
