"""The quantizers of BiTAT: one-bit weights and RSign activations. What makes them wait, train and stay fixed is the
coordinator in ``stages.py``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms.bitat.maths import ALPHA_FLOOR, Moments, groups_of, input_rows, sign, to_columns
from fat_plugins.errors import QuantizationError
from fat_plugins.forms import Codebook, Form, Staircase
from fat_plugins.functional import per_channel_view, positive, wide
from fat_plugins.kernels import evaluate, total
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer


class BiTATParams(Params):
    """Options of ``"algorithm": "bitat"`` (JSON section ``params``)."""

    alpha: Literal["learned", "mean_abs"] = Field(
        "learned", description="Scale of a filter: a parameter, or ReActNet's mean |weight| without gradient."
    )
    mode: Literal["exact", "penalty"] = Field(
        "exact", description="How the trained transform stays orthonormal: by a Cayley map, or by a penalty."
    )
    train_transform: bool = Field(True, description="Train importance and basis; false keeps the PCA (ablation).")
    error_weight: float = Field(1.0, ge=0, description="lambda: factor on the relative error J of the block.")
    l1_weight: float = Field(0.0, ge=0, description="gamma: factor on the mean |weight| of the layer in training.")
    basis_penalty: float = Field(1.0, ge=0, description="mu_V, mode 'penalty': factor on ||V'V - I||^2 / D.")
    importance_penalty: float = Field(1.0, ge=0, description="mu_s, mode 'penalty': factor on the drift of sum log s.")
    block_size: int = Field(3, ge=1, le=8, description="Consecutive layers whose errors share one basis.")
    max_dimensions: int = Field(256, ge=2, description="k_max: more inputs per output are aggregated into as many.")
    floor: float = Field(1e-4, gt=0, description="eps: smallest squared importance.")
    epochs_per_layer: int | None = Field(
        None, ge=1, description="N_ep: epochs per stage; null takes 0.7 of the run for all stages together."
    )
    act_schedule: Literal["progressive", "first"] = Field(
        "progressive", description="Binarize a layer's input with its stage, or all inputs before any weight."
    )
    activation_epochs: int | None = Field(
        None, ge=1, description="act_schedule 'first': epochs before the first stage; null: as a stage."
    )
    joint_finetune: bool = Field(False, description="Final phase: train all signs again, without the error term.")
    calibration_samples: int = Field(1024, ge=1, description="Samples for the input statistics of a stage.")
    seed: int = Field(0, ge=0, description="Seed of the aggregation's k-means.")


# --------------------------------------------------------------------------------------------------------------------
# autograd
# --------------------------------------------------------------------------------------------------------------------
def _signs(x: Tensor, above: Tensor) -> Tensor:
    """-1 and +1 from ``above`` (0 and 1, overwritten); NaN where ``x`` is NaN."""
    return x.clamp(-1, 1).mul_(0).add_(above.mul_(2).sub_(1))


def _binary(out, theta: Tensor, alpha: Tensor):
    theta = wide(theta)
    return torch.mul(_signs(theta, theta.clone().ge_(0)), alpha, out=out), ()


def _binary_backward(out, grad: Tensor, theta: Tensor, alpha: Tensor):
    g, theta = wide(grad), wide(theta)
    by_alpha = theta.clone().ge_(0).mul_(2).sub_(1).mul_(g)
    return torch.mul(theta.abs().le_(1), g, out=out), (total(by_alpha, alpha),)


class _BinaryWeight(torch.autograd.Function):
    """``alpha * sgn(theta)``; section 4.1: ``dtheta = G [|theta| <= 1]``, ``dalpha = sum G sgn(theta)``."""

    @staticmethod
    def forward(ctx, theta, alpha):
        ctx.save_for_backward(theta, alpha)
        return evaluate(_binary, (theta,), (alpha,))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        theta, alpha = ctx.saved_tensors
        by_theta, (by_alpha,) = evaluate(_binary_backward, (grad, theta), (alpha,))
        need_theta, need_alpha = ctx.needs_input_grad
        return by_theta if need_theta else None, by_alpha.reshape(alpha.shape) if need_alpha else None


def _above(out, x: Tensor, beta: Tensor, threshold: Tensor):
    x = wide(x)
    signs = _signs(x, torch.gt(x, threshold, out=torch.empty_like(x)))
    return signs if out is None else out.copy_(signs), ()


def _above_backward(out, grad: Tensor, x: Tensor, beta: Tensor):
    slope = torch.add(wide(x), beta).abs_().mul_(-2).add_(2).clamp_(min=0)
    slope = torch.nan_to_num_(slope, nan=0.0).mul_(wide(grad))
    return slope if out is None else out.copy_(slope), (total(slope, beta),)


class _Sign(torch.autograd.Function):
    """+1 above the threshold that stands for ``x >= -beta``, else -1; section 5: ``du = g max(0, 2 - 2|u|)``."""

    @staticmethod
    def forward(ctx, x, beta, threshold):
        ctx.save_for_backward(x, beta)
        return evaluate(_above, (x,), (beta, threshold))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, beta = ctx.saved_tensors
        by_x, (by_beta,) = evaluate(_above_backward, (grad, x), (beta,))
        return by_x, by_beta.reshape(beta.shape), None


class _Hold(torch.autograd.Function):
    """The identity of ``x`` that gives ``parameter`` a gradient of zero: what a stage holds still takes part in every
    backward, so that DistributedDataParallel needs no special mode."""

    @staticmethod
    def forward(ctx, x, parameter):
        ctx.shape, ctx.options = parameter.shape, {"dtype": parameter.dtype, "device": parameter.device}
        return x.clone()  # a view could not be changed in place, as residual networks do

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros(ctx.shape, **ctx.options)


def resize(module: nn.Module, names: tuple[str, ...], state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give tensors whose shapes follow the data the shapes that a state dict has for them, in place."""
    for name in names:
        saved, own = state_dict.get(prefix + name), getattr(module, name)
        if saved is not None and saved.shape != own.shape:
            own.data = torch.zeros(saved.shape, dtype=own.dtype, device=own.device)


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
#: what a weight does: follow its own parameter (STE), wait in float for its stage, be fixed, be fixed but for alpha
FREE, WAITING, FIXED, SCALES = range(4)


