"""The command line on Brevitas: train, export to QONNX and ONNX, run in qonnx and ONNX Runtime, verify."""

import json
import os
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from fat_plugins.cli import FAILED, OK, app

# an environment that is meant for Brevitas must have all that its recipe needs: nothing is skipped there
_MEANT = "brevitas" in os.environ.get("FAT_PLUGINS_TEST_HOST", "")
_NEEDED = ("brevitas", "onnx", "qonnx", "onnxruntime")
pytestmark = pytest.mark.skipif(
    not _MEANT and any(find_spec(name) is None for name in _NEEDED), reason=f"needs {', '.join(_NEEDED)}"
)

RECIPE = """\
name: tiny
seeds: [1]
model: {name: digits_cnn, params: {width: 8}}
data: {name: digits, batch_size: 128}
host: brevitas
compression:
  algorithm: fat
  weights: {bits: 4}
  activations: {bits: 4}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 1
  optimizer: {name: sgd, lr: 0.02}
export: {format: qonnx, verify_samples: 4}
baselines: [lsq]
"""


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(RECIPE)
    result = call("train", folder / "recipe.yaml", "--output", folder / "run", "--quiet")
    assert result.exit_code == OK, result.output
    assert "FAT W4A4" in result.stdout
    assert "LSQ W4A4" in result.stdout
    return folder / "run"


def test_report_holds_both_runtimes(run):
    report = json.loads((run / "report.json").read_text())
    assert report["verified"] is True
    assert {"brevitas", "qonnx", "onnx", "onnxruntime"} <= set(report["versions"])
    assert [r["algorithm"] for r in report["results"]] == ["fat", "lsq"]
    for result in report["results"]:
        assert [d["format"] for d in result["deployments"]] == ["qonnx", "onnx"]
        for deployment in result["deployments"]:
            # end to end a tie may flip one answer of the 539
            assert abs(deployment["accuracy"] - result["accuracy"]) < 0.01
            assert (run / deployment["path"]).is_file()
            weights = [row for row in deployment["layers"] if row["kind"] == "weight"]
            assert [row["bits"] for row in weights] == [8, 4, 4, 4, 4, 4, 8]
            assert deployment["code_bytes"] * 8 == sum(row["bits"] * row["elements"] for row in weights)
            assert all(row["compared"] > 0 and row["differences"] == 0 for row in deployment["layers"])
            assert len(deployment["layers"]) >= 2 * len(weights)
    assert "| accuracy, qonnx | accuracy, ONNX Runtime |" in (run / "results.md").read_text()


@pytest.mark.parametrize("part", [".", "baselines/lsq"])
def test_verify_accepts_what_was_exported(run, part):
    result = call("verify", run / part, "--samples", 2)
    assert result.exit_code == OK, result.output
    assert result.stdout.count("equal") == 2


def test_export_again_is_verified_by_its_own_codes(run, tmp_path):
    for format in ("qonnx", "onnx"):
        path = tmp_path / f"{format}.onnx"
        result = call("export", run, "--format", format, "--output", path)
        assert result.exit_code == OK, result.output
        assert call("verify", run, "--format", format, "--model", path, "--samples", 2).exit_code == OK
        # the weights of another algorithm
        wrong = call("verify", run / "baselines" / "lsq", "--format", format, "--model", path, "--samples", 2)
        assert wrong.exit_code == FAILED
        assert "codes differ first in" in wrong.stderr


def test_report_summary_and_comparison(run, tmp_path):
    pytest.importorskip("matplotlib", reason="an optional package of reports")
    from fat_plugins import compare
    from fat_plugins.recipes import checkpoint_path, load_checkpoint, load_run

    result = call("report", run, "-o", tmp_path / "r.html")
    assert result.exit_code == OK, result.output
    data = json.loads((tmp_path / "r_data.json").read_text())
    assert data["missing"] == []
    layers = {t["name"]: t for t in data["tensors"] if t["kind"] == "weight"}
    names = ["stem.0", "conv1.0", "depthwise.0", "pointwise.0", "conv2.0", "conv3.0", "head"]
    assert list(layers) == names
    assert [(t["bits"], t["input_bits"]) for t in layers.values()] == [(8, 8), *[(4, 4)] * 5, (8, 8)]
    assert all(t["kernel"] is None and t["sqnr_db"] > 10 for t in layers.values())
    assert {t["input"] for t in layers.values()} <= {t["name"] for t in data["tensors"]}
    assert [c["runtime"] for c in data["checks"]] == ["qonnx", "ONNX Runtime"]
    rows = json.loads(call("summary", run, "--json").stdout)["layers"]
    assert {r["name"]: r["bytes"] for r in rows if r["role"] == "weight"} == {n: t["bytes"] for n, t in layers.items()}

    loaded = load_run(run)
    model = loaded.recipe.model.build(loaded.data)
    model.load_state_dict(load_checkpoint(checkpoint_path(run, "float")).state)
    images = loaded.data.test.tensors[0][:16]
    assert [row.name for row in compare(model, loaded.model, images).layers] == names
    same = compare(loaded.model, loaded.host.freeze(loaded.model), images)
    assert [row.name for row in same.layers] == names
    assert same.output.sqnr_db > 60
