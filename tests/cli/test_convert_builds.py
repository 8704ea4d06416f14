"""Converted configs build and train a model on the NNCF that is installed."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from nncf2_configs import CONFIGS, NNCF2_ONLY, Net

from fat_plugins.convert import convert

try:
    GENERATION = int(version("nncf").split(".")[0])
except PackageNotFoundError:
    GENERATION = None
pytestmark = pytest.mark.skipif(GENERATION is None, reason="needs NNCF")


def build(config):
    import fat_nncf

    from fat_plugins.network import named_quantizers

    data = [(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)) for _ in range(4)]
    loader = torch.utils.data.DataLoader([(x, y) for xs, ys in data for x, y in zip(xs, ys, strict=True)], batch_size=2)
    config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), loader)
    ctrl, model = fat_nncf.create_compressed_model(Net(), config)
    loss = model(data[0][0]).square().sum() + ctrl.loss()
    loss.backward()
    return dict(named_quantizers(model))


@pytest.mark.parametrize("name", CONFIGS | NNCF2_ONLY)
@pytest.mark.parametrize("algorithm", ["fat", "lsq"])
def test_converted_config_builds_a_model(name, algorithm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # NNCF 2 leaves drawings of its graphs
    torch.manual_seed(0)
    old = (CONFIGS | NNCF2_ONLY)[name]
    quantizers = build(convert(old, algorithm, nncf=GENERATION).config)
    assert quantizers
    if name == "manual precision":
        widths = {q.spec.name: q.spec.bits for q in quantizers.values() if q.spec.role == "weight"}
        assert [b for n, b in widths.items() if "conv1" in n] == [8]
        assert [b for n, b in widths.items() if "conv2" in n or "fc" in n] == [4, 4]


@pytest.mark.skipif(GENERATION != 3, reason="NNCF 3 refuses them")
@pytest.mark.parametrize("name", NNCF2_ONLY)
def test_what_is_marked_for_nncf2_only_is_refused_on_nncf3(name):
    with pytest.raises(ValueError, match="NNCF 3"):
        build(convert(NNCF2_ONLY[name]).config)
