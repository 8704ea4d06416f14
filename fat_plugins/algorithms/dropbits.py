"""CPQ + DropBits (Lee et al., ICCV 2021, arXiv 2109.02100; earlier: SRQ, arXiv 1911.12990). A reconstruction.

Only the abstracts and a third-party summary of the paper could be read. The forward takes the most probable point of
Relaxed Quantization's categorical, which is the nearest one; the backward goes through the probability of that point
("imax"), so that latent weights gather at grid points. DropBits drops points of the weights' grid at random in
training; with hierarchical masks and a penalty the layers learn their bit widths. The estimator, the mask families, the
penalty, the schedule and the initialisation are our design. Sections are those of the project's DropBits specification.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms._macs import multiply_accumulates
from fat_plugins.algorithms._rq import (
    GridActivation,
    GridWeight,
    bounded,
    cell,
    draw_seed,
    grid_mass,
    position,
    probability,
    raw_of,
)
from fat_plugins.errors import ConfigError
from fat_plugins.figures import Figure
from fat_plugins.functional import staircase, uniform_codes, wide
from fat_plugins.kernels import evaluate
from fat_plugins.quantizer import Coordinator, LayerQuantizers, Params, Progress, TensorSpec
from fat_plugins.registry import Algorithm

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete, section 3.4
_LARGEST_LOGIT = math.log(100.0)  # section 7
_DROPPED = 0.34  # a level with a higher P(Z = 0) is not used, section 4.3
_LEAST_BITS = 2
_LEAST_MASS = 1e-6  # of the points that a mask leaves, section 10.4

#: points that the compiler may unroll; elements of a block of the kernels that it does not see
_UNROLLED, _BLOCK = 63, 2**16

Estimator = Literal["imax", "full", "ste"]


class DropBitsParams(Params):
    """Options of ``"algorithm": "dropbits"``."""

    estimator: Estimator = Field(
        "imax",
        description="Gradient of weights. 'imax': through the probability of the chosen point; 'full': of all points; "
        "'ste': straight-through within the grid. A reconstruction.",
    )
    act_estimator: Estimator = Field(
        "full",
        description="Gradient of activations. 'imax' is the weights' rule and grows with the level: a chain of layers "
        "multiplies it, and trains badly or not at all.",
    )
    normalization: Literal["truncated", "raw"] = Field(
        "truncated", description="Whether probabilities are divided by those of the whole grid, as in RQ."
    )
    mask: Literal["auto", "none", "endpoints", "hierarchical"] = Field(
        "auto",
        description="DropBits on weights. 'endpoints': the points k and -k-1 share a gate; 'hierarchical': bit widths "
        "are learned; 'auto': endpoints above 2 bits, none at 2.",
    )
    gates: Literal["hard_concrete", "bernoulli"] = Field(
        "hard_concrete", description="Distribution of the gates; 'bernoulli' keeps its probability for ever."
    )
    gate_gradient: Literal["expected", "raw"] = Field(
        "expected", description="How gates learn: through the expectation over the kept points, or through mask * pi."
    )
    keep_probability: float = Field(0.9, gt=0.01, lt=0.99, description="Of every gate at the beginning.")
    bit_penalty: float = Field(
        0.03, ge=0, description="Hierarchical masks: weight of the expected number of levels in the loss (lambda)."
    )
    bit_weight: Literal["one", "params", "macs"] = Field(
        "one",
        description="Factor on a layer's penalty: 1, or its share of all weights that this algorithm quantizes, or of "
        "their multiply-accumulates, which are counted on the calibration data.",
    )
    layer_weight: float = Field(1.0, ge=0, description="A further factor, to be set by layer in scope_overrides.")
    learn_epochs: int | None = Field(
        None, ge=1, description="Epochs after which learned widths are fixed; null: learn_fraction of the planned."
    )
    learn_fraction: float = Field(
        0.75, gt=0, le=1, description="Share of the planned epochs (or steps) after which learned widths are fixed."
    )
    gate_lr: float = Field(10.0, gt=0, description="Learning rate of the gates, in multiples of the base rate.")
    init: Literal["mse", "rq"] = Field(
        "mse", description="First step. 'mse': least mean squared error; 'rq': t/2^b + 3t/2^(2b) of the range t."
    )
    seed: int = Field(0, ge=0, description="Of the masks; they depend on it, the layer's name and the step.")


# --------------------------------------------------------------------------------------------------------------------
# masks and gates, section 3.4
# --------------------------------------------------------------------------------------------------------------------
def pair_ids(bits: int) -> Tensor:
    """Which pair ``{k, -k-1}`` each point ``-2^(b-1) .. 2^(b-1) - 1`` belongs to: int64, 2^b elements."""
    k = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return torch.where(k >= 0, k, -k - 1)


def level_ids(bits: int) -> Tensor:
    """The number of bits at which each point of the grid appears: int64, 2^b elements, 1 to b."""
    return torch.tensor([p.bit_length() + 1 for p in pair_ids(bits).tolist()])


def hard_concrete(phi: Tensor, logit: Tensor | None = None) -> Tensor:
    """Gates in 0 .. 1 with logits ``phi``, for ``logit = log u - log(1 - u)`` of uniform draws; without, the
    deterministic gates."""
    s = torch.sigmoid(phi) if logit is None else torch.sigmoid((logit + phi) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(phi: Tensor) -> Tensor:
    """``P(Z != 0)`` of hard-concrete gates."""
    return torch.sigmoid(phi - BETA * math.log(-GAMMA / ZETA))


def decide_bits(phi: Tensor) -> int:
    """Bit width that the gates of levels 2 .. b stand for: consecutive levels with P(Z = 0) < 0.34; at least 2."""
    kept = (1 - open_probability(phi.detach().float()) < _DROPPED).tolist()
    bits = 1 + (kept.index(False) if False in kept else len(kept))
    return max(bits, _LEAST_BITS)


# --------------------------------------------------------------------------------------------------------------------
# the quantizer with its multi-class straight-through estimators, sections 3.3, 3.4, 4.1 and 4.2
# --------------------------------------------------------------------------------------------------------------------
class _Plan(NamedTuple):
    """What the function below needs beside tensors."""

    low: int
    high: int
    estimator: str
    truncated: bool
    #: rule of the gates, ``None`` where no mask is applied
    gates: str | None
    #: factor on the gradients of log alpha and log sigma
    factor: float


def masked_codes(r: Tensor, rho: Tensor, mask: Tensor, low: int) -> Tensor:
    """``argmax_k mask_k pi_k`` (in the dtype of ``r``); the normaliser plays no part, NaN stays NaN."""
    return staircase(r, masked_thresholds(rho, mask, low)).add_(low)


def masked_thresholds(rho: Tensor, mask: Tensor, low: int) -> Tensor:
    """Ascending thresholds (float64, 2^b - 1) of the staircase ``argmax_k mask_k pi_k``.

    The logistic distribution is log-concave, so the chosen point never falls as ``r`` grows: it is a staircase, whose
    thresholds depend on the mask and rho only. Of two points j < m with gates M, the upper one is the more probable
    above ``r = (j + m) / 2 + log(v) / rho``, where ``h = rho (m - j) / 2`` and v is the positive root of
    ``(M_m - M_j e^(-2h)) v^2 + 2 cosh(rho/2) e^(-h) (M_m - M_j) v - (M_j - M_m e^(-2h)) = 0``.
    """
    count = mask.numel()
    k = torch.arange(count, device=rho.device, dtype=torch.float64)
    rho, gate = rho.double(), mask.double()
    lower, upper = gate[:, None], gate[None, :]  # axes: j, m
    h = rho * (k[None, :] - k[:, None]) / 2
    inside = h > 0
    h = h.clamp_min(0)
    decay = torch.exp(-2 * h)
    square, last = upper - lower * decay, lower - upper * decay
    linear = torch.cosh(rho / 2) * torch.exp(-h) * (upper - lower)
    # the form of the root that does not cancel
    root = torch.sqrt((linear * linear + square * last).clamp_min(0))
    v = torch.where(linear > 0, last / (linear + root), (root - linear) / square)
    between = (k[:, None] + k[None, :]) / 2 + torch.log(v) / rho
    between = between.masked_fill(last <= 0, -math.inf).masked_fill(square <= 0, math.inf)
    # from point i on: some m >= i beats every j < i
    index = torch.arange(count, device=rho.device)
    beats = between.masked_fill(~inside, -math.inf).cummax(0).values  # [j, m]: threshold of m against 0 .. j
    against = beats[:-1]  # row i - 1 is against all j < i
    reachable = index[None, :] >= index[1:, None]
    return against.masked_fill(~reachable, math.inf).amin(1).cummax(0).values + low


def _imax(g: Tensor, x: Tensor, alpha: Tensor, rho: Tensor, low: int, high: int, truncated: bool):
    """Without masks: gradients by x, log alpha and log sigma, element by element."""
    r = position(x, alpha, rho, low, high)
    k = torch.round(r.clamp(low, high))
    pi, by_x, by_alpha, by_sigma = probability(r, rho, k, low, high, truncated)
    gk = g * k
    value = gk * pi
    return value * by_x, gk + value * by_alpha, value * by_sigma


def _ste(g: Tensor, x: Tensor, k: Tensor, alpha: Tensor, low: int, high: int):
    """Straight-through within the grid, LSQ's rule for the step."""
    r = wide(x) / alpha
    inside = ((r >= low) & (r <= high)).to(r.dtype)
    return g * inside, g * (k - r.clamp(low, high) * inside), torch.zeros_like(r)


