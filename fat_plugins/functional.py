"""Pure tensor functions shared by the algorithms. No state, no host, no synchronisation with the device.

The two fake-quantization functions are single ``autograd.Function`` nodes with hand-derived backwards that keep only
the input and the scale (the codes are recomputed). Their elementwise bodies are plain functions, so the same code runs
eagerly or fused by ``torch.compile`` (see :func:`set_backend`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from fat_plugins.errors import ConfigError, unknown

_BACKENDS = ("auto", "eager", "compile")
_compiler = "inductor"
_compiled: dict[Callable, Callable] = {}


def set_backend(name: str, compiler: str = "inductor") -> None:
    """Choose how elementwise kernels run: ``"eager"``, ``"compile"`` or ``"auto"`` (compile on CUDA only).

    :param compiler: the backend that ``torch.compile`` uses, for machines on which its default cannot build code.
    :raises ConfigError: unknown name.
    """
    global _backend, _compiler
    if name not in _BACKENDS:
        raise ConfigError(unknown("backend", name, _BACKENDS))
    if compiler != _compiler:
        _compiled.clear()
    _backend, _compiler = name, compiler


def get_backend() -> str:
    """The backend in force (also settable by the environment variable ``FAT_PLUGINS_BACKEND``)."""
    return _backend


set_backend(os.environ.get("FAT_PLUGINS_BACKEND", "auto"))


def _dispatch(fn: Callable, x: Tensor) -> Callable:
    if _backend == "eager" or (_backend == "auto" and not x.is_cuda) or torch.jit.is_tracing():
        return fn
    if torch.compiler.is_compiling():  # already being fused by the caller's own torch.compile
        return fn
    if fn not in _compiled:
        _compiled[fn] = torch.compile(fn, dynamic=True, backend=_compiler)
    return _compiled[fn]


def fused(fn: Callable, x: Tensor) -> Callable:
    """``fn``, an elementwise function of tensors, as the backend in force runs it on tensors like ``x``."""
    return _dispatch(fn, x)


def wide(x: Tensor) -> Tensor:
    """Half precisions are computed in float32 (codes of a bf16 tensor would otherwise be rounded twice)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --------------------------------------------------------------------------------------------------------------------
