"""The tensors of a forward that are quantized, or would be: with their graphs, for terms of a loss.

Of a model with quantizers of this package, whatever host placed them, these are the inputs of its quantizers. Of any
other model they are the weights of its convolutions and linear layers, and the inputs of these layers, which is where
hosts put activation quantizers. What carries no gradient (images, frozen weights) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fat_plugins.errors import QuantizationError
from fat_plugins.network import named_quantizers
from fat_plugins.quantizer import Quantizer, Role

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Observed:
    """One tensor of the forward.

    :param path: of the layer or quantizer in the model.
    :param owner: what it is called in messages.
    :param tensor: with its graph.
    :param version: of its memory when it was seen.
    :param bits: width of its quantizer, ``None`` where there is none.
    """

    path: str
    owner: str
    role: Role
    tensor: Tensor
    version: int
    bits: int | None

    def unchanged(self) -> Tensor:
        """The tensor.

        :raises QuantizationError: something was written into it since.
        """
        if self.tensor._version != self.version:
            raise QuantizationError(
                f"{self.owner}: its {self.role} is changed in place after it was read, and its gradient with it; "
                "build the model without in-place operations, or call fat_plugins.observed.without_inplace(model)"
            )
        return self.tensor


class _Hook:
    """Hands on what a module gets. In a copy of the model it does nothing: what it tells belongs to the original."""

    def __init__(self, tell: Callable[..., None] | None) -> None:
        self.tell = tell

    def __call__(self, *args: Any) -> None:
        if self.tell is not None:
            self.tell(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class Observer:
    """Hooks that collect the tensors of the model's last forward with gradient.

    :param roles: which ones; without any, nothing is hooked into the model.
    :param wanted: asked before each forward whether it is of interest; default: always.
    """

    def __init__(self, model: nn.Module, roles: set[Role], wanted: Callable[[], bool] = lambda: True) -> None:
        self.roles, self._wanted = roles, wanted
        self.quantizers: list[Quantizer] = [q for _, q in named_quantizers(model)]
        #: by identity of the tensor; a layer that runs twice, or two that share a weight or an input, are seen once
        self._seen: dict[int, Observed] = {}
        self._on = False
        self._handles: list[Any] = []
        if not roles:
            return
        self._handles = [
            # a forward that autograd repeats (gradient checkpointing) does not come through the whole model
            model.register_forward_pre_hook(_Hook(self._begin)),
            model.register_forward_hook(_Hook(self._end)),
        ]
        for name, module in model.named_modules():
            if self.quantizers:
                if isinstance(module, Quantizer) and module.role in roles:
                    self._before(module, name)
            elif isinstance(module, _LAYERS):
                self._before(module, name)
                if "weight" in roles and parametrize.is_parametrized(module, "weight"):
                    hook = _Hook(lambda _module, _args, out, name=name: self._see(name, "weight", out))
                    self._handles.append(module.parametrizations.weight.register_forward_hook(hook))

    def _before(self, module: nn.Module, name: str) -> None:
        tell = self._quantizer if isinstance(module, Quantizer) else self._layer
        hook = _Hook(lambda module, args, kwargs: tell(name, module, (*args, *kwargs.values())))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.clear()
        self._on = torch.is_grad_enabled() and self._wanted()

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._on = False

    def _quantizer(self, name: str, quantizer: Quantizer, args: tuple[Any, ...]) -> None:
        self._see(name, quantizer.role, args[0], quantizer)

    def _layer(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if "weight" in self.roles and not parametrize.is_parametrized(layer, "weight"):
            self._see(name, "weight", layer.weight)
        if "activation" in self.roles and args:
            self._see(name, "activation", args[0])

    def _see(self, path: str, role: Role, tensor: Any, quantizer: Quantizer | None = None) -> None:
        if self._on and isinstance(tensor, Tensor) and tensor.requires_grad:
            owner, bits = (path, None) if quantizer is None else (quantizer.spec.name or path, quantizer.bits)
            self._seen.setdefault(id(tensor), Observed(path, owner, role, tensor, tensor._version, bits))

    def take(self) -> list[Observed]:
        """What the last forward has shown, in its order; the second time nothing."""
        found = list(self._seen.values())
        self._seen.clear()
        return found

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()


def terms(found: list[Observed]) -> Iterator[list[Observed]]:
    """The terms of a sum over tensors: the weights that one owner has read are one (behind a mask every reading is a
    tensor of its own), every activation is another."""
    weights: dict[str, list[Observed]] = {}
    for seen in found:
        if seen.role == "weight":
            weights.setdefault(seen.path, []).append(seen)
        else:
            yield [seen]
    yield from weights.values()


def without_inplace(model: nn.Module) -> nn.Module:
    """Switch off ``inplace`` in all modules of ``model`` that have it (ReLU, dropout); the same model comes back.

    In-place operators in the code of a ``forward`` (``out += x``) are out of reach.
    """
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return model


__all__ = ["Observed", "Observer", "terms", "without_inplace"]
