"""Progressive binarization, bottom-up: the coordinator of BiTAT (sections 3.6, 4.2, 6 and 7 of the specification).

Stage ``l`` binarizes layer ``l`` in execution order: layers below it are fixed, layers above are full precision and
train along. Nothing of this is left when the model is frozen.
"""

from __future__ import annotations

import math
import warnings
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from fat_plugins.algorithms.bitat.maths import (
    Metric,
    from_columns,
    groups_of,
    identity_metric,
    make_metric,
    solve,
    to_columns,
)
from fat_plugins.algorithms.bitat.quantizers import WAITING, BiTATActivation, BiTATParams, BiTATWeight, resize
from fat_plugins.errors import QuantizationError
from fat_plugins.figures import Figure
from fat_plugins.quantizer import Coordinator, LayerQuantizers, Progress

#: share of the run that the stages take together (section 7)
_STAGES_SHARE = 0.7
#: log of the factor that an importance may move away from its start (section 4.2)
_DRIFT = math.log(4)
#: values of the buffer ``stage`` beside the number of the layer in training
_NOT_BEGUN, _BEFORE_STAGES = -2, -1


class _ClampStraight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def cayley(a: Tensor) -> Tensor:
    """Orthogonal ``(I + S/2)^-1 (I - S/2)`` of the skew ``S = L - L^T``, ``L`` the strict lower triangle of ``a``."""
    lower = a.tril(-1)
    half = (lower - lower.transpose(-1, -2)) / 2
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(one + half, one - half)