def _full(g: Tensor, x: Tensor, alpha: Tensor, rho: Tensor, low: int, high: int, truncated: bool):
    """Without masks, through all points: gradients by x, log alpha and log sigma, element by element.

    The mean of k telescopes: with ``F`` at the cells' ends, ``sum_k k (F(k + 1/2) - F(k - 1/2))`` is the highest k
    times the grid's mass less a sum of ``F``. Written for the upper half of the grid, where ``F`` is small and its
    differences do not cancel; the lower half is its mirror image.
    """
    r = position(x, alpha, rho, low, high)
    k = torch.round(r.clamp(low, high))
    count, centre = high - low + 1, (low + high) / 2
    h = (r - centre).abs()
    sign = torch.where(r < centre, -1.0, 1.0).to(r.dtype)

    def end(t: float) -> tuple[Tensor, Tensor, Tensor]:
        u = t - h
        f = torch.sigmoid(u * rho)
        slope = f * (1 - f)
        return f, slope, slope * u

    below, top = end(-count / 2), end(count / 2)
    sums = tuple((1 - count) * b for b in below)
    for i in range(1, count):
        sums = tuple(a.add_(b) for a, b in zip(sums, end(i - count / 2), strict=True))
    mass, by_h, by_rho = (t - b for t, b in zip(top, below, strict=True))
    if truncated:
        mean = sums[0] / mass
        factor = rho / mass
        by_r, by_scale = factor * (sums[1] - mean * by_h), factor * sign * (mean * by_rho - sums[2])
    else:  # k = centre + sign * distance, and the mass of the grid is part of the mean
        half = (count - 1) / 2 + centre * sign
        by_r, by_scale = rho * (sums[1] - half * by_h), rho * sign * (half * by_rho - sums[2])
    by_scale = g * by_scale
    by_x = g * by_r
    return by_x, g * k + by_scale - r * by_x, -by_scale


