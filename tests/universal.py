"""What every registered algorithm is tested with. A new algorithm needs entries in the two tables of references and,
if it has options or limits worth exercising, in :data:`OPTIONS`; everything else follows from its registration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from references import (
    apot_levels,
    apot_project,
    apot_weight,
    bitat_activation,
    bitat_weight,
    cpq,
    daq_mid_rise,
    daq_weight,
    direct_activation,
    direct_levels,
    direct_weight,
    dorefa_weight,
    fat_activation,
    fat_weight,
    gpfq_weight,
    lq_nets_weight,
    lsq,
    lsq_plus_activation,
    minmax_weight,
    one_model_weight,
    pact,
    sdq_activation,
    sdq_weight,
    slb_weight,
    soft_steps,
    squantize,
)

from fat_plugins import ConfigError, TensorSpec, algorithms, get_algorithm


class Layer(NamedTuple):
    """Geometry of a weighted layer."""

    name: str
    shape: tuple[int, ...]
    axis: int = 0


LAYERS = [
    Layer("conv3x3", (8, 4, 3, 3)),
    Layer("conv1x1", (8, 6, 1, 1)),
    Layer("depthwise", (6, 1, 3, 3)),
    Layer("grouped", (8, 2, 3, 3)),
    Layer("linear", (5, 12)),
    Layer("transposed", (4, 6, 3, 3), 1),
    Layer("grouped_transposed", (4, 3, 2, 2), 1),
    Layer("conv1d", (4, 3, 5)),
    Layer("depthwise1x1", (6, 1, 1, 1)),
]
CONV = LAYERS[0]

#: parameter sets to exercise, beside the defaults
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "apot": [{}, {"restore_scale": True, "alpha": 2.0, "activation_alpha": 2.0}],
    "bitat": [{}, {"alpha": "mean_abs"}],
    "cfws": [{}, {"score": "standard", "unsigned_levels": 128}],
    "direct": [
        {},
        {"levels": "tied", "channel_cap": 3.0},
        {"z_grad": "normalized", "channel_weight": "l21", "optimizer": "sgd"},
        {"levels": "tied", "channel_weight": "none", "z_grad": "normalized"},
    ],
    "fat": [
        {},
        {"levels": "power_of_two"},
        {"transform": "none"},
        {"transform": "uniquant", "alpha": 0.5},
        {"variant": "imagenet"},
        {"levels": "power_of_two", "variant": "imagenet", "restore_scale": True},
        {"restore_scale": True, "activation_alpha": 2.0},
    ],
    "gpfq": [
        {},
        {"alphabet": "authors", "radius": 0.9},
        {"mode": "l1", "lambda_": 0.02},
        {"radius": None, "mode": "stochastic"},
    ],
    "daq": [{}, {"step_index": "bits", "sigma_bits": 4}],
    "lq_nets": [{}, {"init": "authors"}],
    "minmax": [{}, {"momentum": 0.5}],
    "one_model_for_all": [{}, {"levels": 2, "gains": "channel_band"}, {"gains": "fixed"}],
    "dropbits": [
        {},
        {"normalization": "raw", "mask": "none"},
        {"estimator": "full", "act_estimator": "full", "mask": "hierarchical"},
        {"estimator": "ste", "act_estimator": "ste", "init": "rq", "mask": "endpoints", "gates": "bernoulli"},
        {"estimator": "full", "act_estimator": "full", "normalization": "raw", "gate_gradient": "raw"},
    ],
    "rq": [{}, {"straight_through": True, "local_grid": False, "init": "mse", "temperature": 0.5}],
    "dorefa": [{}, {"restore_scale": True}],
    "pact": [{}, {"alpha": None}],
    "lsq_plus": [{}, {"train_float_offset": True}],
    "quantization_networks": [
        {},
        {"levels": "+-2", "symmetric_thresholds": True, "temperature": 3.0},
        {"levels": "uniform", "uniform_thresholds": True},
        {"backward": "t1", "activation_backward": "t1", "strict": True, "activation_temperature": 40.0},
    ],
    "sdq": [
        {},
        {"levels": "power_of_two"},
        {"levels": "power_of_two", "tau": 0.8, "alpha": "mse", "activation_alpha": "mse"},
        {"pruning_ratio": 0.6, "alpha": 2.2, "activation_alpha": 2.0},
    ],
    "slb": [{}, {"scale": "max", "alpha": None, "optimizer": "sgd"}, {"init": "he"}],
    "squantizer": [{}, {"grid": "aligned"}, {"sigma": 0.6, "alpha": None}, {"sigma": None, "alpha": 3.0}],
}
#: these keep tensors of their own transformation for the backward
TRANSFORMS_WEIGHTS = {"apot", "fat", "dorefa", "one_model_for_all", "pact"}
#: a level need not lie between the thresholds of its own cell, so these are not idempotent on activations
FREE_THRESHOLDS = {"quantization_networks"}
#: zero does not count among the 2^b levels of their weights: it is stored as sparsity
ZERO_ON_TOP = {"squantizer"}
#: options that have two levels more than the bits hold, which takes one bit more
ONE_BIT_MORE = ("authors",)
#: these have a gradient of zero for the weights that they prune themselves
OWN_MASK = {"squantizer"}
#: statistics of a weight leave out the zeros of a sparsity algorithm, so its clip depends on them
COUNTS_SURVIVORS = {"sdq"}
#: activations have values of their own, whatever the range of the input
FIXED_VALUES = {"bitat", "dorefa"}
#: these draw random numbers in every training forward
DRAWS_NOISE = {"rq"}
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Case:
    """One configuration of one algorithm."""

    algorithm: str
    options: int
    bits: int
    role: str
    per_channel: bool | None = None

    @property
    def params(self) -> dict[str, Any]:
        return OPTIONS.get(self.algorithm, [{}])[self.options]

    def spec(self, layer: Layer = CONV, **changes) -> TensorSpec:
        values = dict(role=self.role, bits=self.bits, name="layer", per_channel=self.per_channel, channel_axis=1)
        if self.role == "weight":
            values.update(shape=layer.shape, channel_axis=layer.axis, followed_by_norm=True)
        return TensorSpec(**{**values, **changes})

    def make(self, layer: Layer = CONV, **changes):
        return get_algorithm(self.algorithm).make(self.spec(layer, **changes), self.params)

    def ready(self, layer: Layer = CONV, signed: bool = False, seed: int = 0, **changes):
        """A calibrated quantizer with its parameters moved a little off their initial values, and an input."""
        quantizer = self.make(layer, **changes)
        x = sample(layer.shape if self.role == "weight" else (4, 3, 5, 5), self.role, signed, seed)
        quantizer.calibrate(x)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in quantizer.parameters():
                p.mul_(1 - 0.4 * torch.rand(p.shape, generator=generator))
        return quantizer.eval(), x

    def __str__(self) -> str:
        words = [self.algorithm, self.role, f"{self.bits}bit", *(f"{v}" for v in self.params.values())]
        return "-".join(words + (["per_channel"] if self.per_channel else []))


def sample(shape, role: str = "weight", signed: bool = True, seed: int = 0) -> torch.Tensor:
    """Deterministic values: like a trained weight, or like an activation (unsigned: after a ReLU)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * 0.1 + 0.01 if role == "weight" else x if signed else x.relu()


