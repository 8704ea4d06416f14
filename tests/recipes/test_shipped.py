"""The recipes of the papers: all of them load; the files beside this one train every one for two steps."""

import re

import pytest
from shipped_runs import EXPORTED, HAS_VISION, NAMES, only_trained

from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes import load_recipe
from fat_plugins.recipes.report import label

vision = pytest.mark.skipif(not HAS_VISION, reason="torchvision is not installed")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[vision] * n.startswith("imagenet")) for n in NAMES])
def test_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "_")
    assert recipe.data.name == {"sr": "generated_sr"}.get(folder := name.split("/")[0], folder)
    assert (recipe.model.weights is not None) == name.startswith("imagenet/")
    text = label(recipe.config_for(None, recipe.training.stages[-1]))
    parts = [part.lower().removesuffix("a32").replace(" ", "_") for part in text.split(" + ")]
    words = re.sub("_(brevitas|log|tied|learned)", "", name)  # what a name says beyond algorithms and bits
    assert words.endswith("_" + "_first_last_".join(parts))


def test_every_algorithm_has_a_recipe():
    from fat_plugins.registry import algorithms

    used = {load_recipe(n).algorithm for n in NAMES if n.startswith(("cifar", "sr"))}
    assert "fat+lsq" in used
    assert used - {"fat+lsq"} == set(algorithms()) - {"minmax"}


def test_every_recipe_is_run():
    trained = [*only_trained("cifar"), *only_trained("sr"), *(only_trained("imagenet") if HAS_VISION else [])]
    names = [name for name in NAMES if HAS_VISION or not name.startswith("imagenet")]
    assert sorted([*trained, *(name for name in EXPORTED if name in names)]) == names


def test_missing_images_are_one_line(tmp_path):
    recipe = load_recipe("cifar10/resnet20_lsq_w4a4", [f"data.params.root={tmp_path}"])
    with pytest.raises(FatPluginsError, match=r"^data.params.root: no data_batch_1.bin in [^\n]*$"):
        recipe.data.build()
