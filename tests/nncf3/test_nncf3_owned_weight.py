"""An algorithm that leaves no float weight (direct) on NNCF 3: the parameter holds what is deployed."""

from __future__ import annotations

import fat_nncf
import nncf
import pytest
import torch
from nncf3_nets import Small, Zoo, batch, compress, config, loader, quantizers, section, train
from torch import nn

from fat_plugins import QuantizationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # without a grid, activation levels are 16 bits wide, and the exporter says so
    pytest.mark.filterwarnings("ignore:.*do not fit 8 bits:UserWarning"),
]
INNER = ("conv2.weight", "conv3.weight")


def direct(bits=2, **params):
    return section("direct", bits, params={"optimizer": "sgd", "z_grad": "normalized", **params})


def owned(model):
    """Name, parameter and quantizer of every weight that was taken over."""
    parameters = dict(model.named_parameters())
    return {
        (name if name in parameters else f"{name}.weight"): (parameters.get(name, parameters.get(f"{name}.weight")), q)
        for (role, name), q in quantizers(model).items()
        if role == "weight" and q.owns_weight
    }


def test_the_parameter_is_out_of_training_and_holds_the_quantized_value():
    torch.manual_seed(0)
    net = Small()
    float_weights = {name: p.clone() for name, p in net.named_parameters()}
    controller, model = compress(direct(), net=net)
    assert set(owned(model)) == set(INNER)
    handed = {id(p) for group in fat_nncf.param_groups(model, lr=0.1) for p in group["params"]}
    for name, (parameter, quantizer) in owned(model).items():
        assert not parameter.requires_grad and id(parameter) not in handed
        assert {id(quantizer.z), id(quantizer.basis)} <= handed
        assert torch.equal(parameter, quantizer.eval()(parameter))
        assert not torch.equal(parameter, float_weights[name])
    before = {name: q(p).clone() for name, (p, q) in owned(model).items()}
    train(controller, model, lr=0.1)
    controller.get_compression_state()  # a checkpoint brings the parameters up to date
    for name, (parameter, quantizer) in owned(model).items():
        assert torch.equal(parameter, quantizer(parameter)) and not torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_activations_are_calibrated_on_the_float_network():
    """Section 7.2: before the weights are folded."""
    torch.manual_seed(0)
    net = Small().eval()
    inputs = []
    net.conv3.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    for x, _ in loader():
        net(x)
    torch.manual_seed(0)
    _, model = compress(direct())
    found = quantizers(model)["activation", "input of conv3"]
    wanted = type(found)(found.spec, found.params)
    for x in inputs:
        wanted.calibrate(x)
    assert torch.allclose(found.basis, wanted.basis, rtol=1e-4)


@pytest.mark.parametrize("params", [{}, {"levels": "tied"}, {"grid": 8}], ids=str)
def test_train_resume_freeze_strip(params):
    torch.manual_seed(0)
    controller, model = compress(direct(3, **params), net=Zoo())
    train(controller, model)
    with torch.no_grad():
        reference = model(batch())
        frozen = fat_nncf.freeze(model)
        assert torch.equal(frozen(batch()), reference)
        assert torch.allclose(controller.strip()(batch()), reference, atol=1e-6)
        state, tensors = controller.get_compression_state(), model.state_dict()
        _, again = fat_nncf.create_compressed_model(Zoo(), config(direct(3, **params)), compression_state=state)
        assert all(not p.requires_grad for p, _ in owned(again).values())
        again.load_state_dict(tensors)
        assert torch.equal(again.eval()(batch()), reference)
        for parameter, quantizer in owned(again).values():
            assert torch.equal(parameter, quantizer(parameter))


@pytest.mark.parametrize("bits,params", [(1, {}), (2, {}), (3, {"levels": "tied"}), (3, {"grid": 8})], ids=str)
def test_openvino_runs_what_was_trained(bits, params, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    controller, model = compress(direct(bits, **params))
    train(controller, model)
    fat_nncf.export_openvino(model, tmp_path / "model.xml", batch())
    report = fat_nncf.verify_openvino(model, tmp_path / "model.xml", batch())
    assert report.ok and sum(c.differences for c in report.activations) == 0


def test_quantize_takes_the_weights_over_too():
    torch.manual_seed(0)
    dataset = nncf.Dataset([x for x, _ in loader()])
    bits = {"bits": 2}
    model = fat_nncf.quantize(Small(), dataset, "direct", weights=bits, activations=bits).eval()
    for parameter, quantizer in owned(model).values():
        assert not parameter.requires_grad and torch.equal(parameter, quantizer(parameter))


class Tied(nn.Module):
    """One parameter read by a layer and by an operation that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.inner(self.first(x).relu()).relu()
        return self.last(x) + self.inner.weight.sum(0)


def test_a_weight_that_something_else_reads_in_float_is_refused():
    settings = {"input_info": {"sample_size": [4, 8]}, "compression": direct()}
    found = fat_nncf.NNCFConfig.from_dict(settings)
    fat_nncf.register_default_init_args(found, [(torch.randn(4, 8), torch.zeros(4))])
    net = Tied()
    with pytest.raises(QuantizationError, match="inner: operations that are not quantized read this weight too"):
        fat_nncf.create_compressed_model(net, found)
    assert net.inner.weight.requires_grad


def test_sparsity_is_refused():
    compression = [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, direct()]
    with pytest.raises(QuantizationError, match="the grid has no zero, so sparsity cannot be kept"):
        compress(compression)