def _averaged(total: Tensor, raw: Tensor, s: Tensor, ks: Tensor, r: Tensor, rho: Tensor, grid: Any) -> list[Tensor]:
    """Sums of a weight times the three slopes of log pi, from the sums of the weight, times raw, S and k S."""
    common = rho * (0.5 / torch.tanh(rho / 2) * total - raw / 2)
    return [
        -rho * s - grid.by_x * total,
        common + rho * ks - grid.by_alpha * total,
        -common + rho * (r * s - ks) - grid.by_sigma * total,
    ]


def _general(
    g: Tensor, x: Tensor, alpha: Tensor, rho: Tensor, mask: Tensor, steps: Tensor,
    low: int, high: int, estimator: str, truncated: bool, gates: str,
):  # fmt: skip
    """With masks: gradients by x, log alpha, log sigma (by element) and by the mask, divided by alpha. One or two loops
    over the points, one exponential in each turn; memory does not grow with their number."""
    r = position(x, alpha, rho, low, high)
    k = staircase(r, steps).add_(low)
    grid = grid_mass(r, rho, low, high, truncated)
    renormalised, full = gates == "expected", estimator == "full"
    mass = expected = by_raw = by_s = by_ks = k_raw = k_ks = 0.0
    if renormalised or full:
        for point in range(low, high + 1):
            raw, s = cell(r, rho, point)
            p = raw * mask[point - low]
            ps, pr = p * s, p * raw
            mass, expected = mass + p, expected + point * p
            by_raw, by_s, by_ks = by_raw + pr, by_s + ps, by_ks + point * ps
            if full:
                k_raw, k_ks = k_raw + point * pr, k_ks + point * point * ps
        means = [m / grid.value for m in _averaged(mass, by_raw, by_s, by_ks, r, rho, grid)]
        if full:
            moments = [m / grid.value for m in _averaged(expected, k_raw, by_ks, k_ks, r, rho, grid)]
        mass, expected = mass / grid.value, expected / grid.value
    if renormalised:
        kept = (mass >= _LEAST_MASS).to(r.dtype)
        mass = mass.clamp_min(_LEAST_MASS)
        expected = expected / mass
        means = [m / mass * kept for m in means]
    gk = g * k
    if estimator == "ste":
        by = _ste(g, x, k, alpha, low, high)
    elif full:
        if renormalised:
            moments = [m / mass - expected * n for m, n in zip(moments, means, strict=True)]
        by = (g * moments[0], gk + g * moments[1], g * moments[2])
    if estimator == "imax" or (gates == "raw" and not full):
        own, *slopes = probability(r, rho, k, low, high, truncated)
        through_gate = gk * own  # by the gate of the chosen point, under the raw rule
    if estimator == "imax":
        own = own * mask[(k.nan_to_num() - low).long()]
        if renormalised:
            own = own / mass
            slopes = [s - m for s, m in zip(slopes, means, strict=True)]
        value = gk * own
        by = (value * slopes[0], gk + value * slopes[1], value * slopes[2])
    by_mask = []
    factor = g / grid.value / mass if renormalised else g / grid.value
    centre = kept * expected if renormalised else None
    for point in range(low, high + 1):
        if gates == "raw" and not full:
            by_mask.append((through_gate * (k == point)).sum())
            continue
        raw = raw_of(r, rho, point)
        away = point - centre if renormalised else point
        by_mask.append(raw.mul_(factor).mul_(away).sum())
    return *by, torch.stack(by_mask)


