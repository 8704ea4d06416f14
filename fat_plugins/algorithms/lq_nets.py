"""LQ-Nets: learned quantization levels (Zhang, Yang, Ye, Hua, ECCV 2018, arXiv 1807.10029).

A level is the product of a basis, one number per bit, with a code of -1 and +1 (weights) or 0 and 1 (activations). The
basis is no parameter: in every training step it moves a tenth of the way to the least-squares fit of what it quantizes
(QEM). Sections quoted below are those of the project's baselines specification; the formulas were read in the authors'
code.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fat_plugins.algorithms._direct_fit import LEVEL_FLOOR, bit_table, midpoints_of, qem, solve
from fat_plugins.algorithms.direct import DirectActivation, DirectParams
from fat_plugins.figures import Figure
from fat_plugins.forms import Codebook, Form, SumOfGrids, UniformGrid
from fat_plugins.functional import fake_quantize, wide
from fat_plugins.kernels import no_view
from fat_plugins.quantizer import FrozenTensor, Params, TensorSpec, WeightQuantizer
from fat_plugins.registry import Algorithm

#: moving average of the basis, and damping of its fit (section 3)
_MEMORY, _DAMPING = 0.9, 1e-4
#: expected magnitude below which half of the normal values lie
_HALF = 0.6745


class LQNetsParams(Params):
    """Options of ``"algorithm": "lq_nets"`` (JSON section ``params``)."""

    init: Literal["data", "authors"] = Field(
        "data",
        description="Where the weights' basis begins: at the least-squares fit of the weight, or at the authors' "
        "constants, which suit training from He's initialisation.",
    )
    grid: Literal[8] | None = Field(
        None,
        description="8: levels are rounded to the 8-bit grid under the highest one, in training too; weights then "
        "deploy as one 8-bit layer instead of a sum of 1-bit ones, activations fit 8 bits. An extension.",
    )


class _Straight(torch.autograd.Function):
    """``value``, with the gradient of ``x`` passed as it is (section 4)."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return no_view(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class LQNetsWeight(WeightQuantizer):
    """Weight side. Buffer: ``basis`` (K x C; one column with ``per_channel: false``)."""

    params: LQNetsParams
    has_zero = False

    def __init__(self, spec: TensorSpec, params: LQNetsParams) -> None:
        super().__init__(spec, params)
        self.columns = 1 if spec.per_channel is False else spec.shape[spec.channel_axis]
        self.register_buffer("basis", torch.ones(spec.bits, self.columns))
        self.register_buffer("table", bit_table(spec.bits, True), persistent=False)

    def init_from_weight(self, weight: Tensor) -> None:
        """Section 6: ``v_j = .6745 sqrt(2/n) 2^j / 2^(b-1)``, n = outputs times kernel size; or QEM until it rests."""
        if self.params.init == "data":
            self.basis.copy_(qem(self._rows(weight).double(), self.spec.bits, False)[0].T)
            return
        fan_out = weight.numel() // weight.shape[1 - self.spec.channel_axis] if weight.ndim > 1 else weight.numel()
        powers = 2.0 ** (torch.arange(self.spec.bits, device=weight.device) + 1 - self.spec.bits)
        self.basis.copy_((_HALF * (2 / fan_out) ** 0.5 * powers).unsqueeze(1).expand_as(self.basis))

    # -- rows and codes ----------------------------------------------------------------------------------------------
    def _rows(self, weight: Tensor) -> Tensor:
        """The weight as columns x n: one row for each basis."""
        return weight.movedim(self.spec.channel_axis, 0).reshape(self.columns, -1)

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        """Rows back in the shape of the weight ``like``."""
        axis = self.spec.channel_axis
        return rows.reshape(like.movedim(axis, 0).shape).movedim(0, axis)

    def _values(self) -> Tensor:
        """The basis (K x columns) with no entry between -1e-6 and 1e-6; a fit may have made one negative."""
        basis = wide(self.basis)
        return torch.where(basis < 0, -1.0, 1.0).to(basis.dtype) * basis.abs().clamp_min(LEVEL_FLOOR)

    def _planes(self, rows: Tensor) -> Tensor:
        """Bits of the nearest level, -1 and +1: K x columns x n. A threshold belongs to the level below (strict >)."""
        table = self.table.to(rows.dtype)
        values, order = torch.sort(self._values().to(rows.dtype).T @ table.T, dim=1, stable=True)
        index = torch.searchsorted(midpoints_of(values), rows.contiguous()).clamp_(max=values.shape[1] - 1)
        code = order.gather(1, index)
        return torch.stack([table[:, k][code] for k in range(self.spec.bits)])

    def _sum(self, planes: Tensor) -> Tensor:
        """Values of the codes, columns x n, added in the order of the deployed form."""
        values = self._values().to(planes.dtype).unsqueeze(-1)
        total = planes[0] * values[0]
        for plane, value in zip(planes[1:].unbind(), values[1:].unbind(), strict=True):
            total = total + plane * value
        return total

    def _scale(self) -> Tensor:
        """Step of the 8-bit grid under the highest level (columns)."""
        return self._values().abs().sum(0) / 127

    def quantize(self, weight: Tensor) -> Tensor:
        """Section 3 with the basis as it was; then, in training, the basis follows the weight."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            rows = wide(self._rows(weight.detach()))
            planes = self._planes(rows)
            total = self._sum(planes)
            if self.params.grid is not None:
                total = fake_quantize(total, self._scale().to(total.dtype).unsqueeze(-1), -127, 127)
            if self.training:
                self._follow(rows, planes)
            # NaN has no code, and must stay visible
            value = self._shaped(torch.where(torch.isnan(rows), rows, total), weight).to(weight.dtype)
        return _Straight.apply(weight, value)

    def _follow(self, rows: Tensor, planes: Tensor) -> None:
        """One step of section 3: ``(B^T B + d I)^-1 (B^T x + d v)``, entered with a tenth."""
        basis = self._values().T.double()
        flat = planes.movedim(0, 1)
        eye = torch.eye(self.spec.bits, dtype=torch.float64, device=rows.device)
        gram = (flat @ flat.transpose(1, 2)).double() + _DAMPING * eye
        right = (flat @ rows.unsqueeze(2)).squeeze(2).double() + _DAMPING * basis
        new = solve(gram, right).T
        old = wide(self.basis)
        moved = (_MEMORY * old + (1 - _MEMORY) * new).to(old.dtype)
        self.basis.copy_(torch.where(torch.isfinite(moved), moved, old))

    # -- deployment --------------------------------------------------------------------------------------------------
    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        """K binary grids that add up (direct specification, section 8); one 8-bit grid with ``grid``."""
        rows = wide(self._rows(weight.detach()))
        with torch.autocast(weight.device.type, enabled=False):
            planes = self._planes(rows)
        values, axis = self._values(), self.spec.channel_axis
        if self.params.grid is not None:
            scale = self._scale()
            codes = torch.round(self._sum(planes) / scale.to(rows.dtype).unsqueeze(-1)).clamp(-127, 127)
            form: Form = UniformGrid(8, True, True, scale, axis)
            return FrozenTensor(self._shaped(codes, weight).to(torch.int32).contiguous(), form)
        levels = torch.tensor([-1, 1], device=values.device)
        parts = tuple(Codebook(1, levels, v.abs(), axis) for v in values)
        signs = torch.where(values < 0, -1, 1).to(planes.dtype).unsqueeze(-1)
        bits = [self._shaped((plane + 1) / 2, weight).to(torch.int32) for plane in planes * signs]
        if len(parts) == 1:
            return FrozenTensor(bits[0].contiguous(), parts[0])
        form = SumOfGrids(parts)
        return FrozenTensor(form.pack(bits).contiguous(), form)

    def grid_scale(self, weight: Tensor) -> Tensor:
        return self._scale() if self.params.grid is not None else self._values()[0].abs()

    def monitor(self, weight: Tensor | None = None) -> dict[str, float]:
        """Also what every bit is worth on average."""
        worth = self._values().abs().mean(1).tolist()
        return {**super().monitor(weight), **{f"bit {k}": v for k, v in enumerate(worth, 1)}}

    def figures(self, weight: Tensor | None = None) -> list[Figure]:
        """What every bit is worth: on average and in the extreme channels."""
        worth = self._values().abs()
        series = {"lowest channel": worth.amin(1), "mean": worth.mean(1), "highest channel": worth.amax(1)}
        series = series if self.columns > 1 else {"value": worth[:, 0]}
        return [Figure.bars("Basis", [f"bit {k}" for k in range(1, len(worth) + 1)], series, "", "value")]


class LQNetsActivation(DirectActivation):
    """Activation side: codes of 0 and 1, one basis per tensor, every element counting alike.

    Signed activations, which the authors do not have, get codes of -1 and +1 as in Direct Quantization. The fit starts
    from the authors' constants times the root mean square of the first batch, and is damped by 1e-6 of its diagonal
    where theirs (0) has no solution.
    """

    def __init__(self, spec: TensorSpec, params: LQNetsParams) -> None:
        super().__init__(spec, DirectParams(channel_weight="none", grid=params.grid))


class LQNets(Algorithm):
    """Registry entry of LQ-Nets."""

    name = "lq_nets"
    title = "LQ-Nets"
    paper = "Zhang, Yang, Ye, Hua: LQ-Nets, Learned Quantization for Highly Accurate and Compact DNNs, ECCV 2018"
    arxiv = "1807.10029"
    fidelity = "B: follows the authors' released code; the body of the paper was not read"
    Params = LQNetsParams
    weight_quantizer = LQNetsWeight
    activation_quantizer = LQNetsActivation
    weight_bits = (1, 4)
    activation_bits = (1, 4)
    bits_reason = "a level needs at least one bit"
    per_channel_weights = True
