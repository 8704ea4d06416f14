"""Cuts a run at any moment and compares what is left of two runs."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from fat_plugins.recipes import checkpoint
from fat_plugins.recipes.trainer import Trainer


class Killed(BaseException):
    """No handler of the program knows it, as none knows SIGKILL."""


@contextmanager
def cut_at(moment: int | None = None, *, step: int | None = None):
    """Raise :class:`Killed` at a moment, counted over optimizer steps and moves of finished files into place.

    :param moment: number of the moment, or
    :param step: of the optimizer step; with neither, moments are only counted.
    :return: a list; its length is the number of moments that passed.
    """
    passed: list[str] = []
    one_step, move = Trainer._one_step, checkpoint.os.replace

    def watched(name, real):
        def call(*args, **kwargs):
            if len(passed) == moment or (name == "step" and passed.count("step") == step):
                raise Killed(name)
            passed.append(name)
            return real(*args, **kwargs)

        return call

    Trainer._one_step, checkpoint.os.replace = watched("step", one_step), watched("file", move)
    try:
        yield passed
    finally:
        Trainer._one_step, checkpoint.os.replace = one_step, move


def contents(path: Path):
    """What a file says, in a form that can be compared and read in a failure."""
    if path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as file:
            return file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def assert_same_run(a: Path, b: Path) -> None:
    """Every file of two run directories is equal, tensors bit for bit."""
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = contents(a / name), contents(b / name)
        if name.endswith(".safetensors"):
            assert one[0] == other[0], name
            assert list(one[1]) == list(other[1]), name
            for key, tensor in one[1].items():
                assert torch.equal(tensor, other[1][key]), f"{name}: {key}"
        else:
            assert one == other, name
