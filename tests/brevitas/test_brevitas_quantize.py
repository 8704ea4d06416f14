"""``fat_brevitas.quantize``: where quantizers go, what the config decides, and every refusal."""

from __future__ import annotations

import itertools
import json

import brevitas.nn as qnn
import crossgen
import fat_brevitas
import pytest
import torch
from brevitas_whole import LSQ, SECTION, Branching, Fork, Mobile, Recurrent, Residual, images, step, where
from torch import nn
from torch.nn.utils import prune

from fat_plugins import ConfigError, HostError, named_quantizers

PLAIN, FAT = (8, "MinMaxActivation"), (4, "FATActivation")


def test_residual_network():
    net = Residual()
    model = fat_brevitas.quantize(net, SECTION, [images()], example_input=images())
    assert where(model, "weight") == {
        "stem": (8, "MinMaxWeight"), "c1": (4, "FATWeight"), "c2": (4, "FATWeight"), "down.0": (4, "FATWeight"),
        "fc": (8, "MinMaxWeight"),
    }  # fmt: skip
    assert where(model, "activation") == {
        "x_quant": PLAIN, "act": FAT, "act_1": FAT, "b2_quant": PLAIN, "down.1_quant": PLAIN, "act_2": PLAIN,
        "gap_quant": PLAIN,
    }  # fmt: skip
    assert type(model.act) is qnn.QuantReLU and type(model.c1) is qnn.QuantConv2d and type(model.bn) is nn.BatchNorm2d
    quantizers = {q.spec.name: q for _, q in named_quantizers(model)}
    assert all(q.calibrated for q in quantizers.values())
    assert quantizers["c1"].spec.followed_by_norm and not quantizers["fc"].spec.followed_by_norm
    assert quantizers["x_quant"].signed and not quantizers["act_1"].signed
    # the user's model is untouched, and its parameters are those of the copy
    assert type(net.c1) is nn.Conv2d and net.bn.num_batches_tracked == 0
    state = model.state_dict()
    for key, value in net.named_parameters():
        assert torch.equal(state[key], value), key
    # functional dropout follows the mode of the model
    (dropout,) = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropout.p == 0.5 and dropout.training
    model.eval()
    assert not dropout.training


def test_mobile_network():
    model = fat_brevitas.quantize(Mobile(), SECTION, [images()], example_input=images())
    assert where(model, "activation") == {
        "x_quant": PLAIN, "features.0.2": FAT, "features.1.2": FAT, "features.2.1_quant": FAT,
        "hardswish_quant": PLAIN, "cat_quant": PLAIN, "avg_pool2d_quant": PLAIN,
    }  # fmt: skip
    relu6 = model.features.get_submodule("0.2")
    assert type(relu6) is qnn.QuantReLU and relu6.act_quant.act_tensor_quant.calibration_range[1] == 6.0
    # the concatenation that is also an output leaves the network as it is
    assert model.eval()(images())[1].unique().numel() > 2**8


def test_a_tensor_that_is_also_an_output_stays_float_there():
    x = torch.randn(2, 4, 6)
    model = fat_brevitas.quantize(Fork(), SECTION, [x], example_input=x).eval()
    assert type(model.relu) is nn.ReLU and set(where(model, "activation")) == {
        "x_quant", "relu_quant", "conv_quant", "sigmoid_quant"
    }  # fmt: skip
    assert set(where(model, "weight")) == {"up", "conv", "last"}
    assert model.up.weight_quant.quantizer.spec.channel_axis == 1
    assert model(x)[1].unique().numel() > 2**4


def test_placement_equals_that_of_nncf():
    pytest.importorskip("nncf")
    import fat_nncf

    if fat_nncf.GENERATION == 2:
        pytest.skip("only NNCF 3 names activations by what reads them")
    for kind in (crossgen.Net, Residual, Mobile):
        ours = fat_brevitas.quantize(kind(), SECTION)
        config = {"input_info": {"sample_size": [4, 3, 12, 12]}, "compression": SECTION}
        config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), crossgen.loader())
        theirs = fat_nncf.create_compressed_model(kind(), config)[1]
        assert where(ours, "weight") == where(theirs, "weight")
        assert sorted(where(ours, "activation").values()) == sorted(where(theirs, "activation").values())
        norms = [{q.spec.name: q.spec.followed_by_norm for _, q in named_quantizers(m) if q.role == "weight"}
                 for m in (ours, theirs)]  # fmt: skip
        assert norms[0] == norms[1]


