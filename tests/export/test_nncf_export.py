"""Export and verification of a model that NNCF wrapped, on whichever generation is installed."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")
pytest.importorskip("nncf")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import crossgen
import fat_nncf
from fat_nncf.export import export_openvino, verify_openvino

from fat_plugins import ExportError, FatPluginsError
from fat_plugins.export import _ov
from fat_plugins.export.openvino import kernels


class Residual(nn.Module):
    """A block with a skip connection, a grouped convolution and a hidden linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16)
        self.hidden, self.fc = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        x = torch.relu(x + y)
        x = nn.functional.max_pool2d(x, 2).mean((2, 3))
        return self.fc(torch.relu(self.hidden(x)))


LAYERS = ["stem", "conv1", "conv2", "hidden", "fc"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    """NNCF 2 writes drawings of its graphs into the current folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def compress(algorithm, bits, **extra):
    torch.manual_seed(0)
    model = Residual()
    config = {
        "input_info": {"sample_size": list(crossgen.INPUT_SHAPE)},
        "compression": {
            "algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}, **extra
        },
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NNCF's own deprecation notes
        config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), crossgen.loader())
        _, model = fat_nncf.create_compressed_model(model, config)
    return model


def write(model, path, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*this OpenVINO writes no.*")
        return export_openvino(model, path, x)


@pytest.mark.parametrize(("algorithm", "bits"), [("fat", 4), ("lsq", 2)])
def test_compressed_model(algorithm, bits, tmp_path):
    model = compress(algorithm, bits)
    before = copy.deepcopy(model.state_dict())
    training = model.training
    report = write(model, tmp_path / "m.xml", crossgen.batch())
    assert [r.name for r in report.layers if r.kind == "weight"] == LAYERS
    assert [r.bits for r in report.layers if r.kind == "weight"] == [8, bits, bits, bits, 8]
    assert {k.name: k.speed for k in kernels(tmp_path / "m.xml")} == dict.fromkeys(LAYERS, "int8")
    types = [n.get_type_name() for n in _ov.openvino().Core().read_model(str(tmp_path / "m.xml")).get_ops()]
    assert "BatchNormInference" not in types
    result = verify_openvino(model, tmp_path / "m.xml", torch.randn(8, 3, 12, 12))
    assert result.ok, result.detail
    assert sum(a.elements for a in result.activations) > 8 * 4 * 16 * 144
    # the user's model is left as it was
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.training == training


def test_a_model_trained_on_is_not_the_exported_one(tmp_path):
    model = compress("fat", 4)
    write(model, tmp_path / "m.xml", crossgen.batch())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("conv1.weight")).neg_()
    report = verify_openvino(model, tmp_path / "m.xml", torch.randn(2, 3, 12, 12))
    assert report.first_difference == "conv1"


def test_errors(tmp_path):
    with pytest.raises(FatPluginsError):
        export_openvino(Residual(), tmp_path / "m.xml", crossgen.batch())
    with pytest.raises(ExportError, match=r"ends in \.xml"):
        export_openvino(compress("fat", 4), tmp_path / "m.onnx", crossgen.batch())
    assert list(tmp_path.iterdir()) == []
