"""Deployment to several targets, on the toy host with exporters that only pretend: training, then the commands."""

import json
import sys
from pathlib import Path

import pytest
from fake_exporter import FakeExporter
from typer.testing import CliRunner

from fat_plugins.cli import BAD_INPUT, FAILED, OK, app
from fat_plugins.errors import ConfigError, ExportError
from fat_plugins.recipes import targets as targets_module
from fat_plugins.recipes import train
from fat_plugins.recipes.targets import FORMATS, ONNX, OPENVINO, QONNX, TARGETS, choose


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def names(found):
    return [t.name for t in found]


@pytest.fixture
def exporters(monkeypatch):
    """Fakes in the place of the exporters of QONNX and ONNX, whatever is installed."""
    fakes = {t.name: FakeExporter(".onnx") for t in (QONNX, ONNX)}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, TARGETS[name].module, fake)
    monkeypatch.setattr(targets_module, "find_spec", lambda name: object())
    monkeypatch.setattr(targets_module, "_version", lambda name: "9")
    return fakes


@pytest.fixture
def recipe(load, recipe_text):
    text = recipe_text.replace("epochs: 2", "epochs: 0").replace("epochs: 1", "epochs: 0")
    return load(text.replace("export: null", "export: {format: qonnx, verify_samples: 5}\nbaselines: [fat]"))


@pytest.fixture
def run(toy_host, exporters, recipe, tmp_path):
    train(recipe, tmp_path / "run")
    return tmp_path / "run"


# -- training --------------------------------------------------------------------------------------------------------
def test_every_target_is_exported_executed_and_verified(toy_host, exporters, recipe, tmp_path):
    report = train(recipe, tmp_path / "run")
    assert report.verified
    assert [(r.algorithm, [d.format for d in r.deployments]) for r in report.results] == [
        ("lsq", ["qonnx", "onnx"]), ("fat", ["qonnx", "onnx"]),
    ]  # fmt: skip
    for result in report.results:
        for deployment in result.deployments:
            assert deployment.accuracy == result.accuracy
            assert (tmp_path / "run" / deployment.path).stat().st_size == deployment.file_bytes
            assert all(row.compared == row.elements for row in deployment.layers)
    # the whole test set in as few calls as its loader gives
    assert [shape[0] for shape in exporters["qonnx"].batches] == [256, 256, 27] * 2
    assert report.versions | {"qonnx": "9", "onnx": "9", "onnxruntime": "9"} == report.versions
    markdown = (tmp_path / "run" / "results.md").read_text()
    assert "| accuracy, qonnx | accuracy, ONNX Runtime | weight codes |" in markdown
    assert "* Sizes: weight codes: " in markdown
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [d["path"] for d in written["results"][1]["deployments"]] == [
        "baselines/fat/export/model.onnx", "baselines/fat/export/model_qdq.onnx",
    ]  # fmt: skip


def test_failing_comparison_is_exit_code_1_and_names_the_file(toy_host, exporters, tmp_path, recipe):
    from fat_plugins.recipes import dump_recipe

    write = exporters["onnx"].export

    def tampered(model, path, example, **kwargs):
        report = write(model, path, example, **kwargs)
        codes = json.loads(path.read_text())
        codes["stem.0"][0] += 1
        path.write_text(json.dumps(codes))
        return report

    exporters["onnx"].export = tampered
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    result = call("train", tmp_path / "r.yaml", "--output", tmp_path / "run", "--quiet")
    assert result.exit_code == FAILED
    assert "failed: lsq, seed 3, export/model_qdq.onnx: codes differ first in stem.0" in result.stderr
    assert "failed: fat, seed 3, baselines/fat/export/model_qdq.onnx: codes differ" in result.stderr
    assert "model.onnx" not in result.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verified"] is False


