"""Recipes made of several files, and keys set on the command line."""

import pytest

from fat_plugins.errors import ConfigError
from fat_plugins.recipes import load_recipe
from fat_plugins.recipes.loader import MAX_FILES, list_recipes, parse_settings


@pytest.fixture
def write(tmp_path, recipe_text):
    (tmp_path / "base.yaml").write_text(recipe_text)

    def writer(text, name="own.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return writer


def failure(path, *settings):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sections_are_merged_key_by_key(write):
    recipe = load_recipe(write("extends: base.yaml\ntraining: {epochs: 9}\ncompression: {weights: {bits: 3}}\n"))
    assert recipe.name == "own"  # not that of the base
    assert (recipe.training.epochs, recipe.training.optimizer.lr) == (9, 0.02)
    assert recipe.compression["compression"] == {"algorithm": "lsq", "weights": {"bits": 3}}
    assert recipe.export is None


def test_a_section_of_another_name_replaces_the_whole(write):
    text = "extends: base.yaml\npretrain: {optimizer: {name: adam, lr: 0.5}}\ncompression: {algorithm: fat}\n"
    recipe = load_recipe(write(text))
    assert recipe.pretrain.epochs == 2
    assert recipe.pretrain.optimizer.model_dump(exclude_defaults=True) == {"name": "adam", "lr": 0.5}
    assert recipe.compression["compression"] == {"algorithm": "fat"}


def test_later_files_win_and_files_below_are_found(write):
    write("training: {epochs: 3}\nseeds: [4]\n", "parts/a.yaml")
    write("extends: deeper/c.yaml\ntraining: {epochs: 5}\n", "parts/b.yaml")
    write("threads: 2\n", "parts/deeper/c.yaml")
    recipe = load_recipe(write("extends: [base.yaml, parts/a.yaml, parts/b.yaml]\nname: x\n"))
    assert (recipe.name, recipe.training.epochs, recipe.seeds, recipe.threads) == ("x", 5, [4], 2)


def test_a_shipped_recipe_can_be_extended(write):
    recipe = load_recipe(write("extends: digits_fat_w4a4\nseeds: [7]\n"))
    assert (recipe.algorithm, recipe.seeds, recipe.name) == ("fat", [7], "own")


def test_mistakes_are_placed_in_the_file_where_they_stand(write, tmp_path):
    path = write("extends: part.yaml\n")
    write("extends: base.yaml\n\ntraining:\n  epochs: many\n", "part.yaml")
    assert f"{tmp_path}/part.yaml:4: training.epochs: expected an integer, got 'many'" in failure(path)


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("../base.yaml", "extends: '../base.yaml' lies outside the recipe's folder"),
        ("/etc/base.yaml", "lies outside the recipe's folder"),
        ("link.yaml", "lies outside the recipe's folder"),
        ("bas.yaml", "extends: no file"),
        ("digits_fat_w4", "no shipped recipe 'digits_fat_w4', nor a .yaml file; did you mean 'digits_fat_w4a4'?"),
        ("3", "expected a file or a list of files, got 3"),
        ("own.yaml", "'own.yaml' extends this recipe in turn"),
        ("loop.yaml", "'own.yaml' extends this recipe in turn"),
        (f"[{', '.join(['base.yaml'] * MAX_FILES)}]", f"made of more than {MAX_FILES} files"),
    ],
)
def test_what_cannot_be_extended(write, tmp_path, extends, expected):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.yaml").symlink_to(tmp_path / "base.yaml")
    write((tmp_path / "base.yaml").read_text(), "in/base.yaml")
    write("extends: own.yaml\n", "in/loop.yaml")
    assert expected in failure(write(f"extends: {extends}\n", "in/own.yaml"))


# -- settings --------------------------------------------------------------------------------------------------------
def test_settings_win_over_files(write):
    settings = [
        "training.epochs=7",
        "seeds=[1, 2]",
        "pretrain.optimizer.lr=5e-4",
        "compression.weights.bits=2",
        "name=z",
    ]
    recipe = load_recipe(write("extends: base.yaml\ntraining: {epochs: 3}\n"), settings)
    assert (recipe.training.epochs, recipe.seeds, recipe.name) == (7, [1, 2], "z")
    assert recipe.pretrain.optimizer.lr == 5e-4
    assert recipe.compression["compression"]["weights"] == {"bits": 2}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.epochs", "--set: expected key=value"),
        ("training..epochs=3", "--set: expected key=value"),
        ("training.epochs=[1", "--set:1: not a recipe"),
        ("training.epochs=!!python/name:os.system", "only plain YAML values are allowed"),
        ("training.epochs=x", "--set: training.epochs: expected an integer, got 'x'"),
        ("trainin.epochs=3", "--set: trainin: unknown key"),
        ("training.epoch=3", "--set: training.epoch: unknown key"),
    ],
)
def test_bad_settings_are_named(write, setting, expected):
    assert expected in failure(write("extends: base.yaml\n"), setting)


def test_settings_of_one_section_add_up():
    assert parse_settings(["a.b=1", "a.c=x", "a.b=2"]) == {"a": {"b": 2, "c": "x"}}


def test_list_says_what_each_recipe_is():
    rows = {r["name"]: r["about"] for r in list_recipes()}
    assert rows["cifar10/resnet20_pact_w2a2"] == "PACT, ResNet-20, 2 bits."
    assert not any(name.split("/")[-1].startswith("_") for name in rows)
    assert all(rows.values())