class BiTATWeight(WeightQuantizer):
    """``alpha * sgn(theta)`` with the host's weight as theta (section 4.1).

    Parameter: ``alpha``, one per output channel (or one, ``per_channel: false``); with ``alpha: mean_abs`` a buffer
    that the mean of the weight overrides. Evaluation gives the deployed values in every phase, also before the stage
    of the layer.
    """

    params: BiTATParams
    needs_input = True
    has_zero = False

    def __init__(self, spec: TensorSpec, params: BiTATParams) -> None:
        super().__init__(spec, params)
        channels = 1 if spec.per_channel is False else spec.shape[spec.channel_axis]
        if params.alpha == "learned":
            self.alpha = nn.Parameter(torch.ones(channels))
        else:
            self.register_buffer("alpha", torch.ones(channels))
        self.register_buffer("phase", torch.tensor(FREE))
        #: signs (int8) and scales of a layer whose stage is over, whatever an optimizer does to the parameters
        self.register_buffer("signs", torch.zeros(0, dtype=torch.int8))
        self.register_buffer("kept", torch.zeros(0))
        self._phase = FREE
        #: in a calibration pass of the coordinator: waiting weights are float although the model evaluates
        self.probing = False
        self._moments: Moments | None = None

    # -- state -------------------------------------------------------------------------------------------------------
    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        resize(self, ("signs", "kept"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "phase" in state_dict:
            self._phase = int(state_dict[prefix + "phase"])

    def set_phase(self, phase: int) -> None:
        """Change what the layer does; the tensors are the coordinator's business."""
        self._phase = phase
        self.phase.fill_(phase)

    def init_from_weight(self, weight: Tensor) -> None:
        """``alpha = mean |w|`` and the weight's own signs: the solution for inputs of which nothing is known."""
        self.alpha.copy_(self._mean_abs(weight))
        self.begin()

    def begin(self) -> None:
        """Follow the weight straight-through from now on."""
        self.set_phase(FREE)
        self.signs, self.kept = self.signs.new_zeros(0), self.kept.new_zeros(0)

    @torch.no_grad()
    def fix(self, weight: Tensor) -> None:
        """End of the layer's stage: signs and scales stay as they are from now on."""
        self.kept = self._scale(weight).detach().clone()
        self.signs = sign(weight).to(torch.int8).contiguous()
        self.set_phase(FIXED)

    @torch.no_grad()
    def release(self, weight: Tensor, signs: bool) -> None:
        """Final phase: train the scales, and with ``signs`` the weight again, from where its stage left them."""
        self.alpha.copy_(self.kept)
        if signs:
            weight.copy_(self.signs * weight.abs())
        self.set_phase(FREE if signs else SCALES)

    # -- input statistics --------------------------------------------------------------------------------------------
    @property
    def wants_input(self) -> bool:
        """Only while the coordinator begins the stage of the layer."""
        return self._moments is not None

    def collect(self) -> None:
        """Gather the statistics of section 3.1 from now on."""
        d = to_columns(torch.empty(self.spec.shape, device="meta"), self.spec).shape[1]
        self._moments = Moments(groups_of(self.spec), d, self.alpha.device)

    def collected(self) -> Moments:
        """End of :meth:`collect`."""
        moments, self._moments = self._moments, None
        return moments

    @torch.no_grad()
    def observe_input(self, x: Tensor) -> None:
        """``x``: input of the layer. Ignored unless the statistics are being gathered."""
        if self._moments is not None:
            self._moments.add(input_rows(x, self.spec))

    # -- values ------------------------------------------------------------------------------------------------------
    def _mean_abs(self, weight: Tensor) -> Tensor:
        rows = weight.detach().abs().movedim(self.spec.channel_axis, 0)
        rows = rows.reshape(rows.shape[0], -1)
        # float64: the sum of huge weights must not overflow
        return rows.double().mean(1 if self.alpha.numel() > 1 or len(rows) == 1 else (0, 1)).reshape(-1).to(rows.dtype)

    def _scale(self, weight: Tensor) -> Tensor:
        """Scales, 1-d, at least float32 and 1e-8."""
        if self._phase == FIXED:
            return wide(self.kept)
        if self._phase == WAITING or self.params.alpha == "mean_abs":
            return wide(self._mean_abs(wide(weight))).clamp_min(ALPHA_FLOOR)
        return positive(wide(self.alpha), ALPHA_FLOOR)

    def _latent(self, weight: Tensor) -> Tensor:
        return self.signs.to(wide(weight).dtype) if self._phase in (FIXED, SCALES) else weight

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 4.1; the weight itself while the layer waits for its stage in training."""
        if self._phase == WAITING and (self.training or self.probing):
            return self._hold(weight)
        scale = per_channel_view(self._scale(weight), weight.ndim, self.spec.channel_axis)
        out = _BinaryWeight.apply(self._latent(weight), scale).to(weight.dtype)
        if self._phase in (FIXED, SCALES):
            out = _Hold.apply(out, weight)
        return out if scale.requires_grad else self._hold(out)

    def _hold(self, out: Tensor) -> Tensor:
        return _Hold.apply(out, self.alpha) if self.alpha.requires_grad else out

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._scale(weight).detach()

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Section 8: sign bits and scales; theta, V and s are gone."""
        levels = torch.tensor([-1, 1], device=weight.device)
        form = Codebook(1, levels, self._scale(weight).detach(), self.spec.channel_axis)
        return FrozenTensor((self._latent(weight) >= 0).to(torch.int32), form)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay on the scales (section 7: none at all once weights are binary)."""
        learned = list(self.parameters())
        return [{"params": learned, "lr": lr, "weight_decay": 0.0}] if learned else []


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class BiTATActivation(ActivationQuantizer):
    """RSign, section 5: ``sgn(x + beta)``, levels -1 and +1, no scale. Parameter: ``beta``, one per channel (or one).

    Evaluation gives the deployed signs in every phase, also before the stage of the layer that reads them.
    """

    params: BiTATParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: BiTATParams) -> None:
        super().__init__(spec, params)
        self.beta = nn.Parameter(torch.zeros(1))
        self.register_buffer("waiting", torch.tensor(False))
        self._waiting = self.probing = False
        self._sum: Tensor | None = None
        self._count = 0
        self._low = 0.0

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        resize(self, ("beta",), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "waiting" in state_dict:
            self._waiting = bool(state_dict[prefix + "waiting"])

    def set_waiting(self, waiting: bool) -> None:
        """Whether the input passes unchanged in training, because the stage of its reader has not begun."""
        self._waiting = waiting
        self.waiting.fill_(waiting)

    # -- calibration -------------------------------------------------------------------------------------------------
    def _gather(self, x: Tensor, first: bool) -> None:
        axis = self.spec.channel_axis
        own = self.spec.per_channel is not False and x.ndim > axis
        rows = x.double().movedim(axis, 0).flatten(1) if own else x.double().reshape(1, -1)
        fresh = first or self._sum is None or len(self._sum) != len(rows)
        self._sum = rows.sum(1) if fresh else self._sum + rows.sum(1)
        self._count = rows.shape[1] + (0 if fresh else self._count)

    def _set_beta(self, values: Tensor) -> None:
        if values.numel() != self.beta.numel():
            self.beta.data = torch.zeros(values.shape, dtype=self.beta.dtype, device=self.beta.device)
        self.beta.copy_(values)

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """``beta = 0`` where the input goes below zero; else minus the mean of each channel, since the sign of a
        ReLU's output is constant."""
        self._gather(x, first)
        self._set_beta(torch.zeros_like(self._sum) if self.signed else -self._sum / self._count)

    def init_from_range(self, low: float, high: float) -> None:
        """A host that knows only a range: the middle of one that does not reach below zero."""
        self._set_beta(self.beta.new_zeros(1) if self.signed else self.beta.new_full((1,), -(low + high) / 2))

    def collect(self) -> None:
        """Gather channel means from the inputs of the next forwards."""
        self._sum, self._count, self._low, self._collecting = None, 0, 0.0, True

    _collecting = False

    def collected(self) -> None:
        """End of :meth:`collect`: set beta anew, in the shape that it has, if an input was seen."""
        self._collecting = False
        if self._sum is None:
            return
        total, count = self._sum, torch.tensor([self._count, self._low], dtype=torch.float64, device=self._sum.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
        signed = bool(self.spec.signed) if self.spec.signed is not None else bool(count[1] < 0)
        mean = total / count[0]
        if self.beta.numel() == 1:
            mean = mean.mean().reshape(1)
        with torch.no_grad():
            self.beta.copy_(torch.zeros_like(mean) if signed else -mean)
        self._set_status(signed=signed)

    # -- values ------------------------------------------------------------------------------------------------------
    def _thresholds(self) -> Tensor:
        """The largest numbers below ``-beta`` (1-d): ``x > threshold`` is then ``x >= -beta``, so that sgn(0) = +1.

        Numbers too small for a normal float are avoided, because runtimes flush them to zero.
        """
        beta = wide(self.beta.detach())
        below = torch.nextafter(-beta, torch.full_like(beta, -float("inf")))
        tiny = torch.finfo(beta.dtype).tiny
        return torch.where(below.abs() < tiny, torch.full_like(below, -tiny), below)

    def quantize(self, x: Tensor) -> Tensor:
        """Section 5; the input itself while its reader waits for its stage in training."""
        if self._collecting and x.numel():
            with torch.no_grad():
                self._gather(x.detach(), False)
                self._low = min(self._low, float(x.min()))
        if self._waiting and (self.training or self.probing):
            return _Hold.apply(x, self.beta)
        axis = self.spec.channel_axis
        if self.beta.numel() > 1 and x.ndim <= axis:
            raise QuantizationError(f"{self.spec.name}: input of shape {list(x.shape)} has no channels at axis {axis}")
        beta, threshold = (per_channel_view(t, x.ndim, axis) for t in (wide(self.beta), self._thresholds()))
        return _Sign.apply(x, beta, threshold)

    def form(self) -> Form:
        thresholds = self._thresholds().double().reshape(-1, 1)
        levels = torch.tensor([-1, 1], device=self.beta.device)
        return Staircase(1, levels, thresholds.squeeze(0), self.grid_scale(), self.spec.channel_axis)

    def grid_scale(self) -> Tensor:
        return torch.ones(1, dtype=wide(self.beta).dtype, device=self.beta.device)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """No decay on the shifts."""
        return [{"params": [self.beta], "lr": lr, "weight_decay": 0.0}]