def cases(role: str | None = None, bits=BITS) -> list[Case]:
    """Every algorithm x options x bits x granularity that the algorithm itself allows.

    An algorithm that knows none of ``bits`` comes with its own width that is nearest to the first.
    """
    found = []
    for name, algorithm in algorithms().items():
        for option in range(len(OPTIONS.get(name, [{}]))):
            for r in ("weight", "activation"):
                if role not in (None, r):
                    continue
                low, high = getattr(algorithm, f"{r}_bits")
                own = [b for b in bits if low <= b <= high] or [min(max(bits[0], low), high)]
                for b in own:
                    for per_channel in (None, True) if r == "weight" else (None,):
                        case = Case(name, option, b, r, per_channel)
                        try:
                            algorithm.check(case.spec(), algorithm.parse_params(case.params))
                        except ConfigError:
                            continue
                        found.append(case)
    return found


def run(quantizer, x: torch.Tensor, grad: torch.Tensor | None = None) -> dict[str, Any]:
    """Forward and, with ``grad``, backward. Gradients of parameters by name."""
    x = x.detach().clone().requires_grad_(grad is not None)
    out = quantizer(x)
    result: dict[str, Any] = {"out": out.detach()}
    if grad is not None:
        quantizer.zero_grad()
        out.backward(grad)
        # a quantizer that owns the weight gives the host's parameter no gradient at all
        owned = getattr(quantizer, "owns_weight", False)
        assert not (owned and x.grad is not None)
        result["dx"] = torch.zeros_like(x) if owned else x.grad
        result["params"] = {n: p.grad for n, p in quantizer.named_parameters()}
    return result


