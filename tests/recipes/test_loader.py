"""Recipe files: what is accepted, and the one line that a mistake gets."""

import json
from pathlib import Path

import pytest

from fat_plugins.errors import ConfigError
from fat_plugins.recipes import dump_recipe, load_recipe, shipped
from fat_plugins.recipes.loader import MAX_BYTES

TOP = Path(__file__).parents[2] / "recipes"


def failure(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_minimal_recipe_gets_defaults(load, recipe_text):
    recipe = load(recipe_text)
    assert recipe.host == "nncf"
    assert recipe.compression == {"compression": {"algorithm": "lsq", "weights": {"bits": 4}}}
    assert [s.weights for s in recipe.training.stages] == [None]
    assert recipe.export is None


@pytest.mark.parametrize(
    ("export", "formats", "targets"),
    [
        ("{}", ["openvino"], ["openvino"]),
        ("{format: onnx}", ["onnx"], ["onnx"]),
        ("{format: qonnx}", ["qonnx"], ["qonnx", "onnx"]),
        ("{format: [openvino, onnx, qonnx]}", ["openvino", "onnx", "qonnx"], ["openvino", "onnx", "qonnx"]),
    ],
)
def test_formats_stand_for_targets(load, recipe_text, export, formats, targets):
    recipe = load(recipe_text.replace("export: null", f"export: {export}"))
    assert recipe.export.format == formats
    assert [t.name for t in recipe.export.targets] == targets
    assert load(dump_recipe(recipe), "again.yaml") == recipe


def test_dumped_recipe_reads_back_equal(load, recipe_text):
    recipe = load(recipe_text)
    assert load(dump_recipe(recipe), "again.yaml") == recipe


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: tiny", "nmae: tiny", ["recipe.yaml:1:", "nmae: unknown key", "did you mean 'name'?"]),
        ("epochs: 2", "epoch: 2", ["recipe.yaml:7:", "pretrain.epoch: unknown key", "did you mean 'epochs'?"]),
        ("lr: 0.1", "lrr: 0.1", ["recipe.yaml:8:", "pretrain.optimizer.lrr", "did you mean 'lr'?"]),
        ("epochs: 2", "epochs: two", ["recipe.yaml:7:", "pretrain.epochs", "got 'two'"]),
        ("epochs: 2", "epochs: 2.5", ["pretrain.epochs", "got 2.5"]),
        ("epochs: 2", "epochs: -1", ["pretrain.epochs", "greater than or equal to 0", "got -1"]),
        ("epochs: 2", "epochs: true", ["pretrain.epochs", "got True"]),
        ("lr: 0.1", "lr: 0", ["pretrain.optimizer.lr", "greater than 0"]),
        ("name: sgd, lr: 0.1", "name: sdg, lr: 0.1", ["pretrain.optimizer.name", "'sgd'", "got 'sdg'"]),
        ("name: sgd, lr: 0.1", "name: adam, lr: 0.1, momentum: 0.5", ["pretrain.optimizer", "momentum", "'sgd'"]),
        ("name: digits_cnn", "name: digits_cn", ["recipe.yaml:3:", "model.name", "did you mean 'digits_cnn'?"]),
        ("name: digits,", "name: digit,", ["data.name", "did you mean 'digits'?"]),
        ("width: 4", "wdth: 4", ["model.params.wdth: unknown key", "did you mean 'width'?"]),
        ("width: 4", "width: 2", ["model.params.width", "greater than or equal to 4"]),
        ("algorithm: lsq", "algorithm: lsqq", ["compression.algorithm", "unknown algorithm 'lsqq'", "mean 'lsq'?"]),
        ("bits: 4", "bits: 1", ["compression.weights", "no 1-bit weights"]),
        ("bits: 4", "bit: 4", ["compression.weights.bit: unknown key", "did you mean 'bits'?"]),
        ("seeds: [3]", "seeds: [3, 3]", ["recipe.yaml:2:", "seeds", "differ"]),
        ("seeds: [3]", "seeds: []", ["seeds"]),
        ("seeds: [3]", "seeds: [-1]", ["seeds.0", "got -1"]),
        ("name: tiny", "name: ../up", ["recipe.yaml:1:", "name", "got '../up'"]),
        ("export: null", "export: {format: onxx}", ["recipe.yaml:12:", "export.format", "'onxx'", "mean 'onnx'?"]),
        ("export: null", "export: {format: [onnx, tflite]}", ["export.format", "'tflite'", "onnx, openvino, qonnx"]),
        ("export: null", "export: {format: [onnx, onnx]}", ["export.format", "repeat each other"]),
        ("export: null", "export: {format: []}", ["export.format", "at least 1"]),
        ("export: null", "export: {format: 3}", ["export.format", "a format or a list of formats", "got 3"]),
        ("export: null", "baselines: [fatt]", ["baselines.0.algorithm", "did you mean 'fat'?"]),
        ("export: null", "baselines: [lsq]", ["baselines", "recipe's own algorithm 'lsq'"]),
        ("export: null", "baselines: [{algorithm: fat, params: {levl: x}}]", ["baselines.0.params.levl", "'levels'?"]),
        ("epochs: 1", "epochs: 1\n  stages: []", ["training.stages"]),
        ("epochs: 1", "epochs: 1\n  stages: [{weights: {bits: 11}}]", ["training.stages.0", "no 11-bit weights"]),
        (
            "epochs: 1",
            "epochs: 1\n  schedule: {name: multistep}",
            ["recipe.yaml:11:", "training.schedule", "milest"],
        ),
    ],
)
def test_mistakes_are_named_with_line_and_key(load, recipe_text, old, new, expected):
    assert old in recipe_text
    line = failure(load, recipe_text.replace(old, new, 1))
    for part in expected:
        assert part in line


