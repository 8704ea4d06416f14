"""Bad input: one clear line each, and the user's model as it was."""

from __future__ import annotations

import copy

import fat_nncf
import nncf
import pytest
import torch
from nncf.torch.function_hook import is_wrapped
from nncf3_nets import Small, compress, config, loader, section
from torch import nn

from fat_plugins import CheckpointError, ConfigError, HostError, QuantizationError


def line(error) -> str:
    """The message, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        ({"algorithm": "fatt"}, "did you mean 'fat'"),
        ({"algorithm": "magnitude_sparsty"}, "did you mean 'magnitude_sparsity'"),
        ({"algorithm": "fat", "weigths": {}}, "did you mean 'weights'"),
        (section(bits=1), "FAT has no 1-bit form"),
        (section(bits=0), "allowed: 2 to 8"),
        (section(bits=9), "allowed: 2 to 8"),
        (section(bits="4"), "'4'"),
        ([section(), {"algorithm": "filter_pruning"}], "NNCF 3 has no filter pruning"),
        ([section(), {"algorithm": "knowledge_distillation"}], "no knowledge distillation"),
        ([section(), {"algorithm": "movement_sparsity"}], "no movement sparsity"),
        ([section(), {"algorithm": "quantization"}], "nncf.quantize"),
        ([section(), section("lsq")], "compression[0] ('fat') and compression[1] ('lsq') both quantize every layer"),
        ([{"algorithm": "magnitude_sparsity"}], "expected a section"),
        ([], "expected a section"),
        ([{"algorithm": "magnitude_sparsity"}, {"algorithm": "const_sparsity"}, section()], "one sparsity algorithm"),
        (section(initializer={"precision": {"type": "hawq"}}), "hawq"),
        (section(initializer={"rnage": {}}), "did you mean 'range'"),
        (section(initializer={"range": {"type": "threesigma"}}), "threesigma"),
        (section(initializer={"range": {"type": "min_mx"}}), "did you mean 'min_max'"),
        (section(initializer={"range": {"num_init_samples": -1}}), "num_init_samples"),
        (section(initializer={"range": {"type": "percentile", "params": {"min_percentile": 100}}}), "percentiles"),
        (section(initializer={"range": {"target_scopes": ["conv1"]}}), "one range estimator"),
        (
            section(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 1.5}}),
            "num_bn_adaptation_samples",
        ),
        (section(activations={"bits": 4, "unified_scale_ops": [["a", "b"]]}), "unified_scale_ops"),
        ([{"algorithm": "magnitude_sparsity", "params": {"schedule": "adaptive"}}, section()], "adaptive"),
        ([{"algorithm": "magnitude_sparsity", "params": {"sparsity_target": 1.5}}, section()], "sparsity_target"),
        ([{"algorithm": "magnitude_sparsity", "params": {"shedule": "a"}}, section()], "did you mean 'schedule'"),
        ([{"algorithm": "magnitude_sparsity", "params": {"multistep_steps": [1]}, "x": 1}, section()], "unknown key"),
        ([{"algorithm": "const_sparsity", "params": {"sparsity_target": 0.5}}, section()], "takes no params"),
        ([{"algorithm": "rb_sparsity", "params": {"sparsity_freeze_epoch": 5}}, section()], "cannot freeze"),
        ("fat", "expected an object"),
    ],
)
def test_bad_compression(compression, expected):
    with pytest.raises(ConfigError) as error:
        config(compression)
    assert expected in line(error)
    net = Small()
    with pytest.raises(ConfigError):
        fat_nncf.create_compressed_model(net, {"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": compression})
    assert not is_wrapped(net)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ({"accuracy_aware_training": {}}, "no accuracy-aware loop"),
        ({"input_inf": {}}, "did you mean 'input_info'"),
        ({"target_device": "CPUU"}, "did you mean 'CPU'"),
        ({"input_info": {"sample_size": [1, "3"]}}, "sample_size"),
        ({"input_info": {"sample_size": []}}, "sample_size"),
        ({"input_info": {"size": [1]}}, "unknown key 'size'"),
        ({"input_info": {"sample_size": [1], "type": "int"}}, "unknown type 'int'"),
        ({"input_info": [{"sample_size": [1], "keyword": "a"}, {"sample_size": [1]}]}, "not both"),
        ({"compression_lr_multiplier": "2"}, "expected a number"),
    ],
)
def test_bad_root(root, expected):
    with pytest.raises(ConfigError) as error:
        config(**root)
    assert expected in line(error)


def test_application_keys_are_left_alone():
    assert config(batch_size=32, model="resnet18", optimizer={"type": "SGD"})["batch_size"] == 32


def test_config_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        fat_nncf.create_compressed_model(Small(), tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"compression": \n oops}')
    with pytest.raises(ConfigError, match="line 2"):
        fat_nncf.NNCFConfig.from_json(broken)
    with pytest.raises(ConfigError, match="missing"):
        fat_nncf.create_compressed_model(Small(), {})
    with pytest.raises(ConfigError, match="input_info: missing"):
        fat_nncf.create_compressed_model(Small(), {"compression": section()})
    with pytest.raises(ConfigError, match="NNCFConfig"):
        fat_nncf.register_default_init_args({}, loader())


@pytest.mark.parametrize("data", [[], torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(0, 3)))])
def test_empty_loader(data):
    net = Small()
    cfg = fat_nncf.register_default_init_args(config(data=False), data)
    with pytest.raises(ConfigError) as error:
        fat_nncf.create_compressed_model(net, cfg)
    assert "it is empty" in line(error) and not is_wrapped(net)


@pytest.mark.parametrize(("data", "expected"), [(iter([1]), "only once"), (7, "an iterable"), ([()], "empty tuple")])
def test_bad_loader(data, expected):
    cfg = fat_nncf.register_default_init_args(config(data=False), data)
    with pytest.raises(ConfigError, match=expected):
        fat_nncf.create_compressed_model(Small(), cfg)


def test_untraceable_model():
    class Broken(Small):
        def forward(self, x):
            raise RuntimeError("no forward\nin two lines")

    net = Broken()
    with pytest.raises(HostError) as error:
        compress(net=net)
    assert line(error) == "NNCF cannot trace Broken: RuntimeError: no forward"
    assert not is_wrapped(net) and "__nncf_hooks" not in dict(net.named_modules())


def test_nothing_to_quantize():
    class Empty(nn.Module):
        def forward(self, x):
            return torch.relu(x)

    with pytest.raises(HostError, match="no layer with weights in Empty"):
        compress(net=Empty())
    with pytest.raises(HostError, match=r"nothing to quantize|no quantizer"):
        compress(section(ignored_scopes=["{re}.*"]))
    with pytest.raises(HostError, match=r"expected a torch.nn.Module"):
        fat_nncf.create_compressed_model(lambda x: x, config())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_refused():
    scripted = torch.jit.trace(Small().eval(), loader()[0][0])
    with pytest.raises(HostError, match="TorchScript"):
        compress(net=scripted)


def test_compressing_twice():
    _, model = compress()
    with pytest.raises(HostError, match="compressed already"):
        compress(net=model)
    with pytest.raises(HostError, match="not a compressed model"):
        fat_nncf.freeze(Small())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(value):
    net = Small()
    net.conv2.weight.data[0, 0, 0, 0] = value
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(QuantizationError) as error:
        compress(net=net)
    assert line(error).startswith("conv2.weight")
    assert not is_wrapped(net) and list(net.state_dict()) == list(state)


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("algorithm", ["fat", "lsq", "minmax"])
def test_constant_weights(algorithm, value):
    net = Small()
    net.conv2.weight.data.fill_(value)
    _, model = compress(section(algorithm), net=net)
    out = model.eval()(loader()[0][0])
    assert torch.isfinite(out).all()
    assert torch.allclose(fat_nncf.freeze(model)(loader()[0][0]), out, atol=1e-6)


def test_a_failure_late_on_leaves_the_model_as_it_was(monkeypatch):
    from fat_nncf import modern

    def refuse(*args, **kwargs):
        raise QuantizationError("late")

    net = Small().train()
    x = loader()[0][0]
    before = net.eval()(x)
    monkeypatch.setattr(modern, "calibrate_activations", refuse)
    with pytest.raises(QuantizationError, match="late"):
        compress([{"algorithm": "magnitude_sparsity"}, section()], net=net.train())
    assert not is_wrapped(net) and net.training and torch.equal(net.eval()(x), before)
    pruned = nncf.prune(Small(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=x)
    with pytest.raises(QuantizationError, match="late"):
        compress(net=pruned)
    kinds = {type(m).__name__ for m in pruned.modules()}
    assert "UnstructuredPruningMask" in kinds and "PluginQuantizer" not in kinds


def test_wrong_checkpoints():
    controller, _ = compress()
    state = controller.get_compression_state()

    class Other(Small):
        def __init__(self):
            super().__init__()
            self.conv2 = nn.Conv2d(6, 8, 5, padding=2)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.c(x)

    for net, expected in (
        (Other(), r"conv2.weight has shape \[8, 6, 5, 5\]"),
        (Renamed(), "no layer 'conv1/conv2d/0'"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            fat_nncf.create_compressed_model(net, config(), compression_state=state)
        assert not is_wrapped(net)
    with pytest.raises(CheckpointError, match="not for 'lsq'"):
        fat_nncf.create_compressed_model(Small(), config(section("lsq")), compression_state=state)
    for bad in (None or {"a": 1}, [], {"builder_state": {"format": 2, "hooks": []}}):
        with pytest.raises(CheckpointError):
            fat_nncf.create_compressed_model(Small(), config(), compression_state=bad)
    damaged = copy.deepcopy(state)
    damaged["builder_state"]["hooks"][0]["class"] = "os.system"
    with pytest.raises(CheckpointError, match="damaged entry"):
        fat_nncf.create_compressed_model(Small(), config(), compression_state=damaged)
    unknown = copy.deepcopy(state)
    unknown["builder_state"]["hooks"][0]["config"]["algorithm"] = "fatt"
    with pytest.raises(CheckpointError, match="did you mean 'fat'"):
        fat_nncf.create_compressed_model(Small(), config(), compression_state=unknown)
