"""What a run leaves behind, damaged: checkpoints, training states, results, the directory itself."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import torch
import yaml
from harness import Case
from mutate import CANARY, damage, damage_bytes, damage_text, deep
from programs import command, without_hosts
from safetensors.torch import save

from fat_plugins.recipes import load_recipe, run
from fat_plugins.recipes.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.report import RunReport
from fat_plugins.recipes.resume import result_to_dict
from fat_plugins.recipes.state import from_bytes, to_bytes
from fat_plugins.recipes.trainer import Trainer
from fat_plugins.recipes.variant import Options

#: trained in a second
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "digits_cnn", "params": {"width": 4}},
    "data": {"name": "digits", "batch_size": 256},
    "compression": {"algorithm": "lsq", "weights": {"bits": 4}},
    "pretrain": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    "training": {"epochs": 1, "optimizer": {"name": "adam", "lr": 0.001}, "ema": {"decay": 0.9}},
    "baselines": ["minmax"],
    "export": None,
}


class _Cut(BaseException):
    """As a kill."""


@cache
def runs() -> tuple[Path, Path]:
    """Directories of a complete run and one that was cut while its quantizers learned. Made once, by the toy host."""
    with without_hosts():
        return _made()


def _made() -> tuple[Path, Path]:
    root = Path(mkdtemp(prefix="fuzz-runs-"))
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    recipe = load_recipe(root / "tiny.yaml")
    report = run.train(recipe, root / "complete")
    _deployed(report, root / "complete")
    steps, one_step = [0], Trainer._one_step

    def until(self: Trainer, *args: Any) -> None:
        steps[0] += 1
        if steps[0] == 8:
            raise _Cut
        one_step(self, *args)

    Trainer._one_step = until
    try:
        run.train(recipe, root / "cut", options=Options(save_steps=1))
    except _Cut:
        pass
    finally:
        Trainer._one_step = one_step
    return root / "complete", root / "cut"


def _deployed(report: RunReport, directory: Path) -> None:
    """As if files had been written: no runtime is needed for the report of them."""
    rows = [LayerRow("stem.0", "weight", "uniform", 4, "i4", 18, "brgconv_I8", "int8", 36, 0, 0, 36)]
    for result in report.results:
        result.deployments = [
            Deployment("export/model.xml", 0.5, 100, 800, rows, True, None, ["a note"], "openvino", 200)
        ]
    data = report.to_dict()
    data["results"] = [result_to_dict(r) for r in report.results]
    (directory / "report.json").write_text(json.dumps(data))


class _Pickled:
    def __reduce__(self) -> tuple:
        return (__import__, (CANARY,))


def _foreign(rng: Random) -> tuple[bytes, str]:
    """Files that only look like safetensors."""
    how = rng.randrange(9)
    if how == 0:
        return pickle.dumps({"weight": _Pickled()}), "a pickle"
    if how == 1:
        return struct.pack(
            "<Q", rng.choice((2**63, 2**40, 10**8, 0, 2**64 - 1))
        ) + b"{}", "a header that claims too much"
    if how == 2:
        size = rng.choice((2**60, 2**40, 400, -4))
        return _with_header(
            {"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, size * 4]}}, b"1234"
        ), "a huge tensor"
    if how == 3:
        shape = rng.choice(([-1], [1.5], ["x"], [[1]], None, [2**70], [0] * 100_000))
        return _with_header(
            {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, b"1234"
        ), "a shape that is none"
    if how == 4:
        dtype = rng.choice(("F99", "", None, "I4", 3))
        return _with_header(
            {"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}, b"1234"
        ), "a type that is none"
    if how == 5:
        text = rng.choice(
            ("{}", "[]", "null", "", "[" * 100_000, '{"format": 99}', '{"format": 1, "zzz": 2}', "NaN", "9" * 5000)
        )
        key = rng.choice(("fat_plugins", "fat_plugins_state"))
        return save({"a": torch.zeros(1)}, metadata={key: text}), f"description {text[:20]!r}"
    if how == 6:
        return save({"a": torch.zeros(1)}), "of another program"
    if how == 7:
        header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        return _with_header({**header, "b": header["a"]}, b"1234"), "tensors that overlap"
    return _with_header(
        {"__metadata__": rng.choice((3, [], {"a": 1}, {"fat_plugins": None}))}, b""
    ), "metadata that is none"


def _with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _edited_state(rng: Random, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors of another model: a digest that is right, contents that are wrong."""
    state = dict(state)
    name = rng.choice(sorted(state))
    tensor = state[name]
    how = rng.randrange(7)
    if how == 0:
        del state[name]
        return state, f"{name} taken away"
    if how == 1:
        state[rng.choice(("foreign", name + "x", "../x", "\x1b[2J"))] = torch.zeros(1)
        return state, "a tensor more"
    if how == 2:
        state[name] = torch.zeros(rng.choice(((0,), (3, 3), (1,) * 9, (7,), ())))
        return state, f"shape of {name}"
    if how == 3:
        state[name] = tensor.to(rng.choice((torch.float64, torch.int64, torch.bfloat16, torch.bool, torch.uint8)))
        return state, f"{name} as {state[name].dtype}"
    if how == 4:
        state[name] = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 99)
        return state, f"{name} full of NaN"
    if how == 5:
        state[name] = torch.full_like(tensor, float("inf") if tensor.is_floating_point() else -1)
        return state, f"{name} infinite"
    return {}, "no tensors"


