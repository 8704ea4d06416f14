"""The command line without a host: help, exit codes, one line per error."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fat_plugins import __version__, algorithms, penalties
from fat_plugins.cli import BAD_INPUT, FAILED, OK, app
from fat_plugins.errors import HostError
from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.report import RunReport, VariantResult

COMMANDS = (
    "algorithms",
    "rewrites",
    "penalties",
    "train",
    "export",
    "verify",
    "report",
    "summary",
    "demo",
    "convert",
)


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})


def test_help_names_every_command():
    result = call("--help")
    assert result.exit_code == OK
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = call(command, "--help")
    assert result.exit_code == OK
    assert "Usage:" in result.output
    assert len(result.output.splitlines()) > 8


def test_no_arguments_shows_help():
    result = call()
    assert "Usage:" in result.output
    assert result.exit_code == BAD_INPUT


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout.strip()) == (OK, f"fat-plugins {__version__}")


def test_algorithms_table_lists_all():
    result = call("algorithms")
    assert result.exit_code == OK
    for name, algorithm in algorithms().items():
        assert name in result.stdout
        assert algorithm.arxiv in result.stdout
    assert "2102.07444" in result.stdout
    assert "2 to 8 bit" in result.stdout


def test_rewrites_are_listed():
    from fat_plugins import rewrites

    rows = json.loads(call("rewrites", "--json").stdout)
    assert [r["name"] for r in rows] == list(rewrites()) and "cfws" in rewrites()
    table = call("rewrites").stdout
    assert all(r["name"] in table and r["arxiv"] in table for r in rows)


def test_algorithms_json():
    rows = json.loads(call("algorithms", "--json").stdout)
    assert [r["name"] for r in rows] == list(algorithms())
    fat = next(r for r in rows if r["name"] == "fat")
    assert fat["arxiv"] == "2102.07444"
    assert fat["weight_bits"] == [2, 8]
    assert fat["fidelity"].startswith("B")


def test_penalties_are_listed():
    assert "gradient_l1" in call("penalties").stdout
    rows = json.loads(call("penalties", "--json").stdout)
    assert [(r["name"], r["arxiv"]) for r in rows] == [(n, p.arxiv) for n, p in penalties().items()]


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "digits_fat_w4a"], "error: no recipe file 'digits_fat_w4a'"),
        (["train", "."], "error: recipe '.' is a directory"),
        (["export", "nowhere"], "error: "),
        (["verify", "nowhere"], "error: "),
        (["summary", "nowhere"], "error: no run directory nowhere"),
        (["demo", "--seed", "1", "--seed", "1"], "error: --seed: [1, 1] repeat each other"),
    ],
)
def test_bad_input_is_one_line_and_code_2(args, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*args)
    assert result.exit_code == BAD_INPUT
    assert result.stdout == ""
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [["train"], ["nonsense"], ["train", "x", "--epochs", "-1"], ["train", "x", "--epochs", "many"]]
)
def test_usage_errors_are_code_2(args):
    assert call(*args).exit_code == BAD_INPUT


def test_unknown_checkpoint_name(tmp_path):
    result = call("verify", tmp_path, "--checkpoint", "lst")
    assert result.exit_code == BAD_INPUT
    assert "allowed: last, best" in result.stderr


def test_debug_shows_where(tmp_path):
    result = call("--debug", "train", tmp_path / "none.yaml")
    assert result.exit_code == BAD_INPUT
    assert "Traceback" in result.stderr
    assert "error: no recipe file" in result.stderr


def test_recipe_error_keeps_file_line_and_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodle: {name: digits_cnn}\n")
    result = call("train", path)
    assert result.exit_code == BAD_INPUT
    assert f"error: {path}:2: modle: unknown key" in result.stderr
    assert "did you mean 'model'?" in result.stderr


def test_missing_host_is_one_line(monkeypatch, tmp_path):
    def missing(name):
        raise HostError("fat_nncf needs NNCF: pip install 'fat-plugins[nncf]'")

    monkeypatch.setattr("fat_plugins.recipes.run.get_host", missing)
    result = call("demo", "--output", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (BAD_INPUT, "")
    assert result.stderr == "error: fat_nncf needs NNCF: pip install 'fat-plugins[nncf]'\n"
    assert not (tmp_path / "run").exists()


# -- options and the failing check -----------------------------------------------------------------------------------
def report(verified):
    rows = [LayerRow("conv1", "weight", "uniform", 4, "i4", 10, "brgconv_I8", "int8", 20, 0 if verified else 3, 1)]
    first = None if verified else "conv1"
    deployment = Deployment("export/model.xml", 0.75, 100, 800, rows, verified, first)
    result = VariantResult("fat", 7, False, 0.5, 0.875, [deployment])
    return RunReport("x", {"Data": "some [data]"}, {"fat": "FAT W4A4"}, [result])


@pytest.fixture
def runs(monkeypatch):
    """Replaces training; remembers the recipes that it was given."""
    seen = []

    def fake(recipe, directory, *, overwrite, reporter, options, world, interrupts):
        seen.append((recipe, directory, overwrite, reporter.quiet))
        return report(fake.verified)

    fake.verified = True
    fake.seen = seen
    monkeypatch.setattr("fat_plugins.cli_train.run", fake)
    return fake


def test_options_reach_the_run(runs, tmp_path):
    args = ["--epochs", 3, "--pretrain-epochs", 4, "--seed", 7, "--seed", 9, "--overwrite", "-q"]
    assert call("train", "digits_fat_w4a4", "-o", tmp_path / "r", *args).exit_code == OK
    recipe, directory, overwrite, quiet = runs.seen[0]
    assert (recipe.training.epochs, recipe.pretrain.epochs, recipe.seeds) == (3, 4, [7, 9])
    assert (directory, overwrite, quiet) == (tmp_path / "r", True, True)


def test_default_directories(runs):
    assert call("train", "digits_fat_w4a4").exit_code == OK
    assert call("demo").exit_code == OK
    assert [str(s[1]) for s in runs.seen] == ["runs/digits_fat_w4a4", "runs/demo"]


def test_results_are_printed(runs):
    out = call("train", "digits_fat_w4a4").stdout
    for part in ("FAT W4A4", "87.50%", "50.00%", "75.00%", "100 B", "800 B", "8.00", "conv1", "int8", "brgconv_I8"):
        assert part in out
    assert "Data: some [data]" in out


def test_failed_check_is_code_1_and_names_the_layer(runs):
    runs.verified = False
    result = call("train", "digits_fat_w4a4")
    assert result.exit_code == FAILED
    assert "failed: fat, seed 7, export/model.xml: codes differ first in conv1" in result.stderr


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "fat_plugins", "train", "no_such_recipe"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.startswith("error: no recipe file 'no_such_recipe'")
    assert "Traceback" not in done.stderr


def test_core_imports_no_host():
    code = "import sys, fat_plugins.cli, fat_plugins.recipes; sys.exit(any(m in sys.modules for m in %r))"
    hosts = ("nncf", "brevitas", "openvino", "onnx", "qonnx", "onnxruntime", "sklearn", "torchvision")
    assert subprocess.run([sys.executable, "-c", code % (hosts,)], timeout=120).returncode == 0


@pytest.mark.parametrize(("world", "ends"), [("1", "freed\n"), ("2", "")])
def test_one_of_several_processes_that_fails_frees_nothing(world, ends):
    """Connections to a process that is lost would be closed then, and that can take hours."""
    code = "import atexit; atexit.register(print, 'freed')\nfrom fat_plugins.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, "recipe", "--no-such-option"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "WORLD_SIZE": world},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ends
    assert "no-such" in done.stderr or "No such" in done.stderr
