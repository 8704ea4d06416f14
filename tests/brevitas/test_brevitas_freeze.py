"""``freeze``: a stock Brevitas model with the same numbers, which needs none of our code."""

from __future__ import annotations

import warnings
from copy import deepcopy

import brevitas.nn as qnn
import fat_brevitas
import numpy as np
import pytest
import torch
from brevitas_exports import (
    VERSION,
    Chain,
    calibrated,
    chain,
    each_algorithm,
    each_case,
    example,
    execute,
    export_qonnx,
    file_weights,
    load,
    same_codes,
    test_algorithms,  # noqa: F401
    torch_weights,
    weight_types,
)
from brevitas_nets import build, each_layer
from torch import nn

from fat_plugins import ExportError
from fat_plugins.quantizer import Quantizer

# Brevitas before 0.10.3 cannot export the lowest code; test_lowest_code_of_old_brevitas is about that
pytestmark = pytest.mark.filterwarnings("ignore:.*are declared as .* bits, without a change:RuntimeWarning")


def classes(model: nn.Module) -> set[type]:
    """Every class in the model: modules, their bases, and the bases of the quantizer classes behind proxies."""
    found: set[type] = set()
    for module in model.modules():
        found.update(type(module).__mro__)
        injector = getattr(module, "quant_injector", None)
        if injector is not None:
            found.update(injector.__mro__)
            for value in injector.__dependencies__.values():
                found.update(k for k in (value if isinstance(value, tuple) else (value,)) if isinstance(k, type))
    return found


def stock_only(model: nn.Module) -> None:
    """Nothing of ours is left."""
    ours = {c for c in classes(model) if c.__module__.split(".")[0] in ("fat_plugins", "fat_brevitas")}
    assert not ours
    assert not any(isinstance(m, Quantizer) for m in model.modules())


@each_case
def test_same_numbers_and_nothing_of_ours(algorithm, bits, per_channel):
    model, x = chain(algorithm, bits, per_channel)
    y, weights = model(x), torch_weights(model)
    float_weight = model.conv1.weight.clone()
    frozen = fat_brevitas.freeze(model)
    assert torch.equal(frozen(x), y)
    stock_only(frozen)
    for layer, before in zip((frozen.conv1, frozen.conv2, frozen.fc), weights, strict=True):
        assert torch.equal(layer.weight, before)
        quantized = layer.quant_weight()
        assert torch.equal(quantized.value, before) and bool(quantized.is_valid)
    # the model that was given is as it was
    assert torch.equal(model.conv1.weight, float_weight) and torch.equal(model(x), y)
    assert not frozen.training and frozen.conv1.weight_quant.training is False
    assert torch.equal(fat_brevitas.freeze(frozen)(x), y), "there is nothing left to freeze"


@each_layer
def test_every_kind_of_layer(layer):
    for per_channel in (False, True):
        quantizer = fat_brevitas.weight_quant("lsq", bit_width=3, scaling_per_output_channel=per_channel)
        made, x = build(layer, quantizer)
        y = made.eval()(x)
        frozen = fat_brevitas.freeze(made)
        assert torch.equal(frozen(x), y)
        stock_only(frozen)


def test_ready_layers_become_brevitas_layers():
    layer = fat_brevitas.FATConv2d(3, 4, 3).eval()
    y = layer(example())
    frozen = fat_brevitas.freeze(layer, inplace=True)
    assert frozen is layer and type(layer) is qnn.QuantConv2d and torch.equal(layer(example()), y)
    stock_only(layer)


def test_inplace_keeps_parameters_and_the_training_flag():
    model = chain("fat", 4)[0]
    weight, bias = model.conv1.weight, model.conv2.bias
    model.train()
    assert fat_brevitas.freeze(model, inplace=True) is model
    assert model.training and model.act1.act_quant.training
    assert model.conv1.weight is weight and model.conv2.bias is bias
    stock_only(model)


