"""``fat_nncf.quantize``, and agreement with NNCF 2."""

from __future__ import annotations

import crossgen
import fat_nncf
import nncf
import pytest
import torch
from nncf.torch.function_hook import is_wrapped
from nncf3_nets import Small, Zoo, batch, bits, loader, quantizers
from safetensors.torch import load_file

from fat_plugins import ConfigError, HostError, regularization


def dataset() -> nncf.Dataset:
    return nncf.Dataset(loader(), lambda item: item[0])


def test_quantize_returns_a_copy():
    net = Small()
    model = fat_nncf.quantize(net, dataset(), weights={"bits": 3}, activations={"bits": 5})
    assert not is_wrapped(net) and model is not net
    assert bits(model) == {"conv1": 8, "conv2": 3, "conv3": 3, "fc": 8}
    assert bits(model, "activation")["input of conv2"] == 5
    assert all(q.calibrated for q in quantizers(model).values())
    assert torch.equal(model.conv2.weight, net.conv2.weight) and model.bn1.running_mean.abs().max() == 0
    assert regularization(model) is None
    assert torch.equal(fat_nncf.freeze(model)(batch()), model.eval()(batch()))


def test_quantize_options():
    model = fat_nncf.quantize(
        Small(), dataset(), "lsq", {"bits": 2, "per_channel": True}, {"bits": 2}, first_layer="float",
        last_layer="same",
        ignored_scope=nncf.IgnoredScope(names=["conv3/conv2d/0"]), preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU, subset_size=1, batchnorm_adaptation_steps=1,
        scope_overrides={"weights": {"fc": {"bits": 3}}},
    )  # fmt: skip
    assert bits(model) == {"conv2": 2, "fc": 3}
    assert quantizers(model)["weight", "conv2"].step.shape == (8,)
    assert model.bn1.running_mean.abs().max() > 0


def test_quantize_never_changes_weights_whatever_the_user_asks():
    net = Zoo()
    settings = nncf.AdvancedQuantizationParameters(disable_bias_correction=False, disable_channel_alignment=False)
    model = fat_nncf.quantize(net, dataset(), advanced_parameters=settings)
    for name, value in net.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algorithm": "fatt"}, "did you mean 'fat'"),
        ({"weights": {"bit": 4}}, "did you mean 'bits'"),
        ({"params": {"level": "uniform"}}, "did you mean 'levels'"),
        ({"subset_size": 0}, "subset_size"),
        ({"ignored_scope": nncf.IgnoredScope(names=["conv9"])}, "conv9"),
        ({"scope_overrides": {"weights": {"conv9": {"bits": 3}}}}, "matches nothing"),
    ],
)
def test_quantize_errors(options, expected):
    with pytest.raises(ConfigError) as error:
        fat_nncf.quantize(Small(), dataset(), **options)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_quantize_data_errors():
    with pytest.raises(ConfigError, match="it is empty"):
        fat_nncf.quantize(Small(), nncf.Dataset([]))
    with pytest.raises(ConfigError, match=r"expected nncf\.Dataset"):
        fat_nncf.quantize(Small(), loader())
    with pytest.raises(HostError, match="NNCF cannot trace Small"):
        fat_nncf.quantize(Small(), nncf.Dataset([torch.zeros(1, 5, 8, 8)]))


@pytest.mark.parametrize("name", crossgen.configs())
def test_quantized_weights_equal_those_of_nncf_2(name):
    stored = {k: v for k in crossgen.LAYERS if (v := load_file(crossgen.DATA).get(f"{name}/{k}")) is not None}
    weights = crossgen.quantized_weights(crossgen.compress(crossgen.configs()[name]))
    assert set(weights) == set(stored) == set(crossgen.LAYERS)
    for layer, expected in stored.items():
        assert torch.equal(weights[layer], expected), layer


def test_the_native_spelling_quantizes_weights_the_same():
    model = fat_nncf.quantize(crossgen.build_net(), nncf.Dataset([crossgen.batch()]), "fat", {"bits": 4}, {"bits": 4})
    stored = load_file(crossgen.DATA)
    for layer, weight in crossgen.quantized_weights(model).items():
        assert torch.equal(weight, stored[f"fat_uniform/{layer}"]), layer
