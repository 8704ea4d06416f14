"""Files from which a training goes on: any tree, no pickle, never half-written."""

import random

import numpy as np
import pytest
import torch

from fat_plugins.errors import CheckpointError
from fat_plugins.recipes import checkpoint as checkpoint_module
from fat_plugins.recipes.state import (
    StateFile,
    from_bytes,
    random_state,
    seed_everything,
    set_random_state,
    to_bytes,
)

TREE = {
    "numbers": [1, -2.5, True, None, "text", float("inf")],
    "tuple": (0.9, (0.999, 1)),
    "by number": {0: {"exp_avg": torch.arange(3.0)}, 1: {}},
    "dollar": {"$tensor": "not one"},
    "tensors": {
        "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "nothing": torch.zeros(0, dtype=torch.int8),
        "scalar": torch.tensor(True),
        "strided": torch.arange(6).reshape(2, 3).T,
    },
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_any_tree_comes_back():
    assert same(TREE, from_bytes(to_bytes(TREE)))


def test_tensors_that_share_memory_come_back_apart():
    x = torch.arange(4.0)
    back = from_bytes(to_bytes({"a": x, "b": x[1:]}))
    back["a"].zero_()
    assert back["b"].tolist() == [1, 2, 3]


def test_what_no_file_can_hold_is_named():
    with pytest.raises(CheckpointError, match=r"part/values/1 is a set; allowed: tensors and JSON types"):
        to_bytes({"part": {"values": [0, {1}]}})


@pytest.mark.parametrize("data", [b"", b"\x00" * 30, to_bytes(TREE)[:-3], to_bytes(TREE)[:100]])
def test_damaged_bytes_are_one_line(data):
    with pytest.raises(CheckpointError, match="somewhere: not a readable training state"):
        from_bytes(data, "somewhere")


def test_foreign_file_is_refused():
    from safetensors.torch import save

    with pytest.raises(CheckpointError, match="no training state of this version"):
        from_bytes(save({"x": torch.zeros(1)}))


# -- files -----------------------------------------------------------------------------------------------------------
def test_newest_is_loaded_and_the_one_before_is_kept(tmp_path):
    file, said = StateFile(tmp_path / "deep" / "training.safetensors"), []
    assert file.load(said.append) is None
    for n in range(3):
        file.save({"n": n})
    assert file.load(said.append) == {"n": 2}
    assert from_bytes(file.previous.read_bytes()) == {"n": 1}
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["training.previous.safetensors", file.path.name]
    assert said == []


def test_truncated_file_falls_back_with_a_warning(tmp_path):
    file, said = StateFile(tmp_path / "training.safetensors"), []
    file.save({"n": 0})
    file.save({"n": 1})
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert file.load(said.append) == {"n": 0}
    assert len(said) == 1
    assert said[0].startswith(f"warning: {file.path}: not a readable training state")
    assert "\n" not in said[0]


def test_no_readable_file_is_an_error(tmp_path):
    file = StateFile(tmp_path / "training.safetensors")
    file.path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"training\.safetensors: not a readable"):
        file.load(pytest.fail)


def test_a_cut_between_the_two_moves_loses_nothing(tmp_path, monkeypatch):
    file, said = StateFile(tmp_path / "training.safetensors"), []
    file.save({"n": 0})
    move = checkpoint_module.os.replace

    def cut(source, target):
        if target == file.path:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(checkpoint_module.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        file.save({"n": 1})
    assert file.load(said.append) == {"n": 0}
    assert said == []


def test_file_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint_module.os, name)
        monkeypatch.setattr(
            checkpoint_module.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    StateFile(tmp_path / "training.safetensors").save({})
    assert calls == ["fsync", "replace", "fsync"]  # the file, then the name in its directory


# -- random numbers --------------------------------------------------------------------------------------------------
def draws():
    return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()


def test_random_numbers_go_on():
    seed_everything(5)
    np.random.standard_normal()  # numpy and Python keep the second number of a pair
    random.gauss(0, 1)
    state = from_bytes(to_bytes(random_state()))
    wanted = draws()
    draws()
    set_random_state(state)
    assert draws() == wanted


def test_seeding_seeds_all():
    seed_everything(2**40)
    a = draws()
    seed_everything(2**40)
    assert draws() == a
