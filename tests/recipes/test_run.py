"""A recipe from beginning to end on a toy host, run directories, bit progressions. No NNCF, no OpenVINO."""

import json
import os

import pytest
import torch

from fat_plugins import get_backend, kernels
from fat_plugins.errors import CheckpointError, ConfigError, HostError
from fat_plugins.network import named_quantizers
from fat_plugins.recipes import checkpoint_path, load_checkpoint, load_run, save_checkpoint, train
from fat_plugins.recipes import directory as directory_module
from fat_plugins.recipes import hosts as hosts_module
from fat_plugins.recipes import variant as variant_module
from fat_plugins.recipes.checkpoint import load_fitting
from fat_plugins.recipes.directory import run_directory
from fat_plugins.recipes.trainer import Trainer, evaluate
from fat_plugins.recipes.variant import carried


def tree(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_run_writes_everything_and_loads_again(toy_host, load, recipe_text, tmp_path):
    recipe = load(recipe_text.replace("export: null", "export: null\nbaselines: [fat]"))
    report = train(recipe, tmp_path / "run")
    assert tree(tmp_path / "run") == [
        "baselines/fat/checkpoint/best.safetensors",
        "baselines/fat/checkpoint/last.safetensors",
        "baselines/fat/metrics.json",
        "checkpoint/best.safetensors",
        "checkpoint/float.safetensors",
        "checkpoint/last.safetensors",
        "metrics.json",
        "recipe.yaml",
        "report.json",
        "results.md",
    ]
    assert [(r.algorithm, r.baseline) for r in report.results] == [("lsq", False), ("fat", True)]
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["float"]["epochs"]) == 2
    assert len(metrics["quantized"]["stages"][0]["epochs"]) == 1
    assert load((tmp_path / "run" / "recipe.yaml").read_text(), "resolved.yaml") == recipe
    markdown = (tmp_path / "run" / "results.md").read_text()
    assert "| LSQ W4A4 |" in markdown
    assert "| FAT W4A4 |" in markdown
    assert "Seeds: 1 (3)" in markdown

    for directory, algorithm in ((tmp_path / "run", "lsq"), (tmp_path / "run" / "baselines" / "fat", "fat")):
        loaded = load_run(directory)
        assert toy_host.calls[-1]["state"] == loaded.checkpoint.compression_state is not None
        assert {type(q).__name__ for _, q in named_quantizers(loaded.model)} == {f"{algorithm.upper()}Weight"}
        wanted = next(r.accuracy for r in report.results if r.algorithm == algorithm)
        assert evaluate(loaded.model, loaded.data.test_loader())[1] == wanted


