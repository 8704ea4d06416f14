"""A full, read-only or vanishing disk: one line, the last good state stays, and the run goes on exactly."""

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import plain_net
import pytest
from cuts import Killed, assert_same_run, cut_at
from disk import failing

from fat_plugins.errors import CheckpointError, ConfigError, FatPluginsError
from fat_plugins.recipes import Options, load_recipe, train
from fat_plugins.recipes.checkpoint import write_atomically
from fat_plugins.recipes.state import StateFile
from fat_plugins.recipes.trainer import Trainer

RECIPE = (
    "name: tiny\n"
    + plain_net.SECTIONS.replace("BATCH", "40").replace("train: 400", "train: 100")
    + """\
compression: {algorithm: lsq, weights: {bits: 4}}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 2
  optimizer: {name: adam, lr: 0.01}
export: null
"""
)
#: the long campaign tries every call, a normal run one of so many
EVERY = 1 if os.environ.get("FAULTS") == "all" else 13
EVERY_STEP = Options(save_steps=1)
GO_ON = Options(resume=True, save_steps=1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return load_recipe(path)


@pytest.fixture
def whole(recipe, tmp_path, toy_host):
    train(recipe, tmp_path / "whole")
    return tmp_path / "whole"


def refused(error, *parts):
    """One line of ours that has these parts."""
    assert isinstance(error.value, FatPluginsError)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# -- one file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failure_at_any_call_leaves_a_good_state(tmp_path, code, for_good):
    with failing() as calls:
        for n in range(3):
            StateFile(tmp_path / "count" / "training.safetensors").save({"n": n})
    assert {"mkstemp", "write", "fsync", "replace", "open"} <= set(calls)
    failed = 0
    for at in range(len(calls)):
        folder = tmp_path / f"{at}"
        file, done = StateFile(folder / "training.safetensors"), -1
        with failing(at, code, for_good), pytest.raises(CheckpointError) as error:
            for n in range(3):
                file.save({"n": n})
                done = n
        refused(error, "cannot write ", os.strerror(code))
        failed += 1
        found, said = StateFile(folder / "training.safetensors").load(pytest.fail), []
        # the last call syncs the directory: the new file is there already
        assert found == ({"n": done} if done >= 0 else None) or found == {"n": done + 1}
        assert not folder.exists() or not list(folder.glob(".*"))
        file.save({"n": "next"})
        assert StateFile(folder / "training.safetensors").load(said.append) == {"n": "next"}
        assert said == []
    assert failed == len(calls) > 15


def test_truncation_at_any_byte_falls_back(tmp_path):
    file = StateFile(tmp_path / "training.safetensors")
    file.save({"n": 0})
    file.save({"n": 1})
    data = file.path.read_bytes()
    for length in range(len(data)):
        file.path.write_bytes(data[:length])
        said = []
        assert file.load(said.append) == {"n": 0}
        assert len(said) == 1
        assert said[0].startswith(f"warning: {file.path}")


def test_damaged_state_does_not_take_the_place_of_the_good_one(tmp_path, monkeypatch):
    file = StateFile(tmp_path / "training.safetensors")
    file.save({"n": 0})
    file.save({"n": 1})
    file.path.write_bytes(b"damaged")
    assert file.load(lambda text: None) == {"n": 0}
    file.save({"n": 2})  # in the place of the damaged one
    file.path.write_bytes(b"damaged again")
    assert StateFile(file.path).load(lambda text: None) == {"n": 0}


def test_state_that_cannot_be_read_falls_back(tmp_path):
    file, said = StateFile(tmp_path / "training.safetensors"), []
    file.save({"n": 0})
    file.save({"n": 1})
    file.path.unlink()
    file.path.mkdir()
    assert file.load(said.append) == {"n": 0}
    assert said == [f"warning: {file.path}: Is a directory; going on from the state before it"]


def test_names_are_synced_up_to_the_directory_that_was_there(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    monkeypatch.setattr("fat_plugins.recipes.checkpoint.os.fsync", fsync)
    path = tmp_path / "a" / "b" / "x"
    write_atomically(path, lambda p: p.write_bytes(b"x"))
    assert [p for p in synced if p.is_dir()] == [path.parent.parent, tmp_path, path.parent]
    assert len(synced) == 4  # and the file itself, under its temporary name


# -- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("for_good", [False, True])
def test_run_on_a_full_disk_goes_on(recipe, whole, tmp_path, for_good):
    with failing() as calls:
        train(recipe, tmp_path / "count", options=EVERY_STEP)
    begun = len(calls)
    for at in range(0, begun, EVERY):
        run = tmp_path / f"run{at}"
        with failing(at, for_good=for_good), pytest.raises(CheckpointError) as error:
            train(recipe, run, options=EVERY_STEP)
        refused(error, "cannot write ", "No space left on device")
        options = GO_ON if (run / "recipe.yaml").exists() else EVERY_STEP
        train(recipe, run, options=options)
        assert_same_run(whole, run)


def at_step(monkeypatch, number, action):
    """Do something before the optimizer step of that number of the whole run."""
    real, steps = Trainer._one_step, []

    def step(self, *args):
        if len(steps) == number:
            action()
        steps.append(self)
        real(self, *args)

    monkeypatch.setattr(Trainer, "_one_step", step)


def test_directory_that_is_taken_away_is_not_made_again(recipe, whole, tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
        at_step(patch, 3, lambda: run.rename(elsewhere))
        train(recipe, run, options=EVERY_STEP)
    refused(error, f"{run}: the directory of the run is gone")
    assert not run.exists()
    elsewhere.rename(run)
    train(recipe, run, options=GO_ON)
    assert_same_run(whole, run)


@pytest.mark.parametrize("name", ["state/training.safetensors", "checkpoint/last.safetensors", "state/run.json"])
def test_file_that_became_a_directory(recipe, whole, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    path = run / name

    def replace():
        path.unlink()
        path.mkdir()

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
        at_step(patch, 5, replace)
        train(recipe, run, options=EVERY_STEP)
    refused(error, f"cannot write {path}: ", "irectory")
    path.rmdir()
    train(recipe, run, options=GO_ON)
    assert_same_run(whole, run)


def test_killed_before_there_was_a_recipe_starts_again(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def killed(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "write_bytes", killed)
        train(recipe, run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [p.name[:13] for p in run.iterdir()] == [".recipe.yaml."]
    train(recipe, run)
    assert_same_run(whole, run)


def test_results_that_are_damaged_fall_back(recipe, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Killed), cut_at(step=5):
        train(recipe, run, options=EVERY_STEP)
    shutil.copy(run / "state" / "run.json", run / "state" / "run.previous.json")
    (run / "state" / "run.json").write_text('{"format": 1}')
    train(recipe, run, options=GO_ON)
    assert_same_run(whole, run)


def test_state_that_a_kill_left_aside_is_cleared(recipe, whole, tmp_path):
    run = tmp_path / "run"
    train(recipe, run)
    (run / ".state.done").mkdir()
    train(recipe, run, options=GO_ON)
    assert_same_run(whole, run)


def test_error_of_the_data_is_not_one_of_the_output(recipe, tmp_path, toy_host, monkeypatch):
    def unreadable():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "image.png")

    at_step(monkeypatch, 2, unreadable)
    with pytest.raises(FileNotFoundError, match=r"image\.png"):
        train(recipe, tmp_path / "run")


# -- replacing a run -------------------------------------------------------------------------------------------------
def test_run_that_cannot_be_replaced_stays(recipe, whole, tmp_path, monkeypatch):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    real = os.replace

    def replace(source, target):
        if Path(target) == whole and ".new-" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("fat_plugins.recipes.directory.os.replace", replace)
    with pytest.raises(ConfigError) as error:
        train(recipe, whole, overwrite=True)
    refused(error, f"output {whole} cannot be replaced: No space left on device; the complete new run is in ")
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    assert_same_run(whole, Path(str(error.value).rsplit(" ", 1)[1]))


def test_run_that_was_moved_aside_is_named(recipe, whole, tmp_path):
    whole.rename(tmp_path / ".whole.old-x1")
    with pytest.raises(ConfigError) as error:
        train(recipe, whole, options=GO_ON)
    refused(error, f"{whole} holds no run", f"or was replaced, is in {tmp_path / '.whole.old-x1'}")


# -- a real small disk -----------------------------------------------------------------------------------------------
@contextmanager
def small_disk(folder, kilobytes):
    """A file system of that size in ``folder``; skips where it cannot be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_really_full(recipe, whole, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 1024) as disk:
        filler = disk / "filler"

        def fill():
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))

        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            at_step(patch, 4, fill)
            train(recipe, disk / "run", options=EVERY_STEP)
        refused(error, f"cannot write {disk / 'run'}", "No space left on device")
        assert not list((disk / "run").rglob(".*.tmp"))
        filler.unlink()
        train(recipe, disk / "run", options=GO_ON)
        assert_same_run(whole, disk / "run")


def test_disk_that_becomes_read_only(recipe, whole, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 4096) as disk:

        def remount(how):
            subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            at_step(patch, 4, lambda: remount("ro"))
            train(recipe, disk / "run", options=EVERY_STEP)
        refused(error, f"cannot write {disk / 'run'}", "Read-only file system")
        with pytest.raises(ConfigError, match="cannot be written to"):
            train(recipe, disk / "other", options=EVERY_STEP)
        remount("rw")
        train(recipe, disk / "run", options=GO_ON)
        assert_same_run(whole, disk / "run")