def _edited_description(rng: Random, checkpoint: Checkpoint) -> str:
    """The JSON of a checkpoint changed in one place."""
    parts = {k: v for k, v in vars(checkpoint).items() if k != "state"}
    if rng.random() < 0.15:
        parts["recipe"] = {**parts["recipe"], "data": {"name": "callable", "params": {"factory": f"{CANARY}:data"}}}
        what = "data of a function"
    elif rng.random() < 0.1:
        parts["recipe"] = {**parts["recipe"], "host": rng.choice((CANARY, f"{CANARY}:x", "brevitas", "../x"))}
        what = "another host"
    else:
        bad = damage(rng, parts, lambda path: True)
        parts, what = bad.tree, bad.what
    for key, value in parts.items():
        if hasattr(checkpoint, key):
            setattr(checkpoint, key, value)
    return what


def _bad_checkpoint(rng: Random, good: Path, path: Path) -> str:
    """Write a bad checkpoint in the place of a good one."""
    how = rng.random()
    if how < 0.35:
        data, what = damage_bytes(rng, good.read_bytes())
        path.write_bytes(data)
        return what
    if how < 0.55:
        data, what = _foreign(rng)
        path.write_bytes(data)
        return what
    if how < 0.6:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()
        return "no file"
    checkpoint = load_checkpoint(good)
    if how < 0.8:
        checkpoint.state, what = _edited_state(rng, checkpoint.state)
    else:
        what = _edited_description(rng, checkpoint)
    try:
        save_checkpoint(path, checkpoint)
    except Exception:  # a number that JSON cannot hold
        path.write_bytes(b"")
    return what


class _OfRun:
    """Cases on a copy of a directory of a run, made anew for each."""

    needs: tuple[str, ...] = ("sklearn",)
    complete = True

    def __init__(self, folder: Path) -> None:
        self.good = runs()[0 if self.complete else 1]
        self.folder, self.run = folder, folder / "run"

    def fresh(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.good, self.run)


class Checkpoints(_OfRun):
    """Checkpoints read by Python and by ``summary``."""

    name, share = "checkpoints", 900

    def case(self, rng: Random) -> Case:
        self.fresh()
        path = self.run / "checkpoint" / "last.safetensors"
        what = _bad_checkpoint(rng, self.good / "checkpoint" / "last.safetensors", path)
        if rng.random() < 0.8:
            return Case(what, lambda: _load(path), names=("last.safetensors",), folder=self.folder)
        names = ("last.safetensors", "data.params", "host", "model")
        return Case(what, lambda: command("summary", self.run, "--checkpoint", "last"), names=names, folder=self.folder)


def _load(path: Path) -> None:
    load_checkpoint(path)


class Results(_OfRun):
    """``report``, ``summary``, ``export``, ``verify`` on a damaged directory."""

    name, share = "run directories", 100

    def case(self, rng: Random) -> Case:
        self.fresh()
        name = rng.choice(("report.json", "metrics.json", "baselines/minmax/metrics.json", "recipe.yaml", "checkpoint"))
        path = self.run / name
        if name == "checkpoint":
            what = _no_directory(rng, path)
        elif name.endswith("json") and rng.random() < 0.6:
            bad = damage(rng, json.loads(path.read_text()), lambda path: True)
            what = f"{name}: {bad.what}"
            try:
                path.write_text(json.dumps(bad.tree))
            except ValueError:
                path.write_text("9" * 5000)
        else:
            data, what = damage_text(rng, path.read_text(), "//")
            path.write_bytes(data)
            what = f"{name}: {what}"
        calls: tuple[Callable[[], int], ...] = (
            lambda: command("report", self.run, "-o", self.run / "page.html"),
            lambda: command("report", self.run, "-o", self.run / "page.html"),
            lambda: command("summary", self.run),
            lambda: command("export", self.run, "-f", "onnx"),
            lambda: command("verify", self.run, "-f", "openvino"),
        )
        return Case(what, rng.choice(calls), folder=self.folder)