def test_missing_section_is_named(load, recipe_text):
    assert "model: this key is required" in failure(load, recipe_text.replace("model:", "# model:"))


def test_exponents_without_a_point_are_numbers(load, recipe_text):
    recipe = load(recipe_text.replace("lr: 0.1", "lr: 1e-2, weight_decay: 5E-4"))
    assert (recipe.pretrain.optimizer.lr, recipe.pretrain.optimizer.weight_decay) == (0.01, 0.0005)


def test_duplicate_key_is_refused(load, recipe_text):
    line = failure(load, recipe_text.replace("epochs: 2", "epochs: 2\n  epochs: 3"))
    assert "'epochs' occurs twice" in line
    assert "line 8" in line


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch X']", "!!python/name:os.system", "!own 3"])
def test_tags_are_refused_and_do_nothing(load, recipe_text, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = failure(load, recipe_text.replace("seeds: [3]", f"seeds: {value}"))
    assert "recipe.yaml:2:" in line
    assert "only plain YAML values are allowed" in line
    assert not (tmp_path / "X").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [1", "recipe.yaml:1: not a recipe"),
        ("a: b: c", "recipe.yaml:1: not a recipe"),
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("[" * 100_000, "recipe.yaml: line 1: nested deeper than 50"),
        ("a: &x [1]\nb: *x", "recipe.yaml: line 2: YAML aliases"),
        ("? [a]\n: b", "recipe.yaml:1:"),
    ],
)
def test_text_that_is_no_recipe(load, text, expected):
    assert expected in failure(load, text)


def test_binary_and_huge_files(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_recipe(path)
    path.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_recipe(path)


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"no recipe file 'digits_fat'.*did you mean 'digits_fat_w4a4'"):
        load_recipe("digits_fat")


def test_directory_is_not_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)


# -- compression from a JSON config ----------------------------------------------------------------------------------
def with_json(recipe_text):
    return recipe_text.replace("{algorithm: lsq, weights: {bits: 4}}", "sub/config.json")


def test_json_config_is_found_beside_the_recipe(load, recipe_text, tmp_path, monkeypatch):
    config = {"input_info": {"sample_size": [1, 1, 8, 8]}, "compression": [{"algorithm": "x"}, {"algorithm": "fat"}]}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    recipe = load(with_json(recipe_text))
    assert recipe.compression == config
    assert recipe.algorithm == "fat"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"compression": {"algorithm": "fat", "weigths": {}}}', "did you mean 'weights'"),
        ('{"compression": [{"algorithm": "fat"}, {"algorithm": "lsq"}]}', "both quantize every layer"),
        ('{"compression": 3}', "expected an object with the key 'algorithm'"),
        ('{"compression": []}', "an empty list"),
        ('{"input_info": {}}', "key 'compression'"),
        ("{,}", "config.json: line 1: not JSON"),
    ],
)
def test_broken_json_configs(load, recipe_text, tmp_path, text, expected):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text(text)
    assert expected in failure(load, with_json(recipe_text))


def test_missing_json_config(load, recipe_text):
    assert "compression: no file" in failure(load, with_json(recipe_text))


# -- bit progressions and baselines ----------------------------------------------------------------------------------
def test_progression_of_widths(load, recipe_text):
    stages = "stages: [{weights: {bits: 5}, activations: {bits: 5}}, {}, {weights: {bits: 3}, epochs: 7, lr: 0.5}]"
    recipe = load(recipe_text.replace("epochs: 1", f"epochs: 1\n  {stages}"))
    first, second, third = recipe.training.stages
    section = recipe.config_for(None, first)["compression"]
    assert (section["weights"]["bits"], section["activations"]["bits"]) == (5, 5)
    assert recipe.config_for(None, second)["compression"] == {"algorithm": "lsq", "weights": {"bits": 4}}
    assert recipe.config_for(None, third)["compression"]["weights"] == {"bits": 3}
    assert (recipe.phase(third).epochs, recipe.phase(third).optimizer.lr) == (7, 0.5)
    assert (recipe.phase(first).epochs, recipe.phase(first).optimizer.lr) == (1, 0.02)


def test_baseline_replaces_algorithm_and_params_only(load, recipe_text):
    section = "{algorithm: fat, weights: {bits: 3}, params: {transform: none}, first_layer: same}"
    text = recipe_text.replace("{algorithm: lsq, weights: {bits: 4}}", section)
    recipe = load(text.replace("export: null", "export: null\nbaselines: [lsq]"))
    config = recipe.config_for(recipe.baselines[0], recipe.training.stages[0])["compression"]
    assert config == {"algorithm": "lsq", "weights": {"bits": 3}, "params": {}, "first_layer": "same"}
    assert recipe.compression["compression"]["algorithm"] == "fat"


# -- shipped recipes -------------------------------------------------------------------------------------------------
def test_shipped_recipes_are_those_of_the_repository():
    packaged = shipped()["digits_fat_w4a4"].parent
    names = sorted(p.relative_to(TOP) for p in TOP.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(packaged) for p in packaged.rglob("*") if p.is_file())
    for name in names:
        assert (TOP / name).read_bytes() == (packaged / name).read_bytes(), name


@pytest.mark.parametrize("name", [n for n in sorted(shipped()) if "/" not in n])
def test_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.build(recipe.data.build()) is not None
