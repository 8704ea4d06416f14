"""Networks, test algorithms and a QONNX runner for the tests of exports and of ``freeze``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import brevitas.nn as qnn
import fat_brevitas
import numpy as np
import pytest
import torch
from fat_brevitas.modules import container_of
from torch import Tensor, nn

from fat_plugins import ConfigError, TensorSpec, algorithms, registry
from fat_plugins.forms import Codebook, Form, Staircase, SumOfGrids, UniformGrid
from fat_plugins.functional import per_channel_view, uniform_codes
from fat_plugins.quantizer import FrozenTensor, WeightQuantizer
from fat_plugins.registry import Algorithm

VERSION = fat_brevitas.BREVITAS_VERSION


def forms(name: str, bits: int) -> list[Form]:
    """Deployed forms of an algorithm with its defaults: of weights and of activations behind a ReLU.

    :return: nothing when the algorithm does not have that width for both.
    """
    algorithm, x = algorithms()[name], torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    if algorithm.weight_quantizer is None or algorithm.activation_quantizer is None:
        return []
    try:
        weight = algorithm.make_weight(TensorSpec("weight", bits, shape=(6, 9)))
        activation = algorithm.make_activation(TensorSpec("activation", bits, signed=False))
    except ConfigError:
        return []
    weight.calibrate(x), activation.calibrate(x.relu())
    return [weight.freeze(x).form, activation.form()]


def free(name: str, bits: int) -> bool:
    """Whether one of these is no single scale times rounded integers, which not every format holds."""
    return any(isinstance(form, (SumOfGrids, Staircase)) for form in forms(name, bits))


#: bits and granularity of every registered algorithm; one-bit ones and free forms have tests of their own
CASES = [
    (name, bits, per_channel)
    for name, algorithm in algorithms().items()
    for bits in (2, 3, 4, 8)
    if forms(name, bits) and not free(name, bits)
    for per_channel in ([False, True] if algorithm.per_channel_weights else [False])
]
#: algorithms and bits whose grids are sums or have free thresholds
FREE = [(name, bits) for name in algorithms() for bits in (1, 2, 4) if free(name, bits)]
each_case = pytest.mark.parametrize(("algorithm", "bits", "per_channel"), CASES)
#: the finest granularity only, for exports that take long
FINEST = [c for c in CASES if c[2] or (c[0], c[1], True) not in CASES]
each_width = pytest.mark.parametrize(("algorithm", "bits", "per_channel"), FINEST)
#: one width per algorithm, where a test is about something else
each_algorithm = pytest.mark.parametrize(("algorithm", "bits", "per_channel"), [c for c in FINEST if c[1] == 3])


class Chain(nn.Module):
    """Three weighted layers between quantized activations; what comes out is codes of ``out`` times its scale.

    :param act: quantizer class of the activations, the last one included (else the algorithm's, and 8 bits at the end).
    """

    def __init__(self, algorithm: str, bits: int, per_channel: bool = False, act: type | None = None, **options):
        super().__init__()
        weight = fat_brevitas.weight_quant(algorithm, bit_width=bits, scaling_per_output_channel=per_channel, **options)
        made = fat_brevitas.act_quant(algorithm, bit_width=bits) if act is None else act
        plain = fat_brevitas.act_quant("minmax", bit_width=8)
        self.inp = qnn.QuantIdentity(act_quant=plain)
        self.conv1 = qnn.QuantConv2d(3, 6, 3, bias=False, weight_quant=weight)
        self.bn1, self.bn2 = nn.BatchNorm2d(6, momentum=1.0), nn.BatchNorm2d(4, momentum=1.0)
        for norm in (self.bn1, self.bn2):  # wide enough for a clip that starts at 10
            nn.init.constant_(norm.weight, 8.0)
        self.act1 = qnn.QuantReLU(act_quant=made)
        self.conv2 = qnn.QuantConv2d(6, 4, 3, groups=2, weight_quant=weight)
        self.act2 = qnn.QuantReLU(act_quant=made)
        self.fc = qnn.QuantLinear(64, 4, bias=False, weight_quant=weight)
        self.out = qnn.QuantIdentity(act_quant=plain if act is None else made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(self.inp(x))))
        return self.out(self.fc(self.act2(self.bn2(self.conv2(x))).flatten(1)))


def example(*shape: int) -> Tensor:
    """A seeded input, of :class:`Chain` unless a shape is given."""
    return torch.randn(shape or (3, 3, 8, 8), generator=torch.Generator().manual_seed(5))


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """One training forward, in which every quantizer initialises itself, then evaluation mode."""
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def chain(algorithm: str, bits: int = 3, per_channel: bool = False, **keywords) -> tuple[Chain, Tensor]:
    """A calibrated :class:`Chain` and an input."""
    torch.manual_seed(1)
    x = example()
    model = calibrated(Chain(algorithm, bits, per_channel, **keywords), x)
    if "act" not in keywords:
        # low-bit layers give few values: with the largest at the end of the grid, others would be exact ties
        bound = 1.0371 * float(model(x).detach().abs().max())
        model.out.act_quant.quantizer.calibrate_range(-bound, bound)
    return model, x


#: ONNX operators that may stand beside quantizers
STANDARD = {"Conv", "ConvTranspose", "BatchNormalization", "Relu", "Flatten", "Reshape", "MatMul", "Gemm", "Transpose"}


def widths(model: nn.Module) -> list[int]:
    """Width of the plain integer type of every layer's weight; that of an algorithm's grid of odd levels is wider."""
    layers = (m for m in model.modules() if hasattr(m, "quant_weight"))
    return [container_of(m.weight_quant.freeze(m.weight).form).bits for m in layers]


# --------------------------------------------------------------------------------------------------------------------
# QONNX
# --------------------------------------------------------------------------------------------------------------------
def export_qonnx(model: nn.Module, x: Tensor, path: Path, dynamo: bool = False) -> str:
    """Brevitas's ``export_qonnx``; the path as text."""
    from brevitas.export import export_qonnx as export

    export(model, x, str(path), dynamo=dynamo, **({"optimize": True, "verbose": False} if dynamo else {}))
    return str(path)


def load(path: str):
    """A cleaned-up QONNX model with inferred datatypes."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

    return cleanup_model(ModelWrapper(path)).transform(InferDataTypes())


def execute(model, x: Tensor) -> np.ndarray:
    """Output of a loaded model for ``x``."""
    from qonnx.core.onnx_exec import execute_onnx

    graph = model.graph
    return execute_onnx(model, {graph.input[0].name: x.detach().numpy()})[graph.output[0].name]


def operators(model) -> Counter:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)


def weight_nodes(model) -> list:
    """The quantizer nodes whose input is constant, in graph order."""
    quantizers = ("Quant", "BipolarQuant")
    return [n for n in model.graph.node if n.op_type in quantizers and model.get_initializer(n.input[0]) is not None]


def weight_types(model) -> list[str]:
    """Integer type of each of :func:`weight_nodes` as qonnx infers it."""
    from qonnx.custom_op.registry import getCustomOp

    return [
        "BIPOLAR" if n.op_type == "BipolarQuant" else getCustomOp(n).get_integer_datatype(model).name
        for n in weight_nodes(model)
    ]


def file_weights(model) -> list[np.ndarray]:
    """What the model computes with: each weight as it comes out of its quantizer node."""
    from qonnx.core.onnx_exec import execute_onnx

    graph = model.graph
    shape = model.get_tensor_shape(graph.input[0].name)
    context = execute_onnx(model, {graph.input[0].name: np.zeros(shape, np.float32)}, return_full_exec_context=True)
    return [context[n.output[0]] for n in weight_nodes(model)]


def torch_weights(model: nn.Module) -> list[Tensor]:
    """The quantized weight of every layer, in the order of the modules."""
    values = (m.quant_weight() for m in model.modules() if hasattr(m, "quant_weight"))
    return [getattr(v, "value", v).detach() for v in values]


def same_codes(out: np.ndarray, expected: Tensor, scale: float) -> None:
    """Both are integers times ``scale``, and the integers are equal."""
    codes, wanted = np.round(out / scale), np.round(expected.detach().numpy() / scale)
    assert np.abs(codes).max() >= 1, "an output of zeros proves nothing"
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_allclose(out, codes * scale, atol=1e-5 * scale * max(np.abs(codes).max(), 1))


# --------------------------------------------------------------------------------------------------------------------
# algorithms with forms that no registered one has
# --------------------------------------------------------------------------------------------------------------------
class _SignWeight(WeightQuantizer):
    def _scale(self, weight: Tensor) -> Tensor:
        rows = weight.detach().float().abs().movedim(self.spec.channel_axis, 0).flatten(1)
        return (rows.mean(1) if self.spec.per_channel else rows.mean().reshape(1)).clamp_min(1e-6)

    def quantize(self, weight: Tensor) -> Tensor:
        scale = per_channel_view(self._scale(weight), weight.ndim, self.spec.channel_axis)
        return weight + (torch.where(weight > 0, scale, -scale) - weight).detach()

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) if self.training else self.freeze(weight).form.decode(self.freeze(weight).codes)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        form = Codebook(1, torch.tensor([-1, 1]), self._scale(weight), self.spec.channel_axis)
        return FrozenTensor((weight > 0).to(torch.int32), form)


class Sign(Algorithm):
    """One bit, -1 and +1."""

    name, title, paper, fidelity = "sign", "Sign", "a test", "none"
    weight_quantizer = _SignWeight
    weight_bits = (1, 1)
    per_channel_weights = True


class _SumWeight(WeightQuantizer):
    def quantize(self, weight: Tensor) -> Tensor:
        frozen = self.freeze_codes(weight)
        return weight + (frozen.form.decode(frozen.codes) - weight).detach()

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) if self.training else self.freeze(weight).form.decode(self.freeze(weight).codes)

    def freeze_codes(self, weight: Tensor) -> FrozenTensor:
        w, axis = weight.detach(), self.spec.channel_axis
        coarse = (w.abs().movedim(axis, 0).flatten(1).amax(1) / 1.5).clamp_min(1e-6)
        first = uniform_codes(w, per_channel_view(coarse, w.ndim, axis), -1, 1)
        fine = (w.abs().mean() / 7).reshape(1)
        second = uniform_codes(w - first * per_channel_view(coarse, w.ndim, axis), fine.reshape(()), -1, 1)
        form = SumOfGrids((UniformGrid(2, True, True, coarse, axis), UniformGrid(2, True, True, fine, axis)))
        return FrozenTensor(form.pack([first.int(), second.int()]), form)

    def grid_scale(self, weight: Tensor) -> Tensor:
        raise AssertionError("a sum of grids has no single scale")


class Sum(Algorithm):
    """A sum of two ternary grids."""

    name, title, paper, fidelity = "sum", "Sum", "a test", "none"
    weight_quantizer = _SumWeight


@pytest.fixture
def test_algorithms(monkeypatch):
    """``sign`` and ``sum`` in the registry, as if a package had brought them."""
    found, broken = registry._load()
    monkeypatch.setattr(registry, "_load", lambda: ({**found, "sign": Sign, "sum": Sum}, broken))
