"""GPFQ on Brevitas: whole models, layers placed by hand, deployment, and Brevitas's own procedure with our rules."""

from __future__ import annotations

from copy import deepcopy

import brevitas.nn as qnn
import fat_brevitas
import gpfq_hosts
import pytest
import torch
from brevitas_whole import Fork, Mobile, Residual
from fat_brevitas.deployed import frozen
from fat_brevitas.model import rebuild
from gpfq_hosts import section
from torch import nn

from fat_plugins.network import coordinators
from fat_plugins.quantizer import Progress

NO_NORMS = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}}


def data(*shape):
    return [torch.randn(4, *shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]


IMAGES = data(3, 12, 12)


def made(net, batches=IMAGES, **changes):
    """Model and the problems that were solved."""
    with gpfq_hosts.recorded() as problems:
        model = fat_brevitas.quantize(net, section(**{**NO_NORMS, **changes}), batches)
    return model.eval(), problems


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("net", "shape"), [(Residual, (3, 12, 12)), (Mobile, (3, 12, 12)), (Fork, (4, 9))])
def test_every_layer_solves_its_problem(net, shape, quantized):
    torch.manual_seed(0)
    net, batches = net().eval(), data(*shape)
    model, problems = made(net, batches, first_layer="same", params={"use_quantized_activations": quantized})
    gpfq_hosts.check(net, model, problems, batches, quantized=quantized, repeated=("conv",))
    gpfq_hosts.check_parameters(model)


def test_batch_norms_adapt_to_the_finished_network():
    torch.manual_seed(0)
    net = Residual().eval()
    without, first = made(net)
    adapted, second = made(net, initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}})
    for name, (_, pairs) in first.items():
        assert torch.equal(pairs.joined()[0], second[name][1].joined()[0])
    assert torch.equal(without.b1.running_mean, net.b1.running_mean)
    assert not torch.equal(adapted.b1.running_mean, net.b1.running_mean)


def test_saved_rebuilt_and_trained_on():
    torch.manual_seed(0)
    model, problems = made(Residual())
    with gpfq_hosts.recorded() as again:
        fresh = rebuild(Residual(), model.compression_state, IMAGES)
        fresh.load_state_dict(model.state_dict())
        fat_brevitas.set_progress(fresh, Progress(epoch=1))
    assert problems and not again  # nothing is quantized twice
    assert torch.equal(fresh.eval()(IMAGES[0]), model(IMAGES[0]))
    codes = {name: q.signed_codes().clone() for name, (q, _) in problems.items()}
    before = model(IMAGES[0]).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(IMAGES[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.eval()(IMAGES[0]), before)
    assert all(torch.equal(q.signed_codes(), codes[name]) for name, (q, _) in problems.items())


class ByHand(nn.Module):
    """Layers of the user's; the second quantizes its own input."""

    def __init__(self, **options) -> None:
        super().__init__()
        weight = fat_brevitas.weight_quant("gpfq", bit_width=4, **{**gpfq_hosts.PARAMS, **options})
        act = fat_brevitas.act_quant("gpfq", bit_width=3)
        self.conv1 = qnn.QuantConv2d(3, 6, 3, weight_quant=weight)
        self.relu = qnn.QuantReLU(act_quant=act, return_quant_tensor=False)
        self.conv2 = qnn.QuantConv2d(6, 5, 3, groups=1, weight_quant=weight, input_quant=act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu(self.conv1(x)))


def test_layers_placed_by_hand():
    torch.manual_seed(0)
    net = ByHand()
    exact = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    exact[0].load_state_dict({"weight": net.conv1.weight, "bias": net.conv1.bias})
    exact[2].load_state_dict({"weight": net.conv2.weight, "bias": net.conv2.bias})
    with gpfq_hosts.recorded() as problems:
        controller = fat_brevitas.Controller(net, IMAGES)
    assert [q.owns_weight for q, _ in problems.values()] == [True, True]
    with torch.no_grad():
        read = exact[1](exact[0](torch.cat(IMAGES)))
        rows = nn.functional.unfold(read, 3).transpose(1, 2).flatten(0, 1)
        assert torch.allclose(list(problems.values())[1][1].joined()[0][0].float(), rows, atol=1e-5)
        net.eval()
        quantized = net.conv2.input_quant(net.relu(net.conv1(torch.cat(IMAGES))))
        rows = nn.functional.unfold(getattr(quantized, "value", quantized), 3).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(list(problems.values())[1][1].joined()[1][0].float(), rows, atol=1e-5)
    gpfq_hosts.check_parameters(net)
    assert len(list(coordinators(net))) == 1 and controller.loss() == 0


@pytest.mark.filterwarnings("ignore:.*a sum of 2 grids:UserWarning")
@pytest.mark.parametrize(
    "params",
    [{}, {"alphabet": "authors"}, {"mode": "l1", "lambda_": 0.01}, {"mode": "l0", "lambda_": 0.03}],
    ids=lambda p: p.get("mode", p.get("alphabet", "plain")),
)
def test_codes_are_deployed(params, tmp_path):
    from fat_plugins.export import onnx, qonnx

    torch.manual_seed(0)
    model, problems = made(Residual(), params=params)
    out = model(IMAGES[0])
    deployed = frozen(model)
    torch.testing.assert_close(deployed(IMAGES[0]), out)
    for target in (qonnx, onnx):
        path = tmp_path / f"{target.__name__}.onnx"
        target.export(deployed, path, IMAGES[0])
        report = target.verify(deployed, path, IMAGES[0])
        assert report.ok and not any(c.differences for c in [*report.weights, *report.activations])
    if params.get("mode") != "l0":
        stock = fat_brevitas.freeze(deepcopy(model))
        assert torch.equal(stock(IMAGES[0]), out)
    quantizer = next(q for q, _ in problems.values())
    assert quantizer.bits == 4 + (params.get("alphabet") == "authors")


def test_a_model_without_data_says_so():
    model = fat_brevitas.quantize(Residual(), section())
    with pytest.warns(UserWarning, match="gpfq: no calibration data reached it"):
        fat_brevitas.set_progress(model, Progress())
    # data that comes later is used when training begins
    fat_brevitas.Controller(model, IMAGES)
    fat_brevitas.set_progress(model, Progress())
    model.eval()(IMAGES[0])
    gpfq_hosts.check_parameters(model)
