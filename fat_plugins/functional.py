"""Pure tensor functions shared by the algorithms. No state, no host, no synchronisation with the device.

The two fake-quantization functions are single ``autograd.Function`` nodes with hand-derived backwards that keep only
the input and the scale (the codes are recomputed). Their elementwise bodies are kernels of
:mod:`fat_plugins.kernels`, which runs them in blocks, fused by ``torch.compile`` or as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fat_plugins.clipping import best_clip
from fat_plugins.kernels import evaluate, get_backend, set_backend, total, wide  # noqa: F401 (their old home)


# --------------------------------------------------------------------------------------------------------------------
# uniform grid
# --------------------------------------------------------------------------------------------------------------------
def uniform_codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Integer codes (kept in a float dtype) ``round_half_even(clip(x / scale, low, high))``.

    Shapes: ``x`` any, ``scale`` broadcastable to ``x``; the result has the shape of ``x``.
    """
    return torch.round((wide(x) / scale).clamp(low, high))


def _fq_forward(out: Tensor | None, x: Tensor, scale: Tensor, low: int, high: int):
    if torch.jit.is_tracing():  # exporters read plain operations more surely than in-place ones
        return uniform_codes(x, scale, low, high) * scale, ()
    return torch.div(wide(x), scale, out=out).clamp_(low, high).round_().mul_(scale), ()


def _inside_(r: Tensor, clipped: Tensor, low: int, high: int, inclusive: bool) -> Tensor:
    """1.0 inside the clip band, 0.0 outside, in place of ``r``. A factor: on CPU whatever is boolean costs several
    times a multiplication."""
    if inclusive:
        return r.eq_(clipped)
    above = r.clone().gt_(low)
    return r.lt_(high).mul_(above)


def _fq_backward(out, grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, residual: bool, inclusive: bool):
    """Gradient of ``x`` and sum for the scale."""
    r = torch.div(wide(x), scale)
    clipped = r.clamp(low, high)
    band = _inside_(r, clipped, low, high, inclusive)
    g = wide(grad)
    by_x = torch.mul(g, band, out=out)
    # inside the band clipped is r, outside it is a bound, which rounding leaves alone
    by_scale = torch.round(clipped) if residual else clipped.clone()
    return by_x, (total(by_scale.addcmul_(clipped, band, value=-1).mul_(g), scale),)


def _fq_backward_x(out, grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, residual: bool, inclusive: bool):
    """The gradient of ``x`` alone, for scales that nothing learns."""
    r = torch.div(wide(x), scale)
    band = _inside_(r, r.clamp(low, high) if inclusive else r, low, high, inclusive)
    return torch.mul(wide(grad), band, out=out), ()


def _fq_backward_scale(
    out: None, grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, residual: bool, inclusive: bool
):
    """The sum for the scale alone."""
    r = torch.div(wide(x), scale)
    clipped = r.clamp(low, high)
    band = _inside_(r, clipped, low, high, inclusive)
    by_scale = torch.round(clipped) if residual else clipped.clone()
    return None, (total(by_scale.addcmul_(clipped, band, value=-1).mul_(wide(grad)), scale),)


def _straight(ctx, grad: Tensor, x: Tensor, scale: Tensor, kernels: tuple, args: tuple, clip_x: bool):
    """Gradients of a fake quantization: ``kernels`` for both, for ``x`` alone and for the scale alone."""
    both, x_only, scale_only = kernels
    need_x, need_scale = ctx.needs_input_grad[:2]
    kernel = x_only if not need_scale else both if need_x and clip_x else scale_only
    by_x = grad if need_x else None
    sums: tuple = ()
    if need_scale or (need_x and clip_x):
        by_x_found, sums = evaluate(kernel, (grad, x), (scale,), args, values=kernel is not scale_only)
        by_x = by_x_found if need_x and clip_x else by_x
    return by_x, sums[0].reshape(scale.shape).to(scale.dtype) if need_scale else None