def test_state_dict_carries_weights_and_scales(tmp_path):
    model, x = chain("lsq", 4, True)
    y = model(x)
    torch.save(fat_brevitas.freeze(model).state_dict(), tmp_path / "state.pt")
    torch.manual_seed(9)
    other = fat_brevitas.freeze(calibrated(Chain("lsq", 4, True), example() * 2))
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.eval()(x), y)


@each_algorithm
def test_stock_exporters(algorithm, bits, per_channel, tmp_path):
    model, x = chain(algorithm, bits, per_channel)
    y, scale = model(x), float(model.out.act_quant.scale())
    frozen = fat_brevitas.freeze(model)
    file = load(export_qonnx(frozen, x, tmp_path / "m.onnx"))
    same_codes(execute(file, x), y, scale)
    for written, trained in zip(file_weights(file)[:2], torch_weights(model), strict=False):
        np.testing.assert_array_equal(written, trained.numpy())
    if VERSION >= (0, 11):
        from brevitas.export.inference import quant_inference_mode

        for cache in (False, True):
            with torch.no_grad(), quant_inference_mode(frozen, cache_quant_weight=cache):
                frozen(x)
                assert torch.equal(frozen(x), y)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_torch_qcdq_of_a_frozen_model():
    from brevitas.export import export_torch_qcdq

    model, x = chain("fat", 4)
    assert torch.equal(export_torch_qcdq(fat_brevitas.freeze(model), x)(x), model(x))


def test_gptq_runs_on_a_frozen_model():
    """The whole-filter transform of FAT cannot be cut into columns; a frozen model can."""
    from brevitas.graph.gptq import gptq_mode

    layer = fat_brevitas.FATConv2d(3, 4, 3, weight_bit_width=4)
    frozen, x = fat_brevitas.freeze(nn.Sequential(layer).eval()), example()
    y = frozen(x)
    with torch.no_grad(), gptq_mode(frozen, use_quant_activations=False) as mode:
        for _ in range(mode.num_layers):
            mode.model(x)
            mode.update()
    # on a grid already: only the error of rounding, which is none, could move a weight
    assert torch.allclose(frozen(x), y, atol=1e-5)


def test_power_of_two_weights_and_one_bit(tmp_path, test_algorithms):  # noqa: F811
    act = fat_brevitas.act_quant("lsq", bit_width=4)
    cases = (
        ("fat", 3, False, {"levels": "power_of_two"}, "INT4"),
        ("sign", 1, False, {}, "BIPOLAR"),
        ("sign", 1, True, {}, "BIPOLAR"),
    )
    for algorithm, bits, per_channel, options, kind in cases:
        model, x = chain(algorithm, bits, per_channel, act=act, **options)
        frozen = fat_brevitas.freeze(model)
        assert torch.equal(frozen(x), model(x))
        stock_only(frozen)
        file = load(export_qonnx(frozen, x, tmp_path / "m.onnx"))
        assert weight_types(file) == [kind] * 3
        same_codes(execute(file, x), model(x), float(model.out.act_quant.scale()))


@pytest.mark.filterwarnings("ignore:Keyword arguments are being passed but they not being used:UserWarning")
def test_shared_quantizers():
    """Each layer gets a scale of its own; an activation quantizer stays one."""
    weight, act = fat_brevitas.weight_quant("minmax", bit_width=4), fat_brevitas.act_quant("fat", bit_width=4)
    a = qnn.QuantConv2d(3, 3, 3, weight_quant=weight, input_quant=act)
    b = qnn.QuantConv2d(3, 3, 3, weight_quant=a.weight_quant, input_quant=a.input_quant)
    with torch.no_grad():
        b.weight.mul_(3)
    model, x = nn.Sequential(a, b), example()
    calibrated(model, x)
    frozen = fat_brevitas.freeze(model)
    assert torch.equal(frozen(x), model(x))
    assert frozen[0].weight_quant is not frozen[1].weight_quant
    assert frozen[0].input_quant is frozen[1].input_quant
    stock_only(frozen)


