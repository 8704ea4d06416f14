"""RQ: Relaxed Quantization (Louizos et al., ICLR 2019), the base method of DropBits.

Training draws a point of the grid from the categorical of section 3.1 by the Gumbel-softmax (section 3.2); evaluation
rounds. The paper's text was read without its appendices: initialisation and temperatures are reconstructions. Sections
are those of the project's DropBits specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms._rq import GridActivation, GridWeight, cell, draw_seed, log_raw, position
from fat_plugins.functional import fake_quantize, grad_scale, wide
from fat_plugins.kernels import Kernel, evaluate, no_view
from fat_plugins.quantizer import Params, Progress, TensorSpec
from fat_plugins.registry import Algorithm

_SMALLEST = 1e-30  # of an exponential draw, whose logarithm is taken
_BLOCK = 2**16  # elements that draw together


class RQParams(Params):
    """Options of ``"algorithm": "rq"``."""

    temperature: float | None = Field(
        None, gt=0, description="Of the Gumbel-softmax. null: 2 above 2 bits, 1 at 2 bits (reconstruction)."
    )
    straight_through: bool = Field(
        False, description="RQ-ST: the forward takes the drawn point itself, the backward stays that of the softmax."
    )
    local_grid: bool | Literal["auto"] = Field(
        "auto", description="Draw only among points within delta * sigma of the nearest one. 'auto': above 2 bits."
    )
    delta: float = Field(3.0, gt=0, le=20, description="Half width of the local grid, in sigmas.")
    init: Literal["rq", "mse"] = Field(
        "rq", description="First step. 'rq': t/2^b + 3t/2^(2b) of the range t; 'mse': least mean squared error."
    )
    seed: int = Field(0, ge=0, description="Of the noise; the noise depends on it, the tensor's name and the step.")


class _Draw(NamedTuple):
    """What one noisy forward needs beside its tensors, and its backward again."""

    low: int
    high: int
    temperature: float
    #: half width of the local grid in sigmas, ``None`` for the whole grid
    delta: float | None
    straight_through: bool
    seed: int
    factor: float


def _drawn(r: Tensor, rho: Tensor, draw: _Draw, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Every candidate point: its integer and its perturbed score.

    The normaliser of the categorical is common to all points, whole grid or window, and drops out of the softmax.
    """
    nearest = torch.round(r.clamp(draw.low, draw.high))
    if draw.delta is None:
        offsets: list[int] = list(range(draw.low, draw.high + 1))
    else:  # sigma <= alpha, so no window is wider than delta; the nearest point is always inside, and comes first
        half = min(int(draw.delta), draw.high - draw.low)
        offsets = sorted(range(-half, half + 1), key=abs)
    for offset in offsets:
        noise = torch.empty(r.shape, dtype=torch.float32, device=r.device).exponential_(generator=generator)
        point = nearest + offset if draw.delta is not None else torch.full_like(r, offset)
        score = (log_raw(r, rho, point) - noise.clamp_min_(_SMALLEST).log_().to(r.dtype)) / draw.temperature
        if draw.delta is not None:
            outside = (point < draw.low) | (point > draw.high) | (abs(offset) * rho > draw.delta)
            score = score.masked_fill(outside, -math.inf)
        yield point, score


def _averages(
    r: Tensor, rho: Tensor, draw: _Draw, generator: torch.Generator, slopes: bool
) -> tuple[list[Tensor], Tensor]:
    """Averages by the softmax of k and, with ``slopes``, of S, k S, k^2 S, raw and k raw; and the point of the highest
    score.

    The softmax runs over the points, its sums relative to the highest score so far: no tensor grows with their number.
    """
    sums, top, best = [], None, None
    for point, score in _drawn(r, rho, draw, generator):
        terms = [torch.ones_like(r), point]
        if slopes:
            raw, s = cell(r, rho, point)
            ks = point * s
            terms += [s, ks, point * ks, raw, point * raw]
        if top is None:
            sums, top, best = terms, score, point
            continue
        new = torch.maximum(top, score)
        fade, weight = torch.exp(top - new), torch.exp(score - new)
        best = torch.where(score > top, point, best)
        sums = [old * fade + weight * t for old, t in zip(sums, terms, strict=True)]
        top = new
    return [t / sums[0] for t in sums[1:]], best + (r - r)  # NaN stays visible


def _relaxed(out, x: Tensor, alpha: Tensor, rho: Tensor, draw: _Draw, generator: torch.Generator):
    (mean,), best = _averages(position(x, alpha, rho, draw.low, draw.high), rho, draw, generator, slopes=False)
    return torch.mul(best if draw.straight_through else mean, alpha, out=out), ()


