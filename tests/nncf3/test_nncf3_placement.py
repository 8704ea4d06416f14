"""Which tensors are quantized, how, and that the user's model stays the user's."""

from __future__ import annotations

import copy

import fat_nncf
import nncf
import pytest
import torch
from fat_nncf.modern_hooks import PluginQuantizer, plugin_hooks
from nncf.torch.function_hook import get_hook_storage, is_wrapped
from nncf3_nets import Small, Zoo, batch, bits, compress, config, loader, quantizers, section
from torch import nn

from fat_plugins import ConfigError


def test_edges_are_8_bit_and_the_rest_is_low_bit():
    _, model = compress()
    assert bits(model) == {"conv1": 8, "conv2": 4, "conv3": 4, "fc": 8}
    activations = bits(model, "activation")
    assert activations["input of conv1"] == activations["input of fc"] == 8
    assert activations["input of conv2"] == activations["input of conv3"] == 4
    algorithms = {hook.name: hook.algorithm for hook in plugin_hooks(model)}
    assert algorithms["conv1"] == "minmax" and algorithms["conv2"] == "fat"


@pytest.mark.parametrize(("first", "expected"), [("same", 4), (6, 6), ("float", None)])
def test_first_layer_policy(first, expected):
    _, model = compress(section(first_layer=first))
    assert bits(model).get("conv1") == expected
    assert bits(model, "activation").get("input of conv1") == expected
    assert bits(model)["fc"] == 8


def test_slots_are_those_of_nncf():
    _, model = compress(net=Zoo())
    # without bias correction NNCF does not run its own quantizers, whose extension would have to be compiled
    plain = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    reference = nncf.quantize(Zoo(), nncf.Dataset([batch()]), advanced_parameters=plain)
    wanted = {slot for slot, _ in get_hook_storage(reference).named_hooks(remove_duplicate=False)}
    assert {slot for slot, _ in get_hook_storage(model).named_hooks(remove_duplicate=False)} == wanted


def test_parameters_stay_the_ones_that_were_given():
    net = Small()
    before, identity = copy.deepcopy(net.state_dict()), {name: id(p) for name, p in net.named_parameters()}
    controller, model = compress(net=net)
    assert model is net and controller.model is net
    after = dict(model.named_parameters())
    for name, number in identity.items():
        assert id(after[name]) == number and torch.equal(after[name], before[name]), name


def test_every_kind_of_layer():
    _, model = compress(net=Zoo())
    found = quantizers(model)
    shapes = {name: (q.spec.shape, q.spec.channel_axis) for (role, name), q in found.items() if role == "weight"}
    assert shapes["body.0"] == ((8, 1, 3, 3), 0)
    assert shapes["blocks.0"] == ((8, 4, 3, 3), 0)
    assert shapes["blocks.1"] == ((8, 8, 1, 1), 0)
    assert shapes["up"] == ((16, 4, 2, 2), 1)
    assert shapes["table"] == ((4, 6), 1)
    assert found["weight", "body.0"].spec.followed_by_norm and not found["weight", "body.3"].spec.followed_by_norm
    model.eval()
    assert torch.isfinite(model(batch())).all()


def test_one_weight_has_one_quantizer_and_concat_one_scale():
    _, model = compress(net=Zoo())
    slots = {hook.name: slots for hook, slots in plugin_hooks(model).items() if hook.tensor}
    assert len(slots["shared"]) == 2
    joined = [slots for hook, slots in plugin_hooks(model).items() if hook.tensor is None and len(slots) > 1]
    assert len(joined) == 1 and {"/relu/0", "shared/conv2d/1"} == {s.split(".")[1].rsplit("__")[0] for s in joined[0]}


def test_activations_that_feed_no_layer_are_plain():
    _, model = compress(net=Zoo())
    hooks = {hook.name: hook for hook in plugin_hooks(model)}
    assert hooks["input of /add/0"].algorithm == "minmax" and hooks["input of /add/0"].core.spec.bits == 8
    _, model = compress(section(scope_overrides={"activations": {"Zoo/add_0": {"bits": 3}}}), net=Zoo())
    assert {h.name: h.core.spec.bits for h in plugin_hooks(model)}["input of /add/0"] == 3


def test_signedness_and_range_come_from_calibration():
    _, model = compress()
    found = quantizers(model)
    assert found["activation", "input of conv1"].signed and not found["activation", "input of conv2"].signed
    x = torch.cat([b[0] for b in loader()])
    assert float(found["activation", "input of conv1"].largest) <= float(x.abs().max()) + 1e-5
    explicit = {"range": {"type": "min_max", "num_init_samples": 8}}
    _, model = compress(section(initializer=explicit))
    assert float(quantizers(model)["activation", "input of conv1"].largest) == pytest.approx(
        float(x.abs().max()), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["mixed_min_max", "mean_min_max", "percentile", "mean_percentile"])