def _no_directory(rng: Random, path: Path) -> str:
    shutil.rmtree(path)
    how = rng.randrange(3)
    if how == 0:
        path.write_text("a file")
        return "checkpoint is a file"
    if how == 1:
        path.symlink_to(path)
        return "checkpoint is a link to itself"
    return "no checkpoints"


class Resumes(_OfRun):
    """``train --resume`` with damaged files of the state."""

    name, share, complete = "training states (--resume)", 120, False

    def case(self, rng: Random) -> Case:
        self.fresh()
        state = self.run / "state" / "training.safetensors"
        for path in self.run.glob("state/*.previous.*"):
            path.unlink()
        how = rng.random()
        if how < 0.3:
            data, what = damage_bytes(rng, state.read_bytes())
            state.write_bytes(data)
        elif how < 0.4:
            data, what = _foreign(rng)
            state.write_bytes(data)
        elif how < 0.65:
            what = self._edited(rng, state)
        elif how < 0.85:
            path = self.run / "state" / "run.json"
            if rng.random() < 0.5:
                bad = damage(rng, json.loads(path.read_text()), lambda path: True)
                path.write_text(_json(bad.tree))
                what = f"run.json: {bad.what}"
            else:
                data, what = damage_text(rng, path.read_text(), "//")
                path.write_bytes(data)
        elif how < 0.95:
            path = self.run / "checkpoint" / "float.safetensors"
            what = "float: " + _bad_checkpoint(rng, self.good / "checkpoint" / "float.safetensors", path)
        else:
            data, what = damage_text(rng, (self.run / "recipe.yaml").read_text(), "# ")
            (self.run / "recipe.yaml").write_bytes(data)
        return Case(what, lambda: command("train", "--resume", "-o", self.run, "--quiet"), writes=self.run)

    def _edited(self, rng: Random, path: Path) -> str:
        """A state whose digest is right and whose contents are not."""
        tree = from_bytes(path.read_bytes())
        places = [p for p in _places(tree) if p]
        place = rng.choice(places)
        owner = tree
        for part in place[:-1]:
            owner = owner[part]
        new = rng.choice((None, -1, 10**6, "x", [], {}, 0.5, torch.zeros(3), torch.zeros(2, 2), deep(rng, 5), 10**30))
        how = rng.randrange(3)
        if how == 0 and isinstance(owner, dict):
            del owner[place[-1]]
            what = "taken away"
        elif how == 1 and isinstance(owner[place[-1]], torch.Tensor) and owner[place[-1]].is_floating_point():
            owner[place[-1]] = torch.full_like(owner[place[-1]], float("nan"))
            what = "NaN"
        else:
            if isinstance(owner, tuple):
                return self._edited(rng, path)
            owner[place[-1]] = copy.deepcopy(new)
            what = f"= {new!r:.40}"
        path.write_bytes(to_bytes(tree))
        return f"{'/'.join(map(str, place))[:100]} {what}"


def _places(tree: Any, above: tuple = ()) -> Any:
    yield above
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in pairs:
        yield from _places(value, (*above, key))


def _json(tree: Any) -> str:
    try:
        return json.dumps(tree)
    except ValueError:
        return "9" * 5000


class Tensors:
    """Pretrained weights: ``model.weights``."""

    name, share, needs = "pretrained weights", 1000, ("sklearn",)

    def __init__(self, folder: Path) -> None:
        from fat_plugins.recipes.models import DigitsCNN

        self.folder = folder
        torch.manual_seed(0)
        self.model = DigitsCNN(1, 10, 4)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        torch.save(self.state, folder / "good.pt")
        (folder / "good.safetensors").write_bytes(save(self.state))

    def case(self, rng: Random) -> Case:
        from fat_plugins.recipes.weights import load_weights

        suffix = rng.choice(("pt", "pth", "safetensors", "bin", "tar"))
        path = self.folder / f"bad.{suffix}"
        how = rng.random()
        good = self.folder / ("good.safetensors" if suffix == "safetensors" else "good.pt")
        if how < 0.4:
            data, what = damage_bytes(rng, good.read_bytes())
        elif how < 0.6:
            data, what = _foreign(rng)
        else:
            state, what = _edited_state(rng, self.state)
            if suffix == "safetensors":
                data = save(state)
            else:
                value: Any = rng.choice(
                    (state, {"model": state}, [state], {"model": _Pickled()}, _Pickled(), {1: state}, 3)
                )
                torch.save(value, path)
                data, what = path.read_bytes(), f"{what}, in a {type(value).__name__}"
        path.write_bytes(data)
        return Case(f"{suffix}: {what}", lambda: load_weights(self.model, "digits_cnn", str(path)), names=(path.name,),
                    folder=self.folder)  # fmt: skip


KINDS = (Checkpoints, Results, Resumes, Tensors)
