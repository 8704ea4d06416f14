"""How elementwise functions run over whole tensors: in blocks that stay in the cache, fused, or as they are written.

An eager chain of a dozen elementwise operations reads and writes the tensor in main memory a dozen times. On CPU,
:func:`evaluate` therefore calls the function for one block after the other; ``torch.compile`` (the default on CUDA)
makes one kernel of it, sums included. Small tensors, unusual layouts and whatever somebody else is tracing, compiling
or transforming go through the function as it is written.
"""

from __future__ import annotations

import math
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fat_plugins.errors import ConfigError, unknown

#: ``fn(out, *tensors, *scales, *args)`` gives the values (written into ``out`` where it is no ``None``; or ``None``)
#: and a tuple of sums over the tensors, in the shape of the scales (see :func:`total`) or in one of their own
Kernel = Callable[..., tuple[Tensor | None, tuple[Tensor, ...]]]

_BACKENDS = ("auto", "eager", "compile")
#: elements of a block for each thread: some five float32 blocks fit the second-level cache of a core
_BLOCK = 2**16

_compiler = "inductor"
_block: int | None = None
_compiled: dict[tuple, Callable] = {}
_broken = False
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def set_backend(name: str, compiler: str = "inductor", block: int | None = None) -> None:
    """Choose how elementwise kernels run: ``"eager"``, ``"compile"`` or ``"auto"`` (compile on CUDA only).

    Where compilation fails, one warning says so and the eager kernels take over until the next call of this function.

    :param compiler: the backend that ``torch.compile`` uses, for machines on which its default cannot build code.
    :param block: elements that the eager kernels take at a time on CPU; ``None``: 65536 per thread, 0: all at once.
    :raises ConfigError: unknown name, or a negative block.
    """
    global _backend, _compiler, _block, _broken
    if name not in _BACKENDS:
        raise ConfigError(unknown("backend", name, _BACKENDS))
    if block is not None and block < 0:
        raise ConfigError(f"block: {block}; allowed: a number of elements, 0 for no blocks, or None")
    if compiler != _compiler:
        _compiled.clear()
    _backend, _compiler, _block, _broken = name, compiler, block, False


def get_backend() -> str:
    """The backend in force (also settable by the environment variable ``FAT_PLUGINS_BACKEND``)."""
    return _backend


set_backend(os.environ.get("FAT_PLUGINS_BACKEND", "auto"))


@contextmanager
def using_backend(name: str | None) -> Iterator[None]:
    """Another backend for a while; ``None`` changes nothing. Compiler and block stay as they are."""
    before = _backend
    if name is not None:
        set_backend(name, _compiler, _block)
    try:
        yield
    finally:
        if name is not None:
            set_backend(before, _compiler, _block)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def wide(x: Tensor) -> Tensor:
    """Half precisions are computed in float32 (codes of a bf16 tensor would otherwise be rounded twice)."""
    return x.to(_wide_dtype(x.dtype))


