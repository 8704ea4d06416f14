"""Gradient l1 regularization (Alizadeh et al., ICLR 2020): small gradients of what will be quantized.

Quantizing a tensor with step ``d`` moves every element by ``d / 2`` at most, which to first order raises the loss by at
most ``(d / 2) ||g||_1``, whatever the width. Abstract and introduction were read; schedule and normalisations are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import QuantizationError
from fat_plugins.functional import wide
from fat_plugins.observed import Observed, Observer, terms
from fat_plugins.penalties import Penalty, PenaltyParams
from fat_plugins.quantizer import WeightQuantizer

_CURES = (
    "gradient checkpointing needs use_reentrant=False, attention SDPBackend.MATH, quantizers may be disabled while the "
    "penalty trains"
)


class GradientL1Params(PenaltyParams):
    """Options of ``gradient_l1``."""

    lambda_weights: float = Field(0.001, ge=0, description="Weight of the gradients of weights; 0 leaves them out.")
    lambda_activations: float = Field(0.001, ge=0, description="Weight of the gradients of activations.")
    normalise: Literal["none", "numel", "step"] = Field(
        "none",
        description="'none': the sum of magnitudes, as in the paper; 'numel': their mean for each tensor; 'step': "
        "times half the step of a min-max grid, which makes it the bound on the rise of the loss.",
    )
    bits: int = Field(4, ge=2, le=8, description="normalise: step: the width of that grid where no quantizer says one.")


class GradientL1(Penalty):
    """``lambda_weights sum_l ||dL/dW_l||_1 + lambda_activations sum_l ||dL/dA_l||_1`` by double back-propagation.

    Whose gradients: see :mod:`fat_plugins.observed`. Mini-batch gradients of the loss that is given, so lambda belongs
    to a batch size. One forward of the model for each call.

    :param model: trained in float, or with quantizers; enabled ones must be twice differentiable.
    :param example: a batch; with it, what cannot be penalised is refused now, not in the first step.
    :param params: of :class:`GradientL1Params`.
    :raises ConfigError: unknown option or bad value.
    :raises QuantizationError: see :meth:`term`.
    """

    name = "gradient_l1"
    title = "Gradient l1 regularization for quantization robustness"
    paper = "Alizadeh et al.: Gradient l1 Regularization for Quantization Robustness, ICLR 2020"
    arxiv = "2002.07520"
    fidelity = "C: abstract and introduction read; the objective is confirmed by others, the recipe is ours"
    Params = GradientL1Params

    def __init__(self, model: nn.Module, *, example: Tensor | None = None, **params: Any) -> None:
        super().__init__(model, **params)
        p = self.params
        self._lambdas = {"weight": p.lambda_weights, "activation": p.lambda_activations}
        roles = {role for role, value in self._lambdas.items() if value}
        self.observer = Observer(model, roles, lambda: self._epoch is None or self.factor > 0)
        #: what was at work when the second derivative was last tried out
        self._tried: Any = None
        self._values: dict[str, Tensor] = {}
        if example is not None:
            self.try_out(example)

    def term(self, loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor | None:
        """See :meth:`Penalty.term`.

        :raises QuantizationError: no forward came before, an observed tensor was changed in place, a quantizer owns its
            weight, or something in the model has no second derivative.
        """
        if not self.observer.roles or not self.factor:
            return None
        seen = self.observer.take()
        self._check(loss, seen)
        # under autocast the products of a backward would be rounded as those of a forward
        with torch.autocast(loss.device.type, enabled=False):
            sums = self._sums(loss, seen, scaler)
        self._values = {role: total.detach() for role, total in sums.items()}
        return self.factor * torch.stack([self._lambdas[role] * total for role, total in sums.items()]).sum()

    def _sums(self, loss: Tensor, seen: list[Observed], scaler: torch.amp.GradScaler | None) -> dict[str, Tensor]:
        """The penalty of each role, scalars with their graphs."""
        scaled, scale = loss, None
        if scaler is not None and scaler.is_enabled():
            scaled, scale = scaler.scale(loss), scaler.scale(torch.ones_like(loss))
        now = tuple((q.enabled, q.calibrated, q.training) for q in self.observer.quantizers)
        first = now != self._tried
        with _watched(scaled) if first else nullcontext():
            gradients = _gradients(scaled, [s.unchanged() for s in seen])
        found = {id(s): g for s, g in zip(seen, gradients, strict=True) if g is not None}
        sums = {
            role: loss.new_zeros((), dtype=wide(loss).dtype) for role in self._lambdas if role in self.observer.roles
        }
        for group in terms(seen):
            parts = [wide(found[id(s)]) for s in group if id(s) in found]
            if not parts:  # the loss does not depend on it
                continue
            g = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            size = (g if scale is None else g / scale).abs().sum()
            sums[group[0].role] = sums[group[0].role] + size * self._factor_of(group[0])
        if scale is not None:  # the scaler leaves out a step whose gradients overflow; its loss stays a number
            sums = {role: torch.where(torch.isfinite(s), s, torch.zeros_like(s)) for role, s in sums.items()}
        if first:
            self._try_second(sums)
            self._tried = now
        return sums

    def _factor_of(self, seen: Observed) -> float | Tensor:
        """What ``normalise`` multiplies the sum of one tensor by."""
        if self.params.normalise == "none":
            return 1.0
        x = wide(seen.tensor.detach())
        if self.params.normalise == "numel":
            return 1.0 / max(x.numel(), 1)
        bits = seen.bits or self.params.bits
        signed = x.abs().amax() / max(2 ** (bits - 1) - 1, 1)
        if seen.role == "weight":
            return signed / 2
        return torch.where((x < 0).any(), signed, x.amax() / (2**bits - 1)) / 2

    # -- what cannot be done -------------------------------------------------------------------------------------------
    def _check(self, loss: Tensor, seen: list[Observed]) -> None:
        if loss.numel() != 1 or not loss.requires_grad:
            raise QuantizationError(
                f"{self.name}: expected the loss of a forward with gradient, a scalar; got a tensor of shape "
                f"{list(loss.shape)}" + ("" if loss.requires_grad else " without gradient")
            )
        for q in self.observer.quantizers:
            if isinstance(q, WeightQuantizer) and q.owns_weight and q.enabled and "weight" in self.observer.roles:
                raise QuantizationError(
                    f"{q.spec.name or self.name}: '{q.algorithm}' trains parameters of its own in the place of the "
                    f"weight; {self.name} needs lambda_weights: 0 here"
                )
        for role in sorted(self.observer.roles - {s.role for s in seen}):
            raise QuantizationError(
                f"{self.name}: the forward before this call showed no {role} with gradient; call it after each "
                f"model(...) in training, or set lambda_{role}s: 0"
            )

    def _try_second(self, sums: dict[str, Tensor]) -> None:
        """Differentiate once more, for nothing but the error."""
        total = torch.stack(list(sums.values())).sum()
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        if not total.requires_grad or not leaves:
            return
        try:
            torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise QuantizationError(f"{self.name}: no second derivative: {error}; {_CURES}") from None

    def try_out(self, example: Tensor, training: bool = False) -> None:
        """One forward and both derivatives; see :meth:`Penalty.try_out`."""
        modes = [(m, m.training) for m in self.model.modules()]
        epoch, self._epoch = self._epoch, self.params.start + self.params.warmup
        device = example.device
        try:
            for module, _ in modes:  # not train(), from which quantizers draw conclusions
                module.training = training
            with torch.enable_grad(), torch.random.fork_rng([device] if device.type != "cpu" else []):
                self.term(wide(self.model(example)).square().mean())
        finally:
            self._epoch, self._tried = epoch, None
            self._values = {}
            self.observer.take()
            for module, mode in modes:
                module.training = mode

    def values(self) -> dict[str, Tensor]:
        """``weight`` and ``activation``: the sums of the last step, normalised, before lambda."""
        return dict(self._values)

    def remove(self) -> None:
        self.observer.remove()


# --------------------------------------------------------------------------------------------------------------------
# first derivatives, and whether there is a second one
# --------------------------------------------------------------------------------------------------------------------
def _gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise QuantizationError(f"{GradientL1.name}: {error}; {_CURES}") from None


def _python_nodes(loss: Tensor) -> Iterator[Any]:
    """Nodes of the graph behind ``loss`` whose backward somebody wrote in Python."""
    ahead, known = [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield node
        ahead += [following for following, _ in node.next_functions]


@contextmanager
def _watched(loss: Tensor) -> Iterator[None]:
    """Look at the gradients that functions written in Python return inside: torch tells only of some that cannot be
    differentiated again, and of those too late.

    :raises QuantizationError: at the end, if there is one.
    """
    broken: set[str] = set()

    def look(name: str, by_inputs: Sequence[Tensor | None], by_outputs: Sequence[Tensor | None]) -> None:
        if any(g is not None and g.requires_grad for g in by_outputs):
            for g in by_inputs:
                once = g is not None and g.grad_fn is not None and g.grad_fn.name().endswith("::Error")
                if once or (g is not None and not g.requires_grad and bool(g.any())):
                    broken.add(name.removesuffix("Backward"))

    handles = [node.register_hook(partial(look, node.name())) for node in _python_nodes(loss)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        raise QuantizationError(
            f"{GradientL1.name}: {', '.join(sorted(broken))} cannot be differentiated twice; disable the quantizers "
            "while the penalty trains, or take it in float training"
        )
