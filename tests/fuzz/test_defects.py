"""What the driver has found and was mended: the smallest input of each."""

import io
import json
import os

import pytest
import torch
import yaml
from kinds_runs import TINY, runs
from rich.console import Console

from fat_plugins.config import read_config
from fat_plugins.convert import convert
from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import load_recipe
from fat_plugins.recipes.checkpoint import Checkpoint, load_checkpoint, load_state, save_checkpoint
from fat_plugins.recipes.models import DigitsCNN, check_fit
from fat_plugins.recipes.report import RunReport, _rich
from fat_plugins.recipes.state import from_bytes, to_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": %s}' % ("9" * 5000), "a number of 5000 digits"),
        ('{"a": NaN}', "number 'NaN'; only finite numbers"),
        ('{"a": 1e999}', "only finite numbers"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"a": "\\ud800"}', "is not Unicode text"),
        ("[" * 60 + "]" * 60, "nested too deeply; allowed: 50 levels"),
        ("[" * 100_000, "nested too deeply"),
        ("/*" * 200_000, "not JSON"),
        ('\\"' * 200_000, "not JSON"),
        (" " * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_json(text, expected, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.json")
    assert "c.json" in str(caught.value) and expected in str(caught.value)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_config(tmp_path / "c.json") == {"a": 1}


@pytest.mark.parametrize("name", ["pipe.json", "a\0b.json", "x" * 300 + ".json", "."])
def test_names_that_are_no_files(name, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="config "):
        read_config(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2001-99-99", "only plain YAML values are allowed: '2001-99-99': month must be in 1..12"),
        ("2001-01-01", "is a date; put text in quotes"),
        ("9" * 5000, "only plain YAML values"),
        ("0x" + "f" * 5000, "a number of 5002 digits"),
        (".nan", "is not a finite number"),
        ("!!set {a, b}", "is a set"),
        ("!!int 9x", "only plain YAML values"),
        ("!!bool maybe", "only plain YAML values"),
        ("!!timestamp x", "only plain YAML values"),
        ('"\\ud800"', "is not Unicode text"),
        ("{1: 2}", "key '1' is no text"),
        ("{<<: {a: 1}}", "key '<<' is no text"),
    ],
)
def test_yaml(value, expected, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY) + f"threads: {value}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "r.yaml" in str(caught.value) and expected in str(caught.value)


def test_convert_a_list_that_is_a_number():
    precision = {"type": "manual", "bitwidth_per_scope": 0.0}
    old = {"compression": {"algorithm": "quantization", "initializer": {"precision": precision}}}
    with pytest.raises(ConfigError, match=r"bitwidth_per_scope: expected a list, got 0\.0"):
        convert(old, "lsq")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["results"][0]["deployments"][0].update(format="x"), "unknown format 'x'"),
        (lambda r: r["results"][0].update(accuracy="high"), "results"),
        (lambda r: r.update(results=[]), "results"),
        (lambda r: [one.update(baseline=True) for one in r["results"]], "no result of the recipe's own algorithm"),
        (lambda r: r.update(facts=[]), "facts: expected an object"),
    ],
)
def test_results(change, expected):
    report = json.loads((runs()[0] / "report.json").read_text())
    change(report)
    with pytest.raises(CheckpointError) as caught:
        RunReport.from_dict(report)
    assert "report.json" in str(caught.value)
    assert expected in str(caught.value) or expected == "results"


@pytest.mark.parametrize("name", ["ResNet/Sequential[layer1]", "a[/x]", "[red]x"])
def test_tables_show_names_as_they_are(name):
    console = Console(file=io.StringIO(), width=100)
    console.print(_rich(name, ["layer"], [[name]]))
    assert console.file.getvalue().count(name) == 2


@pytest.mark.parametrize(("key", "value"), [("config", 3), ("recipe", None), ("progress", []), ("metrics", "x")])
def test_descriptions_of_checkpoints(key, value, tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", Checkpoint({"a": torch.zeros(1)}, **{key: value}))
    with pytest.raises(CheckpointError, match=f"{key} in its description: expected an object"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_states_that_do_not_fit():
    model = DigitsCNN(1, 10, 4)
    for change, expected in (
        (lambda t: t * float("nan"), "holds NaN"),
        (lambda t: t.long(), r"is torch.int64, the model's is torch.float32"),
    ):
        state = dict(model.state_dict())
        state["head.weight"] = change(state["head.weight"])
        with pytest.raises(CheckpointError, match=f"file: .*'head.weight' {expected}"):
            load_state(model, state, "file")


def test_training_states_of_another_shape():
    good = to_bytes({"a": torch.zeros(1)})
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    header["__metadata__"]["fat_plugins_state"] = json.dumps({"format": 1, "tree": {"$items": [[[], 1]]}})
    del header["__metadata__"]["fat_plugins_sha256"]
    text = json.dumps(header).encode()
    with pytest.raises(CheckpointError, match="where: its contents are not what this version"):
        from_bytes(len(text).to_bytes(8, "little") + text + good[8 + size :], "where")


def test_models_that_do_not_fit_the_images():
    with pytest.raises(ConfigError, match=r"model: 'x' does not take images of 3x8x8: .*expected input"):
        check_fit(DigitsCNN(1, 10, 4), "x", torch.zeros(1, 3, 8, 8), 10)
    with pytest.raises(ConfigError, match=r"model: 'x' gives a tensor of \(1, 10\) for one image, expected \(1, 3\)"):
        check_fit(DigitsCNN(1, 10, 4), "x", torch.zeros(1, 1, 8, 8), 3)