# uniform grid
# --------------------------------------------------------------------------------------------------------------------
def uniform_codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Integer codes (kept in a float dtype) ``round_half_even(clip(x / scale, low, high))``.

    Shapes: ``x`` any, ``scale`` broadcastable to ``x``; the result has the shape of ``x``.
    """
    return torch.round((wide(x) / scale).clamp(low, high))


def _fq_forward(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    if torch.jit.is_tracing():  # exporters read plain operations more surely than in-place ones
        return (uniform_codes(x, scale, low, high) * scale).to(x.dtype)
    return torch.div(wide(x), scale).clamp_(low, high).round_().mul_(scale).to(x.dtype)


def _band(r: Tensor, clipped: Tensor, low: int, high: int, inclusive: bool) -> Tensor:
    """1.0 inside the clip band, 0.0 outside. A factor: on CPU torch.where costs several times a multiplication."""
    inside = (r == clipped) if inclusive else ((r > low) & (r < high))
    return inside.to(r.dtype)


def _fq_backward(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, clip_x: bool, residual: bool, inclusive: bool
) -> tuple[Tensor, Tensor]:
    g = wide(grad)
    r = torch.div(wide(x), scale)
    clipped = r.clamp(low, high)
    band = _band(r, clipped, low, high, inclusive)
    # inside the band clipped is r, outside it is a bound, which rounding leaves alone
    grad_scale = (torch.round(clipped) if residual else clipped) - clipped * band
    grad_x = (g * band).to(x.dtype) if clip_x else grad
    return grad_x, grad_scale.mul_(g)


def _fq_backward_x(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, clip_x: bool, residual: bool, inclusive: bool
) -> Tensor:
    """The gradient of ``x`` alone, for scales that nothing learns."""
    if not clip_x:
        return grad
    r = torch.div(wide(x), scale)
    return grad * _band(r, r.clamp(low, high), low, high, inclusive).to(grad.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, low, high, clip_x, residual, inclusive):
        ctx.save_for_backward(x, scale)
        ctx.args = (low, high, clip_x, residual, inclusive)
        return _dispatch(_fq_forward, x)(x, scale, low, high)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return _dispatch(_fq_backward_x, x)(grad, x, scale, *ctx.args), None, None, None, None, None, None
        grad_x, grad_scale = _dispatch(_fq_backward, x)(grad, x, scale, *ctx.args)
        return grad_x, grad_scale.sum_to_size(scale.shape).to(scale.dtype), None, None, None, None, None


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


def _levels_forward(x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    values = levels[level_index(x, scale, thresholds)].to(scale.dtype) * scale
    # NaN must stay visible, as it does on a uniform grid
    return torch.where(torch.isnan(x), x, values.to(x.dtype))


def _levels_backward(
    grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, thresholds: Tensor, clip_x: bool, residual: bool
) -> tuple[Tensor, Tensor]:
    g, r = wide(grad), wide(x) / scale
    clipped = torch.minimum(torch.maximum(r, levels[0].to(r.dtype)), levels[-1].to(r.dtype))
    band = (r == clipped).to(r.dtype)
    if residual:  # outside the band the nearest level is the bound
        grad_scale = levels[_index(r, thresholds)].to(r.dtype) - clipped * band
    else:
        grad_scale = clipped - clipped * band
    return (g * band).to(x.dtype) if clip_x else grad, grad_scale.mul_(g)


class _LevelQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, levels, thresholds, clip_x, residual):
        ctx.save_for_backward(x, scale, levels, thresholds)
        ctx.args = (clip_x, residual)
        return _dispatch(_levels_forward, x)(x, scale, levels, thresholds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale, levels, thresholds = ctx.saved_tensors
        grad_x, grad_scale = _dispatch(_levels_backward, x)(grad, x, scale, levels, thresholds, *ctx.args)
        return grad_x, grad_scale.sum_to_size(scale.shape).to(scale.dtype), None, None, None, None


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
#: of :func:`best_step`
_SAMPLES, _CANDIDATES = 2**16, 100


def best_step(x: Tensor, low: int, high: int) -> float:
    """The step with the least mean squared error on ``x``, among hundredths of the one that reaches the largest value.

    Looks at 65536 evenly spaced elements at most.
    """
    flat = x.reshape(-1)
    largest = flat.abs().max()
    if not bool(largest > 0):
        return 0.0
    flat = flat[:: max(1, -(-flat.numel() // _SAMPLES))] / largest
    steps = torch.arange(1, _CANDIDATES + 1, device=x.device, dtype=flat.dtype) / (_CANDIDATES * high)
    errors = [((flat / s).round_().clamp_(low, high).mul_(s) - flat).square_().mean() for s in steps]
    return float(steps[int(torch.stack(errors).argmin())]) * float(largest)


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


def largest_of_processes(x: Tensor) -> Tensor:
    """The elementwise maximum of ``x`` over all processes of a distributed training; ``x`` itself without one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        x = x.clone()
        distributed.all_reduce(x, op=distributed.ReduceOp.MAX)
    return x


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


def dft_gate(rows: Tensor, transform: Tensor) -> Tensor:
    """FAT's frequency gate, spec section 3 steps 3 to 8: ``Re IDFT(sigmoid(T |F|) * F)``, ``F = DFT(rows)``.

    The half spectrum of a real signal gives the same function and gradients as the full one (spec section 3, step 8).

    :param rows: C x N, one standardised filter per row.
    :param transform: C x C matrix ``T`` that mixes output channels at every frequency.
    """
    spectrum = torch.fft.rfft(rows, dim=1)
    gate = torch.sigmoid(transform @ spectrum.abs())
    return torch.fft.irfft(spectrum * gate, n=rows.shape[1], dim=1)