@pytest.mark.parametrize(
    ("formats", "missing", "expected"),
    [
        ("openvino", "openvino", r"openvino is not installed: pip install 'fat-plugins\[openvino\]'"),
        ("qonnx", "qonnx", r"format qonnx: qonnx is not installed: pip install 'fat-plugins\[qonnx\]'"),
        ("qonnx", "onnxruntime", r"format onnx: onnxruntime is not installed: pip install 'fat-plugins\[onnx\]'"),
        ("[openvino, onnx]", "onnx", r"format onnx: onnx is not installed"),
    ],
)
def test_missing_package_is_said_before_training(
    toy_host, load, recipe_text, tmp_path, monkeypatch, formats, missing, expected
):
    monkeypatch.setattr(targets_module, "find_spec", lambda name: None if name == missing else object())
    wanted = load(recipe_text.replace("export: null", f"export: {{format: {formats}}}"))
    with pytest.raises(ExportError, match=expected):
        train(wanted, tmp_path / "run")
    assert toy_host.calls == []
    assert not (tmp_path / "run").exists()


def test_output_of_a_deployed_model_that_does_not_fit_is_one_line(toy_host, exporters, recipe, tmp_path):
    run = exporters["qonnx"].execute
    exporters["qonnx"].execute = lambda path, inputs: [run(path, inputs)[0][:1]]
    with pytest.raises(ExportError, match=r"gives \(1, 10\) for a batch of 256 images"):
        train(recipe, tmp_path / "run")


# -- the commands on a finished run ----------------------------------------------------------------------------------
def test_export_again_writes_what_the_recipe_names(run, exporters):
    before = {p.name: p.read_text() for p in (run / "export").iterdir()}
    assert set(before) == {"model.onnx", "model_qdq.onnx"}
    for path in (run / "export").iterdir():
        path.unlink()
    result = call("export", run)
    assert result.exit_code == OK, result.output
    assert {p.name: p.read_text() for p in (run / "export").iterdir()} == before
    size = (run / "export" / "model.onnx").stat().st_size
    assert f"model.onnx: {size:,} B, for qonnx" in result.stdout.replace("\n", "")
    assert "smaller" not in result.stdout  # such a file is not
    assert result.stderr.splitlines() == ["note: a note"] * 2


def test_export_of_one_format(run):
    result = call("export", run / "baselines" / "fat", "--format", "onnx", "--output", run / "other.onnx")
    assert result.exit_code == OK, result.output
    assert (run / "other.onnx").read_text() == (run / "baselines/fat/export/model_qdq.onnx").read_text()
    assert "for ONNX Runtime" in result.stdout


def test_a_later_failure_leaves_no_half_of_a_file(run, exporters):
    before = {p.name: p.read_bytes() for p in (run / "export").iterdir()}
    exporters["onnx"].fails = True
    result = call("export", run)
    assert result.exit_code == BAD_INPUT
    assert result.stderr.splitlines()[-1].endswith("model_qdq.onnx: the fake refuses")
    assert {p.name: p.read_bytes() for p in (run / "export").iterdir()} == before


def test_verify_compares_every_file_of_the_run(run):
    result = call("verify", run)
    assert (result.exit_code, result.stderr) == (OK, "")
    assert result.stdout.splitlines() == ["model.onnx: equal", "model_qdq.onnx: equal"]
    assert call("verify", run, "--format", "onnx").stdout.splitlines() == ["model_qdq.onnx: equal"]


def test_verify_json_is_one_report_or_one_per_file(run):
    assert json.loads(call("verify", run, "--json", "--format", "onnx").stdout) == {"ok": True, "samples": 5}
    both = json.loads(call("verify", run, "--json", "--samples", 2).stdout)
    assert both == {name: {"ok": True, "samples": 2} for name in ("model.onnx", "model_qdq.onnx")}