def test_same_seed_same_run_other_seed_other_run(toy_host, load, recipe_text, tmp_path):
    recipe = load(recipe_text)
    train(recipe, tmp_path / "a")
    train(recipe, tmp_path / "b")
    train(load(recipe_text.replace("[3]", "[4]")), tmp_path / "c")
    a, b, c = (load_checkpoint(checkpoint_path(tmp_path / n, "last")).state for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    assert (tmp_path / "a" / "report.json").read_text() == (tmp_path / "b" / "report.json").read_text()


def test_baselines_start_from_the_same_float_weights_and_further_seeds_have_their_place(
    toy_host, load, recipe_text, tmp_path
):
    text = recipe_text.replace("[3]", "[3, 5]").replace("export: null", "export: null\nbaselines: [fat]")
    text = text.replace("epochs: 1", "epochs: 0")
    report = train(load(text), tmp_path / "run")
    assert [(r.seed, r.algorithm) for r in report.results] == [(3, "lsq"), (3, "fat"), (5, "lsq"), (5, "fat")]
    for root in (tmp_path / "run", tmp_path / "run" / "seeds" / "5"):
        reference = load_checkpoint(checkpoint_path(root, "float")).state["head.weight"]
        for directory in (root, root / "baselines" / "fat"):
            state = load_checkpoint(checkpoint_path(directory, "last")).state
            assert torch.equal(state["head.parametrizations.weight.original"], reference)
    assert "mean (lowest to highest)" in report.facts["Seeds"]


def test_progress_is_saved(toy_host, load, recipe_text, tmp_path):
    train(load(recipe_text.replace("epochs: 1", "epochs: 2")), tmp_path / "run")
    checkpoint = load_checkpoint(checkpoint_path(tmp_path / "run", "last"))
    assert checkpoint.progress == {"variant": "lsq", "seed": 3, "stage": 0, "stages": 1, "epoch": 2}
    scheduler = toy_host.controllers[-1].scheduler
    assert (scheduler.epochs, scheduler.total_epochs) == (2, 2)
    assert scheduler.steps == scheduler.total_steps


def test_best_checkpoint_has_the_lowest_validation_loss(toy_host, load, recipe_text, tmp_path):
    text = recipe_text.replace("lr: 0.02", "lr: 1.0").replace("epochs: 1", "epochs: 4")
    train(load(text), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    epochs = metrics["quantized"]["stages"][0]["epochs"]
    best = load_checkpoint(checkpoint_path(tmp_path / "run", "best"))
    assert best.metrics["validation_loss"] == min(e["validation_loss"] for e in epochs)
    assert load_checkpoint(checkpoint_path(tmp_path / "run", "last")).metrics["epoch"] == 3


def test_threads_are_set_for_the_run_and_restored(toy_host, load, recipe_text, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(Trainer, "run", lambda self: seen.append(torch.get_num_threads()) or [])
    train(load(recipe_text.replace("seeds: [3]", "seeds: [3]\nthreads: 3")), tmp_path / "run")
    assert seen == [3, 3]
    assert torch.get_num_threads() == before


def test_the_backend_is_set_for_the_run_and_restored(toy_host, load, recipe_text, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_compiler", "eager")  # whatever compiler this machine has
    before, seen = get_backend(), []
    monkeypatch.setattr(Trainer, "run", lambda self: seen.append(get_backend()) or [])
    train(load(recipe_text.replace("seeds: [3]", "seeds: [3]\nbackend: compile")), tmp_path / "run")
    assert seen == ["compile", "compile"]
    assert get_backend() == before
    with pytest.raises(ConfigError, match=r"backend.*did you mean 'compile'"):
        load(recipe_text.replace("seeds: [3]", "seeds: [3]\nbackend: compiled"))


# -- bit progressions ------------------------------------------------------------------------------------------------
STAGES = "epochs: 1\n  stages: [{weights: {bits: 5}}, {weights: {bits: 3}}]"


def test_stages_follow_each_other(toy_host, load, recipe_text, tmp_path, monkeypatch):
    seen = []

    def spy(model, state):
        seen.append(state)
        return load_fitting(model, state)

    monkeypatch.setattr(variant_module, "load_fitting", spy)
    train(load(recipe_text.replace("epochs: 1", STAGES)), tmp_path / "run")
    widths = [c["config"]["compression"]["weights"]["bits"] for c in toy_host.calls]
    assert widths == [5, 3]
    assert len(seen) == 1  # the first stage starts from the float weights
    assert "conv1.0.parametrizations.weight.0.step" in seen[0]
    loaded = load_run(tmp_path / "run")
    bits = {name: q.spec.bits for name, q in named_quantizers(loaded.model)}
    assert {b for n, b in bits.items() if "conv1" in n} == {3}
    assert loaded.checkpoint.progress["stage"] == 1


def test_carry_weights_leaves_the_quantizers_own_state_behind(toy_host, load, recipe_text):
    recipe = load(recipe_text)
    data = recipe.data.build()
    _, model = toy_host().compress(
        recipe.model.build(data), recipe.compression, data.calibration_loader(256), data.example
    )
    state = model.state_dict()
    kept = carried(state, model, "weights")
    assert set(state) - set(kept) == {k for k in state if ".parametrizations.weight.0." in k} != set()
    assert carried(state, model, "all") is state


# -- run directories -------------------------------------------------------------------------------------------------
def a_run(path):
    path.mkdir()
    (path / "recipe.yaml").write_text("old")
    return path


def test_occupied_directory_is_refused_before_anything_happens(toy_host, load, recipe_text, tmp_path):
    target = a_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run is not empty: give another --output, or --overwrite"):
        train(load(recipe_text), target)
    assert tree(tmp_path / "run") == ["recipe.yaml"]
    assert toy_host.calls == []


def test_overwrite_replaces_a_run_when_the_new_one_is_complete(toy_host, load, recipe_text, tmp_path):
    target = a_run(tmp_path / "run")
    (target / "stale.txt").write_text("")
    train(load(recipe_text.replace("epochs: 2", "epochs: 0")), target, overwrite=True)
    assert "report.json" in tree(target)
    assert "stale.txt" not in tree(target)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]


def test_failed_overwrite_keeps_the_earlier_run(tmp_path):
    target = a_run(tmp_path / "run")
    said = []
    with pytest.raises(KeyboardInterrupt), run_directory(target, True, said.append) as fresh:
        (fresh / "part").write_text("")
        raise KeyboardInterrupt
    assert (target / "recipe.yaml").read_text() == "old"
    assert "untouched" in said[0]
    assert str(fresh) in said[0]


def test_overwrite_refuses_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with (
        pytest.raises(ConfigError, match=r"does not hold a run \(no recipe.yaml\)"),
        run_directory(tmp_path / "home", True),
    ):
        pass
    assert tree(tmp_path / "home") == ["letter.txt"]


def test_empty_and_new_directories_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/er/new"):
        with run_directory(tmp_path / name, False) as path:
            assert path == (tmp_path / name).resolve()
            assert path.is_dir()


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="output"), run_directory(path, False):
            pass
    assert (tmp_path / "file").read_text() == "x"


def test_unwritable_parent_is_one_line(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(directory_module.Path, "mkdir", denied)
    with (
        pytest.raises(ConfigError, match="cannot be written to: Permission denied"),
        run_directory(tmp_path / "x", False),
    ):
        pass


def test_unwritable_directory_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(directory_module.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to"), run_directory(tmp_path / "x", False):
        pass


# -- what cannot be loaded -------------------------------------------------------------------------------------------
def test_loading_what_is_no_run(toy_host, tmp_path):
    with pytest.raises(CheckpointError, match="no run directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_run(tmp_path)


def test_checkpoint_of_another_model_is_named(toy_host, load, recipe_text, tmp_path):
    quick = recipe_text.replace("epochs: 2", "epochs: 0").replace("epochs: 1", "epochs: 0")
    train(load(quick), tmp_path / "narrow")
    train(load(quick.replace("width: 4", "width: 6")), tmp_path / "wide")
    narrow, wide = (load_checkpoint(checkpoint_path(tmp_path / n, "last")) for n in ("narrow", "wide"))
    narrow.state = wide.state
    save_checkpoint(checkpoint_path(tmp_path / "narrow", "last"), narrow)
    with pytest.raises(CheckpointError, match=r"last.safetensors: belongs to another model: 'stem.* has shape \(6,"):
        load_run(tmp_path / "narrow")


def test_recipe_of_another_version_is_one_line(toy_host, load, recipe_text, tmp_path):
    train(load(recipe_text.replace("epochs: 2", "epochs: 0").replace("epochs: 1", "epochs: 0")), tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", "last")
    stored = load_checkpoint(path)
    stored.recipe["export"] = {"format": "tflite"}
    save_checkpoint(path, stored)
    with pytest.raises(
        CheckpointError, match=r"last.safetensors: its recipe .* export.format: unknown format 'tflite'"
    ):
        load_run(tmp_path / "run")


# -- hosts -----------------------------------------------------------------------------------------------------------
def test_unknown_host_names_the_nearest():
    with pytest.raises(HostError, match=r"unknown host 'nncff'.*did you mean 'nncf'"):
        hosts_module.get_host("nncff")


def test_host_checks_the_config_before_training(toy_host, load, recipe_text, tmp_path):
    recipe = load(recipe_text)
    recipe.compression["refused"] = True
    with pytest.raises(ConfigError, match="the toy host refuses"):
        train(recipe, tmp_path / "run")
    assert toy_host.calls == []
    assert not (tmp_path / "run").exists()


def test_missing_host_says_what_to_install_before_training(load, recipe_text, tmp_path, monkeypatch):
    class Point:
        name = "nncf"

        def load(self):
            raise ModuleNotFoundError("No module named 'nncf'")

    monkeypatch.setattr(hosts_module, "entry_points", lambda group: [Point()])
    with pytest.raises(HostError, match=r"host 'nncf' is not installed .*pip install 'fat-plugins\[nncf\]'"):
        train(load(recipe_text), tmp_path / "run")
    assert os.listdir(tmp_path) == ["recipe.yaml"]
