"""Trained models, read back from the directories of their runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from fat_plugins.errors import CheckpointError, ConfigError, FatPluginsError
from fat_plugins.explain import explain
from fat_plugins.recipes.checkpoint import Checkpoint, load_checkpoint, load_state
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.directory import LAST, checkpoint_path
from fat_plugins.recipes.hosts import Host, get_host
from fat_plugins.recipes.models import check_fit
from fat_plugins.recipes.schema import Recipe
from fat_plugins.recipes.sealed import contents_of
from fat_plugins.rewrites import rebuild


@dataclass
class LoadedRun:
    """A trained model, read back from its run directory."""

    recipe: Recipe
    data: Data
    host: Host
    model: nn.Module
    checkpoint: Checkpoint


def _stored(directory: Path, which: str) -> tuple[Checkpoint, Recipe]:
    """A checkpoint of a run and the recipe in it."""
    if not directory.is_dir():
        raise CheckpointError(f"no run directory {directory}")
    path = checkpoint_path(directory, which)
    checkpoint = load_checkpoint(path)
    try:
        return checkpoint, Recipe.model_validate(checkpoint.recipe)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its recipe is not one of this version: {explain(error, Recipe)}") from None


def run_recipe(directory: Path, which: str | None = None) -> Recipe:
    """The recipe of a run; nothing is built. Parameters and errors are those of :func:`load_run`."""
    return _stored(directory, which or LAST)[1]


def load_run(directory: Path, which: str | None = None) -> LoadedRun:
    """Rebuild the trained model of a run.

    :param directory: a run, or one of its ``baselines/...`` or ``seeds/...`` directories.
    :param which: ``"last"`` or ``"best"``; default: the one that the recipe exports.
    :raises CheckpointError: no run there, or its checkpoint is damaged or belongs to another model.
    """
    if which is None:
        export = run_recipe(directory).export
        which = export.checkpoint if export is not None else LAST
    checkpoint, recipe = _stored(directory, which)
    path = checkpoint_path(directory, which)
    if checkpoint.config is None:
        raise CheckpointError(f"{path}: a float model, expected one with quantizers")
    try:
        recipe.check()
    except ConfigError as error:
        raise CheckpointError(f"{path}: its recipe: {error}") from None
    data, host = recipe.data.build(), get_host(recipe.host)
    torch.manual_seed(0)
    model = recipe.model.build(data)
    check_fit(model, recipe.model.name, data.example, data.output_shape)
    try:
        with contents_of(str(path)):
            rebuild(model, checkpoint.rewrites)
            _, model = host.compress(
                model,
                checkpoint.config,
                data.calibration_loader(recipe.data.batch_size),
                data.example,
                compression_state=checkpoint.compression_state,
            )
    except FatPluginsError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    load_state(model, checkpoint.state, str(path))
    return LoadedRun(recipe, data, host, model.eval(), checkpoint)
