"""The rewrite ``reparameterize``: blocks with parallel branches become the one convolution that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Params
from fat_plugins.rewrites import Rewrite, RewriteReport, layer_of

#: what blocks call the method that merges their branches in place: timm's and ours, the authors' of RepVGG and YOLOv6
METHODS = ("reparameterize", "switch_to_deploy")
#: how far outputs may move, as a part of the largest
_TOLERANCE = 1e-3


def _merge(block: nn.Module) -> None:
    next(getattr(block, m) for m in METHODS if callable(getattr(block, m, None)))()


def _merges(block: nn.Module) -> bool:
    return any(callable(getattr(block, m, None)) for m in METHODS)


class Reparameterize(Rewrite):
    """Registry entry. Calls the method of every block that has one, outer blocks first."""

    name = "reparameterize"
    title = "Merge of parallel branches and their batch norms"
    paper = "Ding et al.: RepVGG, CVPR 2021"
    arxiv = "2101.03697"
    fidelity = "folklore: linear algebra; each block brings its own method"
    Params = Params

    @classmethod
    def apply(cls, model: nn.Module, params: Params, example_input: Tensor | None = None) -> RewriteReport:
        """Merge, and compare the outputs for ``example_input``.

        :raises ConfigError: nothing in the model merges, or its outputs are others afterwards.
        """
        before = _outputs(model, example_input)
        report = RewriteReport(cls.name, params.model_dump())
        done: list[str] = []
        for name, block in list(model.named_modules()):
            if _merges(block) and not any(name.startswith(f"{outer}." if outer else "") for outer in done):
                _merge(block)
                done.append(name)
                report.changed[name] = {"class": type(block).__name__}
        if not done:
            raise ConfigError(f"reparameterize: no block of the model has a method {' or '.join(METHODS)}")
        after = _outputs(model, example_input)
        if before is not None and after is not None:
            moved, largest = float((after - before).abs().max()), float(before.abs().max())
            if not moved <= _TOLERANCE * largest:
                raise ConfigError(
                    f"reparameterize: outputs of the merged model differ by {moved:.3g}, of {largest:.3g} at most"
                )
        return report

    @classmethod
    def rebuild(cls, model: nn.Module, params: Params, changed: dict[str, dict[str, Any]]) -> None:
        for name in changed:
            block = layer_of(model, name)
            if not _merges(block):
                raise ConfigError(f"reparameterize: layer '{name}' has no method {' or '.join(METHODS)}")
            _merge(block)


@torch.no_grad()
def _outputs(model: nn.Module, example_input: Tensor | None) -> Tensor | None:
    """What the model gives in evaluation mode, if it is one tensor."""
    if example_input is None:
        return None
    modes = {module: module.training for module in model.modules()}
    try:
        out = model.eval()(example_input)
    finally:
        for module, training in modes.items():
            module.training = training
    return out if isinstance(out, Tensor) else None
