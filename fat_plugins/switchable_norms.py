"""Batch norms with statistics and affine parameters of their own for every bit width of a model.

Activations at 2 bits have other moments than at 8: a norm that saw both would fit neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, StrictInt, field_validator
from torch import Tensor, nn

from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Params, check_width
from fat_plugins.rewrites import Rewrite, RewriteReport, layer_of, replace_layer

_PARAMETERS = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class SwitchableNorm:
    """What all switchable batch norms share; the classes below add the number of dimensions.

    ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked`` are those of the active width;
    the tensors themselves are called ``weight_8`` and so on. To torch, hosts and tracers it is a batch norm: one call
    of ``batch_norm`` in a module whose name does not depend on the width. The active width is a mode, as ``training``
    is, and no part of the state dict. A state dict of a plain batch norm loads too, into all widths.

    :param norm: a batch norm with running statistics; every width starts as it is, and its tensors serve the first.
    :param widths: distinct bit widths.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, widths: Sequence[int]) -> None:
        nn.Module.__init__(self)  # a batch norm's own would register the tensors of a single width
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.affine, self.track_running_stats = norm.affine, True
        self.widths = tuple(sorted(widths, reverse=True))
        self.active_bits = self.widths[0]
        for bits in self.widths:
            for name in _PARAMETERS:
                own = getattr(norm, name)
                copied = own if own is None or bits == self.widths[0] else nn.Parameter(own.detach().clone())
                if copied is not own:
                    copied.requires_grad_(own.requires_grad)
                self.register_parameter(f"{name}_{bits}", copied)
            for name in _STATISTICS:
                self.register_buffer(f"{name}_{bits}", getattr(norm, name).detach().clone())
        self.train(norm.training)

    def set_active_bits(self, bits: int, where: str = "batch norm") -> None:
        """Normalise as of this width from now on.

        :raises QuantizationError: ``bits`` is none of :attr:`widths`; ``where`` says whose they are.
        """
        check_width(bits, self.widths, where)
        self.active_bits = bits

    def _active(self, name: str) -> Any:
        return getattr(self, f"{name}_{self.active_bits}")

    weight = property(lambda self: self._active("weight"))
    bias = property(lambda self: self._active("bias"))
    running_mean = property(lambda self: self._active("running_mean"))
    running_var = property(lambda self: self._active("running_var"))
    num_batches_tracked = property(lambda self: self._active("num_batches_tracked"))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name in (*_PARAMETERS, *_STATISTICS):
            plain = state_dict.pop(prefix + name, None) if prefix + name in state_dict else None
            for bits in self.widths if plain is not None else ():
                state_dict.setdefault(f"{prefix}{name}_{bits}", plain)
        # not a batch norm's own, which would ask for the counter of a single width
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, bits={self.active_bits} of {list(self.widths)}"


class SwitchableBatchNorm1d(SwitchableNorm, nn.BatchNorm1d):
    """See :class:`SwitchableNorm`; N x C or N x C x L."""


class SwitchableBatchNorm2d(SwitchableNorm, nn.BatchNorm2d):
    """See :class:`SwitchableNorm`; N x C x H x W."""


class SwitchableBatchNorm3d(SwitchableNorm, nn.BatchNorm3d):
    """See :class:`SwitchableNorm`; N x C x D x H x W."""


#: batch norms that have a switchable counterpart; subclasses of them may compute something else
KINDS: dict[type[nn.Module], type[SwitchableNorm]] = {
    nn.BatchNorm1d: SwitchableBatchNorm1d,
    nn.BatchNorm2d: SwitchableBatchNorm2d,
    nn.BatchNorm3d: SwitchableBatchNorm3d,
}


def switchable(norm: nn.Module, widths: Sequence[int]) -> nn.Module:
    """The switchable counterpart of a batch norm; another module, and a norm without statistics, as it is.

    :raises ConfigError: ``widths`` is empty, or one of them stands in it twice.
    """
    if not widths or len(set(widths)) != len(widths):
        raise ConfigError(f"bit_set: {list(widths)}; allowed: distinct bit widths, at least one")
    kind = KINDS.get(type(norm))
    return norm if kind is None or norm.running_mean is None else kind(norm, widths)


def norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of all batch norms by name, at all of their widths."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            own = module.named_buffers(name, recurse=False)
            found.update({k: v for k, v in own if torch.is_floating_point(v)})
    return found


class SwitchableNormParams(Params):
    """Options of the rewrite ``switchable_norm``."""

    bit_set: list[Annotated[StrictInt, Field(ge=1, le=32)]] = Field(
        min_length=1, max_length=32, description="Bit widths that have statistics and affine parameters of their own."
    )

    @field_validator("bit_set")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError(f"{value} repeat each other")
        return value


class SwitchableNormRewrite(Rewrite):
    """Every batch norm of a float network becomes switchable, and computes what it did until some width is trained."""

    name = "switchable_norm"
    title = "Batch norms with statistics and affine parameters for each of several bit widths"
    paper = "Jin, Yang, Liao: AdaBits, CVPR 2020; Yu et al.: Any-Precision Deep Neural Networks, AAAI 2021"
    fidelity = "folklore: the practice of both papers as the specification words it; neither was read"
    Params = SwitchableNormParams

    @classmethod
    def apply(cls, model: nn.Module, params: SwitchableNormParams, example_input: Tensor | None) -> RewriteReport:
        """:raises ConfigError: there is no batch norm with running statistics."""
        report = RewriteReport(cls.name, params.model_dump(mode="json"))
        for name, norm in list(model.named_modules()):
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            new = switchable(norm, params.bit_set)
            if new is norm:
                reason = "it has no running statistics" if norm.running_mean is None else "no class of torch.nn itself"
                report.left[name] = reason
                continue
            replace_layer(model, name, new)
            report.changed[name] = {"channels": norm.num_features}
        if not report.changed:
            raise ConfigError("switchable_norm: the model has no batch norm with running statistics; leave it out")
        return report

    @classmethod
    def rebuild(cls, model: nn.Module, params: SwitchableNormParams, changed: dict[str, dict[str, Any]]) -> None:
        """:raises ConfigError: a layer of ``changed`` is no batch norm of the model that could be switchable."""
        for name in changed:
            norm = layer_of(model, name, nn.modules.batchnorm._BatchNorm)
            new = switchable(norm, params.bit_set)
            if new is norm:
                raise ConfigError(f"layer {name!r} is a {type(norm).__name__}, of which there is no switchable form")
            replace_layer(model, name, new)


__all__ = ["KINDS", "SwitchableNorm", "SwitchableNormRewrite", "norm_statistics", "switchable"]
