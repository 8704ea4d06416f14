"""Recipes: a whole training run in one YAML file, and the directory of what came out of it."""

from fat_plugins.recipes.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fat_plugins.recipes.directory import checkpoint_path, model_path
from fat_plugins.recipes.loaded import LoadedRun, load_run, run_recipe
from fat_plugins.recipes.loader import dump_recipe, find_recipe, load_recipe, shipped
from fat_plugins.recipes.progress import Reporter
from fat_plugins.recipes.report import RunReport
from fat_plugins.recipes.run import train
from fat_plugins.recipes.schema import Recipe
from fat_plugins.recipes.variant import Options

__all__ = [
    "Checkpoint",
    "LoadedRun",
    "Options",
    "Recipe",
    "Reporter",
    "RunReport",
    "checkpoint_path",
    "dump_recipe",
    "find_recipe",
    "load_checkpoint",
    "load_recipe",
    "load_run",
    "model_path",
    "run_recipe",
    "save_checkpoint",
    "shipped",
    "train",
]