def test_range_initialisers(kind):
    _, model = compress(section(initializer={"range": {"type": kind, "num_init_samples": 8}}))
    largest = float(quantizers(model)["activation", "input of conv1"].largest)
    assert 1.5 < largest < max(float(b[0].abs().max()) for b in loader())


def test_data_calibration_unless_ranges_are_configured():
    _, model = compress(section("lsq"))
    step = float(quantizers(model)["activation", "input of conv2"].step.detach())
    _, ranged = compress(section("lsq", initializer={"range": {"num_init_samples": 8}}))
    assert step != pytest.approx(float(quantizers(ranged)["activation", "input of conv2"].step.detach()), rel=1e-3)
    # the first batch in float, by the formula of the algorithm
    net = Small().eval()
    torch.manual_seed(0)
    _, model = compress(section("lsq", initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}),
                                 net=net)  # fmt: skip
    seen = torch.relu(nn.functional.batch_norm(
        nn.functional.conv2d(loader()[0][0], net.conv1.weight, net.conv1.bias, padding=1),
        net.bn1.running_mean, net.bn1.running_var, net.bn1.weight, net.bn1.bias))  # fmt: skip
    wanted = 2 * float(seen.detach().mean()) / 15**0.5
    assert float(quantizers(model)["activation", "input of conv2"].step.detach()) == pytest.approx(wanted, rel=1e-4)


def test_batch_norm_adaptation_is_on_unless_zero():
    def running(samples=None):
        torch.manual_seed(0)
        net = Small()
        init = {} if samples is None else {"batchnorm_adaptation": {"num_bn_adaptation_samples": samples}}
        compress(section(initializer=init), net=net)
        return net.bn1.running_mean

    assert running(0).abs().max() == 0
    assert running().abs().max() > 0
    assert not torch.equal(running(4), running(8))  # one batch against two


def test_modes_are_restored():
    net = Small().train()
    net.bn2.eval()
    compress(net=net)
    assert net.training and net.bn1.training and not net.bn2.training


@pytest.mark.parametrize(
    "scope",
    ["conv2", "Small/NNCFConv2d[conv2]/conv2d_0", "Small/NNCFConv2d[conv2]", "Small/Conv2d[conv2]/conv2d_0",
     "conv2/conv2d/0", "{re}.*\\[conv2\\].*", "{re}Conv2d\\[conv2\\]"],
)  # fmt: skip
def test_every_spelling_of_a_scope(scope):
    _, model = compress(section(ignored_scopes=[scope]))
    assert set(bits(model)) == {"conv1", "conv3", "fc"}
    _, model = compress(section(weights={"bits": 4, "ignored_scopes": scope}))
    assert set(bits(model)) == {"conv1", "conv3", "fc"}
    assert "input of conv2" in bits(model, "activation")
    _, model = compress(section(scope_overrides={"weights": {scope: {"bits": 3}}, "activations": {scope: {"bits": 2}}}))
    assert bits(model)["conv2"] == 3 and bits(model)["conv3"] == 4
    assert bits(model, "activation")["input of conv2"] == 2


def test_scopes_of_module_lists_and_nested_modules():
    for scope in ("blocks.0", "Zoo/ModuleList[blocks]/NNCFConv2d[0]/conv2d_0", "Zoo/ModuleList[blocks]/NNCFConv2d[0]"):
        _, model = compress(section(ignored_scopes=[scope]), net=Zoo())
        assert "blocks.0" not in bits(model) and "blocks.1" in bits(model), scope
    _, model = compress(section(ignored_scopes="Zoo/Sequential[body]"), net=Zoo())
    assert not {"body.0", "body.3"} & set(bits(model))


def test_target_scopes():
    _, model = compress(section(target_scopes=["conv2", "{re}conv3"]))
    assert set(bits(model)) == {"conv2", "conv3"}
    _, model = compress(section(activations={"bits": 4, "target_scopes": ["conv3"]}))
    assert set(bits(model, "activation")) == {"input of conv3"}
    assert set(bits(model)) == {"conv1", "conv2", "conv3", "fc"}


def test_overrides_take_algorithm_and_params():
    override = {
        "conv2": {"algorithm": "lsq", "bits": 3, "per_channel": True},
        "conv3": {"params": {"transform": "none"}},
    }
    _, model = compress(section(scope_overrides={"weights": override}))
    hooks = {hook.name: hook for hook in plugin_hooks(model) if hook.tensor}
    assert hooks["conv2"].algorithm == "lsq" and hooks["conv2"].core.step.shape == (8,)
    assert hooks["conv3"].params == {"transform": "none"} and hooks["conv3"].core.transform is None


