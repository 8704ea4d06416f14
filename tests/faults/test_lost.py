"""Processes that are lost: one that reads images, one of several that train."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuts import assert_same_run
from scenarios import OWN_DATA, OWN_DATA_MODULE, installed, recipe
from test_disk import EVERY_STEP, GO_ON, at_step, refused

from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes import load_recipe, train
from fat_plugins.recipes.imports import allow

HERE = Path(__file__).parent


@pytest.fixture(params=[False, True], ids=["", "with a lock"])
def dies_with_a_lock(request, monkeypatch):
    """A reader spends its time where it holds the lock of torch's event, if it has one, and dies there."""
    ours = os.getpid()

    def is_set(self):
        with self._cond:
            if os.getpid() != ours:
                time.sleep(0.05)
            return self._flag.get_value() > 0

    if request.param:
        monkeypatch.setattr("multiprocessing.synchronize.Event.is_set", is_set)


@pytest.mark.usefixtures("dies_with_a_lock")
@pytest.mark.parametrize("step", [1, 8])
def test_lost_reader_of_images_is_one_line(tmp_path, toy_host, monkeypatch, step):
    (tmp_path / "own_data.py").write_text(OWN_DATA_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    allow("own_data")
    (tmp_path / "recipe.yaml").write_text(recipe("{algorithm: lsq}", data=OWN_DATA))
    own = load_recipe(tmp_path / "recipe.yaml")
    train(own, tmp_path / "whole")
    multiprocessing.active_children()  # collects those that have ended

    def kill():
        readers = multiprocessing.active_children()  # in the second epoch also that of the evaluation
        assert readers
        for reader in readers:
            os.kill(reader.pid, signal.SIGKILL)
            reader.join()

    with monkeypatch.context() as patch, pytest.raises(FatPluginsError) as error:
        at_step(patch, step, kill)
        train(own, tmp_path / "run", options=EVERY_STEP)
    refused(error, "data: a process that reads images is lost (DataLoader worker (pid", "go on with --resume")
    train(own, tmp_path / "run", options=GO_ON)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.skipif(not installed("nncf"), reason="NNCF is not installed")
def test_lost_process_ends_the_other_and_both_go_on():
    done = subprocess.run(
        [sys.executable, str(HERE / "processes.py"), "--runs", "1"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal 1" in done.stdout.splitlines()[-1]
