"""QONNX and ONNX of a model that NNCF wrapped, on whichever generation is installed. OpenVINO has no part in it."""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import crossgen
import fat_nncf
import onnx as onnx_package

from fat_plugins import ExportError, FatPluginsError
from fat_plugins.export import onnx

QONNX = find_spec("qonnx") is not None


class Residual(nn.Module):
    """A block with a skip connection, a grouped convolution and linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm0(self.stem(x)))
        x = torch.relu(x + self.norm1(self.conv1(x)))
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    """NNCF 2 writes drawings of its graphs into the current folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def compress(algorithm, bits=4, **extra):
    torch.manual_seed(0)
    config = {
        "input_info": {"sample_size": list(crossgen.INPUT_SHAPE)},
        "compression": {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}, **extra},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NNCF's own deprecation notes
        config = fat_nncf.register_default_init_args(fat_nncf.NNCFConfig.from_dict(config), crossgen.loader())
        return fat_nncf.create_compressed_model(Residual(), config)[1]


@pytest.mark.parametrize(("bits", "extra"), [(4, {}), (3, {"params": {"levels": "power_of_two"}})])
def test_onnx(bits, extra, tmp_path):
    model, path, x = compress("fat", bits, **extra), tmp_path / "m.onnx", crossgen.batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = fat_nncf.export_onnx(model, path, x)
    assert [r.name for r in report.layers if r.kind == "weight"] == ["stem", "conv1", "hidden", "fc"]
    verdict = fat_nncf.verify_onnx(model, path, torch.randn(4, 3, 12, 12))
    assert verdict.ok, verdict.detail
    assert len(verdict.weights) == 4 and sum(a.elements for a in verdict.activations) > 0
    wanted = fat_nncf.freeze(model)(x).detach().numpy()
    np.testing.assert_allclose(onnx.execute(path, [x.numpy()])[0], wanted, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_qonnx_is_written_without_qonnx(tmp_path):
    model, path, x = compress("fat"), tmp_path / "m.onnx", crossgen.batch()
    fat_nncf.export_qonnx(model, path, x[:1], dynamic_batch=False)
    nodes = onnx_package.load(str(path)).graph.node
    assert sum(n.op_type == "Quant" and n.output[0].endswith(".weight") for n in nodes) == 4
    assert {n.op_type for n in nodes} <= {
        "Quant", "Conv", "BatchNormalization", "Relu", "Add", "ReduceMean", "MatMul"
    }  # fmt: skip
    if QONNX:
        assert fat_nncf.verify_qonnx(model, path, x[:1]).ok
    else:
        with pytest.raises(ExportError, match="qonnx is not installed"):
            fat_nncf.verify_qonnx(model, path, x[:1])


def test_a_model_trained_on_is_not_the_exported_one(tmp_path):
    model = compress("fat")
    fat_nncf.export_onnx(model, tmp_path / "m.onnx", crossgen.batch())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("conv1.weight")).neg_()
    report = fat_nncf.verify_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 12, 12))
    assert report.first_difference == "conv1"


def test_errors(tmp_path):
    with pytest.raises(FatPluginsError):
        fat_nncf.export_onnx(Residual(), tmp_path / "m.onnx", crossgen.batch())
    with pytest.raises(ExportError, match=r"ends in \.onnx"):
        fat_nncf.export_qonnx(compress("fat"), tmp_path / "m.xml", crossgen.batch())
    assert list(tmp_path.iterdir()) == []
