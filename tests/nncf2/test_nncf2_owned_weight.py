"""An algorithm that leaves no float weight (direct) on NNCF 2: the parameter holds what is deployed."""

import fat_nncf
import pytest
import torch
from fat_nncf.legacy_calibration import quantized_layers
from legacy_models import Branches, Zoo, batch, compress, evaluate, make_config, train_step

from fat_plugins.errors import QuantizationError

# without a grid, activation levels are 16 bits wide, and the exporter says so
pytestmark = pytest.mark.filterwarnings("ignore:.*do not fit 8 bits:UserWarning")


def direct(bits=2, **params):
    return {
        "algorithm": "direct",
        "weights": {"bits": bits},
        "activations": {"bits": bits},
        "params": {"optimizer": "sgd", "z_grad": "normalized", **params},
    }


def owned(model):
    """Parameter and quantizer of every weight that was taken over."""
    found = [(module.weight, q.core) for module, _, q in quantized_layers(model) if q.core.owns_weight]
    assert found
    return found


def train(ctrl, model, steps=3):
    optimizer = torch.optim.SGD(fat_nncf.param_groups(model, 0.1), lr=0.1)
    for _ in range(steps):
        train_step(model.train(), ctrl, optimizer)
    model.eval()


def test_the_parameter_is_out_of_training_and_holds_the_quantized_value():
    torch.manual_seed(0)
    ctrl, model = compress(direct())
    handed = {id(p) for group in fat_nncf.param_groups(model, lr=0.1) for p in group["params"]}
    before = []
    for parameter, core in owned(model):
        assert not parameter.requires_grad and id(parameter) not in handed
        assert {id(core.z), id(core.basis)} <= handed
        assert torch.equal(parameter, core.eval()(parameter))
        before.append(parameter.clone())
    train(ctrl, model)
    ctrl.get_compression_state()  # a checkpoint brings the parameters up to date
    for (parameter, core), old in zip(owned(model), before, strict=True):
        assert torch.equal(parameter, core(parameter)) and not torch.equal(parameter, old)
        assert parameter.grad is None


def test_a_second_initialisation_keeps_what_was_trained():
    torch.manual_seed(0)
    ctrl, model = compress(direct())
    train(ctrl, model)
    before = [core(parameter).clone() for parameter, core in owned(model)]
    ctrl.init_range()
    for (parameter, core), old in zip(owned(model), before, strict=True):
        assert torch.equal(core.eval()(parameter), old)


@pytest.mark.parametrize("params", [{}, {"levels": "tied"}, {"grid": 8}], ids=str)
@pytest.mark.parametrize("net", [Zoo, Branches])
def test_train_resume_freeze_strip(params, net):
    torch.manual_seed(0)
    ctrl, model = compress(direct(3, **params), model=net())
    train(ctrl, model)
    reference = evaluate(model)
    with torch.no_grad():
        assert torch.equal(fat_nncf.freeze(model)(batch()), reference)
    assert torch.allclose(evaluate(ctrl.strip()), reference, atol=1e-6)
    state, tensors = ctrl.get_compression_state(), model.state_dict()
    _, again = fat_nncf.create_compressed_model(net(), make_config(direct(3, **params)), compression_state=state)
    assert all(not p.requires_grad for p, _ in owned(again))
    again.load_state_dict(tensors)
    assert torch.equal(evaluate(again), reference)
    assert all(torch.equal(p, core(p)) for p, core in owned(again))


@pytest.mark.parametrize("bits,params", [(1, {}), (2, {}), (3, {"levels": "tied"}), (3, {"grid": 8})], ids=str)
def test_openvino_runs_what_was_trained(bits, params, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    ctrl, model = compress(direct(bits, **params))
    train(ctrl, model)
    fat_nncf.export_openvino(model, tmp_path / "model.xml", batch())
    report = fat_nncf.verify_openvino(model, tmp_path / "model.xml", batch())
    assert report.ok and sum(c.differences for c in report.activations) == 0
    assert ctrl.statistics().to_str()


def test_sparsity_is_refused():
    with pytest.raises(QuantizationError, match="the grid has no zero, so sparsity cannot be kept"):
        compress([{"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, direct()])
