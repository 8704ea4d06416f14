"""The command line under SIGKILL, Ctrl-C and SIGTERM; its logs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import plain_net
import pytest
from cuts import assert_same_run
from typer.testing import CliRunner

from fat_plugins.cli import BAD_INPUT, OK, app
from fat_plugins.recipes.trainer import Trainer

RECIPE = (
    "name: tiny\n"
    + plain_net.SECTIONS.replace("BATCH", "100")
    + """\
compression: {algorithm: dropbits, weights: {bits: 4}}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 3
  optimizer: {name: adam, lr: 0.01}
export: null
"""
)
TIMEOUT = 300


@pytest.fixture
def folder(tmp_path, monkeypatch, toy_host):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def call(*args):
    return CliRunner().invoke(app, ["train", *map(str, args)], catch_exceptions=False)


def events_of(log):
    return [json.loads(line) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []


def began(log):
    """Whether the second epoch of fine-tuning has begun."""
    return any(e["event"] == "epoch" and e["variant"] == "dropbits" for e in events_of(log))


def slow_process_in_training(*args):
    """A process amid the second epoch of fine-tuning."""
    program = [sys.executable, str(Path(__file__).parent / "own_cli.py"), "train", "recipe.yaml", *map(str, args)]
    process = subprocess.Popen(
        [*program, "--log-json", "slow.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OWN_CLI": "toy slow"},
    )
    end = time.monotonic() + TIMEOUT
    while not began("slow.jsonl"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.15)
    return process


def test_killed_run_goes_on_exactly(folder):
    process = slow_process_in_training("-o", "run", "--save-every", 1, "-q")
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert list(Path("run/state").glob("training*.safetensors"))  # the newest may be on its way
    assert call("recipe.yaml", "-o", "run", "--resume").exit_code == OK
    assert call("recipe.yaml", "-o", "whole").exit_code == OK
    assert_same_run(folder / "whole", folder / "run")


def test_ctrl_c_says_how_to_go_on(folder):
    process = slow_process_in_training("-o", "run", "-q")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (130, "")
    run = (folder / "run").resolve()
    assert err == f"interrupted: go on with: fat-plugins train --resume --output {run}\n"
    assert (events_of("slow.jsonl")[-1]["event"], events_of("slow.jsonl")[-1]["status"]) == ("end", "interrupted")
    assert call("--resume", "--output", run).exit_code == OK
    assert call("recipe.yaml", "-o", "whole").exit_code == OK
    assert_same_run(folder / "whole", run)


@pytest.mark.parametrize("where", ["_one_step", "_end_epoch"])
def test_sigterm_amid_steps_and_amid_an_evaluation(folder, monkeypatch, where):
    assert call("recipe.yaml", "-o", "whole").exit_code == OK
    real, calls = getattr(Trainer, where), []

    def stopped(self, *args):
        calls.append(self)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, stopped)
        result = call("recipe.yaml", "-o", "run", "--max-steps", 99)
    assert signal.getsignal(signal.SIGTERM) == before
    assert result.exit_code == 143
    assert len(calls) == 3
    assert result.stderr.endswith(f"train --resume --output {folder.resolve() / 'run'} --max-steps 99\n")
    assert call("--resume", "-o", "run", "--max-steps", 99).exit_code == OK
    assert_same_run(folder / "whole", folder / "run")


def test_second_signal_does_not_wait_and_saves_nothing(folder, monkeypatch):
    def twice(self, *args):
        self.model.head.weight.data.fill_(float("nan"))  # amid a step, the model is in disorder
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", twice)
        assert call("recipe.yaml", "-o", "run").exit_code == 130
    assert not Path("run/state/training.safetensors").exists()
    assert call("--resume", "-o", "run").exit_code == OK


# -- logs ------------------------------------------------------------------------------------------------------------
def test_json_lines_hold_every_epoch(folder):
    assert call("recipe.yaml", "-o", "run", "--log-json", "deep/log.jsonl", "-q").exit_code == OK
    events = events_of("deep/log.jsonl")
    assert [e["event"] for e in events] == [
        "start", "stage", "epoch", "before_training", "stage", "epoch", "epoch", "epoch", "result", "end",
    ]  # fmt: skip
    metrics = json.loads(Path("run/metrics.json").read_text())
    (stage,) = metrics["quantized"]["stages"]
    logged = [e for e in events if e["event"] == "epoch" and e["variant"] == "dropbits"]
    for entry, record in zip(logged, stage["epochs"], strict=True):
        assert entry.items() >= record.items()
        assert (entry["seed"], entry["stage"], entry["epochs"]) == (3, 0, 3)
    assert events[3].items() >= stage["before_training"].items()
    assert events[-2]["test_accuracy"] == metrics["quantized"]["test_accuracy"]
    assert events[-1]["status"] == "complete"
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)


def test_log_of_a_failure_ends_with_it(folder, monkeypatch):
    patched = SimpleNamespace(**{**vars(math), "isfinite": lambda value: False})
    monkeypatch.setattr("fat_plugins.recipes.trainer.math", patched)  # others read numbers with it
    result = call("recipe.yaml", "-o", "run", "--log-json", "log.jsonl")
    assert result.exit_code == BAD_INPUT
    assert (events_of("log.jsonl")[-1]["event"], events_of("log.jsonl")[-1]["status"]) == ("end", "failed")


def test_log_that_cannot_be_written_is_found_before_training(folder):
    result = call("recipe.yaml", "-o", "run", "--log-json", folder)
    assert result.exit_code == BAD_INPUT
    assert result.stderr.startswith(f"error: --log-json {folder}: ")
    assert not Path("run").exists()


def test_tensorboard_that_is_not_installed_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = call("recipe.yaml", "-o", "run", "--tensorboard", "board")
    assert result.exit_code == BAD_INPUT
    assert result.stderr == "error: --tensorboard: TensorBoard is not installed: pip install tensorboard\n"
    assert not Path("run").exists()


def test_tensorboard_gets_curves(folder, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, directory):
            self.directory = directory

        def add_scalar(self, name, value, epoch):
            seen.append((self.directory, name, epoch))

        def flush(self):
            pass

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("stand_in"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    assert call("recipe.yaml", "-o", "run", "--tensorboard", "board", "-q").exit_code == OK
    assert ("board", "dropbits/accuracy/validation", 3) in seen
    assert ("board", "float/loss/train", 1) in seen
    assert seen[-1] == "closed"


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: train: which recipe? RECIPE may be left out only with --resume and --output"),
        (["--resume"], "error: train: which recipe?"),
        (["--resume", "-o", "nothing"], "error: --resume: nothing holds no run (no recipe.yaml)"),
        (["recipe.yaml", "--device", "tpu"], "error: --device: unknown device 'tpu'; allowed: auto, cpu, cuda"),
    ],
)
def test_bad_options_are_one_line(folder, args, message):
    result = call(*args)
    assert result.exit_code == BAD_INPUT
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["recipe.yaml"]


def test_cuda_that_is_not_there_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call("recipe.yaml", "--device", "cuda")
    assert (result.exit_code, result.stderr.count("\n")) == (BAD_INPUT, 1)
    assert "finds no CUDA device" in result.stderr
