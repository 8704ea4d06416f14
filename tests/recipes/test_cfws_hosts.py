"""CFWS on the installed hosts: coarse parts stay on their grids, sums are quantized once, exports are exact."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch import nn

from fat_plugins import named_quantizers, rewrite
from fat_plugins.placed import float_weights
from fat_plugins.recipes import load_recipe, load_run, train
from fat_plugins.recipes.hosts import get_host
from fat_plugins.recipes.nets_repvgg import RepVGG
from fat_plugins.recipes.trainer import evaluate

pytestmark = pytest.mark.filterwarnings("ignore")  # of the hosts and torch about each other
SUMS = r"{re}CoarseFine\[\w+\]/(__add__|add)"


def installed(name):
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


HOSTS = [h for h in ("nncf", "brevitas") if installed(h)]


def split_net(bits):
    torch.manual_seed(0)
    net = RepVGG(3, 5, 8, 1)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)):
        conv.weight.data /= 20
    example = torch.randn(1, 3, 16, 16)
    _, report = rewrite(net.eval(), ["reparameterize", {"name": "cfws", "params": {"bits": bits}}], example)
    assert len(report.changed) == 3
    return net, example


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("host", HOSTS)
def test_coarse_weights_are_kept_and_sums_are_quantized_once(host, bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # NNCF 2 writes its graphs to the current folder
    net, example = split_net(bits)
    coarse = [m.weight.detach().clone() for n, m in net.named_modules() if n.endswith("coarse")]
    batches = [(torch.randn(8, 3, 16, 16), torch.zeros(8)) for _ in range(2)]
    section = {
        "algorithm": "cfws",
        "weights": {"bits": bits, "per_channel": True},
        "activations": {"bits": 8, "ignored_scopes": [SUMS]},
        "first_layer": "same",
        "last_layer": "same",
    }
    loader = torch.utils.data.DataLoader(list(zip(*[torch.cat(t) for t in zip(*batches, strict=True)], strict=True)), 8)
    _, model = get_host(host).compress(net, {"compression": section}, loader, example)
    model.eval()
    found = {q.spec.name: (q, w) for q, w in float_weights(model).items() if "coarse" in q.spec.name}
    assert len(found) == len(coarse) == 3
    for (quantizer, weight), before in zip(found.values(), coarse, strict=True):
        assert torch.equal(weight, before) and torch.equal(quantizer(weight), before)
        assert int(quantizer.freeze(weight).codes.abs().max()) == 2 ** (bits - 1) - 1
    # one in front of each pair of convolutions, the pooling and the head; none between the pairs and their sums
    activations = [q for _, q in named_quantizers(model) if q.role == "activation"]
    assert len(activations) == 3 + 2 and all(q.calibrated for q in activations)


@pytest.mark.parametrize("host,formats", [("nncf", ["openvino", "onnx"]), ("brevitas", ["qonnx", "onnx"])])
def test_the_shipped_recipe_is_exported_exactly_and_read_again(host, formats, tmp_path, monkeypatch):
    if host not in HOSTS:
        pytest.skip(f"{host} is not installed")
    monkeypatch.chdir(tmp_path)
    split = "rewrites=[reparameterize, {name: cfws, params: {threshold: 0}}]"
    settings = [split, f"host={host}", f"export.format=[{', '.join(formats)}]", "export.verify_samples=8", "seeds=[0]"]
    recipe = load_recipe("digits_cfws_w8a8", [*settings, "model.params={width: 4, blocks: 1}", "pretrain.epochs=2"])
    report = train(recipe, tmp_path / "run")
    own, plain = report.results
    assert (own.algorithm, plain.algorithm) == ("cfws", "minmax")
    for result in report.results:
        assert [d.format for d in result.deployments] == formats
        assert all(d.verified and d.accuracy == pytest.approx(result.accuracy, abs=0.01) for d in result.deployments)
    layers = [row.name for row in own.deployments[0].layers if row.kind == "weight"]
    assert any("coarse" in name for name in layers) and len(layers) > 4
    assert not any("coarse" in row.name for row in plain.deployments[0].layers)
    loaded = load_run(tmp_path / "run")
    assert any(name.endswith("coarse") for name, _ in loaded.model.named_modules())
    assert evaluate(loaded.model, loaded.data.test_loader())[1] == own.accuracy
