"""Checkpoints: complete, written at once, and refused by another model."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fat_plugins.errors import CheckpointError
from fat_plugins.recipes import checkpoint as module
from fat_plugins.recipes.checkpoint import (
    Checkpoint,
    cpu_state,
    load_checkpoint,
    load_fitting,
    load_state,
    save_checkpoint,
    write_json,
)


def net(features=4, norm=True):
    return nn.Sequential(nn.Linear(3, features), *([nn.BatchNorm1d(features)] if norm else []))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint" / "last.safetensors"
    checkpoint = Checkpoint(
        cpu_state(net()),
        config={"compression": {"algorithm": "fat"}},
        compression_state={"a": [1, {"b": None}]},
        recipe={"name": "é"},
        progress={"epoch": 3},
        metrics={"loss": 0.1},
    )
    save_checkpoint(path, checkpoint)
    return path, checkpoint


def test_round_trip_is_exact(saved):
    path, checkpoint = saved
    loaded = load_checkpoint(path)
    assert vars(loaded).keys() == vars(checkpoint).keys()
    for name in ("config", "compression_state", "recipe", "progress", "metrics"):
        assert getattr(loaded, name) == getattr(checkpoint, name)
    assert loaded.state.keys() == checkpoint.state.keys()
    for key, value in checkpoint.state.items():
        assert torch.equal(loaded.state[key], value)
        assert loaded.state[key].dtype == value.dtype
    torch.manual_seed(99)
    fresh = net()
    load_state(fresh, loaded.state, "here")
    assert torch.equal(fresh[0].weight, checkpoint.state["0.weight"])


def test_shared_and_strided_tensors_are_stored(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, Checkpoint(cpu_state(model)))
    state = load_checkpoint(path).state
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert torch.equal(state["turned"], model.turned)


def test_failure_while_writing_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", no_space)
    with pytest.raises(CheckpointError, match=r"cannot write .*last.safetensors: No space left on device"):
        save_checkpoint(path, Checkpoint(cpu_state(net(5))))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_interruption_while_writing_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def interrupted(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, Checkpoint(cpu_state(net(5))))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_description_that_is_not_json_is_refused_before_writing(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="not JSON"):
        save_checkpoint(path, Checkpoint({}, compression_state={"x": object()}))
    assert os.listdir(tmp_path) == []


def test_files_get_ordinary_rights(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    (tmp_path / "y").write_text("")
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_directory_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_json(tmp_path / "a" / "x.json", {})


# -- reading ---------------------------------------------------------------------------------------------------------
def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_foreign_safetensors_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of fat-plugins"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"format": 2}', "unknown checkpoint layout"),
        ('{"format": 1, "extra": 0}', "unknown entries"),
        ("[1]", "unknown checkpoint layout"),
        ("{", "not a readable checkpoint"),
    ],
)
def test_foreign_descriptions(tmp_path, text, expected):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"fat_plugins": text})
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path / "x.safetensors")


# -- belonging -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (net(5), r"'0.weight' has shape \(4, 3\), the model's has \(5, 3\)"),
        (net(norm=False), r"the model has no '1\.[a-z_]+'"),
        (nn.Sequential(*net(), nn.Linear(4, 1)), "no '2.weight' in it"),
    ],
)
def test_state_of_another_model_names_the_first_key_and_loads_nothing(saved, other, expected):
    before = cpu_state(other)
    with pytest.raises(CheckpointError, match=f"somewhere: belongs to another model: .*{expected}"):
        load_state(other, load_checkpoint(saved[0]).state, "somewhere")
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key])


def test_fitting_entries_are_taken_others_left(saved):
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other[1] = nn.BatchNorm1d(5)
    state = load_checkpoint(saved[0]).state
    missing = load_fitting(other, state)
    assert torch.equal(other[0].weight, state["0.weight"])
    assert missing == ["1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias"]


def test_equal_checkpoints_are_equal_bytes():
    from fat_plugins.recipes.sealed import sealed

    tensors = {"a": torch.arange(5.0), "b": torch.zeros(2, 3, dtype=torch.int64), "c": torch.ones((), dtype=torch.bool)}
    assert len({sealed(tensors, "about", "{}") for _ in range(8)}) == 1
    from safetensors.torch import load

    assert all(torch.equal(v, tensors[k]) for k, v in load(sealed(tensors, "about", "\u00e9 \\ \u20ac")).items())
