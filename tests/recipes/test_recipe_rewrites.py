"""Rewrites in recipes, on a toy host: runs, rebuilt models, baselines, resumed runs, errors in one line."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest
from cuts import Killed, assert_same_run, cut_at

from fat_plugins import plugins, registry
from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import Options, checkpoint_path, load_checkpoint, load_run, save_checkpoint, train
from fat_plugins.recipes.trainer import evaluate
from fat_plugins.rewrites import GROUP


@pytest.fixture(autouse=True)
def halves(monkeypatch, toy_host):
    """A rewrite of the tests' own."""
    real, point = plugins.entry_points, EntryPoint("halves", "halves:Halves", GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real(group=group), *([point] * (group == GROUP))])
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def text(recipe_text):
    return recipe_text + "rewrites: [halves]\nbaselines: [fat, {algorithm: minmax, rewrites: []}]\nthreads: 1\n"


def test_a_run_its_models_and_what_is_said_of_it(load, text, tmp_path):
    recipe = load(text)
    report = train(recipe, tmp_path / "run")
    assert load((tmp_path / "run" / "recipe.yaml").read_text(), "resolved.yaml") == recipe
    fact = "Rewrites of the float network: lsq: halves; fat: halves; minmax: none"
    assert fact in (tmp_path / "run" / "results.md").read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert next(iter(metrics["quantized"]["rewrites"][0]["changed"])) == "stem.0"
    for result in report.results:
        directory = tmp_path / "run" / "baselines" / result.algorithm if result.baseline else tmp_path / "run"
        loaded = load_run(directory)
        names = [name for name, _ in loaded.model.named_modules()]
        assert ("stem.0.b" in names) == (result.algorithm != "minmax")
        assert evaluate(loaded.model, loaded.data.test_loader())[1] == result.accuracy
    # the float network is stored as it was trained
    assert "stem.0.weight" in load_checkpoint(checkpoint_path(tmp_path / "run", "float")).state


def test_a_run_that_was_cut_goes_on(load, text, tmp_path):
    recipe = load(text)
    with cut_at(None) as moments:
        train(recipe, tmp_path / "whole")
    for moment in (len(moments) // 2, len(moments) - 6):
        with pytest.raises(Killed), cut_at(moment):
            train(recipe, tmp_path / f"cut{moment}", options=Options(save_steps=1))
        train(recipe, tmp_path / f"cut{moment}", options=Options(save_steps=1, resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{moment}")


@pytest.mark.parametrize(
    "wrong,message",
    [
        ("[halfs]", "rewrites.0.name: unknown rewrite 'halfs'; allowed: .*; did you mean 'halves'"),
        ("[{name: halves, params: {kernal: 3}}]", "rewrites.0.params.kernal: unknown key.*did you mean 'kernel'"),
        ("[{name: halves, parms: {}}]", "rewrites.0.parms: unknown key"),
        ("[3]", "rewrites.0: expected a name, or an object with name and params, got 3"),
        ("halves", "rewrites: expected a list"),
    ],
)
def test_errors_name_key_and_nearest(load, recipe_text, wrong, message):
    with pytest.raises(ConfigError, match=message):
        load(recipe_text + f"rewrites: {wrong}\n")
    with pytest.raises(ConfigError, match=f"baselines.0.{message}" if "expected a list" not in message else "rewrites"):
        load(recipe_text + f"baselines: [{{algorithm: fat, rewrites: {wrong}}}]\n")


def test_a_checkpoint_with_other_records_is_refused(load, text, tmp_path):
    train(load(text), tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", "last")
    stored = load_checkpoint(path)
    for records, message in (
        ([{**stored.rewrites[0], "changed": {"stem.9": {}}}], "rewrites.0: the model has no layer 'stem.9'"),
        ([{**stored.rewrites[0], "name": "quarters"}], "rewrites.0: unknown rewrite 'quarters'"),
        ([], "belongs to another model"),
        ({}, "rewrites in its description: expected a list"),
    ):
        stored.rewrites = records
        save_checkpoint(path, stored)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_run(tmp_path / "run")
        assert str(path) in str(caught.value)
        stored.rewrites = [{"name": "halves", "params": {}, "changed": {}, "left": {}}]