def _masked_forward(out, x: Tensor, alpha: Tensor, rho: Tensor, steps: Tensor, low: int, high: int):
    return torch.mul(staircase(position(x, alpha, rho, low, high), steps).add_(low), alpha, out=out), ()


def _plain_forward(out, x: Tensor, alpha: Tensor, low: int, high: int):
    return torch.mul(uniform_codes(x, alpha, low, high), alpha, out=out), ()


def _slopes(
    out, grad: Tensor, x: Tensor, alpha: Tensor, rho: Tensor, scale: Tensor, mask: Tensor | None, steps: Tensor | None,
    low: int, high: int, estimator: str, truncated: bool, gates: str | None,
):  # fmt: skip
    """Gradient of x, and the sums for log alpha, log sigma and the mask."""
    g, more = wide(grad), ()
    if gates is not None:
        by_x, by_alpha, by_sigma, by_mask = _general(
            g, x, alpha, rho, mask, steps, low, high, estimator, truncated, gates
        )
        more = (by_mask,)
    elif estimator == "ste":
        by_x, by_alpha, by_sigma = _ste(g, x, uniform_codes(x, alpha, low, high), alpha, low, high)
    else:
        rule = _full if estimator == "full" else _imax
        by_x, by_alpha, by_sigma = rule(g, x, alpha, rho, low, high, truncated)
    # the factor first: the sum over a huge tensor must not overflow
    return by_x, (by_alpha.mul_(scale).sum(), by_sigma.mul_(scale).sum(), *more)


