"""Bad input: one line that names the layer, the value and what is allowed."""

from __future__ import annotations

import subprocess
import sys

import brevitas.nn as qnn
import fat_brevitas
import pytest
import torch
from brevitas_nets import batch, build
from fat_brevitas import FATActQuant, FATWeightQuant, LSQWeightQuant

from fat_plugins import ConfigError, HostError, QuantizationError

CONV = r"QuantConv2d\(4, 3, 3, 3\) weight: "


def conv(quantizer=FATWeightQuant, **keywords):
    return qnn.QuantConv2d(3, 4, 3, weight_quant=quantizer, **keywords)


@pytest.mark.parametrize(
    "keywords,message",
    [
        ({"weight_bit_width": 1}, CONV + "algorithm 'fat' has no 1-bit weights; allowed: 2 to 8"),
        ({"weight_bit_width": 9}, CONV + "algorithm 'fat' has no 9-bit weights"),
        ({"weight_bit_width": 4.0}, CONV + "algorithm 'fat' has no 4.0-bit weights"),
        ({"weight_bit_width": "4"}, CONV + "algorithm 'fat' has no '4'-bit weights"),
        ({"weight_levels": "pot"}, CONV + "attributes.levels: expected 'uniform' or 'power_of_two', got 'pot'"),
        ({"weight_level": "uniform"}, CONV + "the quantizer of 'fat' has no attribute 'level'.*did you mean 'levels'"),
        ({"weight_scaling_impl_type": "stats"}, CONV + "the quantizer of 'fat' has no attribute 'scaling_impl_type'"),
        ({"weight_scaling_per_output_channel": True}, CONV + "algorithm 'fat' has one scale per weight tensor"),
        ({"weight_signed": False}, CONV + "signed=False; weights are always signed"),
        ({"weight_quant_type": "TERNARY"}, CONV + "quant_type 'TERNARY'; allowed: INT, FP"),
        ({"weight_name": "a.b", "weight_bit_width": 0}, "a.b: algorithm 'fat' has no 0-bit weights"),
    ],
)
def test_wrong_attributes_of_weights(keywords, message):
    with pytest.raises(ConfigError, match=message) as error:
        conv(**keywords)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keywords,message",
    [
        ({"bit_width": 1}, "QuantReLU activation: algorithm 'fat' has no 1-bit activations"),
        ({"bitwidth": 4}, "QuantReLU activation: the quantizer of 'fat' has no attribute 'bitwidth'.*'bit_width'"),
        ({"collect_stats_steps": 0}, "collect_stats_steps must be a positive integer, got 0"),
        ({"calibration_max": -1.0}, "calibration_max must be a positive number, got -1.0"),
        ({"scaling_per_output_channel": True}, "algorithm 'fat' has one scale per activation tensor"),
    ],
)
def test_wrong_attributes_of_activations(keywords, message):
    with pytest.raises(ConfigError, match=message):
        qnn.QuantReLU(act_quant=FATActQuant, **keywords)


def test_wrong_names():
    with pytest.raises(ConfigError, match=r"unknown algorithm 'fatt'.*did you mean 'fat'"):
        fat_brevitas.weight_quant("fatt")
    with pytest.raises(ConfigError, match=r"unknown attribute of the 'fat' weight quantizer 'levls'.*'levels'"):
        fat_brevitas.weight_quant("fat", levls="uniform")
    with pytest.raises(ConfigError, match=r"Int4WeightPerChannelFloatFAT: algorithm 'fat' has one scale per weight"):
        fat_brevitas.Int4WeightPerChannelFloatFAT  # noqa: B018
    with pytest.raises(ConfigError, match=r"Int1WeightPerTensorFloatFAT: algorithm 'fat' has no 1-bit weights"):
        fat_brevitas.Int1WeightPerTensorFloatFAT  # noqa: B018
    with pytest.raises(ConfigError, match=r"Uint4WeightPerTensorFloatFAT: weights are always signed"):
        fat_brevitas.Uint4WeightPerTensorFloatFAT  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'FATWeightQuan'; did you mean 'FATWeightQuant'"):
        fat_brevitas.FATWeightQuan  # noqa: B018
    with pytest.raises(ImportError):
        from fat_brevitas import FATConv9d  # noqa: F401


def test_weights_of_different_shapes_cannot_share_a_quantizer():
    first = conv()
    with pytest.raises(ConfigError, match=r"shared by weights of shapes \(4, 3, 3, 3\), \(4, 3, 5, 5\)"):
        qnn.QuantConv2d(3, 4, 5, weight_quant=first.weight_quant)


def test_part_of_a_weight():
    layer, _ = build("conv2d", FATWeightQuant)
    layer.quant_weight()
    with pytest.raises(QuantizationError, match=r"whole weight of shape \[8, 3, 3, 3\].*fat_brevitas.freeze"):
        layer.weight_quant(layer.weight[:, :1])
    columns, _ = build("conv2d", LSQWeightQuant)
    whole = columns.quant_weight().value
    assert torch.equal(columns.weight_quant(columns.weight[:, :1]).value, whole[:, :1])


def test_missing_or_unsupported_brevitas(monkeypatch):
    from fat_brevitas import compat

    def version(_):
        raise compat.PackageNotFoundError("brevitas")

    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(HostError, match=r"fat_brevitas needs Brevitas: pip install 'fat-plugins\[brevitas\]'"):
        compat.brevitas_version()
    for text in ("0.9.1", "0.14.0", "1.2"):
        monkeypatch.setattr(compat, "version", lambda _, t=text: t)
        with pytest.raises(HostError, match=f"brevitas {text} is not supported, allowed: 0.10 to 0.13.x"):
            compat.brevitas_version()


def test_a_broken_brevitas_is_one_line():
    code = "import sys; sys.modules['brevitas.config'] = None\nimport fat_brevitas"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert "HostError: brevitas" in run.stderr and "cannot be imported" in run.stderr


def test_wrong_input_shape_is_left_to_the_layer():
    with pytest.raises(RuntimeError, match=r"expected"):
        conv()(batch()[:, :2])
