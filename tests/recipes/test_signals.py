"""The command line under SIGKILL, Ctrl-C and SIGTERM, in a process of its own; and its logs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuts import assert_same_run

RECIPE = """\
name: tiny
seeds: [3]
threads: 1
model: {name: plain}
data: {name: digits, batch_size: 256}
compression: {algorithm: dropbits, weights: {bits: 4}}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 3
  optimizer: {name: adam, lr: 0.01}
export: null
"""
TIMEOUT = 120


def start(folder, *args, words="toy"):
    program = [sys.executable, str(Path(__file__).parent / "own_cli.py"), "train", *map(str, args)]
    environment = {**os.environ, "OWN_CLI": words, "COLUMNS": "200"}
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def finish(process):
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def wait_for(condition, process):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def epochs_of(log):
    """Variant and number of every epoch that a log tells of."""
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(e["variant"], e["epoch"]) for e in events if e["event"] == "epoch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "recipe.yaml").write_text(RECIPE)
    code, _, err = finish(start(folder, "recipe.yaml", "-o", "whole", "--log-json", "whole.jsonl"))
    assert code == 0, err
    return folder


def test_killed_run_goes_on_exactly(folder):
    log = folder / "killed.jsonl"
    process = start(folder, "recipe.yaml", "-o", "killed", "--save-every", 1, "--log-json", log, "-q", words="toy slow")
    wait_for(lambda: ("dropbits", 0) in epochs_of(log), process)
    time.sleep(0.15)  # into a step of the next epoch
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert (folder / "killed" / "state" / "training.safetensors").exists()
    code, _, err = finish(start(folder, "recipe.yaml", "-o", "killed", "--resume", "--log-json", log))
    assert (code, "Traceback" in err) == (0, False)
    assert_same_run(folder / "whole", folder / "killed")
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("start") == 2
    assert events[-1] == "end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_go_on(folder, number):
    name = number.name
    log = folder / f"{name}.jsonl"
    process = start(folder, "recipe.yaml", "-o", name, "--log-json", log, "-q", words="toy slow")
    wait_for(lambda: ("dropbits", 0) in epochs_of(log), process)
    time.sleep(0.15)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (128 + number, "")
    run = (folder / name).resolve()
    assert err == f"interrupted: go on with: fat-plugins train --resume --output {run}\n"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["status"]) == ("end", "interrupted")
    code, _, err = finish(start(folder, "--resume", "--output", run))
    assert code == 0, err
    assert_same_run(folder / "whole", run)


def test_json_lines_hold_every_epoch(folder):
    events = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == [
        "start", "stage", "epoch", "before_training", "stage", "epoch", "epoch", "epoch", "result", "end",
    ]  # fmt: skip
    metrics = json.loads((folder / "whole" / "metrics.json").read_text())
    (stage,) = metrics["quantized"]["stages"]
    logged = [e for e in events if e["event"] == "epoch" and e["variant"] == "dropbits"]
    for entry, record in zip(logged, stage["epochs"], strict=True):
        assert entry.items() >= record.items()
        assert (entry["seed"], entry["stage"], entry["epochs"]) == (3, 0, 3)
    assert events[-2]["test_accuracy"] == metrics["quantized"]["test_accuracy"]
    assert events[-1]["status"] == "complete"
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
