"""Direct quantization (Hoang, Do, Nguyen, Cheung, IJCAI 2020, arXiv 2012.13762): training without float weights.

Reconstruction from the abstract; not verified against the authors' text, code or tables. Sections quoted below are
those of the project's specification of Direct Quantization.

A weight *is* a basis of positive levels and one auxiliary variable per weight and bit, whose sign is the bit. Both are
trained with the gradient of the quantized weight; the float weight is gone after initialisation, and the host's
parameter holds the quantized value. Activation levels are fitted so that every channel counts alike.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.algorithms._direct_fit import (
    LEVEL_FLOOR,
    UNIT_ERROR,
    Tally,
    basis_codes,
    channel_tally,
    fit_step,
    initial_weight,
    integer_table,
    sorted_levels,
)
from fat_plugins.errors import ConfigError
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, Staircase, SumOfGrids, UniformGrid
from fat_plugins.functional import fake_quantize, level_quantize, wide
from fat_plugins.kernels import evaluate, no_view, row_blocks
from fat_plugins.quantizer import ActivationQuantizer, FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: moving averages of activation statistics and levels (section 5.2)
_MEMORY = 0.9
#: bits of the integers that carry fitted activation levels: an error of at most 2^-17 of the highest level
_FINE_BITS = 16
_MOST_STEPS = 60
#: calibration looks at this many samples of a batch at most (section 6.2)
_SAMPLES = 512
_DECAY = 1e-4


class DirectParams(Params):
    """Options of ``"algorithm": "direct"`` (JSON section ``params``)."""

    levels: Literal["basis", "tied"] = Field(
        "basis",
        description="'basis': every bit has a learned (weights) or fitted (activations) value of its own. 'tied': they "
        "are 1, 2, 4, ... times one number, so the levels are evenly spaced: the choice for integer targets.",
    )
    grid: Literal[8] | None = Field(
        None,
        description="8: levels of 'basis' are rounded to the 8-bit grid under the highest one, in training too; "
        "weights then deploy as one 8-bit layer instead of a sum of 1-bit ones, activations fit 8 bits.",
    )
    channel_weight: Literal["norm", "l21", "none"] = Field(
        "norm",
        description="What an activation channel's squared error counts: 'norm' relative to the channel's energy, 'l21' "
        "by the square root of its error, 'none' all alike, so the strong ones rule (the ablation).",
    )
    channel_cap: float = Field(
        10.0, ge=1, description="Largest weight of a channel relative to the median ('norm'); about 3 suits 'tied'."
    )
    z_grad: Literal["plain", "normalized"] = Field(
        "plain",
        description="Gradient of an auxiliary variable: times the value of its bit ('plain', for Adam), or divided by "
        "half the mean gap of the levels ('normalized', for SGD at the rate of the float weights).",
    )
    optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="The optimizer of the run, for the learning rates of param_groups."
    )


# --------------------------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------------------------
class _BinarySum(torch.autograd.Function):
    """``sum_k v_k sgn(z_k)`` and the gradients of section 4; one bit plane at a time in one buffer, so nothing of
    K-fold size but ``z`` and its gradient is ever in memory.

    Shapes: ``z`` K x C x n, ``basis`` P x C or P x 1; P = K, or 1 for bits worth 1, 2, 4, ... times it. Result C x n.
    """

    @staticmethod
    def forward(ctx, z: Tensor, basis: Tensor, unit_grad: bool) -> Tensor:
        ctx.save_for_backward(z, basis)
        ctx.unit_grad = unit_grad
        values = wide(basis).clamp_min(LEVEL_FLOOR).unsqueeze(-1)
        tied = len(basis) < len(z)
        total = torch.zeros(z.shape[1:], dtype=values.dtype, device=z.device)
        for some in row_blocks(total):
            part, worth = total[some], values if values.shape[1] == 1 else values[:, some]
            buffer = torch.empty_like(part)
            for k, bits in enumerate(z[:, some].unbind()):
                _signs(bits, buffer)
                # the sum of tied bits is an exact integer, as the form has it; others add up in the form's order
                part.add_(buffer, alpha=2**k) if tied else part.add_(buffer.mul_(worth[k]))
            if tied:
                part.mul_(worth[0])
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        z, basis = ctx.saved_tensors
        values = wide(basis).clamp_min(LEVEL_FLOOR).unsqueeze(-1)
        g = grad.to(values.dtype)
        tied = len(basis) < len(z)
        worth = torch.stack([values[0] * 2**k if tied else values[k] for k in range(len(z))])
        if ctx.unit_grad:
            factors = (1 / (worth.sum(0) / (2 ** len(z) - 1)).clamp_min(UNIT_ERROR)).expand_as(worth)
        else:
            factors = worth
        dz, dbasis = torch.empty_like(z), torch.zeros_like(values, dtype=torch.float64)
        for some in row_blocks(g):
            part, shared = g[some], values.shape[1] == 1
            buffer = torch.empty_like(part)
            for k, bits in enumerate(z[:, some].unbind()):
                window = buffer.copy_(bits).abs_().le_(1)
                dz[k, some].copy_(window.mul_(part).mul_(factors[k] if shared else factors[k, some]))
                reach = _signs(bits, buffer).mul_(part).sum(1, keepdim=True)
                reach = reach.sum(0, keepdim=True) if shared else reach
                dbasis[0 if tied else k, slice(None) if shared else some] += reach * 2**k if tied else reach
        return dz, dbasis.squeeze(-1).to(basis.dtype), None


def _signs(bits: Tensor, out: Tensor) -> Tensor:
    """-1 and +1 by the sign of ``bits`` (of 0: +1), written into ``out`` of the same shape."""
    return torch.ge(bits, 0, out=out).mul_(2).sub_(1)


class DirectWeight(WeightQuantizer):
    """Weight side, sections 3, 4 and 6.1.

    Parameters: ``z`` (K x C x n: bits, output channels, weights per channel; its sign is the bit, within [-1, 1]) and
    ``basis`` (K x C; one row when tied; one column without ``per_channel``). No tensor of the weight's shape is left.
    """

    params: DirectParams
    owns_weight: ClassVar[bool] = True
    has_zero: ClassVar[bool] = False

    def __init__(self, spec: TensorSpec, params: DirectParams) -> None:
        super().__init__(spec, params)
        self.tied = params.levels == "tied" or spec.bits == 1  # one bit is evenly spaced as it is
        channels = spec.shape[spec.channel_axis]
        count = torch.Size(spec.shape).numel() // channels
        self.columns = 1 if spec.per_channel is False else channels
        self.z = nn.Parameter(torch.ones(spec.bits, channels, count))
        self.basis = nn.Parameter(torch.ones(1 if self.tied else spec.bits, self.columns))

    def init_from_weight(self, weight: Tensor) -> None:
        """Section 6.1: the nearest least-squares levels, and margins to the thresholds as auxiliary variables."""
        with torch.autocast(weight.device.type, enabled=False):
            rows = weight.double().movedim(self.spec.channel_axis, 0).reshape(self.columns, -1)
            z, basis = initial_weight(rows, self.spec.bits, self.tied)
        self.z.copy_(z.reshape(self.z.shape))
        self.basis.copy_(basis)

    @torch.no_grad()
    def project(self) -> None:
        """Section 4, after an optimizer's step: ``z`` into [-1, 1], the basis above 1e-6.

        Every training forward does it first. Through ``data``, since two layers that share the weight run two forwards
        before one backward.
        """
        self.z.data.clamp_(-1, 1)
        self.basis.data.clamp_min_(LEVEL_FLOOR)

    def _scale(self) -> Tensor:
        """Step of the 8-bit grid: the highest level is code 127. Shape (columns,)."""
        return wide(self.basis.detach()).clamp_min(LEVEL_FLOOR).sum(0) / 127

    def quantize(self, weight: Tensor) -> Tensor:
        """``w_q``; of ``weight`` only the dtype is read."""
        if self.training:
            self.project()
        with torch.autocast(self.z.device.type, enabled=False):
            rows = _BinarySum.apply(self.z, self.basis, self.params.z_grad == "normalized")
            if self._snapped:
                scale = self._scale().unsqueeze(-1)
                rows = fake_quantize(rows, scale, -127, 127, clip_x_grad=False)
            return self._shaped(rows).to(weight.dtype)

    @property
    def _snapped(self) -> bool:
        return self.params.grid is not None and not self.tied

    def _shaped(self, rows: Tensor) -> Tensor:
        """C x n as the host has it."""
        shape = list(self.spec.shape)
        shape.insert(0, shape.pop(self.spec.channel_axis))
        return rows.reshape(shape).movedim(0, self.spec.channel_axis)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """Section 8: K binary grids that add up; odd integers when tied; one 8-bit grid with ``grid``."""
        for tensor, what in ((self.z, "auxiliary variables"), (self.basis, "basis")):
            self._refuse_nonfinite(tensor, what)
        bits, axis = self.spec.bits, self.spec.channel_axis
        values = wide(self.basis.detach()).clamp_min(LEVEL_FLOOR)
        planes = [(plane >= 0).to(torch.int32) for plane in self.z.detach().unbind()]
        if self._snapped:
            form: Form = UniformGrid(8, True, True, self._scale(), axis)
            rows = _BinarySum.apply(self.z.detach(), self.basis.detach(), False)
            codes = torch.round(rows / self._scale().unsqueeze(-1)).clamp(-127, 127)
        elif self.tied:
            levels = 2 * torch.arange(2**bits, device=values.device) - (2**bits - 1)
            form = Codebook(bits, levels, values[0], axis)
            codes = sum(plane << k for k, plane in enumerate(planes))
        else:
            levels = torch.tensor([-1, 1], device=values.device)
            form = SumOfGrids(tuple(Codebook(1, levels, v, axis) for v in values))
            codes = form.pack(planes)
        return FrozenTensor(self._shaped(codes).to(torch.int32).contiguous(), form)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also the mean of the auxiliary variables' magnitudes, and what every bit is worth on average."""
        numbers = {**super().monitor(weight), "margin": float(self.z.detach().abs().mean())}
        return {**numbers, **{f"bit {k}": float(v) for k, v in enumerate(self._worth().mean(1), 1)}}

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """What every bit is worth: on average and in the extreme channels."""
        worth = self._worth()
        series = {"lowest channel": worth.amin(1), "mean": worth.mean(1), "highest channel": worth.amax(1)}
        series = series if self.columns > 1 else {"value": worth[:, 0]}
        return [Figure.bars("Basis", [f"bit {k}" for k in range(1, len(worth) + 1)], series, "", "value")]

    def _worth(self) -> Tensor:
        """Value of every bit: K x columns."""
        return _bit_values(self.basis, self.spec.bits).reshape(self.spec.bits, -1)

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._scale() if self._snapped else wide(self.basis.detach()).clamp_min(LEVEL_FLOOR)[0]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Section 7. No decay on ``z``, where it would flip bits at random; 1e-4 on the basis, if the run decays.

        Rates in proportion to the base, of which Adam's is 1e-3: ``z`` 10 times it at one bit, else the base. SGD:
        ``z`` the base divided by the mean square of the basis, or with ``z_grad: normalized`` the base, either of which
        flips bits as fast as float weights would; the basis a tenth.
        """
        if self.params.optimizer == "adam":
            fast, slow = lr * (10 if self.spec.bits == 1 else 1), lr
        else:
            worth = self.basis.detach().double().clamp_min(LEVEL_FLOOR)
            square = float((worth.square() * ((4**self.spec.bits - 1) / 3 / self.spec.bits if self.tied else 1)).mean())
            fast, slow = lr if self.params.z_grad == "normalized" else lr / square, 0.1 * lr
        return [
            {"params": [self.z], "lr": fast, "weight_decay": 0.0},
            {"params": [self.basis], "lr": slow, "weight_decay": _DECAY if weight_decay else 0.0},
        ]


# --------------------------------------------------------------------------------------------------------------------
# activations
# --------------------------------------------------------------------------------------------------------------------
class _ClippedStraight(torch.autograd.Function):
    """``value``, with the gradient of ``x`` passed where ``bottom <= x <= top`` (section 5.1)."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, bottom: Tensor | None, top: Tensor) -> Tensor:
        ctx.save_for_backward(x, bottom, top)
        return no_view(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, bottom, top = ctx.saved_tensors
        bounds = (top,) if bottom is None else (top, bottom)
        return evaluate(_inside, (grad, x), bounds)[0], None, None, None


def _inside(out, grad: Tensor, x: Tensor, top: Tensor, bottom: Tensor | None = None):
    inside = wide(x).clone().le_(top)
    if bottom is not None:
        inside.mul_(wide(x).clone().ge_(bottom))
    return torch.mul(inside, wide(grad), out=out), ()


class DirectActivation(ActivationQuantizer):
    """Activation side, sections 5 and 6.2. Nothing is learned by gradient: in training, each batch moves the levels.

    Buffers: ``basis`` (K numbers, one when tied) and ``energy`` (moving mean square of every channel; empty until a
    batch was seen).
    """

    params: DirectParams
    calibration = "data"

    def __init__(self, spec: TensorSpec, params: DirectParams) -> None:
        super().__init__(spec, params)
        self.tied = params.levels == "tied" or spec.bits == 1
        # both, since signedness may come from calibration; nothing in the state dict
        for signed in (False, True):
            codes = basis_codes(spec.bits, signed, self.tied)
            self.register_buffer("signed_codes" if signed else "unsigned_codes", codes, persistent=False)
        self.register_buffer("basis", torch.ones(1 if self.tied else spec.bits))
        self.register_buffer("energy", torch.zeros(0))
        # of the calibration so far: batches, and signedness of the levels that the last one fitted
        self._batches, self._sign_at_fit = 0, False

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        energy = state_dict.get(prefix + "energy")
        if energy is not None and energy.shape != self.energy.shape:  # as many as the tensor has channels
            self.energy = self.energy.new_zeros(energy.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- levels ------------------------------------------------------------------------------------------------------
    @property
    def _codes(self) -> Tensor:
        """2^K x P: a row for every code; a level is its product with the basis."""
        return self.signed_codes if self.signed else self.unsigned_codes

    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ascending integer levels (int64, 2^K), their midpoints and the scale (0-d)."""
        basis = wide(self.basis)
        if self.tied:
            levels = self._codes[:, 0].long()
            return levels, midpoints(levels), basis[0]
        most = 2 ** ((self.params.grid or _FINE_BITS) - int(self.signed)) - 1
        scale = basis.sum() / most
        levels = integer_table(self._codes, basis, most)
        return levels, midpoints(levels), scale

    def quantize(self, x: Tensor) -> Tensor:
        """``x_q`` of the levels before this batch; then, in training, the levels follow the batch."""
        levels, thresholds, scale = self._levels()
        with torch.no_grad():
            if self.tied and not self.signed:
                value = fake_quantize(x.detach(), scale, 0, 2**self.spec.bits - 1)
            else:
                value = level_quantize(x.detach(), scale, levels, thresholds)
            if self.training:
                self._follow(x.detach())
        ends = levels[0] * scale, levels[-1] * scale
        return _ClippedStraight.apply(x, value, ends[0] if self.signed else None, ends[1])

    def form(self) -> Form:
        """A staircase, its levels integers times one scale (16 bits wide, 8 with ``grid``); tied and unsigned, a
        uniform grid."""
        levels, _, scale = self._levels()
        scale, bits = scale.detach().reshape(1), self.spec.bits
        if self.tied and not self.signed:
            return UniformGrid(bits, False, False, scale, 1)
        levels = torch.unique(levels)  # equal entries of the basis give a level twice
        return Staircase(bits, levels, midpoints(levels).double(), scale)

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also what every bit is worth."""
        worth = _bit_values(self.basis, self.spec.bits)
        return {**super().monitor(weight), **{f"bit {k}": v for k, v in enumerate(worth.tolist(), 1)}}

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """What every bit is worth."""
        worth = _bit_values(self.basis, self.spec.bits)
        return [Figure.bars("Basis", [f"bit {k}" for k in range(1, len(worth) + 1)], {"value": worth}, "", "value")]

    def grid_scale(self) -> Tensor:
        return self._levels()[2].detach().reshape(1)

    # -- fitting -----------------------------------------------------------------------------------------------------
    def init_from_batch(self, x: Tensor, first: bool) -> None:
        """Section 6.2 on the first batch; each further one moves the levels towards its own by 1 / batches."""
        x = x[:_SAMPLES] if x.ndim else x
        sample = self._by_channel(x).to(wide(self.basis).dtype)
        again = first or self._sign_at_fit != self.signed
        if again:
            largest = x.abs().max().clamp_min(1e-30)
            rms = largest * (x / largest).square().mean().sqrt()
            self.basis.copy_(self._spread(0.6745 * 2 / (2**self.spec.bits - 1) * rms))
        self._batches, self._sign_at_fit = 1 if again else self._batches + 1, self.signed
        before, basis = wide(self.basis).clone(), wide(self.basis).clone()
        energy = self._energy_with(sample.square().mean(1), fresh=again)
        for _ in range(_MOST_STEPS):
            new = self._fitted(sample, basis, energy)
            moved = (new - basis).abs().max() / new.abs().max()
            basis = new
            if not float(moved) > 1e-6:
                break
        self.basis.copy_(before + (basis - before) / self._batches)

    def init_from_range(self, low: float, high: float) -> None:
        """Evenly spaced levels up to the end of the range."""
        top = max(abs(low), abs(high), LEVEL_FLOOR)
        self.basis.copy_(self._spread(torch.tensor(top / (2**self.spec.bits - 1))))
        self.energy = self.energy.new_zeros(0)
        self._batches, self._sign_at_fit = 0, self.signed

    def _spread(self, unit: Tensor) -> Tensor:
        """Bits worth 1, 2, 4, ... times ``unit`` (0-d)."""
        powers = torch.tensor([2.0**k for k in range(len(self.basis))], device=self.basis.device)
        return (unit.to(powers.device) * powers).clamp_min(LEVEL_FLOOR)

    def _by_channel(self, x: Tensor) -> Tensor:
        """``x`` as C x N in float32 (float64 stays)."""
        x, axis = wide(x), self.spec.channel_axis
        if x.ndim <= axis:
            return x.reshape(1, -1)
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)

    def _energy_with(self, seen: Tensor, fresh: bool = False) -> Tensor:
        """Moving average of the channels' mean squares with this batch's, kept and returned."""
        if fresh or self.energy.shape != seen.shape:
            self.energy = seen.to(self.energy.dtype)
        else:
            kept = wide(self.energy).lerp(seen.to(wide(self.energy).dtype), 1 - _MEMORY)
            self.energy.copy_(torch.where(torch.isfinite(kept), kept, wide(self.energy)))
        return wide(self.energy)

    def _fitted(self, sample: Tensor, basis: Tensor, energy: Tensor) -> Tensor:
        """One weighted least-squares step (section 5.2) from ``basis``."""
        values, codes = sorted_levels(self._codes.to(basis.dtype), basis)
        tally = channel_tally(sample, midpoints(values), 0)
        return fit_step(tally, values, codes, basis, energy, self.params.channel_weight, self.params.channel_cap)

    def _follow(self, x: Tensor) -> None:
        """The step of section 5.2 that a training batch takes: no gradient, no synchronisation."""
        if not x.numel():
            return
        with torch.autocast(x.device.type, enabled=False):
            basis = wide(self.basis)
            values, codes = sorted_levels(self._codes.to(basis.dtype), basis)
            tally = channel_tally(x, midpoints(values), self.spec.channel_axis).over_processes()
            tally = Tally(*(part.to(basis.dtype) for part in tally))
            energy = self._energy_with(tally.mean_square)
            new = fit_step(tally, values, codes, basis, energy, self.params.channel_weight, self.params.channel_cap)
            self.basis.copy_(_MEMORY * basis + (1 - _MEMORY) * new)


def _bit_values(basis: Tensor, bits: int) -> Tensor:
    """Values of all bits (rows), also where they are 1, 2, 4, ... times one number."""
    values = wide(basis.detach()).clamp_min(LEVEL_FLOOR)
    return values if len(values) == bits else torch.cat([values * 2**k for k in range(bits)])


def midpoints(levels: Tensor) -> Tensor:
    """Half-way points between neighbours (a float dtype)."""
    return (levels[1:] + levels[:-1]) / 2


class Direct(Algorithm):
    """Registry entry of Direct Quantization."""

    name = "direct"
    title = "Direct Quantization"
    paper = "Hoang, Do, Nguyen, Cheung: Direct Quantization for Training Highly Accurate Low Bit-width DNNs, IJCAI 2020"
    arxiv = "2012.13762"
    fidelity = "D: reconstruction from the abstract; not verified against the authors' text, code or tables"
    Params = DirectParams
    weight_quantizer = DirectWeight
    activation_quantizer = DirectActivation
    weight_bits = (1, 4)
    activation_bits = (1, 4)
    bits_reason = "a level needs at least one bit"
    per_channel_weights = True

    @classmethod
    def check(cls, spec: TensorSpec, params: Params | None = None) -> None:
        """Also refuses a grid under levels that are evenly spaced already."""
        super().check(spec, params)
        if getattr(params, "grid", None) is not None and params.levels == "tied":
            raise ConfigError(f"{spec.name or spec.role}: params.grid: levels 'tied' are on a grid of their own")