def no_view(x: Tensor) -> Tensor:
    """The same memory in a tensor that is no view of ``x``, for custom functions to return.

    Autograd lets nobody change a view or an input that such a function returns, as ``out += shortcut`` does.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.view_as(x)
    return x.new_empty(0).set_(x.detach())


def total(terms: Tensor, scale: Tensor) -> Tensor:
    """Sum of ``terms`` over everything that shares one element of ``scale``, in the shape of ``scale``."""
    return terms.sum_to_size(scale.shape)


def evaluate(
    fn: Kernel,
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor] = (),
    args: tuple = (),
    *,
    values: bool = True,
    block: int | None = None,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """``fn(out, *tensors, *scales, *args)`` for whole tensors, the way that the backend in force wants it.

    The function must be elementwise but for its sums, may change nothing but ``out``, and must give the same whether
    it sees everything or a part. It computes in the wide dtype of the tensors. To be compiled once, not for every
    layer, it takes numbers that differ between layers as integers or tensors, not as floats.

    :param tensors: of one shape; the values get the shape, layout and dtype of the first.
    :param scales: with one element each, or all others of one shape that has one element per channel along one axis.
    :param args: anything else; passed on as it is.
    :param values: whether the function gives values, not only sums.
    :param block: elements of a block on CPU, whatever backend and threads say, and no compilation: for functions that
        draw random numbers, block by block.
    :return: the values (or ``None``) and the sums, those of the shape of the scales flattened.
    """
    x = tensors[0]
    how = _way(x, block)
    if how is not None and (place := _Place.of(tensors, scales)) is not None:
        if how == "blocks":
            return _in_blocks(fn, tensors, scales, args, values, place, block or _block_size())
        if (found := _fused(fn, tensors, scales, args, place)) is not None:
            return found
    out, sums = fn(None, *tensors, *scales, *args)
    return out if out is None else out.to(x.dtype), sums


def _way(x: Tensor, block: int | None) -> str | None:
    """``"blocks"``, ``"compile"`` or ``None`` for a plain call."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transforms_active():
        return None
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # fake, distributed or otherwise special
        return None
    if block is None and not _broken and (_backend == "compile" or (_backend == "auto" and x.is_cuda)):
        return "compile" if x.numel() else None
    return "blocks" if x.device.type == "cpu" and x.numel() > (block or _block_size()) > 0 else None


def _block_size() -> int:
    return _BLOCK * torch.get_num_threads() if _block is None else _block


