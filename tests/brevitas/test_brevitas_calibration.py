"""Calibration: by the first training batches, and by Brevitas's own modes."""

from __future__ import annotations

import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas_nets import Net, batch, each_activation, trained
from fat_brevitas import FATActQuant
from torch import nn

from fat_plugins import QuantizationError


def scale(layer):
    return float(layer.act_quant.scale())


def levels(largest):
    """The 16 levels of a 4-bit activation: its best clip is the largest."""
    return torch.arange(16) / 15 * largest


def test_before_calibration_activations_pass_and_weights_are_quantized():
    net = Net().eval()
    x = batch()
    assert torch.equal(net.act1(x), torch.relu(x)) and torch.equal(net.inp(x), x)
    assert len(net.conv1.quant_weight().value.unique()) <= 15


def test_the_first_training_batch_calibrates_once():
    layer = qnn.QuantReLU(act_quant=FATActQuant)
    x = torch.randn(100).clamp(max=2.0)
    out = layer(x)
    assert len(out.unique()) <= 16 and scale(layer) == pytest.approx(float(x.max()) / 15)
    first = scale(layer)
    layer(x * 10)
    assert scale(layer) == first


def test_more_batches_refine():
    layer = qnn.QuantReLU(act_quant=FATActQuant, collect_stats_steps=2)
    for factor in (1, 3, 7):
        layer(levels(factor))
    assert scale(layer) == pytest.approx(3**0.5 / 15)  # the geometric mean of the first two


@each_activation
def test_calibration_mode(algorithm):
    net = Net(algorithm)
    net.train(False)
    with torch.no_grad(), calibration_mode(net):
        floats = [net(batch(seed)) for seed in range(3)]
    reference = Net(algorithm)
    reference.load_state_dict({k: v for k, v in net.state_dict().items()}, strict=True)
    for layer in (net.act1, net.act2, net.inp):
        assert layer.act_quant.quantizer.calibrated
    # inside the mode the network computes in float
    for m in net.modules():
        if hasattr(m, "disable_quant"):
            m.disable_quant = True
    assert torch.equal(net.eval()(batch(2)), floats[2])


def test_calibration_mode_sees_every_batch_and_ends():
    layer = nn.Sequential(qnn.QuantReLU(act_quant=FATActQuant)).eval()
    with torch.no_grad(), calibration_mode(layer):
        for factor in (1, 5, 2):
            layer(levels(factor))
    assert scale(layer[0]) == pytest.approx(10 ** (1 / 3) / 15)
    assert not layer.training
    layer.train()(levels(20))
    assert scale(layer[0]) == pytest.approx(10 ** (1 / 3) / 15)


def test_a_second_calibration_starts_anew():
    layer = nn.Sequential(qnn.QuantReLU(act_quant=FATActQuant))
    layer.train()(torch.linspace(0, 9, 50))
    with torch.no_grad(), calibration_mode(layer):
        layer(levels(1))
    assert scale(layer[0]) == pytest.approx(1 / 15)


def test_bias_correction_mode():
    net = trained()
    before = net.fc.bias.detach().clone()
    quantized = net.conv1.quant_weight().value.clone()
    with torch.no_grad(), bias_correction_mode(net):
        net(batch())
    assert not torch.equal(net.fc.bias, before)
    # the weights and their quantizers are left alone, and quantization is on again
    assert torch.equal(net.conv1.quant_weight().value, quantized)
    assert len(net.act1(batch()).unique()) <= 16


def test_calibration_max_is_for_calibration_only():
    layer = qnn.QuantReLU(act_quant=FATActQuant, calibration_max=6.0)
    layer(torch.cat([levels(6), torch.tensor([40.0])]))
    assert scale(layer) == pytest.approx(6 / 15)
    small = qnn.QuantReLU(act_quant=FATActQuant, calibration_max=6.0)
    small(levels(3))
    assert scale(small) == pytest.approx(3 / 15)


def test_batch_norm_statistics_can_be_estimated_again():
    net = trained()
    kept = {k: v.clone() for k, v in net.state_dict().items() if "quant" in k and "largest" not in k}
    net.train()
    with torch.no_grad():
        for seed in range(3):
            net(batch(seed))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in kept.items())


def test_without_calibration_there_is_no_scale_to_return():
    layer = qnn.QuantReLU(act_quant=FATActQuant, return_quant_tensor=True).eval()
    with pytest.raises(QuantizationError, match=r"QuantReLU activation: not calibrated.*calibration_mode"):
        layer(batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_calibration_data(value):
    layer = qnn.QuantReLU(act_quant=FATActQuant)
    x = batch()
    x[0, 0, 0, 0] = value
    with pytest.raises(QuantizationError, match="QuantReLU activation: calibration batch holds NaN or infinite"):
        layer(x)
    layer(batch())
    assert layer.act_quant.quantizer.calibrated


def test_nan_weights_are_named():
    layer = qnn.QuantConv2d(3, 4, 3, weight_quant=fat_brevitas.FATWeightQuant, weight_name="features.0")
    with torch.no_grad():
        layer.weight[0] = float("nan")
    with pytest.raises(QuantizationError, match=r"features.0: weight holds NaN"):
        layer(batch())