def _straight_again(
    grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float, code: Callable[[Tensor], Tensor], residual: bool,
    inclusive: bool, clip_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of :func:`_straight` in operations that autograd follows, for who differentiates them once more.

    Codes and clip bands are constant between thresholds; the rounding residual moves with ``x`` and the scale.
    """
    r = wide(x) / scale
    clipped = r.clamp(low, high)
    with torch.no_grad():
        band = _inside_(r.clone(), clipped, low, high, inclusive)
        codes = code(clipped)
    g = wide(grad)
    by_scale = ((codes if residual else clipped) - clipped * band) * g
    return (g * band).to(x.dtype) if clip_x else grad, total(by_scale, scale).reshape(scale.shape).to(scale.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, low, high, clip_x, residual, inclusive):
        ctx.save_for_backward(x, scale)
        ctx.args, ctx.clip_x = (low, high, residual, inclusive), clip_x
        return evaluate(_fq_forward, (x,), (scale,), (low, high))[0]

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            low, high, *rules = ctx.args
            x, scale = ctx.saved_tensors
            return (*_straight_again(grad, x, scale, low, high, torch.round, *rules, ctx.clip_x), *(None,) * 5)
        kernels = _fq_backward, _fq_backward_x, _fq_backward_scale
        return (*_straight(ctx, grad, *ctx.saved_tensors, kernels, ctx.args, ctx.clip_x), *(None,) * 5)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: int,
    high: int,
    *,
    clip_x_grad: bool = True,
    residual_scale_grad: bool = True,
    inclusive: bool = True,
) -> Tensor:
    """``scale * round_half_even(clip(x / scale, low, high))`` with straight-through gradients.

    :param x: tensor of any shape.
    :param scale: step of the grid, broadcastable to ``x`` (one element, or one per channel).
    :param low, high: integer bounds of the codes.
    :param clip_x_grad: zero the gradient of ``x`` outside the clip band (LSQ, PACT); ``False`` passes it everywhere
        (FAT weights, spec section 4).
    :param residual_scale_grad: inside the band the gradient of the scale is the rounding residual ``code - x/scale``
        (LSQ, FAT's CIFAR copy); ``False`` makes it 0 there (PACT, FAT's ImageNet copy).
    :param inclusive: whether an ``x`` exactly on a bound counts as inside (FAT: yes, LSQ: no).
    """
    return _FakeQuantize.apply(x, scale, low, high, clip_x_grad, residual_scale_grad, inclusive)


#: more thresholds than this are searched, not compared one by one
_MOST_COMPARED = 48


# --------------------------------------------------------------------------------------------------------------------
# any set of levels
# --------------------------------------------------------------------------------------------------------------------
def level_index(x: Tensor, scale: Tensor, thresholds: Tensor, axis: int = 1) -> Tensor:
    """Index of the level of ``x / scale``: the number of ``thresholds`` strictly below it. NaN takes the last level.

    :param thresholds: ascending, 1-d; or 2-d with one row for each channel along ``axis``.
    """
    return _index(wide(x) / scale, thresholds, axis)


def _index(r: Tensor, thresholds: Tensor, axis: int = 1) -> Tensor:
    if thresholds.ndim == 2:
        steps = thresholds.to(r.dtype).unbind(1)
        return torch.stack([~(r <= per_channel_view(t, r.ndim, axis)) for t in steps]).sum(0)
    # torch warns about other layouts, and copies them anyway
    return torch.bucketize(r.contiguous(), thresholds.to(r.dtype))


def staircase(r: Tensor, thresholds: Tensor, steps: Tensor | None = None) -> Tensor:
    """Sum of the ``steps`` (1 each without them) whose thresholds are strictly below ``r``, in the dtype of ``r``.

    NaN stays NaN. By comparisons where that is faster than a search; exact where all partial sums are.

    :param thresholds, steps: 1-d, ascending thresholds.
    """
    compared = len(thresholds) <= _MOST_COMPARED and (r.device.type == "cpu" or torch.compiler.is_compiling())
    if torch.jit.is_tracing() or not compared:
        index = _index(r, thresholds)
        found = index if steps is None else torch.cat([steps.new_zeros(1), steps.cumsum(0)])[index]
        return torch.where(torch.isnan(r), r, found.to(r.dtype))
    value = r.clamp(-1, 1).mul_(0)
    for i, threshold in enumerate(thresholds.to(r.dtype).unbind()):
        above = torch.gt(r, threshold, out=torch.empty_like(r))
        value.add_(above if steps is None else above.mul_(steps[i].to(r.dtype)))
    return value


def _nearest(r: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """The level of every ``r``, in its dtype. The partial sums are levels, hence exact."""
    return staircase(r, thresholds, levels.diff()).add_(levels[0])


def _levels_forward(out, x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor):
    return torch.mul(_nearest(wide(x) / scale, levels, thresholds), scale, out=out), ()


def _levels_band(x: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = wide(x) / scale
    clipped = torch.minimum(torch.maximum(r, levels[0].to(r.dtype)), levels[-1].to(r.dtype))
    return r, clipped, r.clone().eq_(clipped)


def _levels_sum(g: Tensor, r: Tensor, clipped: Tensor, band: Tensor, scale, levels, thresholds, residual: bool):
    # outside the band the nearest level is the bound
    by_scale = _nearest(r, levels, thresholds) if residual else clipped.clone()
    return total(by_scale.addcmul_(clipped, band, value=-1).mul_(g), scale)


def _levels_backward(out, grad, x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, residual: bool):
    g, (r, clipped, band) = wide(grad), _levels_band(x, scale, levels)
    return torch.mul(g, band, out=out), (_levels_sum(g, r, clipped, band, scale, levels, thresholds, residual),)


def _levels_backward_x(out, grad, x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, residual: bool):
    return torch.mul(wide(grad), _levels_band(x, scale, levels)[2], out=out), ()


def _levels_backward_scale(out, grad, x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, residual: bool):
    parts = _levels_band(x, scale, levels)
    return None, (_levels_sum(wide(grad), *parts, scale, levels, thresholds, residual),)


class _LevelQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, levels, thresholds, clip_x, residual):
        ctx.save_for_backward(x, scale, levels, thresholds)
        ctx.residual, ctx.clip_x = residual, clip_x
        return evaluate(_levels_forward, (x,), (scale,), (levels, thresholds))[0]

    @staticmethod
    def backward(ctx, grad):
        x, scale, *grid = ctx.saved_tensors
        if torch.is_grad_enabled():
            nearest = partial(_nearest, levels=grid[0], thresholds=grid[1])
            ends = float(grid[0][0]), float(grid[0][-1])
            return (*_straight_again(grad, x, scale, *ends, nearest, ctx.residual, True, ctx.clip_x), *(None,) * 4)
        kernels = _levels_backward, _levels_backward_x, _levels_backward_scale
        return (*_straight(ctx, grad, x, scale, kernels, (*grid, ctx.residual), ctx.clip_x), *(None,) * 4)


def level_quantize(
    x: Tensor,
    scale: Tensor,
    levels: Tensor,
    thresholds: Tensor,
    *,
    clip_x_grad: bool = True,
    residual_scale_grad: bool = True,
) -> Tensor:
    """``scale * levels[i]``, ``i`` = number of ``thresholds`` below ``x / scale``; straight-through gradients.

    ``levels`` (ascending, L) and ``thresholds`` (ascending, L - 1) are in units of ``scale``. The options mean what
    they mean in :func:`fake_quantize`; the clip band is ``[levels[0], levels[-1]]``, bounds included.
    """
    return _LevelQuantize.apply(x, scale, levels, thresholds, clip_x_grad, residual_scale_grad)


# --------------------------------------------------------------------------------------------------------------------
# small helpers
# --------------------------------------------------------------------------------------------------------------------
def best_step(x: Tensor, low: int, high: int) -> float:
    """The step with the least mean squared error on ``x``, for a grid of the integers ``low .. high``; see
    :func:`fat_plugins.clipping.best_clip`, of which it is the ``high``-th part."""

    def quantized(values: Tensor, clip: Tensor) -> Tensor:
        step = clip / high
        return uniform_codes(values, step, low, high) * step

    return best_clip(x, quantized) / high


class _GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def grad_scale(x: Tensor, factor: float) -> Tensor:
    """Identity whose gradient is multiplied by ``factor`` (LSQ's g, baselines spec section 4)."""
    return _GradScale.apply(x, factor)


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, floor):
        return x.clamp_min(floor)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def positive(x: Tensor, floor: float = 1e-5) -> Tensor:
    """``max(x, floor)`` whose gradient is the identity, so that a clip pushed below the floor can come back."""
    return _Positive.apply(x, floor)


class _KeepZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x):
        return out.masked_fill(x == 0, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def keep_zeros(out: Tensor, x: Tensor) -> Tensor:
    """``out`` with zeros where ``x`` is exactly 0. The gradient of ``out`` is the identity everywhere, so that a
    learned sparsity mask still sees the weights that it has switched off."""
    return _KeepZeros.apply(out, x)


def _many_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _reduced(x: Tensor, how: Any) -> Tensor:
    x = x.clone()
    torch.distributed.all_reduce(x, op=how)
    return x


def largest_of_processes(x: Tensor) -> Tensor:
    """The elementwise maximum of ``x`` over all processes of a distributed training; ``x`` itself without one."""
    return _reduced(x, torch.distributed.ReduceOp.MAX) if _many_processes() else x


def sum_of_processes(x: Tensor) -> Tensor:
    """The elementwise sum, as :func:`largest_of_processes`."""
    return _reduced(x, torch.distributed.ReduceOp.SUM) if _many_processes() else x


def per_channel_view(x: Tensor, ndim: int, axis: int) -> Tensor:
    """Reshape a vector of channels so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions."""
    if x.numel() == 1:
        return x.reshape(())
    shape = [1] * ndim
    shape[axis] = x.numel()
    return x.reshape(shape)


def standardize(weight: Tensor, scale: bool = True) -> tuple[Tensor, Tensor]:
    """``((W - mean) / std, std)`` over the whole tensor, unbiased std, both statistics without gradient.

    FAT spec section 3, step 1. The paper's code has no guard; here a constant or one-element tensor, whose standard
    deviation is zero or undefined, is divided by its largest magnitude instead (1 when it is all zero) and keeps its
    mean, so that nothing becomes NaN (spec section 10.3).

    :param scale: ``False`` subtracts the mean only (the authors' ``UniQuantConv2d``).
    """
    with torch.no_grad():
        largest = weight.abs().max()
        # a power of two: the statistics of huge and of tiny weights neither overflow nor vanish, all others are exact
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        unit = torch.exp2(torch.floor(torch.log2(safe)).clamp_min(-100))
        scaled = weight / unit
        mean = scaled.mean()
        std = scaled.std() if weight.numel() > 1 else torch.zeros_like(mean)
        largest = largest / unit
        constant = std <= 1e-6 * largest
        mean = torch.where(constant, torch.zeros_like(mean), mean)
        bypass = torch.where(largest > 0, largest, torch.ones_like(largest))
        std = torch.where(constant, bypass, std if scale else 1 / unit)
    return (weight / unit - mean) / std, std * unit


class _Gate(torch.autograd.Function):
    """Keeps the half spectrum and the gate; the backward goes through half spectra as well (torch's own, of a real
    transform, goes through full complex ones)."""

    @staticmethod
    def forward(ctx, rows, transform):
        spectrum = torch.fft.rfft(rows, dim=1)
        gate = (transform @ spectrum.abs()).sigmoid_()
        ctx.save_for_backward(spectrum, transform, gate)
        ctx.count = rows.shape[1]
        return torch.fft.irfft(spectrum * gate, n=ctx.count, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        spectrum, transform, gate = ctx.saved_tensors
        n = ctx.count
        with torch.autocast(grad.device.type, enabled=False):
            # the one over n comes first: gradients of huge weights overflow otherwise. torch 2.8 refuses expanded
            # tensors (MKL)
            wave = torch.fft.rfft(grad.contiguous(), dim=1, norm="forward")
            # every frequency but the first, and the last of an even length, stands for two of the full spectrum
            twice = torch.full_like(gate[0], 2.0)
            twice[:1].fill_(1.0)
            if n % 2 == 0:
                twice[-1:].fill_(1.0)
            by_gate = torch.view_as_real(spectrum).mul(torch.view_as_real(wave)).sum(-1).mul_(twice)
            by_mixed = by_gate.mul_(gate).mul_(1 - gate)
            by_transform = by_mixed @ spectrum.abs().T if ctx.needs_input_grad[1] else None
            by_magnitude = (transform.T @ by_mixed).div_(twice)
            moved = wave.mul_(gate).add_(torch.sgn(spectrum).mul_(by_magnitude))
            by_rows = torch.fft.irfft(moved, n=n, dim=1, norm="forward")
        return by_rows, by_transform


def dft_gate(rows: Tensor, transform: Tensor) -> Tensor:
    """FAT's frequency gate, spec section 3 steps 3 to 8: ``Re IDFT(sigmoid(T |F|) * F)``, ``F = DFT(rows)``.

    The half spectrum of a real signal gives the same function and gradients as the full one (spec section 3, step 8).

    :param rows: C x N, one standardised filter per row.
    :param transform: C x C matrix ``T`` that mixes output channels at every frequency.
    """
    return _Gate.apply(rows, transform)
