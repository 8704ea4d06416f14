"""GPFQ on NNCF 3: post-training, so that the model that comes back is finished."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy

import fat_nncf
import gpfq_hosts
import nncf
import pytest
import torch
from gpfq_hosts import section
from nncf3_nets import Small, Zoo, batch, compress, config, loader, train
from torch import nn

from fat_plugins.errors import QuantizationError
from fat_plugins.network import coordinators

NO_NORMS = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}
DATA = [x for x, _ in loader()]


def made(net: nn.Module, **changes):
    """Controller, model and the problems that were solved."""
    torch.manual_seed(0)
    with gpfq_hosts.recorded() as problems:
        controller, model = compress(section(**{**NO_NORMS, **changes}), net=deepcopy(net))
    return controller, model.eval(), problems


@pytest.mark.parametrize("net", [Small, Zoo])
@pytest.mark.parametrize("quantized", [True, False])
def test_every_layer_solves_its_problem(net, quantized):
    torch.manual_seed(0)
    net = net()
    _, model, problems = made(net, first_layer="same", params={"use_quantized_activations": quantized})
    gpfq_hosts.check(net, model, problems, DATA, quantized=quantized, repeated=("shared",))
    gpfq_hosts.check_parameters(model)


def test_samples_are_the_same_in_both_networks_though_the_loader_shuffles():
    class Shuffling(list):
        def __iter__(self):
            order = torch.randperm(len(self)).tolist()
            return iter([self[i] for i in order])

    torch.manual_seed(0)
    net = Small()
    data = Shuffling(loader(batches=8))
    with gpfq_hosts.recorded() as problems:
        params = {"samples": 32, "use_quantized_activations": False}
        compress(section(first_layer="same", params=params, **NO_NORMS), net, data)
    _, pairs = problems["conv1"]
    assert torch.equal(*pairs.joined()) and pairs.count == 8 * 4 * 64


def test_batch_norms_adapt_to_the_finished_network():
    torch.manual_seed(0)
    net = Small()
    _, without, first = made(net)
    _, adapted, second = made(net, initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}})
    # the path saw the float network's norms in both
    for name, (_, pairs) in first.items():
        assert torch.equal(pairs.joined()[0], second[name][1].joined()[0])
    assert torch.equal(without.bn2.running_mean, net.bn2.running_mean)
    assert not torch.equal(adapted.bn2.running_mean, net.bn2.running_mean)


def test_saved_and_rebuilt(tmp_path):
    controller, model, _ = made(Small())
    state = json.loads(json.dumps(controller.get_compression_state()))
    with gpfq_hosts.recorded() as problems:
        again, fresh = fat_nncf.create_compressed_model(Small(), config(section(**NO_NORMS)), compression_state=state)
        fresh.load_state_dict(model.state_dict())
        again.scheduler.epoch_step()
    assert not problems  # nothing is quantized twice
    assert torch.equal(fresh.eval()(batch()), model(batch()))


def test_training_goes_on_with_what_is_left():
    controller, model, problems = made(Small())
    codes = {name: q.signed_codes().clone() for name, (q, _) in problems.items()}
    weight, bias = model.conv3.weight.clone(), model.conv3.bias.clone()
    train(controller, model, epochs=2)
    assert torch.equal(model.conv3.weight, weight) and not torch.equal(model.conv3.bias, bias)
    assert all(torch.equal(q.signed_codes(), codes[name]) for name, (q, _) in problems.items())


#: the transposed convolution looks its weights up in a table, with codes from zero on
@pytest.mark.parametrize(
    ("params", "storage"),
    [
        ({}, {"i4", "i8", "u4"}),
        ({"alphabet": "authors"}, {"i8"}),
        ({"mode": "l1", "lambda_": 0.02}, {"i4", "i8", "u4"}),
        ({"mode": "stochastic", "bias_correction": "all"}, {"i4", "i8", "u4"}),
        ({"mode": "l0", "lambda_": 0.05}, {"i8", "u2+i4", "u2+u4"}),
    ],
    ids=lambda p: p.get("mode", p.get("alphabet", "plain")) if isinstance(p, dict) else "",
)
def test_codes_are_deployed(params, storage, tmp_path):
    pytest.importorskip("openvino")
    _, model, _ = made(Zoo(), params=params)
    torch.testing.assert_close(fat_nncf.freeze(model)(batch()), model(batch()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the L0 mode's size
        report = fat_nncf.export_openvino(model, tmp_path / "m.xml", batch())
    assert {r.storage for r in report.layers if r.kind == "weight"} <= storage
    verified = fat_nncf.verify_openvino(model, tmp_path / "m.xml", batch())
    assert verified.ok and not any(c.differences for c in [*verified.weights, *verified.activations])


def test_without_data_it_says_so():
    with pytest.warns(UserWarning, match="no data loader is registered"):
        controller, model = compress(section(), data=False)
    with pytest.warns(UserWarning, match="gpfq: no calibration data reached it"):
        controller.scheduler.epoch_step()
    (path,) = coordinators(model)
    assert not any(layer.weight.owns_weight for layer in path.layers)


def test_an_error_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    net = Small()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    bad = section(params={"mode": "l0", "lambda_": 9.0})
    with pytest.raises(QuantizationError, match="conv2: lambda_ 9 of mode l0"):
        compress(bad, net=net)
    data = loader()
    data[1][0][0, 0, 0, 0] = float("inf")
    with pytest.raises(QuantizationError):
        compress(section(params={"bias_correction": "all"}), net=net, data=data)
    assert set(net.state_dict()) == set(state)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())


def test_nncf_quantize():
    torch.manual_seed(0)
    net = Small().eval()
    with gpfq_hosts.recorded() as problems:
        model = fat_nncf.quantize(
            net, nncf.Dataset(DATA), "gpfq", {"bits": 4}, {"bits": 8}, gpfq_hosts.PARAMS, first_layer="same"
        )
    gpfq_hosts.check(net, model.eval(), problems, DATA)
    gpfq_hosts.check_parameters(model)