def _relaxed_backward(
    out, grad: Tensor, x: Tensor, alpha: Tensor, rho: Tensor, draw: _Draw, generator: torch.Generator
):
    """Gradient of x, and the sums for log alpha and log sigma."""
    g = wide(grad)
    r = position(x, alpha, rho, draw.low, draw.high)
    (mean, s, ks, kks, raw, k_raw), best = _averages(r, rho, draw, generator, slopes=True)
    # covariances of k with S, k S and raw / 2: what is left of the slopes of log pi (see slopes_of)
    with_s, with_ks, with_raw = ks - mean * s, kks - mean * ks, (k_raw - mean * raw) / 2
    g_t = g * (rho / draw.temperature)
    grid = best if draw.straight_through else mean
    by_alpha = (g * grid + g_t * (with_ks - with_raw)) * (alpha * draw.factor)
    by_sigma = g_t * (with_raw + r * with_s - with_ks) * (alpha * draw.factor)
    return torch.mul(-g_t, with_s, out=out), (by_alpha.sum(), by_sigma.sum())


class _Relaxed(torch.autograd.Function):
    """``alpha sum_i z_i k_i``, or the drawn point; keeps the input only and draws again in the backward."""

    @staticmethod
    def forward(ctx, x, log_alpha, log_sigma, draw):
        alpha, rho = log_alpha.exp().reshape(()), torch.exp(log_alpha - log_sigma).reshape(())
        ctx.save_for_backward(x, alpha, rho)
        ctx.draw = draw
        return _noisily(_relaxed, (x,), alpha, rho, draw)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, alpha, rho = ctx.saved_tensors
        grad_x, (by_alpha, by_sigma) = _noisily(_relaxed_backward, (grad, x), alpha, rho, ctx.draw)
        return grad_x, by_alpha.reshape(1), by_sigma.reshape(1), None


def _noisily(fn: Kernel, tensors: tuple[Tensor, ...], alpha: Tensor, rho: Tensor, draw: _Draw):
    """The same random numbers at every call: a generator of its own, and blocks that depend on nothing else."""
    generator = torch.Generator(device=alpha.device).manual_seed(draw.seed)
    return evaluate(fn, tensors, (alpha, rho), (draw, generator), block=_BLOCK)


class _Noisy(nn.Module):
    """The forward that weights and activations share."""

    params: RQParams

    @torch.compiler.disable  # no random generator can be made inside a compiled graph
    def forward(self, x: Tensor) -> Tensor:
        """As of every quantizer; it stays outside of compiled graphs."""
        return super().forward(x)

    def _add_noise(self) -> None:
        self._seed = draw_seed(self.params.seed, self.spec, 0)

    def on_progress(self, progress: Progress) -> None:
        """New noise for every step."""
        self._seed = draw_seed(self.params.seed, self.spec, progress.step)

    @property
    def noisy(self) -> bool:
        """Every training forward is."""
        return True

    def _draw(self, x: Tensor) -> _Draw:
        p, bits = self.params, self.spec.bits
        local = bits > 2 if p.local_grid == "auto" else p.local_grid
        temperature = p.temperature or (2.0 if bits > 2 else 1.0)
        return _Draw(
            *self.bounds, temperature, p.delta if local else None, p.straight_through, self._seed,
            self.gradient_scale(x),
        )  # fmt: skip

    def quantize(self, x: Tensor) -> Tensor:
        """Training: section 3.2. Evaluation: the nearest point, straight-through within the grid."""
        if self.training:
            return _Relaxed.apply(x, wide(self.log_alpha), self._log_sigma(), self._draw(x))
        out = fake_quantize(x, grad_scale(self.alpha.reshape(()), self.gradient_scale(x)), *self.bounds)
        return _also(out, self.log_sigma)


class _Also(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, parameter):
        ctx.save_for_backward(parameter)
        return no_view(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _also(out: Tensor, parameter: Tensor) -> Tensor:
    """``out``, with a gradient of zero for a parameter that plays no part in it."""
    return _Also.apply(out, parameter)


class RQWeight(_Noisy, GridWeight):
    """Weights of RQ."""

    def __init__(self, spec: TensorSpec, params: RQParams) -> None:
        super().__init__(spec, params)
        self._add_noise()


class RQActivation(_Noisy, GridActivation):
    """Activations of RQ; signed where negatives occur, which the paper does not specify (section 5)."""

    def __init__(self, spec: TensorSpec, params: RQParams) -> None:
        super().__init__(spec, params)
        self._add_noise()


class RQ(Algorithm):
    """Registry entry of Relaxed Quantization."""

    name = "rq"
    title = "Relaxed Quantization"
    paper = "Louizos, Reisser, Blankevoort, Gavves, Welling: Relaxed Quantization, ICLR 2019"
    arxiv = "1810.01875"
    fidelity = "C: the text was read without its appendices; initialisation and temperatures are reconstructions"
    Params = RQParams
    weight_quantizer = RQWeight
    activation_quantizer = RQActivation
    bits_reason = "its signed 1-bit grid is {-1, 0}, which exporters would read as {-1, +1}"