@pytest.mark.parametrize(
    ("scope", "kept"),
    [("c2", {"stem", "c1", "down.0", "fc"}), ("{re}^c[12]$", {"stem", "down.0", "fc"}),
     ("down", {"stem", "c1", "c2", "fc"}), ("Residual/NNCFConv2d[c1]/conv2d_0", {"stem", "c2", "down.0", "fc"}),
     ("c1/conv2d/0", {"stem", "c2", "down.0", "fc"})],
)  # fmt: skip
def test_ignored_scopes(scope, kept):
    model = fat_brevitas.quantize(Residual(), {**SECTION, "ignored_scopes": [scope]})
    assert set(where(model, "weight")) == kept
    model = fat_brevitas.quantize(Residual(), {**SECTION, "weights": {"bits": 4, "ignored_scopes": [scope]}})
    assert set(where(model, "weight")) == kept and len(where(model, "activation")) == 7


def test_target_scopes():
    model = fat_brevitas.quantize(Residual(), {**SECTION, "target_scopes": ["c1", "{re}c2"]})
    assert set(where(model, "weight")) == {"c1", "c2"} and set(where(model, "activation")) == {"pool_quant", "act_1"}


def test_overrides_edges_and_options():
    section = {
        **LSQ, "first_layer": "float", "last_layer": 6, "quantize_inputs": False, "compression_lr_multiplier": 0.0,
        "weights": {"bits": 3, "per_channel": True},
        "scope_overrides": {
            "weights": {
                "c2": {"bits": 2, "per_channel": False},
                "{re}down": {"algorithm": "fat", "per_channel": False, "params": {"levels": "power_of_two"}},
            },
            "activations": {"c2": {"bits": 5}, "gap_quant": {"bits": 7}, "act_2": {"bits": 3, "algorithm": "fat"}},
        },
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"'gap_quant' matches nothing.*nearest is 'gap"):
        fat_brevitas.quantize(Residual(), section)
    section["scope_overrides"]["activations"]["gap"] = section["scope_overrides"]["activations"].pop("gap_quant")
    model = fat_brevitas.quantize(Residual(), section, [images()])
    assert where(model, "weight") == {
        "c1": (3, "LSQWeight"), "c2": (2, "LSQWeight"), "down.0": (3, "FATWeight"), "fc": (6, "MinMaxWeight"),
    }  # fmt: skip
    bits = where(model, "activation")
    assert bits["act_1"] == (5, "LSQActivation") and "x_quant" not in bits
    assert bits["act_2"] == (7, "FATActivation") and bits["gap_quant"] == (7, "LSQActivation")
    quantizers = {q.spec.name: q for _, q in named_quantizers(model)}
    assert quantizers["c1"].spec.per_channel and not quantizers["c2"].spec.per_channel
    assert quantizers["down.0"].params.levels == "power_of_two"
    step(model, images())
    gradient = quantizers["c1"].step.grad
    assert gradient is not None and not gradient.any() and model.c1.weight.grad.any()


def test_config_forms(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"input_info": {"sample_size": [1, 3, 12, 12]}, "compression": [LSQ]}) + "// end")
    states = [
        fat_brevitas.quantize(crossgen.build_net(), c).compression_state for c in (LSQ, {"compression": LSQ}, path)
    ]
    assert states[0] == states[1] == states[2]


def test_merge_bn_and_equalize():
    net = step(Residual(), images())  # statistics that are not those of a fresh norm
    merged = fat_brevitas.quantize(net, SECTION, [images()], merge_bn=True, example_input=images())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) and merged.c1.bias is not None
    assert not any(q.spec.followed_by_norm for _, q in named_quantizers(merged))
    equalized = fat_brevitas.quantize(Mobile().eval(), SECTION, [images()], equalize=True, example_input=images())
    assert torch.isfinite(equalized(images())[0]).all()