class BiTATStages(Coordinator):
    """The schedule, the loss term and the trained transform of one network.

    Parameters (with ``train_transform``): ``rotation`` and ``log_importance``, flat, large enough for every block; the
    block in training uses their beginning. Buffers hold the stage and what its loss compares with, so that a resumed
    run goes on exactly.

    :param layers: in execution order; those of other algorithms' inputs keep them.
    """

    def __init__(self, layers: list[LayerQuantizers]) -> None:
        super().__init__([layer for layer in layers if isinstance(layer.weight, BiTATWeight)])
        self.params: BiTATParams = self.layers[0].weight.params if self.layers else BiTATParams()
        self.blocks = _blocks([layer.weight for layer in self.layers], self.params.block_size)
        sizes = [(groups_of(b[0].spec), sum(_reduced(w) for w in b)) for b in self.blocks]
        trained = self.params.train_transform and bool(sizes)
        self.rotation = nn.Parameter(torch.zeros(max(g * d * d for g, d in sizes))) if trained else None
        self.log_importance = nn.Parameter(torch.zeros(max(g * d for g, d in sizes))) if trained else None
        self.register_buffer("stage", torch.tensor(_NOT_BEGUN))
        for name in self._tensors:
            self.register_buffer(name, torch.zeros(0))
        self._stage = _NOT_BEGUN

    @property
    def _tensors(self) -> tuple[str, ...]:
        # of the block: V and log s at the start of the stage, ||diag(s) V^T W||^2 and the part of J that is constant;
        # of the layer in training: W, P, s_perp^2; of the fixed layers of the block: P E
        errors = (f"error{i}" for i in range(self.params.block_size - 1))
        return ("basis", "start", "norm", "constant", "reference", "reduction", "residual", *errors)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        resize(self, self._tensors, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "stage" in state_dict:
            self._stage = int(state_dict[prefix + "stage"])

    # -- schedule ----------------------------------------------------------------------------------------------------
    def stage_of(self, progress: Progress) -> int:
        """Number of the layer in training (section 7): -1 before the first, the number of layers in the final phase.

        Stages are whole epochs; only where the run has fewer epochs than layers they are shorter.
        """
        count, total = len(self.layers), progress.total_epochs
        length = self.params.epochs_per_layer
        fitted = length is None and total is not None
        length = length or max(1, round(_STAGES_SHARE * (total or 0) / max(count, 1)))
        first = self.params.act_schedule == "first"
        warm = (self.params.activation_epochs or length) if first else 0
        if fitted and warm + length * count > total:
            done = progress.step / progress.total_steps if progress.total_steps else progress.epoch / total
            return min(int(done / _STAGES_SHARE * (count + first)) - first, count)
        epoch = progress.epoch - warm
        return _BEFORE_STAGES if epoch < 0 else min(epoch // length, count)

    def on_progress(self, progress: Progress) -> None:
        """Begin the stage that is due; one that was left out is gone through without training. Never goes back."""
        if not self.layers:
            return
        target = self.stage_of(progress)
        if self._stage == _NOT_BEGUN:
            self._begin()
        while self._stage < target:
            self._next()
        if self.log_importance is not None and self.start.numel():
            n = self.start.numel()
            with torch.no_grad():
                own = self.log_importance[:n].view_as(self.start)
                own.copy_(torch.minimum(torch.maximum(own, self.start - _DRIFT), self.start + _DRIFT))

    @torch.no_grad()
    def _begin(self) -> None:
        for layer in self.layers:
            layer.weight.set_phase(WAITING)
            if self._own_input(layer) is not None:
                layer.input_activation.set_waiting(True)
        self._set_stage(_BEFORE_STAGES)
        if self.params.act_schedule == "first":
            for layer in self.layers:
                self._switch_on(layer)

    @torch.no_grad()
    def _next(self) -> None:
        if self._stage >= 0:
            layer = self.layers[self._stage]
            self._keep_error(layer)
            layer.weight.fix(_parameter(layer))
        self._set_stage(self._stage + 1)
        if self._stage < len(self.layers):
            self._begin_stage(self.layers[self._stage])
        else:
            for layer in self.layers:
                layer.weight.release(_parameter(layer), self.params.joint_finetune)
            self._clear()
        self._broadcast()

    def _set_stage(self, stage: int) -> None:
        self._stage = stage
        self.stage.fill_(stage)

    def _clear(self) -> None:
        for name in self._tensors:
            setattr(self, name, getattr(self, name).new_zeros(0))

    def _broadcast(self) -> None:
        """Eigenvectors may come out differently on other processors: all processes take those of the first."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        mine = [self.rotation, self.log_importance, *(getattr(self, name) for name in self._tensors)]
        for layer in self.layers:
            own = self._own_input(layer)
            mine += [*layer.parameters.values(), layer.weight.alpha, layer.weight.signs, layer.weight.kept]
            mine += [own.beta] if own is not None else []
        for tensor in mine:
            if tensor is not None and tensor.numel():
                torch.distributed.broadcast(tensor.data, src=0)

    # -- beginning of a stage (sections 6 and 7) ---------------------------------------------------------------------
    def _begin_stage(self, layer: LayerQuantizers) -> None:
        self._switch_on(layer)
        weight, theta = layer.weight, _parameter(layer)
        metric = self._metric(weight)
        reference = to_columns(theta, weight.spec).double()
        signs, alpha, _ = solve(reference, metric, shared=weight.alpha.numel() == 1)
        self._compensate(layer, metric, reference - signs * alpha.unsqueeze(1))
        theta.copy_(from_columns(signs * reference.abs(), weight.spec))
        weight.alpha.copy_(alpha.flatten()[: weight.alpha.numel()])
        weight.begin()
        self._extend_block(weight, metric, reference)

    def _switch_on(self, layer: LayerQuantizers) -> None:
        """Step a: beta from the network as it stands, then signs."""
        own = self._own_input(layer)
        if own is None or not own._waiting:
            return
        if self._calibration is not None:
            own.collect()
            self._run()
            own.collected()
        own.set_waiting(False)

    def _metric(self, weight: BiTATWeight) -> Metric:
        """Step b: a pass through the network as it stands, behind the activation quantizer of the layer."""
        spec, params = weight.spec, self.params
        if self._calibration is None:
            where = "no calibration data reached the coordinator"
        else:
            weight.collect()
            self._run()
            moments = weight.collected()
            moments.reduce()
            mean, sigma = moments.covariance()
            metric = make_metric(
                mean, sigma, float(moments.count), eps=params.floor, k_max=params.max_dimensions,
                seed=zlib.crc32(f"{params.seed} {spec.name}".encode()),
                blocks=spec.groups if spec.groups != groups_of(spec) else 1,
            )  # fmt: skip
            if not metric.blind:
                return metric
            where = "its input does not vary" if float(moments.count) else "its input was not seen"
            if float(moments.count):
                warnings.warn(f"{spec.name}: {where}; the error is weighted evenly there", stacklevel=2)
                return metric
        warnings.warn(f"{spec.name}: {where}; the signs come from the weight alone", stacklevel=2)
        g, d, _ = to_columns(torch.empty(spec.shape, device="meta"), spec).shape
        return identity_metric(g, d, params.max_dimensions, weight.alpha.device)

    def _run(self) -> None:
        """The host's data through the network as the training sees it: what waits is float."""
        quantizers: list[Any] = [q for layer in self.layers for q in (layer.weight, self._own_input(layer))]
        quantizers = [q for q in quantizers if q is not None]
        for quantizer in quantizers:
            quantizer.probing = True
        try:
            self._calibration(self.params.calibration_samples)
        finally:
            for quantizer in quantizers:
                quantizer.probing = False

    def _compensate(self, layer: LayerQuantizers, metric: Metric, error: Tensor) -> None:
        """Section 3.5: what the mean input loses goes to the bias, where no batch norm would take it out again."""
        bias = next((p for name, p in layer.parameters.items() if name.split(".")[-1] == "bias"), None)
        if bias is None or layer.weight.spec.followed_by_norm:
            return
        lost = (metric.mean.unsqueeze(1) @ error).flatten()
        if lost.numel() == bias.numel():
            bias.add_(lost.to(bias.dtype))

    def _extend_block(self, weight: BiTATWeight, metric: Metric, reference: Tensor) -> None:
        """Section 3.6: ``V_blk <- blockdiag(trained V_blk, V_l)``, ``S <- [S, s_l]``; a new block starts afresh."""
        block = next(b for b in self.blocks if any(w is weight for w in b))
        basis, start = metric.basis, metric.importance.log()
        norm, constant = metric.objective(reference), reference.new_zeros(())
        if block[0] is not weight:
            old_basis, old_start = self._transform()
            basis = torch.stack([torch.block_diag(a.double(), b) for a, b in zip(old_basis, basis, strict=True)])
            start = torch.cat([old_start.double(), start], 1)
            norm, constant = norm + self.norm, constant + self.constant
        else:
            self._clear()
        reduction = reference.new_zeros(0) if metric.reduction is None else metric.reduction
        # contiguous: a resumed run must multiply the same layouts to give the same bits
        tensors = {"basis": basis, "start": start, "norm": norm, "constant": constant, "reference": reference}
        for name, value in {**tensors, "residual": metric.residual, "reduction": reduction}.items():
            setattr(self, name, value.to(weight.alpha.device, torch.float32).contiguous())
        if self.rotation is not None:
            self.rotation.zero_()
            self.log_importance[: start.numel()].copy_(self.start.flatten())
            if self.params.mode == "penalty":
                self.rotation[: basis.numel()].copy_(self.basis.flatten())

    def _keep_error(self, layer: LayerQuantizers) -> None:
        """The error of a layer whose stage is over is constant from now on."""
        reduced, outside = self._error(layer)
        block = next(b for b in self.blocks if any(w is layer.weight for w in b))
        position = next(i for i, w in enumerate(block) if w is layer.weight)
        if position < len(block) - 1:
            setattr(self, f"error{position}", reduced.detach().clone(memory_format=torch.contiguous_format))
            self.constant = self.constant + outside.detach()

    # -- loss --------------------------------------------------------------------------------------------------------
    def _transform(self) -> tuple[Tensor, Tensor]:
        """V (g x D x D) and log s (g x D) of the block as trained so far (section 4.2)."""
        basis, start = self.basis.float(), self.start.float()
        if self.rotation is None:
            return basis, start
        rotation = self.rotation[: basis.numel()].float().view_as(basis)
        t = self.log_importance[: start.numel()].float().view_as(start)
        t = _ClampStraight.apply(t, start - _DRIFT, start + _DRIFT)
        if self.params.mode == "penalty":
            return rotation, t
        return basis @ cayley(rotation), t - t.mean(1, keepdim=True) + start.mean(1, keepdim=True)

    def _error(self, layer: LayerQuantizers) -> tuple[Tensor, Tensor]:
        """``P E`` of the layer in training (g x k x o) and the part of J outside the reduction (a scalar)."""
        what = layer.weight.quantize(_parameter(layer))
        error = self.reference.float() - to_columns(what.float(), layer.weight.spec)
        if not self.reduction.numel():
            return error, error.new_zeros(())
        p = self.reduction.float()
        reduced = p @ error
        rest = (error - p.transpose(1, 2) @ reduced).square().sum((1, 2))
        return reduced, (self.residual.float() * rest).sum()

    def block_error(self) -> Tensor:
        """``J_blk`` of the stage in training (section 3.6), with the gradients of weight, scale, basis and importance.

        :raises QuantizationError: no stage is in training.
        """
        if not 0 <= self._stage < len(self.layers):
            raise QuantizationError("BiTAT: no layer is in training")
        basis, log_importance = self._transform()
        importance = log_importance.exp().unsqueeze(2)
        reduced, outside = self._error(self.layers[self._stage])
        fixed = [e for i in range(self.params.block_size - 1) if (e := getattr(self, f"error{i}")).numel()]
        total, row = self.constant + outside, 0
        for error in (*(e.float() for e in fixed), reduced):
            rows = basis[:, row : row + error.shape[1]]
            total = total + (importance * (rows.transpose(1, 2) @ error)).square().sum()
            row += error.shape[1]
        return total

    def penalty(self) -> Tensor:
        """Reg(s, V) of section 4.2: how far basis and importance are from their constraints; 0 in mode 'exact'."""
        basis, log_importance = self._transform()
        d = basis.shape[-1]
        one = torch.eye(d, device=basis.device)
        off = (basis.transpose(1, 2) @ basis - one).square().sum() / d
        drift = ((self.start.float().sum(1) - log_importance.sum(1)) / d).square().sum()
        return self.params.basis_penalty * off + self.params.importance_penalty * drift

    def regularization(self) -> Tensor | None:
        """``lambda J_blk / J_ref + gamma mean|theta| (+ Reg)`` in a stage (section 7); zero gradients otherwise."""
        device = self.stage.device
        with torch.autocast(device.type, enabled=False):
            own = [p for p in (self.rotation, self.log_importance) if p is not None]
            # every parameter takes part in every backward, as DistributedDataParallel wants it
            total = sum((p.sum() * 0 for p in own), torch.zeros((), device=device))
            if not 0 <= self._stage < len(self.layers):
                return total if own else None
            if self.params.error_weight:
                norm = torch.where(self.norm > 0, self.norm, torch.ones_like(self.norm)).float()
                total = total + self.params.error_weight * self.block_error() / norm
            if self.params.l1_weight:
                total = total + self.params.l1_weight * _parameter(self.layers[self._stage]).float().abs().mean()
            if own and self.params.mode == "penalty":
                total = total + self.penalty()
            return total

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A tenth of the learning rate for s and V (section 7), no decay."""
        own = [p for p in (self.rotation, self.log_importance) if p is not None]
        return [{"params": own, "lr": 0.1 * lr, "weight_decay": 0.0}] if own else []

    # -- reports -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """The layer in training, counted from 1 (0: none yet; one more than layers: all are done), and its error."""
        numbers = {"stage": float(max(self._stage + 1, 0))}
        if 0 <= self._stage < len(self.layers):
            numbers["block error"] = float(self.block_error() / self.norm.clamp_min(torch.finfo(torch.float32).tiny))
        return numbers

    def figures(self) -> list[Figure]:
        """How far every layer has come."""
        done = [float(self._stage > i) + float(self._stage >= i) for i in range(len(self.layers))]
        names = [layer.name for layer in self.layers]
        title = "Stage of every layer (0: waits, 1: in training, 2: binary)"
        return [Figure.bars(title, names, {"stage": done}, "", "stage", (0.0, 2.0))]

    @staticmethod
    def _own_input(layer: LayerQuantizers) -> BiTATActivation | None:
        """The sign in front of a layer; ``None`` where another algorithm quantizes the input."""
        return layer.input_activation if isinstance(layer.input_activation, BiTATActivation) else None


def _blocks(weights: list[BiTATWeight], size: int) -> list[list[BiTATWeight]]:
    """Runs of at most ``size`` consecutive layers; a grouped layer, whose groups share no basis, is one by itself."""
    blocks: list[list[BiTATWeight]] = []
    for weight in weights:
        last = blocks[-1] if blocks else []
        fits = last and len(last) < size and groups_of(last[0].spec) == groups_of(weight.spec) == 1
        if fits:
            last.append(weight)
        else:
            blocks.append([weight])
    return blocks


def _reduced(weight: BiTATWeight) -> int:
    d = to_columns(torch.empty(weight.spec.shape, device="meta"), weight.spec).shape[1]
    return min(d, weight.params.max_dimensions)


def _parameter(layer: LayerQuantizers) -> nn.Parameter:
    """The host's float weight of a layer, which is theta during and after its stage.

    :raises QuantizationError: the host gave none.
    """
    shape = layer.weight.spec.shape
    found = [p for name, p in layer.parameters.items() if p is not None and tuple(p.shape) == shape]
    if not found:
        raise QuantizationError(f"{layer.name}: the host gave no float weight of shape {list(shape)}")
    return found[0]


__all__ = ["BiTATStages", "cayley"]
