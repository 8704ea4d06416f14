"""``fat_brevitas.frozen``: plain torch layers that give the evaluation output bit for bit, and what they export to."""

from __future__ import annotations

import brevitas.nn as qnn
import crossgen
import fat_brevitas
import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat, Int8BiasPerTensorFloatInternalScaling, Int32Bias
from brevitas_whole import LSQ, SECTION, Fork, Mobile, Residual, images, step
from torch import nn

from fat_plugins import ExportError
from fat_plugins.frozen import FrozenActivation, FrozenWeight, frozen_modules


def names(model: nn.Module) -> dict[str, str]:
    return {m.name: type(m).__name__ for m in frozen_modules(model)}


def no_brevitas(model: nn.Module) -> bool:
    return not any(type(m).__module__.startswith("brevitas.nn") for m in model.modules())


@pytest.mark.parametrize("section", [SECTION, {**LSQ, "weights": {"bits": 2, "per_channel": True}}], ids=["fat", "lsq"])
@pytest.mark.parametrize("kind", [Residual, Mobile])
def test_whole_models_are_equal_bit_for_bit(kind, section):
    model = step(fat_brevitas.quantize(kind(), section, [images()]), images())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = fat_brevitas.frozen(model)
    wanted, found = model(images(seed=5)), frozen(images(seed=5))
    for a, b in zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]:
        assert torch.equal(a, b)
    assert no_brevitas(frozen) and not frozen.training
    layers = {n for n, m in model.named_modules() if hasattr(m, "weight_quant")}
    assert {n for n, kind in names(frozen).items() if kind == "FrozenWeight"} == layers
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_transposed_and_1d_layers():
    x = torch.randn(2, 4, 6)
    model = step(fat_brevitas.quantize(Fork(), LSQ, [x]), x)
    for a, b in zip(model(x), fat_brevitas.frozen(model)(x), strict=True):
        assert torch.equal(a, b)


def mixed() -> tuple[nn.Module, torch.Tensor]:
    """Brevitas's own quantizers and ours, with every place a layer has for one."""
    torch.manual_seed(3)
    net = nn.Sequential(
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantConv2d(3, 6, 3, weight_bit_width=4, weight_scaling_per_output_channel=True, bias=True,
                        bias_quant=Int32Bias, return_quant_tensor=True),
        nn.BatchNorm2d(6),
        qnn.QuantReLU(bit_width=3),
        qnn.QuantConvTranspose2d(6, 4, 3, groups=2, input_quant=Int8ActPerTensorFloat,
                                 output_quant=Int8ActPerTensorFloat, weight_quant=fat_brevitas.weight_quant("lsq")),
        qnn.QuantSigmoid(act_quant=fat_brevitas.act_quant("lsq", bit_width=5)),
        nn.Flatten(),
        qnn.QuantLinear(4 * 64, 5, bias=True, bias_quant=Int8BiasPerTensorFloatInternalScaling),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    net(x)
    return net.eval(), x


def test_brevitas_own_quantizers():
    net, x = mixed()
    with pytest.raises(ExportError, match=r"^1: its bias quantizer takes the scale .*give an example_input"):
        fat_brevitas.frozen(net)
    frozen = fat_brevitas.frozen(net, x)
    assert torch.equal(frozen(x), net(x)) and no_brevitas(frozen)
    assert names(frozen) == {
        "0": "FrozenActivation", "1": "FrozenWeight", "3": "FrozenActivation", "4": "FrozenWeight",
        "4.input_quant": "FrozenActivation", "4.output_quant": "FrozenActivation", "5": "FrozenActivation",
        "7": "FrozenWeight",
    }  # fmt: skip


def test_forms_of_brevitas_own_quantizers():
    net, x = mixed()
    frozen = fat_brevitas.frozen(net, x)
    (weight,) = [m for m in frozen[1].modules() if isinstance(m, FrozenWeight)]
    assert (weight.form.bits, weight.form.narrow, weight.form.scale.numel()) == (4, True, 6)
    (act,) = [m for m in frozen[3].modules() if isinstance(m, FrozenActivation)]
    assert (act.form.bits, act.form.signed) == (3, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qnn.QuantLSTM(3, 4), "layer: a QuantLSTM has no plain torch equal"),
        (lambda: qnn.QuantConv2d(3, 4, 3, stride=2, padding="same"), "padding 'same' and a stride"),
        (lambda: qnn.QuantConv2d(3, 4, 3, weight_zero_point_impl=_five()), "has a zero point"),
        (lambda: qnn.QuantIdentity(float_to_int_impl_type="floor"), "no static grid with rounding to nearest"),
    ],
    ids=["lstm", "same", "zero_point", "floor"],
)
def test_what_cannot_be_frozen(make, message, request):
    name = request.node.callspec.id
    if name == "same" and fat_brevitas.BREVITAS_VERSION < (0, 12):
        pytest.skip("this Brevitas has another padding option")
    net = nn.Sequential()
    net.add_module("layer", make())
    if name == "floor":
        net(torch.randn(2, 3, 6, 6))
    with pytest.raises(ExportError, match=message) as error:
        fat_brevitas.frozen(net)
    assert "\n" not in str(error.value) and "layer" in str(error.value)


def _five() -> type:
    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x, scale, bit_width):
            return torch.tensor(5.0)

    return Five


def test_a_lone_layer_is_refused():
    with pytest.raises(ExportError, match="lone QuantLinear"):
        fat_brevitas.frozen(qnn.QuantLinear(3, 4, bias=True))


def test_an_uncalibrated_activation_is_named():
    model = fat_brevitas.quantize(crossgen.Net(), LSQ).eval()
    frozen = fat_brevitas.frozen(model)
    assert torch.equal(frozen(crossgen.batch()), model(crossgen.batch()))
    assert {m.name for m in frozen_modules(frozen) if isinstance(m, FrozenActivation) and m.form is None} == {
        "x_quant", "relu", "relu_1", "relu_2", "relu_3", "mean_quant"
    }  # fmt: skip


@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_openvino_gives_the_same_codes(algorithm, tmp_path):
    pytest.importorskip("openvino")
    section = {**SECTION, "algorithm": algorithm}
    model = step(fat_brevitas.quantize(crossgen.build_net(), section, crossgen.loader()), crossgen.batch())
    report = fat_brevitas.export_openvino(model, tmp_path / "net.xml", crossgen.batch())
    assert {layer.name: layer.storage for layer in report.layers if layer.kind == "weight"} == {
        "conv1": "i8", "dw": "i4", "pw": "i4", "conv2": "i4", "fc": "i8"
    }  # fmt: skip
    check = fat_brevitas.verify_openvino(model, tmp_path / "net.xml", crossgen.batch())
    assert check.ok and sum(w.differences for w in check.weights) == 0
    assert sum(a.differences + a.input_differences for a in check.activations) == 0
    import openvino as ov

    compiled = ov.Core().compile_model(str(tmp_path / "net.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kinds.setdefault(str(info["layerType"].astype(str)), []).append(str(info["primitiveType"].astype(str)))
    integer = [k for k in kinds["Convolution"] if k.endswith("I8")]
    assert len(integer) == len(kinds["Convolution"]), kinds