def test_verify_says_which_file_differs(run):
    path = run / "export" / "model.onnx"
    codes = json.loads(path.read_text())
    codes["conv2.0"][3] += 1
    path.write_text(json.dumps(codes))
    result = call("verify", run)
    assert result.exit_code == FAILED
    assert result.stdout.splitlines() == ["model.onnx: unequal", "model_qdq.onnx: equal"]
    assert result.stderr == "failed: model.onnx: codes differ first in conv2.0\n"
    assert call("verify", run, "--model", run / "export" / "model_qdq.onnx").exit_code == OK
    alone = call("verify", run, "--model", path)
    assert (alone.exit_code, alone.stderr) == (FAILED, "failed: codes differ first in conv2.0\n")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["export", "--format", "qonx"], "--format: unknown format 'qonx'; allowed: onnx, openvino, qonnx; did you"),
        (["verify", "--model", "x.onnx"], "x.onnx: the suffix fits several formats: add --format; allowed: qonnx, on"),
        (["export", "--output", "x.tflite"], "no format has files that end in '.tflite'; allowed: .onnx, .xml"),
        (["verify", "--model", "export/model.onnx", "--checkpoint", "first"], "--checkpoint: unknown checkpoint"),
        (["verify", "--format", "qonnx", "--model", "none.onnx"], "none.onnx: no such file"),
        (["export", "--format", "qonnx", "--output", "x.xml"], "x.xml: must end in .onnx"),
        (["export", "--format", "qonnx", "--output", "no/x.onnx"], "no such directory"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(run, monkeypatch, args, expected):
    monkeypatch.chdir(run)
    before = sorted(run.rglob("*"))
    result = call(args[0], ".", *args[1:])
    assert (result.exit_code, result.stdout) == (BAD_INPUT, "")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_commands_say_what_is_missing_before_the_model_is_rebuilt(run, toy_host, monkeypatch):
    monkeypatch.setattr(targets_module, "find_spec", lambda name: None if name == "qonnx" else object())
    calls = len(toy_host.calls)
    for command in ("export", "verify"):
        result = call(command, run)
        assert result.exit_code == BAD_INPUT
        assert result.stderr == (
            "error: export.format qonnx: qonnx is not installed: pip install 'fat-plugins[qonnx]'\n"
        )
    assert len(toy_host.calls) == calls
    assert call("verify", run, "--format", "onnx").exit_code == OK


def test_run_without_export_section_goes_to_openvino(toy_host, exporters, load, recipe_text, tmp_path, monkeypatch):
    text = recipe_text.replace("epochs: 2", "epochs: 0").replace("epochs: 1", "epochs: 0")
    train(load(text), tmp_path / "run")
    monkeypatch.setitem(sys.modules, OPENVINO.module, FakeExporter(".xml"))
    result = call("export", tmp_path / "run")
    assert result.exit_code == OK, result.output
    assert (tmp_path / "run" / "export" / "model.xml").is_file()
    assert "weights 10 B, 8.00 times smaller than float32" in result.stdout
    assert call("export", tmp_path / "run", "--format", "qonnx").exit_code == OK
    assert (tmp_path / "run" / "export" / "model.onnx").is_file()


# -- which target a command means ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("formats", "wanted", "path", "expected"),
    [
        (["qonnx"], None, None, ["qonnx", "onnx"]),
        (["qonnx", "onnx"], None, None, ["qonnx", "onnx"]),
        (["qonnx"], "openvino", None, ["openvino"]),
        (["qonnx"], "qonnx", "any.name", ["qonnx"]),
        (["openvino"], "qonnx", None, ["qonnx", "onnx"]),
        (["qonnx"], None, "x.xml", ["openvino"]),
        (["onnx"], None, "model.onnx", ["onnx"]),
        (["openvino", "onnx"], None, "x.onnx", ["onnx"]),
        (["qonnx"], None, "dir/model.onnx", ["qonnx"]),
        (["qonnx"], None, "dir/model_qdq.onnx", ["onnx"]),
        (["openvino"], None, "model_qdq.onnx", ["onnx"]),
    ],
)
def test_which_targets_a_command_means(formats, wanted, path, expected):
    assert names(choose(formats, wanted, Path(path) if path else None)) == expected


@pytest.mark.parametrize("formats", [["openvino"], ["qonnx"]])
def test_an_open_file_name_is_refused(formats):
    with pytest.raises(ConfigError, match="add --format; allowed: qonnx, onnx"):
        choose(formats, None, Path("x.onnx"))


def test_formats_and_targets_belong_together():
    assert all(TARGETS[name].name == name == targets[0] for name, targets in FORMATS.items())
    assert len({t.file for t in TARGETS.values()}) == len(TARGETS)