def test_switched_off_quantizers_stay_off():
    model, x = chain("fat", 4)
    model.act1.act_quant.disable_quant = True
    model.conv2.weight_quant.disable_quant = True
    layer = qnn.QuantConv2d(3, 3, 3, weight_quant=fat_brevitas.FATWeightQuant, weight_quant_type="FP").eval()
    for net in (layer, qnn.QuantReLU(act_quant=fat_brevitas.FATActQuant, quant_type="FP").eval()):
        frozen = fat_brevitas.freeze(net)
        assert torch.equal(frozen(x), net(x))
        stock_only(frozen)
    frozen = fat_brevitas.freeze(model)
    assert frozen.act1.act_quant.disable_quant and frozen.conv2.weight_quant.disable_quant


def unchanged(model: nn.Module, before: dict) -> bool:
    """The state dict is the same, value by value."""
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_refusals_change_nothing(test_algorithms):  # noqa: F811
    act = fat_brevitas.act_quant("lsq", bit_width=4)
    stairs = fat_brevitas.act_quant("fat", bit_width=3, levels="power_of_two")
    cases = (
        (chain("lsq", 3, act=stairs)[0], r"^act1: no stock Brevitas quantizer holds the activation's Staircase; .*"),
        (chain("sum", 4, act=act)[0], r"^conv1: no stock Brevitas quantizer holds the weight's SumOfGrids; .*"),
        (Chain("fat", 4).eval(), r"^inp: the activation quantizer is not calibrated; .*"),
    )
    for model, text in cases:
        before = deepcopy(model.state_dict())
        with pytest.raises(ExportError, match=text) as error:
            fat_brevitas.freeze(model, inplace=True)
        assert "\n" not in str(error.value) and unchanged(model, before)


def test_weights_that_are_not_parameters():
    from torch.nn.utils import prune

    model, x = chain("fat", 4)
    prune.l1_unstructured(model.conv2, "weight", 0.3)
    with pytest.raises(ExportError, match=r"^conv2: its weight is computed .*prune.remove"):
        fat_brevitas.freeze(model)
    prune.remove(model.conv2, "weight")
    assert torch.equal(fat_brevitas.freeze(model)(x), model(x))


def test_tied_weights():
    model = nn.Sequential(
        *(qnn.QuantConv2d(3, 3, 3, weight_quant=fat_brevitas.FATWeightQuant) for _ in range(2))
    ).eval()
    model[1].weight = model[0].weight
    assert torch.equal(fat_brevitas.freeze(model)(example()), model(example()))
    model[1] = qnn.QuantConv2d(3, 3, 3, weight_quant=fat_brevitas.LSQWeightQuant).eval()
    model[1].weight = model[0].weight
    with pytest.raises(ExportError, match=r"^1: its weight also belongs to another layer"):
        fat_brevitas.freeze(model)


@pytest.mark.filterwarnings("default:.*are declared as .* bits, without a change:RuntimeWarning")
def test_lowest_code_of_old_brevitas(tmp_path):
    layer = qnn.QuantConv2d(3, 4, 3, weight_quant=fat_brevitas.LSQWeightQuant, weight_bit_width=2).eval()
    x = example()
    layer(x)
    with torch.no_grad():
        layer.weight_quant.quantizer.step.mul_(0.3)
    y = layer(x)
    assert int(layer.quant_weight().value.detach().div(layer.weight_quant.scale()).min().round()) == -2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = fat_brevitas.freeze(layer)
    old = VERSION < (0, 10, 3)
    assert any("declared as 3 bits" in str(w.message) for w in caught) is old
    file = load(export_qonnx(frozen, x, tmp_path / "m.onnx"))
    np.testing.assert_allclose(execute(file, x), y.detach().numpy(), atol=1e-5)
    assert weight_types(file) == ["INT3" if old else "INT2"]
