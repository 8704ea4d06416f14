"""The quantizer interface: what an algorithm implements and all that a host adapter may rely on.

A quantizer is an ``nn.Module`` for one tensor, a weight or an activation. It knows tensors and maths; it does not know
which framework placed it, nor which target will run its codes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fat_plugins.deprecation import moved
from fat_plugins.errors import CheckpointError, QuantizationError, shown
from fat_plugins.figures import Figure
from fat_plugins.forms import Form, refuse_nonfinite
from fat_plugins.functional import keep_zeros
from fat_plugins.reuse import Kept, Shared

Role = Literal["weight", "activation"]
ROLES: tuple[Role, ...] = ("weight", "activation")


@dataclass(frozen=True)
class TensorSpec:
    """What a host tells a quantizer about its tensor. JSON types only (see :meth:`to_dict`).

    :param role: ``"weight"`` or ``"activation"``.
    :param bits: bit width, sign included.
    :param name: layer name, for error messages and reports.
    :param shape: shape of the weight; empty for activations, whose shape is not fixed.
    :param channel_axis: output-channel axis of the weight (1 for transposed convolutions), channel axis of activations.
    :param per_channel: ``None`` leaves the choice to the algorithm.
    :param signed: activations only; ``None`` means that calibration decides.
    :param followed_by_norm: a batch norm reads the output of the weight's layer (and absorbs its scale).
    :param keep_zeros: exact zeros of the weight stay zero (a sparsity algorithm put them there).
    :param groups, stride, dilation, padding: of the weight's convolution, for algorithms that look at the inputs of
        single outputs; per spatial axis, the padding before and after each (top, bottom, left, right). Empty: 1, 1, 0.
    """

    role: Role
    bits: int
    name: str = ""
    shape: tuple[int, ...] = ()
    channel_axis: int = 0
    per_channel: bool | None = None
    signed: bool | None = None
    followed_by_norm: bool = False
    keep_zeros: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorSpec:
        """Inverse of :meth:`to_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def conv_geometry(
    kernel: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> dict[str, Any]:
    """The fields of :class:`TensorSpec` for a convolution, from its arguments in torch's spelling.

    :param kernel: spatial extent of the weight; empty for linear layers, which have no such fields.
    :param padding: a number, one per axis, ``"same"`` or ``"valid"``.
    """
    if not kernel:
        return {}

    def each(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return tuple(int(v) for v in (values * len(kernel) if len(values) == 1 else values))

    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, each(dilation), strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in each(0 if padding == "valid" else padding)]
    around = tuple(n for pair in pairs for n in pair)
    return {"groups": int(groups), "stride": each(stride), "dilation": each(dilation), "padding": around}


def module_geometry(layer: nn.Module) -> dict[str, Any]:
    """The same of a layer in torch's classes or a subclass of them; nothing for layers that are no convolution."""
    if not hasattr(layer, "stride") or not hasattr(layer, "weight"):
        return {}
    kernel = tuple(layer.weight.shape[2:])
    return conv_geometry(kernel, layer.stride, layer.padding, layer.dilation, layer.groups)


def check_width(bits: int, widths: Sequence[int], where: str) -> None:
    """:raises QuantizationError: ``bits`` is none of ``widths``; ``where`` says whose they are."""
    if type(bits) is not int or bits not in widths:
        allowed = ", ".join(str(b) for b in widths)
        raise QuantizationError(f"{where}: it does not compute at {shown(bits)} bits; allowed: {allowed}")


@dataclass
class Progress:
    """Where training stands. Driven by the host's scheduler, saved with the checkpoint, never counted in forwards.

    :param step: optimizer steps done.
    :param epoch: epochs begun, counted from 0.
    :param total_steps, total_epochs: planned, ``None`` when unknown.
    """

    step: int = 0
    epoch: int = 0
    total_steps: int | None = None
    total_epochs: int | None = None


class FrozenTensor(NamedTuple):
    """A weight after training: integer codes (int32, shape of the weight) and the form that reads them."""

    codes: Tensor
    form: Form


class Params(BaseModel):
    """Base of an algorithm's own options (the JSON section ``params``); unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Quantizer(nn.Module):
    """Base of all quantizers. Subclass :class:`WeightQuantizer` or :class:`ActivationQuantizer`.

    ``state_dict`` is complete: reloading it gives identical evaluation outputs. The buffer ``status`` carries
    ``[layout version, calibrated, signed]``; Python mirrors of it spare the forward pass a device synchronisation.
    """

    role: ClassVar[Role]
    #: layout version of the state dict; override :meth:`upgrade_state` when raising it
    state_version: ClassVar[int] = 1
    #: name of the algorithm that made the quantizer (the registry sets it)
    algorithm: str = ""

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        super().__init__()
        self.spec = spec
        self.params = params
        self.enabled = True
        #: the one of :attr:`widths` that it computes at; a mode like ``training``, no part of the state dict
        self.active_bits = spec.bits
        self._lr_multiplier: float | None = None
        self._lr_hooks: list[Any] = []
        self.register_buffer("status", torch.tensor([self.state_version, 0, int(bool(spec.signed))]))
        self._calibrated = False
        self._signed = bool(spec.signed) if self.role == "activation" else True

    # -- state -------------------------------------------------------------------------------------------------------
    @property
    def calibrated(self) -> bool:
        """Whether the quantizer was initialised from data or from a checkpoint."""
        return self._calibrated

    @property
    def signed(self) -> bool:
        """Whether codes reach below zero."""
        return self._signed

    @property
    def bits(self) -> int:
        """Bit width in force: that of the deployed form. Below ``spec.bits`` where an algorithm has learned it, the
        active one where it has several."""
        return self.active_bits

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit widths that it can compute at, descending; one but for algorithms of several, whose parameters serve
        all of them. ``spec.bits`` is among them: it is active at first, and after the model was rebuilt."""
        return (self.spec.bits,)

    def set_active_bits(self, bits: int) -> None:
        """Compute at another of :attr:`widths` from now on. For a whole model: :func:`fat_plugins.set_active_bits`.

        :raises QuantizationError: ``bits`` is none of them.
        """
        check_width(bits, self.widths, self.spec.name or self.role)
        self.active_bits = bits

    @property
    def noisy(self) -> bool:
        """Whether the training forward is another function than the deployed one (random numbers, soft steps), of which
        batch norms gather the statistics (see :func:`fat_plugins.norms.reestimate_batch_norms`)."""
        return False

    def reset_calibration(self) -> None:
        """Forget the calibration: the next one starts anew."""
        self._set_status(calibrated=False)

    def _set_status(self, *, calibrated: bool | None = None, signed: bool | None = None) -> None:
        if calibrated is not None:
            self._calibrated = calibrated
            self.status[1] = int(calibrated)
        if signed is not None:
            self._signed = signed
            self.status[2] = int(signed)

    def upgrade_state(self, state: dict[str, Tensor], prefix: str, version: int) -> None:
        """Rewrite entries of an older layout in place (default: nothing to do)."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        status = state_dict.get(prefix + "status")
        if status is not None:
            if status.numel() != self.status.numel():
                raise CheckpointError(
                    f"{prefix}status: expected {self.status.numel()} numbers (layout, calibrated, signed), "
                    f"got shape {tuple(status.shape)}; this is not a checkpoint of a fat-plugins quantizer"
                )
            version = int(status[0])
            if version > self.state_version:
                raise CheckpointError(
                    f"{self.spec.name or 'quantizer'}: checkpoint layout {version} is newer than this package's "
                    f"{self.state_version}; upgrade fat-plugins"
                )
            if version < self.state_version:
                self.upgrade_state(state_dict, prefix, version)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if status is not None:
            self.status[0] = self.state_version
            self._calibrated, signed = bool(status[1]), bool(status[2])
            if self.role == "activation":
                self._signed = signed
        if self._lr_multiplier is not None:  # load_state_dict(assign=True) brings new parameters
            self.set_lr_multiplier(self._lr_multiplier)

    # -- contract ----------------------------------------------------------------------------------------------------
    def quantize(self, x: Tensor) -> Tensor:
        """The algorithm's fake quantization of ``x`` (same shape): soft or stochastic when ``self.training`` if the
        paper says so, the hard deployed function in evaluation. Differentiable by the paper's rule."""
        raise NotImplementedError

    def regularization(self) -> Tensor | None:
        """The scalar loss term that the paper adds, or ``None``."""
        return None

    def on_progress(self, progress: Progress) -> None:
        """Follow a schedule (temperature, delay, stage). Default: none."""

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups for the quantizer's own parameters, with the paper's learning rates and decays.

        :param lr, weight_decay: base values of the run.
        :return: groups as for ``torch.optim``; parameters that are not named follow the base group.
        """
        return []

    def set_lr_multiplier(self, factor: float) -> None:
        """Multiply the gradients of the quantizer's parameters (NNCF's ``compression_lr_multiplier``).

        A second call replaces the factor of the first.
        """
        for handle in self._lr_hooks:
            handle.remove()
        self._lr_multiplier = float(factor)
        self._lr_hooks = [
            p.register_hook(lambda g, f=self._lr_multiplier: g * f) for p in self.parameters() if p.requires_grad
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lr_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch drops gradient hooks when it copies or unpickles a parameter: put ours back
        super().__setstate__(state)
        if self._lr_multiplier is not None:
            self.set_lr_multiplier(self._lr_multiplier)

    def _refuse_nonfinite(self, x: Tensor, what: str) -> None:
        if not bool(torch.isfinite(x).all()):
            raise QuantizationError(f"{self.spec.name or self.role}: {what} holds NaN or infinite values")

    # -- reports -----------------------------------------------------------------------------------------------------
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Numbers worth following while training runs, by name. Asked for once an epoch, so they may cost something.

        :param weight: the float weight in front of a weight quantizer, ``None`` for activations.
        """
        return {"bits": float(self.bits)}

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """Figures of what only this algorithm has, for reports (default: none); ``weight`` as in :meth:`monitor`."""
        return []

    def extra_repr(self) -> str:
        spec = self.spec
        several = f" of {list(self.widths)}" if len(self.widths) > 1 else ""
        parts = [spec.name or self.role, f"bits={self.bits}{several}"]
        if self.algorithm:
            parts.insert(1, self.algorithm)
        if spec.shape:
            parts.append(f"shape={tuple(spec.shape)}")
        if spec.per_channel:
            parts.append("per channel")
        if self.role == "activation" and self.calibrated:
            parts.append("signed" if self.signed else "unsigned")
        parts += [] if self.calibrated else ["not calibrated"]
        parts += [] if self.enabled else ["disabled"]
        return ", ".join(parts)


class WeightQuantizer(Quantizer):
    """Quantizer of one weight tensor of shape ``spec.shape``.

    A subclass implements :meth:`quantize` and :meth:`freeze_codes`, and :meth:`calibrate` if it initialises from the
    weight.
    """

    role = "weight"
    #: set to True to receive :meth:`observe_input` during calibration or a stage
    needs_input: ClassVar[bool] = False
    #: ``quantize`` works element by element, so also on a part of the input channels (GPTQ hands out columns)
    accepts_slices: ClassVar[bool] = False
    #: once calibrated, the quantizer's own parameters are the weight: see :meth:`fold_into`
    owns_weight: ClassVar[bool] = False
    #: it sets weights to zero by a rule of its own (unless ``spec.keep_zeros``), and hosts report how many
    prunes: ClassVar[bool] = False
    #: whether 0 is a level; without it the zeros of a sparsity algorithm are refused
    has_zero: ClassVar[bool] = True

    def __init__(self, spec: TensorSpec, params: Params) -> None:
        where = spec.name or "weight"
        if not spec.shape or 0 in spec.shape:
            raise QuantizationError(f"{where}: cannot quantize an empty tensor (shape {list(spec.shape)})")
        if not 0 <= spec.channel_axis < len(spec.shape):
            raise QuantizationError(
                f"{where}: channel axis {spec.channel_axis} is outside a weight of shape {list(spec.shape)}"
            )
        if spec.keep_zeros and not self.has_zero:
            raise QuantizationError(f"{where}: the grid has no zero, so sparsity cannot be kept")
        super().__init__(spec, params)
        self._kept = Kept()
        #: what the parts of a training batch share, inside :func:`fat_plugins.reuse.accumulate`
        self.shared: Shared | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weight, same shape and dtype; see :mod:`fat_plugins.reuse` for when it is not computed anew.

        NaN and infinity are not looked for here (that would stall the device): NaN comes out as NaN.
        """
        if not self.enabled:
            return weight
        if torch.is_grad_enabled():
            if self.shared is not None and self.training:
                return self.shared.get(self, weight)
        elif not self.training:
            return self._kept.get(self.compute, self, weight)
        return self.compute(weight)

    def compute(self, weight: Tensor) -> Tensor:
        """The quantized weight, computed now."""
        out = self.quantize(weight)
        return keep_zeros(out, weight) if self.spec.keep_zeros else out

    # -- what is kept of earlier forwards ----------------------------------------------------------------------------
    def train(self, mode: bool = True) -> WeightQuantizer:
        self._kept.drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> WeightQuantizer:
        self._kept.drop()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept.drop()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "shared": None}

    def calibrate(self, weight: Tensor) -> None:
        """Initialise from the float weight, once. A quantizer that owns the weight ignores a second call, until
        :meth:`reset_calibration`: the float weight is gone.

        :raises QuantizationError: the weight is empty or holds NaN or infinite values.
        """
        if weight.numel() == 0:
            raise QuantizationError(f"{self.spec.name or 'weight'}: cannot quantize an empty tensor")
        if self.owns_weight and self.calibrated:
            return
        self._refuse_nonfinite(weight, "weight")
        with torch.no_grad():
            self.init_from_weight(weight.detach())
        self._set_status(calibrated=True)

    def init_from_weight(self, weight: Tensor) -> None:
        """Algorithm's own initialisation; default: nothing depends on the weight."""

    @property
    def wants_input(self) -> bool:
        """Whether :meth:`observe_input` is to be called now; default: always, when :attr:`needs_input`."""
        return self.needs_input

    @torch.no_grad()
    def fold_into(self, parameter: Tensor) -> None:
        """Where :attr:`owns_weight`: take the host's parameter out of training and write the quantized weight into it.

        :meth:`quantize` reads nothing of that parameter but its dtype. Adapters call this when initialisation is over,
        after rebuilding a model from a saved description (nothing is written before calibration), and before the
        parameter is saved or deployed. Does nothing for other quantizers.
        """
        if not self.owns_weight:
            return
        parameter.requires_grad_(False)
        if self.calibrated:
            codes, form = self.freeze_codes(parameter)
            parameter.copy_(form.decode(codes))

    def observe_input(self, x: Tensor) -> None:
        """Receives the input of the weight's layer, behind its activation quantizer, when :attr:`wants_input`."""

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Codes and form of the evaluation forward of ``weight`` (without the zeros rule)."""
        raise NotImplementedError

    def rounded(self, weight: Tensor) -> Tensor:
        """What is rounded to the grid, same shape and in its units: the weight, or what the algorithm makes of it first
        (for reports, which show it between the levels)."""
        return weight

    @torch.no_grad()
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Width, mean scale, and share of weights that are zero."""
        numbers = super().monitor(weight)
        if weight is not None:
            codes, form = self.freeze(weight)
            numbers["scale"] = float(form.scale.double().mean())
            numbers["zeros"] = float((form.decode(codes) == 0).double().mean())
        return numbers

    def grid_scale(self, weight: Tensor) -> Tensor:
        """Scale of the deployed form of ``weight``, 1-d and without gradient, for hosts that pass it along in training.

        Override it where it costs less than the codes do.
        """
        with torch.no_grad():
            return self.freeze_codes(weight.detach()).form.scale

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> FrozenTensor:
        """Integer codes and form; ``form.decode(codes)`` equals the evaluation forward bit for bit.

        :raises QuantizationError: the weight or its scale holds NaN or infinite values, or the form has no zero that
            ``keep_zeros`` needs.
        """
        self._refuse_nonfinite(weight, "weight")
        frozen = self.freeze_codes(weight.detach())
        refuse_nonfinite(frozen.form, self.spec.name or "weight")
        if self.spec.keep_zeros:
            zero = frozen.form.encode(torch.zeros_like(weight))
            if bool(frozen.form.decode(zero).any()):
                raise QuantizationError(f"{self.spec.name}: the grid has no zero, so sparsity cannot be kept")
            frozen = FrozenTensor(torch.where(weight == 0, zero, frozen.codes), frozen.form)
        return frozen


class ActivationQuantizer(Quantizer):
    """Quantizer of one activation tensor. The identity until it is calibrated.

    A subclass implements :meth:`quantize`, :meth:`form`, and :meth:`init_from_batch` and/or :meth:`init_from_range`.
    """

    role = "activation"
    #: what initialises it best: a range that the host collected by its own settings, or batches of data
    calibration: ClassVar[Literal["range", "data"]] = "range"

    def forward(self, x: Tensor) -> Tensor:
        """Quantized activation, same shape and dtype. NaN comes out as NaN, infinity as the end of the grid."""
        if not self.enabled or not self._calibrated:
            return x
        return self.quantize(x)

    def calibrate(self, x: Tensor) -> None:
        """Initialise from a batch; may be called several times, each batch refines.

        :raises QuantizationError: the batch is empty or holds NaN or infinite values.
        """
        if x.numel() == 0:
            raise QuantizationError(f"{self.spec.name or 'activation'}: cannot calibrate on an empty tensor")
        self._refuse_nonfinite(x, "calibration batch")
        x = x.detach().float()
        first = not self._calibrated
        with torch.no_grad():
            # a value below zero in any batch makes it signed; known signedness (spec.signed) is kept
            signed = self._decide_sign(float(x.min()), first)
            self.init_from_batch(x if signed else x.clamp_min(0), first)
        self._set_status(calibrated=True, signed=signed)

    def calibrate_range(self, low: float, high: float) -> None:
        """Initialise from a range that the host collected with its own range initialisers.

        :raises QuantizationError: the range is not finite.
        """
        low, high = float(low), float(high)
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise QuantizationError(f"{self.spec.name or 'activation'}: range [{low}, {high}] is not finite")
        with torch.no_grad():
            signed = self._decide_sign(low, True)
            # what an unsigned grid cannot reach must not widen it
            self.init_from_range(*((low, high) if signed else (max(low, 0.0), max(high, 0.0))))
        self._set_status(calibrated=True, signed=signed)

    def _decide_sign(self, low: float, first: bool) -> bool:
        signed = bool(self.spec.signed) if self.spec.signed is not None else (low < 0 or (self._signed and not first))
        self._set_status(signed=signed)
        return signed

    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """Algorithm's own initialisation from a float32 batch; default: its extreme values as a range."""
        self.init_from_range(float(x.min()), float(x.max()))

    def init_from_range(self, low: float, high: float) -> None:
        """Algorithm's own initialisation from a range."""
        raise NotImplementedError

    def form(self) -> Form:
        """The deployed form; ``form.decode(form.encode(x))`` equals the evaluation forward bit for bit.

        :raises ExportError: there is none, because the range follows every input; the message says what to do.
        """
        raise NotImplementedError

    def nominal_form(self) -> Form:
        """What reports show and hosts carry along in training: :meth:`form`, or where there is none the one that comes
        nearest to it."""
        return self.form()

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Width and mean scale."""
        numbers = super().monitor(weight)
        return {**numbers, "scale": float(self.grid_scale().double().mean())} if self.calibrated else numbers

    def grid_scale(self) -> Tensor:
        """Scale of the deployed form, 1-d and without gradient, for hosts that pass it along in training.

        Override it where :meth:`form` stalls the device.
        """
        return self.nominal_form().scale


class Calibration(Protocol):
    """The host's calibration data, in the hands of a coordinator."""

    def __call__(self, samples: int, turns: Sequence[Collection[Role]] = (ROLES,)) -> None:
        """Pass about ``samples`` samples through the model as it stands, in evaluation mode and without gradient, show
        their inputs to weight quantizers that want them, and restore the modes.

        :param turns: each batch goes through the model once for every entry, which names the roles whose quantizers are
            in force then; all others are disabled. ``((), ROLES)`` shows the inputs of the float network and of the
            quantized one, batch by batch, whatever order the loader draws its samples in.
        """
        ...


class Coordinator(nn.Module):
    """For methods that act on the whole network (stages, coupled losses, one bit budget). Host-agnostic.

    An adapter builds it with the quantizers in execution order and drives it like a quantizer, from the first step or
    epoch on: by then a checkpoint is loaded.
    """

    def __init__(self, layers: list[LayerQuantizers]) -> None:
        super().__init__()
        self.layers = layers
        self._calibration: Calibration | None = None

    def set_calibration(self, run: Calibration | None) -> None:
        """Give the coordinator the host's data."""
        self._calibration = run

    def begin(self) -> None:
        """Everything is initialised but the batch norms, which the host may adapt afterwards: what a method does to a
        network once, without training, it does here.

        Adapters call it on a new model when they have data, before parameters are folded
        (:meth:`WeightQuantizer.fold_into`); not on a model that is rebuilt from a saved state.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calibration": None}  # it belongs to the model that was copied

    def on_progress(self, progress: Progress) -> None:
        """Follow the schedule of the whole network; may freeze and thaw parameters."""

    def regularization(self) -> Tensor | None:
        """A scalar loss term over several layers, or ``None``."""
        return None

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups for the coordinator's own parameters, as :meth:`Quantizer.param_groups`."""
        return []

    def monitor(self) -> dict[str, float]:
        """Numbers worth following while training runs, as :meth:`Quantizer.monitor`."""
        return {}

    def figures(self) -> list[Figure]:
        """Figures of the whole network, as :meth:`Quantizer.figures`."""
        return []


@dataclass
class LayerQuantizers:
    """One layer as a coordinator sees it.

    :param parameters: the host's parameters of the layer, weight and bias, under names that end in their own.
    """

    name: str
    weight: WeightQuantizer | None = None
    input_activation: ActivationQuantizer | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


_MOVED = ("broadcast_state", "coordinators", "named_quantizers", "param_groups", "regularization", "set_progress")
__getattr__ = moved(__name__, dict.fromkeys(_MOVED, "fat_plugins.network"), until="0.4")
