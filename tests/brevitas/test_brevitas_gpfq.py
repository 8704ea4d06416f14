"""GPFQ on Brevitas: whole models, layers placed by hand, deployment, and Brevitas's own procedure with our rules."""

from __future__ import annotations

import inspect
from copy import deepcopy

import brevitas.graph.gpfq as brevitas_gpfq
import brevitas.nn as qnn
import fat_brevitas
import gpfq_hosts
import pytest
import torch
from brevitas_whole import Fork, Mobile, Residual
from fat_brevitas.deployed import frozen
from fat_brevitas.gpfq import gpfq_mode
from fat_brevitas.model import rebuild
from gpfq_hosts import section
from torch import nn

from fat_plugins import ConfigError, HostError, TensorSpec, get_algorithm
from fat_plugins.network import coordinators
from fat_plugins.quantizer import Progress, conv_geometry

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


# --------------------------------------------------------------------------------------------------------------------
# Brevitas's own procedure
# --------------------------------------------------------------------------------------------------------------------
class Stock(nn.Module):
    """Brevitas's layers with Brevitas's quantizers."""

    def __init__(self, kind: type = qnn.QuantConv2d) -> None:
        super().__init__()
        self.conv1 = kind(4, 6, 3, weight_bit_width=4, groups=2)
        self.relu = qnn.QuantReLU(bit_width=8)
        self.fc = qnn.QuantLinear(6, 5, bias=True, weight_bit_width=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.as_tensor(getattr(y := self.relu(self.conv1(x)), "value", y)).mean((2, 3)))


BATCHES = data(4, 8, 8)
EXTENSIBLE = "algorithm_impl" in inspect.signature(brevitas_gpfq.gpfq_mode.__init__).parameters
extensible = pytest.mark.skipif(not EXTENSIBLE, reason="this Brevitas's GPFQ cannot be extended")


def by_brevitas(model: nn.Module, **options) -> nn.Module:
    with torch.no_grad():
        model.train()(BATCHES[0])  # Brevitas's activation quantizers collect their ranges
        with gpfq_mode(model.eval(), **options) as mode:
            for _ in range(mode.num_layers):
                for x in BATCHES:
                    mode.model(x)
                mode.update()
    return model.eval()


@extensible
@pytest.mark.parametrize(
    "options", [{}, {"alphabet": "authors", "act_order": True}, {"mode": "l1", "lambda_": 0.01}, {"per_channel": True}]
)
def test_our_rules_in_brevitas_s_procedure(options):
    torch.manual_seed(0)
    model = Stock()
    floats = deepcopy(model.state_dict())
    exact = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU())
    exact[0].load_state_dict({k: floats[f"conv1.{k}"] for k in ("weight", "bias")})
    by_brevitas(model, **options)
    params = {"patches": None, **{k: v for k, v in options.items() if k != "per_channel"}}
    spec = TensorSpec(
        "weight", 4, name="conv1", shape=(6, 2, 3, 3), per_channel=options.get("per_channel", False),
        **conv_geometry((3, 3), groups=2),
    )  # fmt: skip
    wanted = get_algorithm("gpfq").make(spec, params)
    wanted.calibrate(floats["conv1.weight"])
    wanted.collect(floats["conv1.weight"])
    for enabled in (False, True):
        wanted.enabled = enabled
        wanted.observe_input(torch.cat(BATCHES))
    wanted.follow(wanted.collected())
    found = model.conv1.weight_quant.quantizer
    # Brevitas sums in float32
    assert (found.codes == wanted.codes).float().mean() > 0.97 and torch.equal(found.step, wanted.step)
    assert torch.equal(model.conv1.weight, found.eval()(model.conv1.weight)) and not model.conv1.weight.requires_grad
    assert model.fc.weight_quant.quantizer.owns_weight


@extensible
def test_l0_and_stochastic_modes_and_deployment(tmp_path):
    from fat_plugins.export import qonnx

    for options in ({"mode": "l0", "lambda_": 0.03}, {"mode": "stochastic", "bits": 3}):
        torch.manual_seed(0)
        model = by_brevitas(Stock(), **options)
        levels = model.conv1.weight_quant.quantizer.signed_codes().unique().numel()
        assert levels <= 2 ** options.get("bits", 4) - 1
        deployed = frozen(model)
        torch.testing.assert_close(deployed(BATCHES[0]), model(BATCHES[0]))
        if options["mode"] == "stochastic":
            qonnx.export(deployed, tmp_path / "m.onnx", BATCHES[0])
            assert qonnx.verify(deployed, tmp_path / "m.onnx", BATCHES[0]).ok


@extensible
def test_what_brevitas_s_procedure_cannot_do_is_one_line():
    with pytest.raises(ConfigError, match=r"option of gpfq_mode 'radios'.*did you mean 'radius'"):
        gpfq_mode(Stock(), radios=1.0)
    with pytest.raises(ConfigError, match="takes 9 bits at 8 bits"):
        by_brevitas(Stock(), bits=8, alphabet="authors")


@pytest.mark.skipif(EXTENSIBLE, reason="this Brevitas's GPFQ can be extended")
def test_an_older_brevitas_says_so():
    with pytest.raises(HostError, match=r"cannot be extended; use Brevitas 0\.12"):
        gpfq_mode(Stock())
