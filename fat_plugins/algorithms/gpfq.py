"""GPFQ: Greedy Path-Following Quantization (Zhang, Zhou, Saab, SIMODS 2023, arXiv 2201.11113).

Post-training: nothing is learned. The layers are quantized one after the other, in execution order, on calibration
data: each weight in turn takes the level that makes the layer's output, from the inputs of the network as quantized so
far, least different from the float network's. From then on codes are fixed. Sections quoted below are those of the
project's GPFQ specification; the maths is in ``_gpfq.py``.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fat_plugins.algorithms._gpfq import Alphabet, Pairs, follow
from fat_plugins.algorithms.minmax import MinMaxActivation, MinMaxParams
from fat_plugins.clipping import best_clip
from fat_plugins.errors import ConfigError, QuantizationError
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, SumOfGrids, UniformGrid
from fat_plugins.functional import per_channel_view, wide
from fat_plugins.quantizer import (
    ROLES,
    Coordinator,
    FrozenTensor,
    LayerQuantizers,
    Params,
    Progress,
    TensorSpec,
    WeightQuantizer,
)
from fat_plugins.registry import Algorithm
from fat_plugins.unfold import input_rows, is_transposed

#: no step falls below it
_FLOOR = 1e-12


class GPFQParams(Params):
    """Options of ``"algorithm": "gpfq"`` (JSON section ``params``)."""

    alphabet: Literal["bits", "authors"] = Field(
        "bits",
        description="'bits': 2^b - 1 levels, which b bits hold. 'authors': the 2^b + 1 levels of their code, which "
        "take b + 1 bits.",
    )
    radius: float | None = Field(
        1.16,
        gt=0,
        description="C: the outermost level in units of the mean over neurons of the largest |weight|. null: where "
        "nearest rounding has the least squared error, layer by layer (ours).",
    )
    mode: Literal["plain", "l0", "l1", "stochastic"] = Field(
        "plain", description="Nearest level; with hard or soft thresholding for sparsity; or stochastic rounding."
    )
    lambda_: float = Field(0.1, gt=0, description="Threshold of modes l0 and l1, in units of the weights.")
    stride: Literal["layer", "kernel"] = Field(
        "layer", description="Patches of a convolution: its own stride, or the kernel's size as the authors' code."
    )
    samples: int = Field(1024, ge=1, description="Calibration samples for each layer.")
    patches: float | None = Field(
        0.25, gt=0, le=1, description="p: int(pL + 1) of the L patches of a sample, with repetition. null: each once."
    )
    bias_correction: Literal["none", "last", "all"] = Field(
        "none",
        description="Add the mean output error to the bias: of the last linear layer (the authors), or of all layers "
        "that have a bias and no batch norm behind them (ours).",
    )
    act_order: bool = Field(
        False, description="Quantize inputs of large energy first (as Brevitas can), not in the order of the weight."
    )
    accumulate: Literal["covariance", "direct"] = Field(
        "covariance", description="Keep products of the inputs, d x d, or the inputs themselves; the result is equal."
    )
    use_quantized_activations: bool = Field(
        True, description="The quantized network that the path follows has its activations quantized too."
    )
    seed: int = Field(0, ge=0, description="Seed of the patches and of stochastic rounding.")

    @model_validator(mode="after")
    def _fitting(self) -> GPFQParams:
        if self.radius is None and self.mode in ("l0", "l1"):
            raise ValueError("radius: null belongs to modes plain and stochastic; give a number")
        return self


def make_alphabet(bits: int, params: GPFQParams) -> Alphabet:
    """The levels of ``bits``-bit weights (sections 2, 3 and 8)."""
    gap = params.lambda_ if params.mode == "l0" else 0.0
    steps = 2 ** (bits - 1) if params.alphabet == "authors" else 2 ** (bits - 1) - 1 - int(gap > 0)
    return Alphabet(steps, gap, params.lambda_ if params.mode == "l1" else 0.0)


def form_of(alphabet: Alphabet, bits: int, step: Tensor, axis: int = 0) -> Form:
    """The deployed form of an alphabet whose codes take ``bits`` bits; ``step`` is 1-d."""
    if alphabet.gap:
        gap = torch.full_like(step[:1], alphabet.gap)
        parts = (UniformGrid(2, True, True, gap, axis), UniformGrid(bits, True, True, step, axis))
        form = SumOfGrids(parts)
        return SumOfGrids(parts, pack(form, torch.arange(-alphabet.highest, alphabet.highest + 1)).long().unique())
    if alphabet.highest == 2 ** (bits - 1) - 1:
        return UniformGrid(bits, True, True, step, axis)
    levels = torch.arange(-alphabet.highest, alphabet.highest + 1, device=step.device)
    return Codebook(bits, levels, step, axis)


def pack(form: Form, codes: Tensor) -> Tensor:
    """Codes of the form (int32) from signed codes of the alphabet."""
    if isinstance(form, SumOfGrids):
        sign = torch.sign(codes)
        return form.pack((sign, codes - sign))
    offset = form.levels.numel() // 2 if isinstance(form, Codebook) else 0
    return codes.to(torch.int32) + offset


# --------------------------------------------------------------------------------------------------------------------
# layers as matrices
# --------------------------------------------------------------------------------------------------------------------
def to_rows(weight: Tensor, spec: TensorSpec) -> Tensor:
    """A weight as ``g x o x d``: the neurons of each group, their inputs in the order of
    :func:`fat_plugins.unfold.input_rows`."""
    g = spec.groups
    if is_transposed(spec):
        split = weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1)
        return split.transpose(1, 2).reshape(g, weight.shape[1], -1)
    rows = weight.movedim(spec.channel_axis, 0)
    return rows.reshape(g, rows.shape[0] // g, -1)


def from_rows(rows: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of :func:`to_rows`."""
    shape = list(spec.shape)
    if is_transposed(spec):
        g, (inputs, outputs) = spec.groups, shape[:2]
        return rows.reshape(g, outputs, inputs // g, -1).transpose(1, 2).reshape(shape)
    shape.insert(0, shape.pop(spec.channel_axis))
    return rows.reshape(shape).movedim(0, spec.channel_axis)


class GPFQWeight(WeightQuantizer):
    """Weight side. Buffers: ``codes`` (int8, signed codes of the alphabet, output channels x weights), ``step`` (1, or
    one per output channel), ``done`` (whether the path has been followed), ``errors`` (relative squared error of the
    layer's output by the path and by nearest rounding).

    Calibration fixes the step. Until the coordinator has found the codes, the host's weight is rounded to nearest, and
    trains straight through; from then on it is of no use any more.
    """

    params: GPFQParams
    needs_input: ClassVar[bool] = True

    def __init__(self, spec: TensorSpec, params: GPFQParams) -> None:
        super().__init__(spec, params)
        self.alphabet = make_alphabet(spec.bits, params)
        self.register_buffer("step", torch.ones(spec.shape[spec.channel_axis] if spec.per_channel else 1))
        channels = spec.shape[spec.channel_axis]
        self.register_buffer("codes", torch.zeros(channels, math.prod(spec.shape) // channels, dtype=torch.int8))
        self.register_buffer("done", torch.tensor(False))
        self.register_buffer("errors", torch.zeros(2))
        self._done = False
        #: the path goes on through later layers: the float network is needed as it is
        self.held = False
        self._alive: Tensor | None = None
        self._pairs: Pairs | None = None
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()

    # -- state -------------------------------------------------------------------------------------------------------
    @property
    def bits(self) -> int:
        """Width of a code: that of the config, or one more for the authors' alphabet."""
        return self.spec.bits + int(self.params.alphabet == "authors")

    @property
    def owns_weight(self) -> bool:
        """Whether the codes are those of the path, and nothing reads the float weight any more."""
        return self._done and not self.held

    def _set_done(self, done: bool) -> None:
        self._done = done
        self.done.fill_(done)
        self._kept.drop()

    def reset_calibration(self) -> None:
        super().reset_calibration()
        self._set_done(False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "done" in state_dict:
            self._done = bool(state_dict[prefix + "done"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": None, "_waiting": deque()}

    def init_from_weight(self, weight: Tensor) -> None:
        """Section 2: ``d = C R / K``, R the mean over neurons of the largest magnitude.

        :raises QuantizationError: the gap of mode l0 reaches to the outermost level.
        """
        rows = to_rows(weight.double(), self.spec)
        largest = rows.abs().amax(2)  # g x o
        if self.spec.per_channel:
            channels = largest.amax(0) if is_transposed(self.spec) else largest.flatten()
        else:
            channels = largest.mean().reshape(1)
        radius = self._radius(weight.double(), channels)
        step = torch.where(channels > 0, self.alphabet.step(radius), 1.0)
        if not bool((step > 0).all()):
            lowest = float(radius[step <= 0].min())
            raise QuantizationError(
                f"{self.spec.name or 'weight'}: lambda_ {self.params.lambda_:g} of mode l0 is not below the outermost "
                f"level, {lowest:.4g} (radius times the largest weights); allowed: less than that"
            )
        self.step.copy_(step.clamp_min(_FLOOR))
        self._alive = weight != 0 if self.spec.keep_zeros else None

    def _radius(self, weight: Tensor, channels: Tensor) -> Tensor:
        if self.params.radius is not None:
            return self.params.radius * channels

        def nearest(x: Tensor, clip: Tensor) -> Tensor:
            d = self.alphabet.step(clip)
            return self.alphabet.values(self.alphabet.codes(x, d), d)

        parts = weight.movedim(self.spec.channel_axis, 0) if self.spec.per_channel else weight.unsqueeze(0)
        return channels.new_tensor([best_clip(part, nearest) for part in parts])

    def _row_step(self) -> Tensor:
        """The step as it broadcasts to ``g x o x 1``, float64."""
        step = self.step.double()
        if step.numel() == 1 or is_transposed(self.spec):
            return step.reshape(1, -1, 1)
        return step.reshape(self.spec.groups, -1, 1)

    # -- data --------------------------------------------------------------------------------------------------------
    @property
    def wants_input(self) -> bool:
        """Only while the coordinator gathers data for the layer."""
        return self._pairs is not None

    def collect(self, weight: Tensor) -> None:
        """Gather the inputs of the layer from now on.

        :param weight: the host's float weight.
        """
        weight = weight.detach().double()
        if self._alive is not None:
            weight = weight * self._alive
        self._pairs = Pairs(to_rows(weight, self.spec), self.params.accumulate == "direct")
        self._generator = self._seeded("patches")
        self._waiting.clear()

    def collected(self) -> Pairs:
        """End of :meth:`collect`."""
        pairs, self._pairs = self._pairs, None
        self._waiting.clear()
        return pairs

    def _seeded(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.params.seed} {what} {self.spec.name}".encode()))

    @torch.no_grad()
    def observe_input(self, x: Tensor) -> None:
        """Input of the layer: in the float network (where the quantizer is disabled), then in the quantized one, for
        each call of the layer on each batch. The patches are the same."""
        if self._pairs is None:
            return
        stride = tuple(self.spec.shape[2:]) if self.params.stride == "kernel" else None
        if not self.enabled:
            chosen: list[Tensor] = []

            def draw(samples: int, positions: int, device: torch.device) -> Tensor:
                chosen.append(self._positions(samples, positions).to(device))
                return chosen[0]

            rows = input_rows(x, self.spec, draw, stride=stride)
            self._waiting.append((rows, chosen[0]))
            return
        if not self._waiting:
            raise QuantizationError(f"{self.spec.name}: the host showed no input of the float network")
        rows, positions = self._waiting.popleft()
        self._pairs.add(rows, input_rows(x, self.spec, lambda *_: positions, stride=stride))

    def _positions(self, samples: int, positions: int) -> Tensor:
        """Section 7; linear layers are read whole."""
        if self.params.patches is None or len(self.spec.shape) < 3:
            return torch.arange(positions)
        count = int(self.params.patches * positions + 1)
        return torch.randint(positions, (samples, count), generator=self._generator)

    @torch.no_grad()
    def follow(self, pairs: Pairs) -> Tensor:
        """Section 3: the codes of the path; they are final.

        :return: what the mean output of each output channel loses (1-d, float64).
        :raises QuantizationError: the layer reads NaN or infinite values.
        """
        known = [pairs.norms()] + ([] if pairs.energy is None else [pairs.energy])
        if not all(bool(torch.isfinite(numbers).all()) for numbers in known):
            raise QuantizationError(f"{self.spec.name}: its input holds NaN or infinite values, or is too large")
        d, alphabet = self._row_step().squeeze(2), self.alphabet
        alive = None if self._alive is None else to_rows(self._alive, self.spec)
        generator = self._seeded("rounding")

        def draw(z: Tensor) -> Tensor:
            return torch.rand(z.shape, generator=generator, dtype=z.dtype).to(z.device)

        def pick(z: Tensor, at: Tensor) -> Tensor:
            codes = alphabet.codes(z, d, draw if self.params.mode == "stochastic" else None)
            if alive is None:
                return codes
            return codes * alive.gather(2, at.reshape(-1, 1, 1).expand(*z.shape, 1)).squeeze(2)

        order = pairs.norms().argsort(dim=1, descending=True, stable=True) if self.params.act_order else None
        codes = follow(pairs, pick, lambda c: alphabet.values(c, d), order)
        d = d.unsqueeze(2)
        found, nearest = (alphabet.values(c, d) for c in (codes, alphabet.codes(pairs.weight, d)))
        self.errors.copy_(torch.stack([pairs.error(found), pairs.error(nearest)]))
        self._keep(from_rows(codes, self.spec))
        return pairs.lost_mean(found).flatten()

    @torch.no_grad()
    def keep_nearest(self, weight: Tensor) -> None:
        """Nothing is known of the layer's input: round the host's float weight, and be done."""
        self._keep(self._nearest(weight))

    def _keep(self, codes: Tensor) -> None:
        self.codes.copy_(codes.movedim(self.spec.channel_axis, 0).reshape(self.codes.shape))
        self._set_done(True)

    def signed_codes(self) -> Tensor:
        """Codes of the path (int8, shape of the weight); zeros before."""
        shape = list(self.spec.shape)
        shape.insert(0, shape.pop(self.spec.channel_axis))
        return self.codes.reshape(shape).movedim(0, self.spec.channel_axis)

    def reopen(self) -> None:
        """The codes are final no more."""
        self._set_done(False)

    # -- values ------------------------------------------------------------------------------------------------------
    def _view(self) -> Tensor:
        return per_channel_view(wide(self.step), len(self.spec.shape), self.spec.channel_axis)

    def _nearest(self, weight: Tensor) -> Tensor:
        """Signed codes of nearest rounding, in a float dtype."""
        return self.alphabet.codes(wide(weight.detach()), self._view())

    def quantize(self, weight: Tensor) -> Tensor:
        """The levels of the path's codes (of ``weight`` only the dtype is read); before, the nearest ones."""
        step = self._view()
        if self._done:
            return self.alphabet.values(self.signed_codes().to(step.dtype), step).to(weight.dtype)
        value = self.alphabet.values(self._nearest(weight), step).to(weight.dtype)
        return value + (weight - weight.detach())  # straight through: the difference is zero

    def _form(self) -> Form:
        return form_of(self.alphabet, self.bits, wide(self.step), self.spec.channel_axis)

    def grid_scale(self, weight: Tensor) -> Tensor:
        step = wide(self.step)
        return step if step.numel() > 1 or not self.alphabet.gap else torch.full_like(step, self.alphabet.gap)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Section 8: integer codes and one step per layer; two grids that add up where there is a gap."""
        form = self._form()
        return FrozenTensor(pack(form, self.signed_codes() if self._done else self._nearest(weight)), form)

    @torch.no_grad()
    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the relative squared error of the layer's output, by the path and by nearest rounding."""
        numbers = super().monitor(weight)
        if self._done:
            numbers |= {"output error": float(self.errors[0]), "output error, nearest": float(self.errors[1])}
        return numbers


class GPFQActivation(MinMaxActivation):
    """Activation side (section 5: the authors leave activations float): the calibrated range on a uniform grid."""

    def __init__(self, spec: TensorSpec, params: GPFQParams) -> None:
        super().__init__(spec, MinMaxParams(momentum=0.0))


class GPFQPath(Coordinator):
    """Quantizes the layers one after the other (section 7), once, when the host has calibrated everything else.

    :param layers: in execution order.
    """

    def __init__(self, layers: list[LayerQuantizers]) -> None:
        super().__init__([layer for layer in layers if isinstance(layer.weight, GPFQWeight)])
        self._warned = False

    @property
    def _ahead(self) -> Iterator[LayerQuantizers]:
        return (x for x in self.layers if x.weight.enabled and not x.weight.owns_weight)

    def begin(self) -> None:
        """Follow the path through every layer that has not been quantized yet. Without data nothing happens but a
        warning: weights are rounded to nearest."""
        ahead = list(self._ahead)
        if not ahead:
            return
        if self._calibration is None:
            if not self._warned:
                warnings.warn(
                    "gpfq: no calibration data reached it, so that weights are rounded to the nearest level; give the "
                    "host a loader",
                    stacklevel=2,
                )
            self._warned = True
            return
        biases = {bias: bias.detach().clone() for layer in ahead if (bias := _bias(layer)) is not None}
        for layer in ahead:
            layer.weight.held = True
        try:
            for layer in ahead:
                self._quantize(layer)
        except BaseException:
            for layer in ahead:
                layer.weight.reopen()
            with torch.no_grad():
                for bias, before in biases.items():
                    bias.copy_(before)
            raise
        finally:
            for layer in ahead:
                layer.weight.held = False

    def on_progress(self, progress: Progress) -> None:
        """Begin, where the host had no data before."""
        self.begin()

    def _quantize(self, layer: LayerQuantizers) -> None:
        weight = layer.weight
        weight.collect(_parameter(layer))
        quantized = ROLES if weight.params.use_quantized_activations else ("weight",)
        try:
            self._calibration(weight.params.samples, turns=((), quantized))
        finally:
            pairs = weight.collected()
        if not pairs.count:
            warnings.warn(f"{layer.name}: its input was not seen; its weights are rounded to nearest", stacklevel=3)
            weight.keep_nearest(_parameter(layer))
            return
        self._correct(layer, weight.follow(pairs))

    def _correct(self, layer: LayerQuantizers, lost: Tensor) -> None:
        """Section 7: what the mean output loses goes to the bias."""
        rule = layer.weight.params.bias_correction
        if rule == "none" or (rule == "last" and layer is not self._last_linear()):
            return
        bias = _bias(layer)
        if bias is None or bias.shape != lost.shape:
            if rule == "last":
                warnings.warn(f"{layer.name}: bias_correction 'last': the layer has no bias", stacklevel=4)
            return
        if rule == "last" or not layer.weight.spec.followed_by_norm:
            with torch.no_grad():
                bias.add_(lost.to(bias.dtype))

    def _last_linear(self) -> LayerQuantizers | None:
        return next((x for x in reversed(self.layers) if len(x.weight.spec.shape) == 2), None)

    # -- reports -----------------------------------------------------------------------------------------------------
    def monitor(self) -> dict[str, float]:
        """Layers that are still to be quantized."""
        return {"layers ahead": float(len(list(self._ahead)))}

    def figures(self) -> list[Figure]:
        """Output errors of all layers."""
        done = [layer for layer in self.layers if layer.weight.owns_weight]
        if not done:
            return []
        by_path, nearest = torch.stack([layer.weight.errors for layer in done]).unbind(1)
        series = {"greedy path": by_path, "nearest rounding": nearest}
        names = [layer.name for layer in done]
        return [Figure.bars("Relative squared error of the output", names, series, "", "error")]


def _bias(layer: LayerQuantizers) -> nn.Parameter | None:
    return next((p for name, p in layer.parameters.items() if name.split(".")[-1] == "bias"), None)


def _parameter(layer: LayerQuantizers) -> nn.Parameter:
    """The host's float weight.

    :raises QuantizationError: the host gave none.
    """
    shape = layer.weight.spec.shape
    found = [p for p in layer.parameters.values() if p is not None and tuple(p.shape) == shape]
    if not found:
        raise QuantizationError(f"{layer.name}: the host gave no float weight of shape {list(shape)}")
    return found[0]


class GPFQ(Algorithm):
    """Registry entry of GPFQ."""

    name = "gpfq"
    title = "Greedy Path-Following Quantization (post-training)"
    paper = "Zhang, Zhou, Saab: Post-training Quantization for Neural Networks with Provable Guarantees, SIMODS 2023"
    arxiv = "2201.11113"
    fidelity = (
        "B: follows the authors' released code, which was executed; abstract and README read, the body of the paper "
        "was not available"
    )
    Params = GPFQParams
    weight_quantizer = GPFQWeight
    activation_quantizer = GPFQActivation
    bits_reason = "a symmetric alphabet of one bit has no level beside zero"
    per_channel_weights = True
    coordinator = GPFQPath

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses widths that an alphabet does not have."""
        super().check(spec, params)
        if spec.role != "weight" or not isinstance(params, GPFQParams):
            return
        where = spec.name or "weight"
        if params.alphabet == "authors" and spec.bits > 7:
            raise ConfigError(
                f"{where}: alphabet 'authors' takes 9 bits at {spec.bits} bits; allowed: 2 to 7, or alphabet 'bits'"
            )
        if params.mode == "l0" and params.alphabet == "bits" and spec.bits < 3:
            raise ConfigError(
                f"{where}: mode 'l0' has a zero, a gap and steps, which 2 bits cannot hold; allowed: 3 to 8 bits, or "
                "alphabet 'authors'"
            )


__all__ = ["GPFQ", "GPFQActivation", "GPFQParams", "GPFQPath", "GPFQWeight"]