# --------------------------------------------------------------------------------------------------------------------
# float64 references: (quantizer in float64, x, grad) -> (out, dx, {parameter: gradient})
# --------------------------------------------------------------------------------------------------------------------
def _fat_weight(quantizer, x, grad):
    params, axis = quantizer.params, quantizer.spec.channel_axis
    t = quantizer.transform.detach().numpy() if quantizer.transform is not None else None
    r = fat_weight(
        np.moveaxis(x, axis, 0), t, quantizer.alpha.item(), quantizer.spec.bits, params.levels, params.transform,
        params.restore_scale is True, np.moveaxis(grad, axis, 0),
    )  # fmt: skip
    gradients = {"alpha": r["dalpha"], **({"transform": r["dt"]} if t is not None else {})}
    return np.moveaxis(r["wq"], 0, axis), np.moveaxis(r["dw"], 0, axis), gradients


def _fat_activation(quantizer, x, grad):
    params = quantizer.params
    r = fat_activation(
        x, quantizer.alpha.item(), quantizer.spec.bits, params.levels, params.variant, quantizer.signed, grad
    )
    return r["xq"], r["dx"], {"alpha": r["dalpha"]}


def _direct_weight(quantizer, x, grad):
    axis = quantizer.spec.channel_axis
    z, basis = quantizer.z.detach().numpy(), quantizer.basis.detach().numpy()
    rows = np.moveaxis(grad, axis, 0)
    out, dz, dbasis = direct_weight(z, basis, rows.reshape(len(rows), -1), quantizer.params.z_grad == "normalized")
    return np.moveaxis(out.reshape(rows.shape), 0, axis), np.zeros_like(x), {"z": dz, "basis": dbasis}


def _direct_activation(quantizer, x, grad):
    levels = direct_levels(quantizer.basis.numpy(), quantizer.spec.bits, quantizer.signed, quantizer.tied)
    return (*direct_activation(x, levels, quantizer.signed, grad), {})


def _lsq_weight(quantizer, x, grad):
    b, axis = quantizer.spec.bits, quantizer.spec.channel_axis
    low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
    step = quantizer.step.detach().numpy()
    shape = [1] * x.ndim
    shape[axis] = step.size
    r = lsq(x, step.reshape(shape), low, high, 1 / np.sqrt(x.size / step.size * high), grad)
    return r["vq"], r["dv"], {"step": r["ds"].reshape(-1)}