class _Categorical(torch.autograd.Function):
    """``alpha k*``. Keeps the input and what has one number per layer or point."""

    @staticmethod
    def forward(ctx, x, log_alpha, log_sigma, mask, plan):
        alpha, rho = log_alpha.exp().reshape(()), torch.exp(log_alpha - log_sigma).reshape(())
        steps = None if plan.gates is None else masked_thresholds(rho, mask, plan.low)
        ctx.save_for_backward(x, alpha, rho, mask, steps)
        ctx.plan = plan
        if steps is None:
            return evaluate(_plain_forward, (x,), (alpha,), (plan.low, plan.high))[0]
        return evaluate(_masked_forward, (x,), (alpha, rho), (steps, plan.low, plan.high))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, alpha, rho, mask, steps = ctx.saved_tensors
        plan: _Plan = ctx.plan
        used = mask if plan.gates is not None else None
        # two unrolled loops, or one over many points, are not worth the compiler's time
        loops = plan.gates is not None or (plan.estimator == "full" and plan.high - plan.low > _UNROLLED)
        # named: the compiler of torch 2.8 cannot slice a NamedTuple
        rest = (plan.low, plan.high, plan.estimator, plan.truncated, plan.gates)
        args = (alpha * plan.factor, used, steps, *rest)
        by_x, (by_alpha, by_sigma, *more) = evaluate(
            _slopes, (grad, x), (alpha, rho), args, block=_BLOCK if loops else None
        )
        by_mask = None
        if mask is not None:
            by_mask = (more[0] * alpha).to(mask.dtype) if more else torch.zeros_like(mask)
        return by_x, by_alpha.reshape(1), by_sigma.reshape(1), by_mask, None