# --------------------------------------------------------------------------------------------------------------------
# where a tensor's elements and their scales are in memory
# --------------------------------------------------------------------------------------------------------------------
class _Place:
    """Tensors as they lie in memory, whatever their layout is called: 1-d, or with a scale per channel as (channels,
    inner) or (outer, channels, inner)."""

    def __init__(self, order: Sequence[int], shape: tuple[int, ...]) -> None:
        self.order, self.shape = order, shape

    @classmethod
    def of(cls, tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> _Place | None:
        """``None`` where the first tensor has gaps, or a scale does not follow one axis."""
        x = tensors[0]
        order = range(x.ndim)
        if not x.is_contiguous():
            order = sorted(order, key=lambda d: (-x.stride(d), d))
            if not x.permute(order).is_contiguous():
                return None
        if any(t.shape != x.shape for t in tensors) or any(s.dtype != _wide_dtype(x.dtype) for s in scales):
            return None
        sizes = [x.shape[d] for d in order]
        rows = {s.shape for s in scales if s.numel() != 1}
        if not rows:
            return cls(order, (x.numel(),))
        shape = rows.pop()
        axes = [x.ndim - len(shape) + i for i, n in enumerate(shape) if n > 1]
        if rows or len(axes) != 1 or axes[0] < 0 or x.shape[axes[0]] != max(shape):
            return None
        at = order.index(axes[0])
        outer, inner = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
        return cls(order, (max(shape), inner) if outer == 1 else (outer, max(shape), inner))

    def view(self, x: Tensor) -> Tensor:
        """The tensor in the shape of this place, a copy where it lies otherwise."""
        return x.detach().permute(list(self.order)).reshape(self.shape)

    def restore(self, values: Tensor, like: Tensor) -> Tensor:
        """Inverse of :meth:`view`, for values that lie as ``like`` does. No view: see :func:`no_view`."""
        values = values.contiguous()
        out = values.new_empty(0)
        return out.set_(values.untyped_storage(), values.storage_offset(), like.shape, like.stride())

    def scales(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """The scales so that they broadcast."""
        return [s.detach().reshape(() if s.numel() == 1 else (-1, 1)) for s in scales]


# --------------------------------------------------------------------------------------------------------------------
# blocks
# --------------------------------------------------------------------------------------------------------------------
def _blocks(shape: Sequence[int], size: int) -> Iterator[tuple[tuple[int | slice, ...], slice | None]]:
    """Index of every block, and which channels it has (``None``: all of them, or one scale for all)."""
    if len(shape) == 1:
        yield from (((slice(i, i + size),), None) for i in range(0, shape[0], size))
    elif len(shape) == 2:
        channels, inner = shape
        step = max(size // inner, 1)
        for i in range(0, channels, step):
            those = slice(i, i + step)
            yield from (((those, slice(j, j + size)), those) for j in range(0, inner, size))
    elif math.prod(shape[1:]) <= size:
        step = size // math.prod(shape[1:])
        yield from (((slice(i, i + step),), None) for i in range(0, shape[0], step))
    else:
        for i in range(shape[0]):
            yield from (((i, *index), those) for index, those in _blocks(shape[1:], size))


def row_blocks(x: Tensor) -> list[slice]:
    """Rows of a matrix to take at a time, for loops that :func:`evaluate` does not fit; all of them where it would not
    take blocks either."""
    rows = len(x)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
        return [slice(0, rows)]
    size = _block_size() or x.numel()
    step = max(size // max(x.shape[1], 1), 1)
    return [slice(i, i + step) for i in range(0, rows, step)]


def _in_blocks(fn: Kernel, tensors, scales, args, values: bool, place: _Place, size: int):
    x = tensors[0]
    seen, rows = [place.view(t) for t in tensors], place.scales(scales)
    result = torch.empty_like(x) if values else None
    out = place.view(result) if values else None
    direct = _wide_dtype(x.dtype) == x.dtype
    sums: list[Tensor] = []
    for index, those in _blocks(place.shape, size):
        here = rows if those is None else [r[those] if r.ndim else r for r in rows]
        slot = out[index] if values else None
        found, terms = fn(slot if direct else None, *(t[index] for t in seen), *here, *args)
        if values and found is not slot:
            slot.copy_(found)
        if not sums:  # float64: the blocks of a huge tensor are many
            shapes = (t.shape if those is None else (place.shape[-2], 1) for t in terms)
            sums = [t.new_zeros(s, dtype=torch.float64) for t, s in zip(terms, shapes, strict=True)]
        for sum_, term in zip(sums, terms, strict=True):
            (sum_ if those is None else sum_[those]).add_(term)
    return result, tuple(s.to(t.dtype) for s, t in zip(sums, terms, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------------------------------
def _static(arg: Any) -> Any:
    """What of an argument the compiler builds in: torch takes 0 and 1 for constants, other integers for variables."""
    if isinstance(arg, Tensor):
        return tuple(arg.shape), arg.dtype
    return arg if isinstance(arg, (bool, str, tuple, type(None))) or arg in (0, 1) else type(arg)


def _fused(fn: Kernel, tensors, scales, args, place: _Place):
    """The same in one kernel; ``None`` where it cannot be built."""
    global _broken
    seen, rows = [place.view(t) for t in tensors], place.scales(scales)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    kinds = ((t.ndim, t.dtype) for t in (*seen, *rows))
    key = (fn, *kinds, *(_static(a) for a in args))
    if key not in _compiled:
        # dynamo counts recompilations by code object, and gives up after a few: one for every key
        code = fn.__code__.replace(co_name=f"{fn.__name__}_{len(_compiled)}")
        own = types.FunctionType(code, fn.__globals__, code.co_name, fn.__defaults__, fn.__closure__)
        _compiled[key] = torch.compile(own, dynamic=True, backend=_compiler)
    try:
        out, sums = _compiled[key](None, *seen, *rows, *args)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever compilers raise; a fault of the function itself shows again in the eager call
        _broken = True
        reason = (str(e).strip().splitlines() or [""])[0]
        warnings.warn(
            f"torch.compile ({_compiler}) failed: {type(e).__name__}: {reason}; kernels run eagerly from now on",
            stacklevel=2,
        )
        return None
    return out if out is None else place.restore(out.to(tensors[0].dtype), tensors[0]), sums