def _lsq_activation(quantizer, x, grad):
    b = quantizer.spec.bits
    low, high = (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if quantizer.signed else (0, 2**b - 1)
    r = lsq(x, quantizer.step.item(), low, high, 1 / np.sqrt(x.size / x.shape[0] * high), grad)
    return r["vq"], r["dv"], {"step": r["ds"].reshape(-1)}


def _minmax_weight(quantizer, x, grad):
    per_channel = quantizer.spec.per_channel is not False
    return minmax_weight(x, quantizer.spec.bits, quantizer.spec.channel_axis, per_channel), grad, {}


def _minmax_activation(quantizer, x, grad):
    b = quantizer.spec.bits
    n = 2 ** (b - 1) - 1 if quantizer.signed else 2**b - 1
    r = lsq(x, quantizer.largest.item() / n, -n if quantizer.signed else 0, n, grad=grad)
    inside = (x >= (-quantizer.largest.item() if quantizer.signed else 0)) & (x <= quantizer.largest.item())
    return r["vq"], grad * inside, {}


def _cfws_activation(quantizer, x, grad):
    b, threshold = quantizer.spec.bits, quantizer.threshold.item()
    n = 2 ** (b - 1) - 1 if quantizer.signed else 2**b - 1
    r = lsq(x, threshold / n, -n if quantizer.signed else 0, n, grad=grad)
    inside = (x >= (-threshold if quantizer.signed else 0)) & (x <= threshold)
    return r["vq"], grad * inside, {}


def _bitat_weight(quantizer, x, grad):
    axis, learned = quantizer.spec.channel_axis, quantizer.params.alpha == "learned"
    rows = np.moveaxis(x, axis, 0)
    mean = np.abs(rows).reshape(len(rows), -1).mean(1)
    r = bitat_weight(rows, quantizer.alpha.detach().numpy() if learned else mean, np.moveaxis(grad, axis, 0))
    gradients = {"alpha": r["dalpha"]} if learned else {}
    return np.moveaxis(r["what"], 0, axis), np.moveaxis(r["dtheta"], 0, axis), gradients


def _bitat_activation(quantizer, x, grad):
    r = bitat_activation(x, quantizer.beta.detach().numpy(), grad)
    return r["xhat"], r["dx"], {"beta": r["dbeta"]}


def _noise_scale(quantizer, dsigma):
    """Sigma within alpha / 20 .. alpha, and the gradient of its logarithm, which is dropped where it leads outward."""
    alpha, sigma = np.exp(quantizer.log_alpha.item()), np.exp(quantizer.log_sigma.item())
    if dsigma is None:
        return alpha, float(np.clip(sigma, alpha / 20, alpha))
    outward = (sigma < alpha / 20 and dsigma > 0) or (sigma > alpha and dsigma < 0)
    return np.asarray([0.0 if outward else dsigma])


def _grid_gradients(quantizer, x, r, alpha, sigma):
    """Gradients of the two logarithms, with the factor of a tensor's size."""
    _, high = quantizer.bounds
    count = x.size if quantizer.role == "weight" else x.size / x.shape[0]
    g = 1 / np.sqrt(count * high)
    return {
        "log_alpha": np.asarray([r["dalpha"] * alpha * g]),
        "log_sigma": _noise_scale(quantizer, r["dsigma"] * sigma * g),
    }


def _dropbits(quantizer, x, grad):
    p = quantizer.params
    alpha, sigma = _noise_scale(quantizer, None)
    estimator = p.estimator if quantizer.role == "weight" else p.act_estimator
    r = cpq(x, alpha, sigma, *quantizer.bounds, grad, estimator, p.normalization == "truncated")
    gradients = _grid_gradients(quantizer, x, r, alpha, sigma)
    if "phi" in dict(quantizer.named_parameters()):  # evaluation knows no masks
        gradients["phi"] = np.zeros(quantizer.phi.shape)
    return r["out"], r["dx"], gradients


def _rq(quantizer, x, grad):
    alpha, sigma = _noise_scale(quantizer, None)
    r = cpq(x, alpha, sigma, *quantizer.bounds, grad, "ste")  # evaluation draws no noise
    return r["out"], r["dx"], _grid_gradients(quantizer, x, r, alpha, sigma)


def _dorefa_weight(quantizer, x, grad):
    r = dorefa_weight(x, quantizer.spec.bits, quantizer.restore, grad)
    return r["wq"], r["dw"], {}


def _dorefa_activation(quantizer, x, grad):
    r = pact(x, 1.0, quantizer.spec.bits, quantizer.signed, grad)
    inside = (x >= (-1 if quantizer.signed else 0)) & (x <= 1)
    return r["xq"], grad * inside, {}


def _pact_activation(quantizer, x, grad):
    r = pact(x, quantizer.alpha.item(), quantizer.spec.bits, quantizer.signed, grad)
    return r["xq"], r["dx"], {"alpha": r["dalpha"]}


def _lsq_plus_activation(quantizer, x, grad):
    rounded = not (quantizer.training and quantizer.params.train_float_offset)
    g = 1 / np.sqrt(x.size / x.shape[0] * (2**quantizer.spec.bits - 1))
    r = lsq_plus_activation(x, quantizer.step.item(), quantizer.beta.item(), quantizer.spec.bits, rounded, g, grad)
    return r["xq"], r["dx"], {"step": r["ds"], "beta": r["dbeta"]}


def _quantization_networks(mode, k, cap):
    def reference(quantizer, x, grad):
        params, (alpha, beta) = quantizer.params, (v.item() for v in quantizer._scales())
        r = soft_steps(
            x, alpha, beta, quantizer.thresholds().numpy(), quantizer.levels, quantizer.clock.item() * k(params),
            mode(quantizer), cap, grad, hard=not quantizer.training, strict=params.strict,
        )  # fmt: skip
        if quantizer.beta is None:  # 1/alpha
            return r["y"], r["dx"], {"alpha": r["dalpha"] - r["dbeta"] * beta / alpha}
        return r["y"], r["dx"], {"alpha": r["dalpha"], "beta": r["dbeta"]}

    return reference


def _qn_weight_mode(quantizer):
    binary = quantizer.spec.bits == 1
    return {"auto": "t1" if binary else "true"}.get(quantizer.params.backward, quantizer.params.backward)


def _squantizer_weight(quantizer, x, grad):
    p = quantizer.params
    r = squantize(x, quantizer.spec.bits, p.sigma, p.grid, (x != 0) if quantizer.spec.keep_zeros else None, grad)
    return r["wq"], r["dw"], {}


def _apot_weight(quantizer, x, grad):
    out, dx, dalpha = apot_weight(x, quantizer.alpha.item(), quantizer.spec.bits, quantizer.restore, grad)
    return out, dx, {"alpha": np.asarray(dalpha)}


def _apot_activation(quantizer, x, grad):
    levels = apot_levels(quantizer.spec.bits, quantizer.signed)
    out, dx, dalpha = apot_project(x, quantizer.alpha.item(), levels, grad)
    return out, dx, {"alpha": np.asarray(dalpha)}


def _lq_nets_weight(quantizer, x, grad):
    axis, basis = quantizer.spec.channel_axis, quantizer.basis.double().numpy()
    rows = np.moveaxis(x, axis, 0)
    out = lq_nets_weight(rows.reshape(basis.shape[1], -1), basis)
    if quantizer.params.grid:
        step = np.abs(basis).sum(0)[:, None] / 127
        out = np.round(out / step) * step
    return np.moveaxis(out.reshape(rows.shape), 0, axis), grad, {}


def _sdq_weight(quantizer, x, grad):
    p, spec = quantizer.params, quantizer.spec
    powers = p.levels == "power_of_two"
    r = sdq_weight(x, quantizer.alpha.item(), spec.bits, powers, p.tau, p.pruning_ratio, spec.keep_zeros, grad)
    return r["wq"], r["dw"], {"alpha": np.asarray(r["dalpha"])}


def _sdq_activation(quantizer, x, grad):
    r = sdq_activation(x, quantizer.alpha.item(), quantizer.sigma.item(), quantizer.spec.bits, quantizer.signed, grad)
    return r["xq"], r["dx"], {"alpha": np.asarray(r["dalpha"])}


def _slb_weight(quantizer, x, grad):
    rows = np.moveaxis(grad, quantizer.spec.channel_axis, 0)
    scale = quantizer.scale.numpy() * np.ones(len(rows))
    out, da = slb_weight(
        quantizer.logits.detach().numpy(), scale, quantizer.temperature.item(), rows.reshape(len(rows), -1),
        hard=not quantizer.training,
    )  # fmt: skip
    return np.moveaxis(out.reshape(rows.shape), 0, quantizer.spec.channel_axis), np.zeros_like(x), {"logits": da}


def _gpfq_weight(quantizer, x, grad):
    params, bits = quantizer.params, quantizer.spec.bits
    step = quantizer.step.numpy().reshape([-1 if i == quantizer.spec.channel_axis else 1 for i in range(x.ndim)])
    return gpfq_weight(x, step, bits, params.alphabet, params.mode, params.lambda_), grad, {}


def _daq_weight(quantizer, x, grad):
    return daq_weight(x, quantizer.spec.bits, quantizer.params.step_index == "bits"), grad, {}


def _daq_activation(quantizer, x, grad):
    """The calibrated grid: half-integer steps around a whole number of half steps, or whole steps from zero."""
    half, factor = 2 ** (quantizer.spec.bits - 1), quantizer.params.step(quantizer.spec.bits)
    step = factor * quantizer.sigma.item()
    if not quantizer.signed:
        return step * np.clip(np.round(x / step), 0, 2 * half - 1), grad, {}
    mean = np.round(quantizer.mean.item() / (step / 2)) * step / 2
    return mean + daq_mid_rise(x - mean, step, half), grad, {}


def _one_model_weight(quantizer, x, grad):
    """All rows of the parameters but that of the width get a gradient of zero."""
    b, axis, row = quantizer.active_bits, quantizer.spec.channel_axis, quantizer.widths.index(quantizer.active_bits)
    parameters = {n: p.detach().numpy() for n, p in quantizer.named_parameters()}
    gains = parameters["gains"][row] if "gains" in parameters else None
    rows, by_rows = np.moveaxis(x, axis, 0), np.moveaxis(grad, axis, 0)
    out, dx, dstep, dgains = one_model_weight(rows, b, parameters["step"][row], gains, quantizer._groups, by_rows)
    gradients = {n: np.zeros_like(p) for n, p in parameters.items()}
    gradients["step"][row] = dstep
    if gains is not None:
        gradients["gains"][row] = dgains
    return np.moveaxis(out, 0, axis), np.moveaxis(dx, 0, axis), gradients


def _one_model_activation(quantizer, x, grad):
    b, row = quantizer.active_bits, quantizer.widths.index(quantizer.active_bits)
    low, high = (-(2 ** (b - 1)), 2 ** (b - 1) - 1) if quantizer.signed else (0, 2**b - 1)
    r = lsq(x, quantizer.step[row].item(), low, high, 1 / np.sqrt(x.size / x.shape[0] * high), grad)
    dstep = np.zeros(len(quantizer.widths))
    dstep[row] = r["ds"]
    return r["vq"], r["dv"], {"step": dstep}


REFERENCES = {
    ("one_model_for_all", "weight"): _one_model_weight,
    ("one_model_for_all", "activation"): _one_model_activation,
    ("daq", "weight"): _daq_weight,
    ("daq", "activation"): _daq_activation,
    ("gpfq", "weight"): _gpfq_weight,
    ("gpfq", "activation"): _minmax_activation,
    ("apot", "weight"): _apot_weight,
    ("apot", "activation"): _apot_activation,
    ("lq_nets", "weight"): _lq_nets_weight,
    ("lq_nets", "activation"): _direct_activation,
    ("quantization_networks", "weight"): _quantization_networks(_qn_weight_mode, lambda p: p.temperature, 2000),
    ("quantization_networks", "activation"): _quantization_networks(
        lambda q: q.params.activation_backward, lambda p: p.activation_temperature or p.temperature, np.inf
    ),
    ("squantizer", "weight"): _squantizer_weight,
    ("squantizer", "activation"): _pact_activation,
    ("cfws", "weight"): _minmax_weight,
    ("cfws", "activation"): _cfws_activation,
    ("bitat", "weight"): _bitat_weight,
    ("bitat", "activation"): _bitat_activation,
    ("dropbits", "weight"): _dropbits,
    ("dropbits", "activation"): _dropbits,
    ("rq", "weight"): _rq,
    ("rq", "activation"): _rq,
    ("direct", "weight"): _direct_weight,
    ("direct", "activation"): _direct_activation,
    ("sdq", "weight"): _sdq_weight,
    ("sdq", "activation"): _sdq_activation,
    ("slb", "weight"): _slb_weight,
    ("slb", "activation"): _pact_activation,
    ("dorefa", "weight"): _dorefa_weight,
    ("dorefa", "activation"): _dorefa_activation,
    ("pact", "weight"): _dorefa_weight,
    ("pact", "activation"): _pact_activation,
    ("lsq_plus", "weight"): _lsq_weight,
    ("lsq_plus", "activation"): _lsq_plus_activation,
    ("fat", "weight"): _fat_weight,
    ("fat", "activation"): _fat_activation,
    ("lsq", "weight"): _lsq_weight,
    ("lsq", "activation"): _lsq_activation,
    ("minmax", "weight"): _minmax_weight,
    ("minmax", "activation"): _minmax_activation,
}


def clip_is_given(case: Case) -> bool:
    """Whether the range of an activation does not come from calibration."""
    if case.algorithm in ("pact", "slb", "squantizer"):
        return case.params.get("alpha", 10.0) is not None
    if case.algorithm == "sdq":  # in units of what calibration finds
        return False
    return case.algorithm in FIXED_VALUES or "activation_alpha" in case.params


def widens_ranges(case: Case) -> bool:
    """Whether the highest level of an activation is meant to lie beyond the range that calibration saw."""
    return case.params.get("init", "rq" if case.algorithm == "rq" else "mse") == "rq"


def reaches_the_range(case: Case) -> bool:
    """Whether the upper end of the grid is that of the calibrated range (Quantization Networks: 4/5 of it)."""
    return not (clip_is_given(case) or widens_ranges(case)) and case.algorithm != "quantization_networks"


def scale_invariant(case: Case) -> bool:
    """Whether the codes do not change when the tensor is multiplied by a power of two before calibration."""
    if case.role == "activation":
        return not clip_is_given(case)
    if case.params.get("init") in ("authors", "he"):  # constants for training from scratch
        return False
    if "lambda_" in case.params:  # a threshold in units of the weights
        return False
    # tanh is no linear function
    return case.params.get("transform") != "uniquant" and case.algorithm not in ("dorefa", "pact")