def test_masks_of_pruned_weights_are_kept():
    net = Residual()
    prune.l1_unstructured(net.c1, "weight", amount=0.5)
    step(net, images())  # the masked weight is a result of an operation now
    model = fat_brevitas.quantize(net, LSQ, [images()])
    quantizer = model.c1.weight_quant.quantizer
    assert quantizer.spec.keep_zeros and not model.c2.weight_quant.quantizer.spec.keep_zeros
    mask = model.c1.weight_mask.bool()
    before = model.c1.weight_orig.clone()
    step(model, images())
    assert not torch.equal(model.c1.weight_orig[mask], before[mask])
    assert torch.equal(model.c1.weight_orig[~mask], before[~mask])
    model(images())
    assert not quantizer(model.c1.weight)[~mask].any()
    assert torch.equal(fat_brevitas.frozen(model)(images()), model(images()))


def test_without_data_the_first_training_batch_calibrates():
    model = fat_brevitas.quantize(Residual(), LSQ)
    assert all(q.calibrated == (q.role == "weight") for _, q in named_quantizers(model))
    model.train()(images())
    assert all(q.calibrated for _, q in named_quantizers(model))


def test_batch_norms_are_adapted_as_configured():
    x = [images(seed=1), images(seed=2)]
    net = Residual().eval()
    adapted = fat_brevitas.quantize(net, LSQ, x)
    assert adapted.b2.num_batches_tracked == 2 and not adapted.training and not adapted.b2.training
    off = {**LSQ, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}
    assert fat_brevitas.quantize(net, off, x).b2.num_batches_tracked == 0
    one = {**LSQ, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 3}}}
    assert fat_brevitas.quantize(net, one, x).b2.num_batches_tracked == 1


def test_range_samples_limit_the_calibration():
    small, large = images(seed=1), 10 * images(seed=2)
    section = {"algorithm": "minmax", "weights": {"bits": 8}, "activations": {"bits": 8},
               "initializer": {"range": {"num_init_samples": 4}}}  # fmt: skip
    one = fat_brevitas.quantize(Residual(), section, [(small, 0), (large, 0)])
    both = fat_brevitas.quantize(Residual(), {**section, "initializer": {}}, [(small, 0), (large, 0)])
    tops = [m.x_quant.act_quant.form().scale * m.x_quant.act_quant.form().high for m in (one, both)]
    torch.testing.assert_close(tops[0], small.abs().max().reshape(1))
    torch.testing.assert_close(tops[1], large.abs().max().reshape(1))


def test_bias_correction_of_brevitas():
    from brevitas.graph.calibrate import bias_correction_mode

    net = Residual()
    model = fat_brevitas.quantize(net, SECTION, [images()]).eval()
    before = model.stem.bias.clone()
    with torch.no_grad(), bias_correction_mode(model):
        model(images())
    assert not torch.equal(model.stem.bias, before)


