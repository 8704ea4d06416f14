"""What stands inside Brevitas's proxies: a core quantizer behind Brevitas's tuple interface.

Plain modules that hold the quantizer. They subclass nothing of Brevitas, so they run with its TorchScript switch on
and off, and on all its versions.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fat_brevitas.compat import ignore_missing_keys
from fat_plugins.errors import QuantizationError
from fat_plugins.forms import Codebook, Form, Staircase, UniformGrid
from fat_plugins.functional import per_channel_view
from fat_plugins.quantizer import ActivationQuantizer, WeightQuantizer
from fat_plugins.registry import algorithms
from fat_plugins.reuse import Kept, state_of

Quantized = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Container(NamedTuple):
    """The plain integer type that holds all integers of a form: what Brevitas and QONNX are told.

    :param bits: width, sign included; 1 stands for the two values -1 and +1.
    """

    bits: int
    signed: bool
    narrow: bool


def container_of(form: Form) -> Container | None:
    """Smallest integer type for the integers of ``form``; ``None`` when no single scale times integers equals it."""
    if isinstance(form, UniformGrid):
        return Container(form.bits, form.signed, form.narrow)
    if not isinstance(form, (Codebook, Staircase)):
        return None
    low, high = int(form.levels[0]), int(form.levels[-1])
    if form.levels.tolist() == [-1, 1]:
        return Container(1, True, True)
    if low >= 0:
        return Container(max(high.bit_length(), 1), False, False)
    bits = max((-low - 1).bit_length(), high.bit_length()) + 1
    return Container(bits, True, low > -(2 ** (bits - 1)))


def scale_view(form_scale: Tensor, ndim: int, axis: int) -> Tensor:
    """Scale of a form as Brevitas shapes it: a scalar, or one per channel that broadcasts to ``ndim`` dimensions."""
    if form_scale.numel() == 1:
        return form_scale.reshape(())
    # Brevitas also asks with a scalar in the place of the tensor
    return per_channel_view(form_scale, max(ndim, axis + 1), axis)


class _Wrapper(nn.Module):
    """State handling that Brevitas's users expect, around one core quantizer."""

    def __init__(self, quantizer: WeightQuantizer | ActivationQuantizer, delay: nn.Module | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.delay = delay
        self.register_buffer("_zero_point", torch.zeros(()), persistent=False)
        self.register_buffer("_bit_width", torch.zeros(()), persistent=False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        own = f"{prefix}quantizer."
        if ignore_missing_keys() and not any(key.startswith(own) for key in state_dict):
            # a float checkpoint: the quantizer starts anew from the weights that come with it
            self.reset()
            for key, value in self.quantizer.state_dict().items():
                state_dict[own + key] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.forget()

    def reset(self) -> None:
        """Forget the calibration."""
        self.quantizer.reset_calibration()
        self.forget()

    def forget(self) -> None:
        """Something changed from outside: look at the deployed form anew."""

    def _delayed(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.delay is None else self.delay(x, out)


class WeightTensorQuant(_Wrapper):
    """``tensor_quant`` of a weight proxy: returns (value, scale, zero point, bit width).

    The first forward initialises the quantizer from the weight that it sees, unless a checkpoint was loaded. The first
    one after each change between training and evaluation writes the value of a quantizer that owns its weight into the
    layer's parameter.
    """

    quantizer: WeightQuantizer

    def __init__(self, quantizer: WeightQuantizer, delay: nn.Module | None = None) -> None:
        super().__init__(quantizer, delay)
        self.container: Container | None = None
        self._ready = False
        self._bits = quantizer.bits
        self._scale = Kept()
        #: somebody looked whether the algorithm has a coordinator, and built it
        self.coordinated = False

    def forget(self) -> None:
        self._ready = False
        self._scale.drop()

    def train(self, mode: bool = True) -> WeightTensorQuant:
        if mode != self.training:
            self._ready = False  # an algorithm may have changed its levels
        self._scale.drop()
        return super().train(mode)

    def _warn_alone(self) -> None:
        """An algorithm of the whole network that trains layer by layer would go unnoticed otherwise."""
        if self.coordinated or not (self.training and torch.is_grad_enabled()):
            return
        algorithm = algorithms().get(self.quantizer.algorithm)
        if algorithm is not None and algorithm.coordinator is not None:
            # without the layer's name, so that Python shows it once
            warnings.warn(
                f"'{algorithm.name}' acts on the whole network, but its layers train alone: call "
                "fat_brevitas.Controller(model, calibration) before training",
                UserWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> Container | None:
        """Calibrate if need be and learn the integer type of the deployed form."""
        if not self._ready or self._bits != self.quantizer.bits:  # an algorithm may learn its width
            weight = weight.detach()
            if not self.quantizer.calibrated:
                self.quantizer.calibrate(weight)
            form = self.quantizer.freeze(weight).form
            self.container = container_of(form)
            if self.container is not None:
                self._bit_width.fill_(self.container.bits)
            self._ready, self._bits = True, self.quantizer.bits
        return self.container

    def forward(self, x: Tensor) -> Quantized:
        spec = self.quantizer.spec
        whole = tuple(x.shape) == spec.shape
        if not whole and not self.quantizer.accepts_slices:
            raise QuantizationError(
                f"{spec.name}: the algorithm quantizes the whole weight of shape {list(spec.shape)}, got a slice of "
                f"shape {list(x.shape)} (GPTQ and the like work column by column): fat_brevitas.freeze the model first"
            )
        if whole:
            fresh = not self._ready
            self.prepare(x)
            if fresh:
                source = x._base if x._is_view() else x  # Brevitas hands out a view of the parameter
                if source.is_leaf:
                    self.quantizer.fold_into(source)
                self._warn_alone()
        elif not self._ready:
            raise QuantizationError(f"{spec.name}: run the whole weight through the quantizer before a slice of it")
        if not self.quantizer.enabled:
            return x, None, None, None
        value = self._delayed(x, self.quantizer(x))
        if self.container is None:
            return value, None, None, None
        if self.training or torch.is_grad_enabled():
            scale = self._scale_of(x)
        else:
            scale = self._scale.get(self._scale_of, self.quantizer, x)
        return value, scale, self._zero_point, self._bit_width

    def _scale_of(self, x: Tensor) -> Tensor:
        return scale_view(self.quantizer.grid_scale(x).to(x.dtype), x.ndim, self.quantizer.spec.channel_axis)


class ActTensorQuant(_Wrapper):
    """``tensor_quant`` of an activation proxy: returns (value, scale, zero point, bit width).

    Calibration follows Brevitas's own convention: the first :attr:`collect_stats_steps` training forwards initialise
    the quantizer, and ``calibration_mode`` extends that number. The identity (no scale) before.

    :param collect_stats_steps: training batches that initialise; each refines what the ones before gave.
    :param calibration_range: values outside are clipped in calibration (ReLU6: up to 6; Hardtanh: its bounds).
    """

    quantizer: ActivationQuantizer

    def __init__(
        self,
        quantizer: ActivationQuantizer,
        delay: nn.Module | None = None,
        collect_stats_steps: int = 1,
        calibration_range: tuple[float | None, float | None] = (None, None),
    ) -> None:
        super().__init__(quantizer, delay)
        self.counter = 0
        self._steps = self._own_steps = collect_stats_steps
        self.calibration_range = calibration_range
        #: integer type of the form when it was last looked at; in training that would stall the device
        self.container: Container | None = None
        #: state of the quantizer at that time, while evaluating, and its width
        self._seen: tuple[Any, ...] | None = None
        self._bits = quantizer.bits
        #: set by Brevitas's calibration mode: collect, and pass the input on
        self.observer_only = False

    @property
    def collect_stats_steps(self) -> int:
        """Training forwards that initialise the quantizer; raising it after they are done starts a new collection."""
        return self._steps

    @collect_stats_steps.setter
    def collect_stats_steps(self, steps: int) -> None:
        if steps > self._steps:
            self.counter = 0
            self.reset()
        self._steps = steps

    def forget(self) -> None:
        self.container = self._seen = None

    def _look(self) -> None:
        """Learn the integer type of the form, if the quantizer is another one than when it was last looked at."""
        seen, bits = None if self.training else state_of(self.quantizer), self.quantizer.bits
        if self.container is not None and self._bits == bits and (self.training or self._seen == seen):
            return
        found = container_of(self.quantizer.nominal_form())
        if self.container is None or found.bits != self.container.bits:
            self._bit_width = torch.full_like(self._bit_width, found.bits)  # who has the old one keeps it
        self.container, self._seen, self._bits = found, seen, bits

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def init_scale(self) -> None:
        """End of Brevitas's calibration mode."""
        if self.quantizer.calibrated:
            self._steps = self.counter = self._own_steps

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        status = state_dict.get(f"{prefix}quantizer.status")
        if status is not None:
            self.counter = self._steps if bool(status[1]) else 0

    def forward(self, x: Tensor) -> Quantized:
        quantizer = self.quantizer
        if self.training and self.counter < self._steps:
            with torch.no_grad():
                clipped = self.calibration_range != (None, None)
                quantizer.calibrate(x.detach().clamp(*self.calibration_range) if clipped else x)
            self.counter += 1
            self.forget()  # calibration decides the sign
        if self.observer_only:
            return x, None, None, None
        if not quantizer.calibrated or not quantizer.enabled:  # the identity, of which its hooks are told
            return quantizer(x), None, None, None
        self._look()
        value = self._delayed(x, quantizer(x))
        scale = scale_view(quantizer.grid_scale().to(x.dtype), x.ndim, quantizer.spec.channel_axis)
        return value, scale, self._zero_point, self._bit_width
