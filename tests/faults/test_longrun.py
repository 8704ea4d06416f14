"""The checks of :mod:`longrun`, some steps of each; thousands are the business of ``tox -e faults``."""

from importlib import import_module

import longrun
import pytest
import torch
from scenarios import installed
from torch import nn

from fat_plugins import algorithms, get_algorithm
from fat_plugins.errors import ExportError, QuantizationError
from fat_plugins.export.common import check_model
from fat_plugins.frozen import FrozenWeight
from fat_plugins.network import named_quantizers
from fat_plugins.quantizer import TensorSpec
from fat_plugins.recipes.hosts import get_host


@pytest.mark.parametrize("check", longrun.CHECKS)
@pytest.mark.parametrize("name", algorithms())
def test_check(name, check):
    longrun.CHECKS[check](name, 120 if check == "endurance" else 20)


# -- the checks find what they look for ------------------------------------------------------------------------------
def test_growth_is_found(monkeypatch):
    kept, step = [], longrun.Loop.step

    def leaking(self, x, y):
        kept.append(torch.zeros(1))
        return step(self, x, y)

    monkeypatch.setattr(longrun.Loop, "step", leaking)
    with pytest.raises(AssertionError, match="30 tensors more"):
        longrun.endurance("lsq", 80)


def test_drift_is_found(monkeypatch):
    step = longrun.Loop.step

    def drifting(self, x, y):
        self.net.head.bias.data += 1e-7
        return step(self, x, y)

    monkeypatch.setattr(longrun.Loop, "step", drifting)
    with pytest.raises(AssertionError, match="parameters moved"):
        longrun.rate_zero("lsq", 10)


# -- NaN is not deployed ---------------------------------------------------------------------------------------------
class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        spec = TensorSpec("weight", 4, name="conv", shape=(2, 1, 3, 3))
        quantizer, weight = get_algorithm("minmax").make(spec), torch.randn(2, 1, 3, 3)
        quantizer.calibrate(weight)
        self.quantizer = FrozenWeight(*quantizer.freeze(weight), name="conv")
        self.norm, self.bias = nn.BatchNorm2d(2), nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("name", ["bias", "norm.weight", "norm.running_var"])
def test_nan_in_what_is_not_quantized_is_refused(name):
    net = Frozen()
    check_model(net)
    net.state_dict()[name][1] = float("nan")
    with pytest.raises(ExportError, match=rf"^{name}: holds NaN: training has diverged, lower the learning rate$"):
        check_model(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_is_not_frozen(value):
    weight, spec = torch.randn(2, 1, 3, 3), TensorSpec("weight", 4, name="conv", shape=(2, 1, 3, 3))
    quantizer = get_algorithm("lsq").make(spec)
    quantizer.calibrate(weight)
    quantizer.freeze(weight)
    quantizer.step.data.fill_(value)
    with pytest.raises(QuantizationError, match=r"^conv: the scale holds NaN or infinite values; training"):
        quantizer.freeze(weight)


@pytest.mark.parametrize("host_name", [h for h in ("nncf", "brevitas") if installed(h)])
def test_activation_scale_that_is_not_finite_is_not_left_in_a_stock_model(host_name):
    x, y = longrun.images()
    section = {"algorithm": "lsq", "weights": {"bits": 4}, "activations": {"bits": 4}}
    config = {"compression": {**section, "initializer": {"range": {"num_init_samples": 8}}}}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    controller, net = get_host(host_name).compress(longrun.Net(), config, loader, x[:1])
    activations = [q for _, q in named_quantizers(net) if q.role == "activation" and q.algorithm == "lsq"]
    activations[0].step.data.fill_(float("nan"))
    with pytest.raises(QuantizationError, match="the scale holds NaN or infinite values; training has diverged"):
        if host_name == "nncf":
            controller.strip()
        else:
            import_module("fat_brevitas").freeze(net.eval())


def test_offset_that_has_left_the_numbers_is_refused():
    quantizer = get_algorithm("lsq_plus").make(TensorSpec("activation", 4, name="input", channel_axis=1))
    quantizer.calibrate_range(-1.0, 1.0)
    for value in (1e30, float("nan")):
        quantizer.beta.data.fill_(value)
        with pytest.raises(QuantizationError, match=r"^input: the offset is .* steps; training has diverged"):
            quantizer.form()