@pytest.mark.parametrize("key", ["ignored_scopes", "target_scopes"])
def test_a_scope_that_matches_nothing(key):
    with pytest.raises(ConfigError, match=rf"compression\.{key}: scope 'conv9' matches nothing .*nearest is 'conv"):
        compress(section(**{key: ["conv9"]}))
    with pytest.raises(ConfigError, match=rf"compression\.weights\.{key}: scope"):
        compress(section(weights={"bits": 4, key: ["{re}conv9"]}))
    compress(section(ignored_scopes=["conv9"], validate_scopes=False))


def test_an_override_that_matches_nothing_and_a_broken_pattern():
    with pytest.raises(ConfigError, match=r"scope_overrides\.weights: scope 'cnv2' matches nothing"):
        compress(section(scope_overrides={"weights": {"cnv2": {"bits": 3}}}))
    with pytest.raises(ConfigError, match="not a regular expression"):
        compress(section(ignored_scopes=["{re}conv("]))


def test_quantize_inputs_and_overflow_fix():
    _, model = compress(section(quantize_inputs=False))
    assert "input of conv1" not in bits(model, "activation")
    _, model = compress(section(overflow_fix="first_layer_only"))
    assert bits(model)["conv1"] == 7 and bits(model)["fc"] == 8
    _, model = compress(section(overflow_fix="enable"))
    assert bits(model) == {"conv1": 7, "conv2": 4, "conv3": 4, "fc": 7}


@pytest.mark.parametrize("device", ["ANY", "CPU", "NPU", "TRIAL", "VPU"])
def test_low_bits_need_no_trial_device(device):
    _, model = compress(target_device=device)
    assert bits(model)["conv2"] == 4


def test_root_sequential():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    keys = list(net.state_dict())
    _, model = compress(net=net)
    assert bits(model) == {"0": 8, "2": 4, "5": 8}
    assert keys == [k for k in model.state_dict() if "__nncf_hooks" not in k]
    assert model[0] is net[0] and model(batch()).shape == (4, 5)
    assert torch.equal(fat_nncf.freeze(model)(batch()), model.eval()(batch()))
    assert not is_wrapped(net)


def test_without_a_loader_it_warns_and_activations_are_identities():
    with pytest.warns(UserWarning, match="no data loader is registered"):
        _, model = compress(data=False)
    weights, activations = (
        [q for (r, _), q in quantizers(model).items() if r == role] for role in ("weight", "activation")
    )
    assert all(q.calibrated for q in weights) and not any(q.calibrated for q in activations)
    assert model.bn1.running_mean.abs().max() == 0


def test_inputs_by_keyword_and_loaders_of_several_kinds():
    class Keyword(Small):
        def forward(self, image):
            return super().forward(image)

    info = {"sample_size": [1, 3, 8, 8], "keyword": "image"}
    data = [{"image": b[0]} for b in loader()]
    for batches in (data, [(d, 0) for d in data], [b[0] for b in loader()]):
        _, model = compress(net=Keyword(), data=batches, input_info=info)
        assert bits(model)["conv2"] == 4 and all(q.calibrated for q in quantizers(model).values())

    class Initializing:
        def __iter__(self):
            return iter([{"ignored": 1, "x": b[0]} for b in loader()])

        def get_inputs(self, output):
            return (output["x"],), {}

    _, model = compress(data=Initializing())
    assert all(q.calibrated for q in quantizers(model).values())


def test_lr_multiplier_reaches_the_gradients():
    grads = []
    for factor in (None, 10.0):
        torch.manual_seed(0)
        _, model = compress(section(**({"compression_lr_multiplier": factor} if factor else {})))
        model.train()(batch()).square().sum().backward()
        grads.append((quantizers(model)["weight", "conv2"].alpha.grad, model.conv2.weight.grad))
    assert torch.allclose(grads[1][0], 10 * grads[0][0], rtol=1e-5)
    assert torch.allclose(grads[1][1], grads[0][1])


def test_config_survives_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{ // a comment\n "input_info": {"sample_size": [1, 3, 8, 8]},\n'
                    ' "log_dir": "http://not-a-comment", "compression": {"algorithm": "fat"}}')  # fmt: skip
    found = fat_nncf.NNCFConfig.from_json(path)
    assert found["log_dir"] == "http://not-a-comment" and found["compression"] == {"algorithm": "fat"}
    with pytest.warns(UserWarning):
        _, model = fat_nncf.create_compressed_model(Small(), str(path))
    assert any(isinstance(m, PluginQuantizer) for m in model.modules())
    assert copy.deepcopy(config()) == config()