def test_unsupported_layers_stay_float_with_one_warning():
    tokens = torch.randint(0, 7, (2, 3))
    with pytest.warns(UserWarning, match=r"stay float: embed \(Embedding\), lstm \(LSTM\)$") as seen:
        model = fat_brevitas.quantize(Recurrent(), SECTION, [tokens])
    assert len([w for w in seen if "stay float" in str(w.message)]) == 1
    assert set(where(model, "weight")) == {"fc"}
    fat_brevitas.quantize(Recurrent(), {**SECTION, "ignored_scopes": ["embed", "lstm"]})  # said so: no warning
    with pytest.raises(ConfigError, match=r"target_scopes: lstm \(LSTM\) cannot be quantized"):
        fat_brevitas.quantize(Recurrent(), {**SECTION, "target_scopes": ["lstm", "fc"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "mixed"}, "compression.preset: only NNCF has it"),
        ({"overflow_fix": "enable"}, "compression.overflow_fix: only NNCF has it, got 'enable'"),
        ({"export_to_onnx_standard_ops": True}, "export_to_onnx_standard_ops: only NNCF"),
        ({"initializer": {"precision": {"type": "hawq"}}}, "initializer.precision: only NNCF"),
        ({"initializer": {"range": {"type": "percentile"}}}, "range.type: 'percentile' cannot run on Brevitas"),
        ({"initializer": {"range": {"num_init_sample": 4}}}, "did you mean 'num_init_samples'"),
        ({"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": "many"}}}, "expected a number of"),
        ({"activations": {"bits": 4, "unified_scale_ops": [["a"]]}}, "unified_scale_ops: only NNCF 2"),
        ({"algorithm": "fatt"}, "did you mean 'fat'"),
        ({"algorithm": "magnitude_sparsity"}, "'magnitude_sparsity' is NNCF's and cannot run on Brevitas; prune"),
        ({"weights": {"bits": 1}}, "has no 1-bit weights"),
        ({"ignored_scopes": ["conv9"]}, "'conv9' matches nothing in the model; the nearest is 'conv"),
        ({"scope_overrides": {"weights": {"{re}(": {"bits": 4}}}}, "not a regular expression"),
    ],
)
def test_refusals(change, message):
    for config in ({**SECTION, **change}, {"compression": {**SECTION, **change}}):
        with pytest.raises(ConfigError) as error:
            fat_brevitas.quantize(crossgen.Net(), config)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compresion": SECTION}, "compression"),
        ({"compression": SECTION, "accuracy_aware_training": {}}, "accuracy_aware_training"),
        ({"compression": SECTION, "compression_lr_multiplier": "0.1"}, "compression_lr_multiplier: expected a number"),
        ({"compression": [SECTION, LSQ]}, r"compression\[0\] \('fat'\) and compression\[1\] \('lsq'\) both quantize"),
        ({"compression": [SECTION, {"algorithm": "filter_pruning"}]}, r"compression\[1\].algorithm: 'filter_pruning'"),
        (3, "got int"),
        ("missing.json", "No such file"),
    ],
)
def test_wrong_configs(config, message):
    with pytest.raises(ConfigError, match=message):
        fat_brevitas.quantize(crossgen.Net(), config)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "it is empty"), (3, "got int"), (iter([images()]), "only once"), (images(), "got one Tensor")],
)
def test_wrong_calibration_data(data, message):
    with pytest.raises(ConfigError, match=message):
        fat_brevitas.quantize(crossgen.Net(), SECTION, data)


def test_models_that_cannot_be_quantized():
    with pytest.raises(HostError, match=r"cannot trace Branching: .*build the model from") as error:
        fat_brevitas.quantize(Branching(), SECTION)
    assert "\n" not in str(error.value)
    with pytest.raises(HostError, match="nothing to quantize"):
        fat_brevitas.quantize(crossgen.Net(), {**SECTION, "target_scopes": ["bn1"]})

    calls = itertools.count(1)

    class Counting(nn.Module):
        """Its forward depends on what tracing fixes."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * next(calls)

    with pytest.raises(HostError, match="gives another output"):
        fat_brevitas.quantize(Counting(), SECTION, example_input=torch.ones(1, 4))
    model = fat_brevitas.quantize(crossgen.Net(), SECTION)
    with pytest.raises(HostError, match="Net is quantized already"):
        fat_brevitas.quantize(model, SECTION)


def test_modules_that_are_named_like_functions():
    class Clash(nn.Module):
        """Its layers have the names that a tracer gives to the functions."""

        def __init__(self) -> None:
            super().__init__()
            self.relu, self.relu_1 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.relu_1(torch.relu(self.relu(x))))

    x = torch.randn(3, 4)
    model = fat_brevitas.quantize(Clash(), SECTION, [x], example_input=x)
    assert set(where(model, "weight")) == {"relu", "relu_1"} and len(where(model, "activation")) == 2
    assert torch.equal(fat_brevitas.frozen(model.eval())(x), model(x))
