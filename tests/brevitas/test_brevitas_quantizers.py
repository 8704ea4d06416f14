"""Every algorithm as a Brevitas quantizer and as ready layers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from brevitas.inject import ExtendedInjector
from brevitas.quant import Int8ActPerTensorFloat, Int32Bias
from brevitas_nets import WEIGHTS, Net, batch, build, each_activation, each_layer, each_weight, trained, without_scale
from fat_brevitas import FATActQuant, FATConv2d, FATWeightQuant, layers
from fat_brevitas.compat import VERSION as BREVITAS_VERSION
from fat_brevitas.modules import container_of
from torch import nn

from fat_plugins import ConfigError, TensorSpec, get_algorithm, named_quantizers
from fat_plugins.quantizer import module_geometry
from fat_plugins.registry import Algorithm


def core(layer: nn.Module):
    return layer.weight_quant.quantizer


# -- weights -----------------------------------------------------------------------------------------------------------
@each_weight
@each_layer
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_what_the_algorithm_computes(algorithm, layer, bits):
    made, x = build(layer, fat_brevitas.weight_quant(algorithm), weight_bit_width=bits)
    axis = 1 if "transposed" in layer else 0
    spec = TensorSpec(
        "weight", bits, shape=tuple(made.weight.shape), channel_axis=axis, **module_geometry(made)
    )  # fmt: skip
    alone = get_algorithm(algorithm).make_weight(spec)
    alone.calibrate(made.weight)
    made.eval(), alone.eval()
    quantized = made.quant_weight()
    codes, form = alone.freeze(made.weight)
    if container_of(form) is None:  # a sum of grids
        assert torch.equal(without_scale(quantized), alone(made.weight))
    else:
        assert torch.equal(quantized.value, alone(made.weight))
        assert torch.equal(quantized.int(float_datatype=False).long(), form.integers(codes).long())
        assert quantized.is_valid and quantized.signed
        assert int(quantized.bit_width) == container_of(form).bits >= bits
    made(x).sum().backward()
    if alone.owns_weight:
        assert made.weight.grad is None and torch.equal(made.weight, alone(made.weight))
        assert all(p.grad.abs().sum() > 0 for p in core(made).parameters())
    else:
        assert made.weight.grad.abs().sum() > 0


@each_weight
def test_gradients_are_those_of_the_algorithm(algorithm):
    made, _ = build("conv2d", fat_brevitas.weight_quant(algorithm))
    made.train()
    made.quant_weight()
    alone = copy.deepcopy(core(made)).train()
    twin = made.weight.detach().clone().requires_grad_()
    factors = torch.linspace(-1, 1, twin.numel()).reshape(twin.shape)
    quantized = made.quant_weight()
    (getattr(quantized, "value", quantized) * factors).sum().backward()
    (alone(twin) * factors).sum().backward()
    if alone.owns_weight:
        assert made.weight.grad is None and twin.grad is None
    else:
        assert torch.equal(made.weight.grad, twin.grad)
    for ours, theirs in zip(core(made).parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_overrides_by_keyword_and_by_subclass():
    class Mine(FATWeightQuant):
        bit_width = 3
        levels = "power_of_two"
        alpha = 2.5

    by_class, _ = build("conv2d", Mine)
    by_keyword, _ = build("conv2d", FATWeightQuant, weight_bit_width=3, weight_levels="power_of_two", weight_alpha=2.5)
    by_factory, _ = build(
        "conv2d", fat_brevitas.weight_quant("fat", bit_width=3, levels="power_of_two"), weight_alpha=2.5
    )
    for layer in (by_class, by_keyword, by_factory):
        assert core(layer).params.levels == "power_of_two" and core(layer).alpha.item() == 2.5
        assert torch.equal(layer.quant_weight().value, by_class.quant_weight().value)
    assert set(by_class.quant_weight().int().unique().tolist()) <= {-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0}
    # the integers -4 .. 4 need four bits
    assert int(by_class.quant_weight().bit_width) == 4 and by_class.quant_weight().is_valid
    plain, _ = build("conv2d", FATWeightQuant)
    assert core(plain).spec.bits == 4 and core(plain).params.levels == "uniform"


def test_per_channel_scales_have_brevitas_shapes():
    layer, _ = build("conv2d", fat_brevitas.LSQWeightQuant, weight_scaling_per_output_channel=True)
    assert layer.quant_weight().scale.shape == (8, 1, 1, 1)
    layer, _ = build("transposed", fat_brevitas.LSQWeightQuant, weight_scaling_per_output_channel=True)
    assert layer.quant_weight().scale.shape == (1, 6, 1, 1)
    layer, _ = build("linear", fat_brevitas.LSQWeightQuant, weight_scaling_per_output_channel=False)
    assert layer.quant_weight().scale.shape == ()


def test_pruned_weights_stay_zero():
    layer, _ = build("conv2d", FATWeightQuant, weight_keep_zeros=True)
    other, _ = build("conv2d", FATWeightQuant)
    for made in (layer, other):
        with torch.no_grad():
            made.weight[:, 0] = 0
    assert not layer.quant_weight().value[:, 0].any()
    assert layer.quant_weight().is_valid
    other.weight.data[:, 0] = 0
    assert layer.quant_weight().value[:, 1:].any()


def test_quant_type_fp_is_the_float_layer():
    layer, x = build("conv2d", FATWeightQuant, weight_quant_type="FP")
    assert not layer.weight_quant.is_quant_enabled
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))
    act = qnn.QuantReLU(act_quant=FATActQuant, quant_type="FP")
    assert torch.equal(act(x), torch.relu(x))


def test_quant_delay_starts_with_the_float_weight():
    layer, _ = build("conv2d", FATWeightQuant, weight_quant_delay_steps=2)
    values = [layer.quant_weight().value.detach().clone() for _ in range(3)]
    assert torch.equal(values[0], layer.weight) and torch.equal(values[1], layer.weight)
    assert not torch.equal(values[2], layer.weight)


def test_disabled_quantization_gives_the_float_weight():
    layer, x = build("conv2d", FATWeightQuant)
    layer(x)
    layer.weight_quant.disable_quant = True
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("algorithm", WEIGHTS)
def test_double_precision_layers(algorithm):
    layer, x = build("conv2d", fat_brevitas.weight_quant(algorithm))
    layer.double().eval()
    out = layer(x.double())
    quantized = layer.quant_weight()
    assert out.dtype == torch.float64 and getattr(quantized, "value", quantized).dtype == torch.float64
    if container_of(core(layer).freeze(layer.weight).form) is None:
        return
    integers = quantized.value / quantized.scale
    assert (integers - integers.round()).abs().max() < 1e-9


def test_dtype_and_device_arguments():
    layer = qnn.QuantConv2d(3, 4, 3, weight_quant=FATWeightQuant, dtype=torch.float64, device="cpu")
    assert layer.weight.dtype == torch.float64
    assert layer(torch.randn(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_a_shared_quantizer_has_one_set_of_parameters():
    first, x = build("conv2d", FATWeightQuant)
    second, _ = build("conv2d", first.weight_quant)
    assert second.weight_quant is first.weight_quant
    net = nn.ModuleList([first, second])
    assert len(list(named_quantizers(net))) == 1
    (first(x).sum() + second(x).sum()).backward()
    assert core(first).alpha.grad is not None


# -- activations -------------------------------------------------------------------------------------------------------
@each_activation
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_are_what_the_algorithm_computes(algorithm, bits):
    low, high = get_algorithm(algorithm).activation_bits
    bits = min(max(bits, low), high)
    layer = qnn.QuantReLU(act_quant=fat_brevitas.act_quant(algorithm), bit_width=bits, return_quant_tensor=True)
    x = torch.randn(4, 3, 6, 6)
    layer.train()(x)
    alone = copy.deepcopy(layer.act_quant.quantizer).eval()
    out = layer.eval()(x)
    assert torch.equal(out.value, alone(torch.relu(x)))
    assert not out.signed and not layer.act_quant.is_signed
    width = container_of(alone.form()).bits
    assert float(layer.act_quant.bit_width()) == width and float(layer.act_quant.zero_point()) == 0
    assert out.is_valid
    integers = out.int(float_datatype=False)
    assert int(integers.min()) == 0 and int(integers.max()) <= 2**width - 1 and len(integers.unique()) <= 2**bits
    assert torch.equal(layer.act_quant.scale(), alone.form().scale.reshape(()))


def test_signs_come_from_the_function_the_keyword_or_the_data():
    x = torch.randn(64) + 0.5

    def signed(layer, data):
        layer.train()(data)
        return layer.act_quant.is_signed

    assert signed(qnn.QuantIdentity(act_quant=FATActQuant), x) is True
    assert signed(qnn.QuantIdentity(act_quant=FATActQuant), x.abs()) is False
    assert signed(qnn.QuantIdentity(act_quant=FATActQuant, signed=True), x.abs()) is True
    assert signed(qnn.QuantSigmoid(act_quant=FATActQuant), x) is False
    assert signed(qnn.QuantTanh(act_quant=FATActQuant), x) is True


def test_hardtanh_is_the_quantizers_own_clamp():
    layer = qnn.QuantHardTanh(act_quant=fat_brevitas.act_quant("fat", signed=True), min_val=-1.0, max_val=1.0)
    x = torch.linspace(-3, 3, 60)
    layer.train()(x)
    assert layer.act_quant.scale().item() == pytest.approx(1 / 7)
    out = layer.eval()(x)
    assert len(out.unique()) == 15 and out.abs().max().item() == pytest.approx(1.0)
    no_bounds = qnn.QuantReLU(act_quant=FATActQuant)
    with pytest.raises(ConfigError, match="no attribute 'max_val'"):
        qnn.QuantReLU(act_quant=FATActQuant, max_val=6.0)
    assert no_bounds.act_quant.act_tensor_quant.calibration_range == (None, None)


def test_input_and_output_quantizers_of_a_layer():
    layer = qnn.QuantConv2d(
        3, 4, 3,
        weight_quant=FATWeightQuant, input_quant=FATActQuant, output_quant=fat_brevitas.LSQActQuant,
        weight_bit_width=3, input_bit_width=5, output_bit_width=6, bias_quant=Int32Bias, return_quant_tensor=True,
    )  # fmt: skip
    out = layer(batch())
    assert float(layer.input_quant.bit_width()) == 5 and float(out.bit_width) == 6 and core(layer).spec.bits == 3
    assert layer.input_quant.is_signed and out.is_valid


def test_integer_bias_uses_our_scales():
    layer = qnn.QuantLinear(
        6, 5, bias=True, weight_quant=FATWeightQuant, input_quant=FATActQuant, bias_quant=Int32Bias
    ).train()
    x = torch.randn(16, 6)
    layer(x)
    layer.eval()
    step = layer.input_quant.scale() * layer.quant_weight().scale
    bias = layer(x) - nn.functional.linear(layer.input_quant(x).value, layer.quant_weight().value)
    assert (bias / step - torch.round(bias / step)).abs().max() < 1e-2


def test_stock_quantizers_beside_ours():
    net = nn.Sequential(
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantConv2d(3, 4, 3, weight_quant=FATWeightQuant, return_quant_tensor=True),
        qnn.QuantReLU(act_quant=FATActQuant, return_quant_tensor=True),
        qnn.QuantConv2d(4, 4, 3),
    )
    net.train()(batch()).sum().backward()
    assert torch.isfinite(net.eval()(batch())).all()


# -- layers, names, third parties -------------------------------------------------------------------------------------
@each_weight
@pytest.mark.parametrize("kind", layers.KINDS)
def test_ready_layers_are_brevitas_layers(algorithm, kind):
    name = get_algorithm(algorithm).__name__
    cls = getattr(fat_brevitas, f"{name}{kind}")
    assert cls.__name__ == f"{name}{kind}" and issubclass(cls, getattr(qnn, f"Quant{kind}"))
    args = (4, 6, True) if kind == "Linear" else (4, 6, 3)
    layer = cls(*args, weight_bit_width=3)
    assert core(layer).spec.bits == 3
    shape = (2, 4) if kind == "Linear" else (2, 4, *[4] * int(kind[-2]))
    assert torch.isfinite(layer(torch.randn(shape))).all()


def test_there_are_layers_of_every_kind():
    wanted = {"Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"}
    # Brevitas has three dimensions from 0.11 on
    assert set(layers.KINDS) == wanted | ({"Conv3d", "ConvTranspose3d"} if BREVITAS_VERSION >= (0, 11) else set())


def test_ready_layers_take_every_argument_and_can_be_subclassed():
    class Block(FATConv2d):
        def __init__(self):
            super().__init__(4, 8, 3, 2, padding=1, groups=2, bias=False, input_quant=FATActQuant, input_bit_width=3)

    block = Block()
    assert block(torch.randn(2, 4, 6, 6)).shape == (2, 8, 3, 3) and block.bias is None
    assert isinstance(
        FATConv2d(3, 4, 3, weight_quant=fat_brevitas.LSQWeightQuant).weight_quant.quantizer,
        type(core(build("conv2d", fat_brevitas.LSQWeightQuant)[0])),
    )
    assert not FATConv2d(3, 4, 3, weight_quant=None).weight_quant.is_quant_enabled


def test_names_of_brevitas_scheme():
    quantizer = fat_brevitas.Int3WeightPerChannelFloatLSQ
    assert quantizer.__name__ == "Int3WeightPerChannelFloatLSQ" and issubclass(quantizer, ExtendedInjector)
    layer, _ = build("conv2d", quantizer)
    assert core(layer).spec.bits == 3 and core(layer).spec.per_channel is True
    act = qnn.QuantIdentity(act_quant=fat_brevitas.Uint4ActPerTensorFloatFAT)
    assert act.act_quant.quantizer.spec.bits == 4 and act.act_quant.quantizer.spec.signed is False
    assert fat_brevitas.Int4WeightPerTensorFloatFAT is not None
    assert "FATWeightQuant" in dir(fat_brevitas) and "LSQConvTranspose2d" in dir(fat_brevitas)
    for name in dir(fat_brevitas):
        assert getattr(fat_brevitas, name) is not None


def test_algorithms_of_third_parties_need_nothing_more(monkeypatch):
    from fat_plugins import registry

    class Theirs(get_algorithm("lsq")):
        name = "theirs"
        title = "Somebody's"

    found, broken = registry._load()
    monkeypatch.setattr(registry, "_load", lambda: ({**found, "theirs": Theirs}, broken))
    assert issubclass(Theirs, Algorithm)
    for quantizer in (fat_brevitas.weight_quant("theirs", bit_width=3), fat_brevitas.TheirsWeightQuant):
        layer, x = build("conv2d", quantizer)
        assert torch.isfinite(layer(x)).all() and layer.quant_weight().is_valid
    assert fat_brevitas.TheirsConv2d(3, 4, 3).weight_quant.quantizer is not None
    assert fat_brevitas.act_quant("theirs").__name__ == "TheirsActQuant"


# -- life of a model ---------------------------------------------------------------------------------------------------
@each_weight
def test_training_lowers_the_loss_and_changes_what_is_learned(algorithm):
    net = Net(algorithm)
    x, y = batch(), torch.randint(0, 4, (4,))
    optimizer = torch.optim.Adam(fat_brevitas.param_groups(net, 0.02), lr=0.02)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # these learn their steps at a tenth of the rate, the gradient of one vanishes at zero and the other draws noise
    assert losses[-1] < (0.9 if algorithm in ("dropbits", "rq", "slb") else 0.6) * losses[0]
    for name, p in net.named_parameters():
        assert p.grad is not None or not p.requires_grad, name


def test_deepcopy_and_evaluation_are_stable():
    net = trained()
    twin = copy.deepcopy(net)
    assert torch.equal(net(batch()), twin(batch())) and torch.equal(net(batch()), net(batch()))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert not torch.equal(net(batch()), twin(batch()))


@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_compiled_layers_equal_eager_ones(layer):
    made, x = build(layer, FATWeightQuant)
    made.eval()
    expected = made(x)
    tensor_quant = torch.compile(made.weight_quant.tensor_quant, backend="eager")
    value = tensor_quant(made.weight)[0]
    assert torch.equal(value, made.quant_weight().value)
    torch._dynamo.reset()
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("params", [{}, {"levels": "power_of_two"}])
def test_no_synchronisation_in_a_training_step(no_host_sync, params):
    weight = build("conv2d", fat_brevitas.weight_quant("fat", **params))[0].train().weight_quant
    act = qnn.QuantReLU(act_quant=fat_brevitas.act_quant("fat", **params)).train().act_quant
    w, x = torch.randn(8, 3, 3, 3, requires_grad=True), torch.randn(4, 3, 5, 5, requires_grad=True)
    weight.tensor_quant(w), act.act_tensor_quant(x)  # the first call initialises
    with no_host_sync():
        for out in (weight.tensor_quant(w), act.act_tensor_quant(x)):
            assert out[1] is not None
            out[0].sum().backward()


SCRIPT = """
import os, torch, brevitas.config
assert brevitas.config.JIT_ENABLED, "the switch of Brevitas is not on"
from brevitas_nets import Net, batch, trained, without_scale
for algorithm in ("fat", "lsq"):
    net = trained(algorithm)
    out = net(batch())
    twin = Net(algorithm)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.eval()(batch()), out)
print("same", float(out.sum()))
"""


def test_brevitas_torchscript_switch():
    """Brevitas reads BREVITAS_JIT when it is imported: another process."""
    here = Path(__file__).parent
    env = {**os.environ, "BREVITAS_JIT": "1", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    torch.set_num_threads(1)
    assert abs(float(run.stdout.split()[1]) - trained("lsq")(batch()).sum().item()) < 1e-3