class DropBitsWeight(GridWeight):
    """Weights: ``log_alpha``, ``log_sigma`` and, with masks, ``phi``, the logit of every gate (a buffer if Bernoulli).

    Learned widths (hierarchical masks): the buffer ``learned`` holds the width that was decided, 0 before. Until then
    training draws masks and evaluation uses the whole grid; afterwards both use the grid of that width.

    With ``bit_weight: macs`` the buffer ``macs`` holds the multiply-accumulates of all inputs that were shown, -1
    before the first. All layers see the same inputs, so their ratios are those of one sample, and a layer that is
    called twice counts twice.
    """

    params: DropBitsParams
    needs_input = True

    def __init__(self, spec: TensorSpec, params: DropBitsParams) -> None:
        self._learned = 0
        super().__init__(spec, params)
        family = params.mask
        if family == "auto":
            family = "endpoints" if spec.bits > 2 else "none"
        if family == "hierarchical" and spec.bits <= _LEAST_BITS:
            family = "none"  # nothing is left to learn
        self.family = family
        # of all weights or multiply-accumulates; a coordinator sets it
        self.share: float | None = 1.0
        self._macs = -1
        if params.bit_weight == "macs":
            self.share = None  # not known yet
            self.register_buffer("macs", torch.full((1,), -1, dtype=torch.int64))
        self.register_buffer("learned", torch.zeros(1, dtype=torch.int64))
        if family == "none":
            self.phi = None
            return
        count = 2 ** (spec.bits - 1) - 1 if family == "endpoints" else spec.bits - 1
        phi = torch.full((count,), math.log(params.keep_probability / (1 - params.keep_probability)))
        if params.gates == "hard_concrete":
            self.phi = nn.Parameter(phi)
        else:  # a probability that stays
            self.register_buffer("phi", phi)
        ids = pair_ids(spec.bits) if family == "endpoints" else level_ids(spec.bits) - 1
        self.register_buffer("gate_of_point", ids, persistent=False)
        # log u - log(1 - u) of this step's draws; follows from the progress, so it is no state
        self.register_buffer("logit", torch.zeros(count), persistent=False)
        self._redraw(0)

    # -- state and schedule ------------------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """The width that was learned, or that of the specification."""
        return self._learned or self.spec.bits

    @property
    def learns_bits(self) -> bool:
        """Whether the width is still being learned."""
        return self.family == "hierarchical" and not self._learned

    @property
    def noisy(self) -> bool:
        """Whether training draws masks."""
        return self.phi is not None and not self._learned

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "learned" in state_dict:
            self._learned = int(self.learned[0])
        if self.params.bit_weight == "macs" and prefix + "macs" in state_dict:
            self._macs = int(self.macs[0])

    @property
    def wants_input(self) -> bool:
        """While multiply-accumulates are counted, that is until training begins."""
        return self.params.bit_weight == "macs" and self.share is None

    @torch.no_grad()
    def observe_input(self, x: Tensor) -> None:
        """Counts the layer's multiply-accumulates. Ignored unless they are wanted, or if ``x`` is no input of a linear
        layer or convolution with this weight."""
        if self.wants_input and (count := multiply_accumulates(self.spec, x)) is not None:
            self._macs = max(self._macs, 0) + count
            self.macs.fill_(self._macs)

    @property
    def counted(self) -> int | None:
        """Multiply-accumulates of all inputs shown until training began; ``None`` if not asked for, or without any."""
        return None if self._macs < 0 else self._macs

    def _redraw(self, step: int) -> None:
        generator = torch.Generator().manual_seed(draw_seed(self.params.seed, self.spec, step))
        u = torch.rand(self.logit.shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        self.logit = torch.logit(u).to(self.logit, non_blocking=True)

    def on_progress(self, progress: Progress) -> None:
        """New masks for every step; the decision of section 4.3 when its time has come."""
        if self.learns_bits and self._time_is_up(progress):
            self.decide()
        if self.noisy:
            self._redraw(progress.step)

    def _time_is_up(self, progress: Progress) -> bool:
        if self.params.learn_epochs is not None:
            return progress.epoch >= self.params.learn_epochs
        # epochs first: a width must not change amid one where the host counts them
        for done, total in ((progress.epoch, progress.total_epochs), (progress.step, progress.total_steps)):
            if total:
                return done >= self.params.learn_fraction * total
        return False

    @torch.no_grad()
    def decide(self) -> int:
        """Fix the learned width now; masks end, step, noise scale and weights stay."""
        if self.learns_bits:
            self._learned = decide_bits(self._logits())
            self.learned.fill_(self._learned)
        return self.bits

    def _logits(self) -> Tensor:
        limit = torch.full_like(self.phi, _LARGEST_LOGIT, dtype=torch.float32)
        return bounded(wide(self.phi), -limit, limit)

    # -- forward -----------------------------------------------------------------------------------------------------
    def mask(self) -> Tensor | None:
        """Factors on the points' probabilities in this step (2^b elements, 0 .. 1); ``None`` without gates."""
        if self.phi is None:
            return None
        phi, logit = self._logits(), wide(self.logit)
        if self.params.gates == "bernoulli":  # the limit beta -> 0
            gates = (logit + phi > 0).to(phi.dtype)
        else:
            gates = hard_concrete(phi, logit)
        kept = torch.cat([torch.ones_like(gates[:1]), gates])  # pair 0, or level 1
        if self.family == "hierarchical":
            kept = kept.cumprod(0)  # a bit exists only if all lower ones do
        return kept[self.gate_of_point]

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3.3, with the masks of section 3.4 in training."""
        p = self.params
        gates = p.gate_gradient if self.training and self.noisy else None
        plan = _Plan(
            *self.bounds, p.estimator, p.normalization == "truncated", gates, self.gradient_scale(weight)
        )  # fmt: skip
        # a mask that is not applied still gives its gates a gradient of zero, which DDP waits for
        return _Categorical.apply(weight, wide(self.log_alpha), self._log_sigma(), self.mask(), plan)

    def regularization(self) -> Tensor | None:
        """``lambda w sum_m P(Z_m != 0)`` over the levels 2 .. b, while the width is being learned (section 4.3).

        :raises ConfigError: ``bit_weight: macs``, and nobody told the layer's share.
        """
        if not self.learns_bits:
            return None
        if self.share is None:
            raise ConfigError(
                f"{self.spec.name or 'weight'}: bit_weight 'macs' counts multiply-accumulates over the whole network, "
                "but no coordinator told this layer its share; announce progress before the first loss, or use 'one'"
            )
        weight = self.params.bit_penalty * self.params.layer_weight * self.share
        return weight * open_probability(self._logits()).sum()

    def _open(self) -> Tensor | None:
        """Probability that each gate is open, 1-d; ``None`` without gates."""
        if self.phi is None:
            return None
        logits = self._logits().detach()
        return torch.sigmoid(logits) if self.params.gates == "bernoulli" else open_probability(logits)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the mean probability of open gates, and with hierarchical masks that of each and the expected width."""
        numbers, kept = super().monitor(weight), self._open()
        if kept is None:
            return numbers
        numbers["open gates"] = float(kept.mean())
        if self.family == "hierarchical":
            numbers["expected bits"] = 1 + float(kept.cumprod(0).sum())
            numbers |= {f"gate of bit {i}": p for i, p in enumerate(kept.tolist(), 2)}
        return numbers

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """How likely every gate is open."""
        kept = self._open()
        if kept is None:
            return []
        if self.family == "hierarchical":
            names, label = [f"bit {i}" for i in range(2, self.spec.bits + 1)], "gate"
        else:
            names, label = [f"{i}, {-i - 1}" for i in range(1, len(kept) + 1)], "codes that share a gate"
        return [Figure.bars("Probability of open gates", names, {"probability": kept}, label, "", (0.0, 1.0))]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Section 7: gates learn faster, step and noise scale slower, none decays."""
        gates = {"params": [self.phi], "lr": lr * self.params.gate_lr, "weight_decay": 0.0}
        return self._own_groups(lr, (gates,) if isinstance(self.phi, nn.Parameter) else ())


class DropBitsActivation(GridActivation):
    """Activations: the same categorical, no masks (section 5)."""

    params: DropBitsParams

    def quantize(self, x: Tensor) -> Tensor:
        p = self.params
        plan = _Plan(
            *self.bounds, p.act_estimator, p.normalization == "truncated", None, self.gradient_scale(x)
        )  # fmt: skip
        return _Categorical.apply(x, wide(self.log_alpha), self._log_sigma(), None, plan)


class DropBitsCoordinator(Coordinator):
    """Tells every layer its share of the weights or multiply-accumulates, for ``bit_weight``."""

    def __init__(self, layers: list[LayerQuantizers]) -> None:
        super().__init__(layers)
        weights = [layer.weight for layer in layers if isinstance(layer.weight, DropBitsWeight)]
        total = sum(math.prod(w.spec.shape) for w in weights)
        for w in weights:
            if w.params.bit_weight == "params":
                w.share = math.prod(w.spec.shape) / total
        self._counted = [w for w in weights if w.params.bit_weight == "macs"]

    def on_progress(self, progress: Progress) -> None:
        """Share out the multiply-accumulates: now calibration is over, or a checkpoint with its counts is loaded.

        :raises ConfigError: a layer that learns its width was never shown its input.
        """
        if not any(w.learns_bits for w in self._counted):
            return
        for w in self._counted:
            if w.learns_bits and w.counted is None:
                raise ConfigError(
                    f"{w.spec.name or 'weight'}: bit_weight 'macs' needs the layer's multiply-accumulates, but "
                    "calibration showed it no input of a linear layer or convolution; calibrate with data, or use "
                    "'params' or 'one'"
                )
        total = sum(w.counted or 0 for w in self._counted)
        for w in self._counted:
            w.share = (w.counted or 0) / max(total, 1)


class DropBits(Algorithm):
    """Registry entry of CPQ + DropBits."""

    name = "dropbits"
    title = "CPQ with DropBits, optionally with learned bit widths"
    paper = "Lee, Yun, Hwang, Yang: Cluster-Promoting Quantization with Bit-Drop, ICCV 2021"
    arxiv = "2109.02100"
    fidelity = "C: a reconstruction from the abstracts and the base method; the body of the paper was not available"
    Params = DropBitsParams
    weight_quantizer = DropBitsWeight
    activation_quantizer = DropBitsActivation
    coordinator = DropBitsCoordinator
    bits_reason = "its signed 1-bit grid is {-1, 0}, which exporters would read as {-1, +1}"

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses learned widths with gates that do not learn."""
        super().check(spec, params)
        if getattr(params, "mask", "") == "hierarchical" and params.gates == "bernoulli":
            raise ConfigError(
                f"{spec.name or spec.role}: mask 'hierarchical' learns bit widths, which gates 'bernoulli' cannot; use "
                "gates 'hard_concrete'"
            )
