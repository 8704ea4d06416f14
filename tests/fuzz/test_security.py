"""What a file must not reach: code that nobody permitted, other folders, the network, the memory of the machine."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from driver import kinds
from harness import watched
from kinds_runs import TINY, runs
from programs import begin_training, command, without_hosts

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import imports, load_recipe, run
from fat_plugins.recipes.checkpoint import load_checkpoint, save_checkpoint
from fat_plugins.recipes.directory import check_inside
from fat_plugins.recipes.loaded import load_run

kinds()  # torchvision beside a CPU build of torch


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that a file may name; importing it leaves a file. Nothing is permitted."""
    (tmp_path / "fuzz_canary.py").write_text(
        "import pathlib\nfrom subprocess import run as shell\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n\ndef data():\n    return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(imports, "_allowed", set())
    yield tmp_path
    sys.modules.pop("fuzz_canary", None)


def failure(capsys, *args):
    with without_hosts():
        code = begin_training(*args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


OF_CANARY = {"name": "callable", "params": {"factory": "fuzz_canary:data"}}


# -- imports ---------------------------------------------------------------------------------------------------------
def test_no_way_to_an_import_without_permission(canary, capsys):
    (canary / "base.yaml").write_text(yaml.safe_dump({**TINY, "data": OF_CANARY}))
    (canary / "plain.yaml").write_text(yaml.safe_dump(TINY))
    (canary / "child.yaml").write_text("extends: base.yaml\nname: child\n")
    for args in (
        ["base.yaml"],
        ["child.yaml"],
        ["plain.yaml", "--set", "data={name: callable, params: {factory: 'fuzz_canary:data'}}"],
        ["plain.yaml", "--set", "model={name: callable, params: {factory: 'fuzz_canary:data'}}"],
        ["base.yaml", "--allow-import", "fuzz_canar"],
    ):
        assert "add --allow-import fuzz_canary" in failure(capsys, *args, "-o", "run")
    for name, hint in (
        ("host", "fuzz_canary"),
        ("compression.algorithm", "fuzz_canary:data"),
    ):
        assert "unknown" in failure(capsys, "plain.yaml", "-o", "run", "--set", f"{name}={hint}")
    assert not (canary / "imported").exists()
    assert "fuzz_canary" not in sys.modules


def test_the_recipe_of_a_checkpoint_imports_nothing(canary):
    stored = load_checkpoint(runs()[0] / "checkpoint" / "last.safetensors")
    stored.recipe["data"] = OF_CANARY
    save_checkpoint(canary / "run" / "checkpoint" / "last.safetensors", stored)
    with pytest.raises(ConfigError, match="add --allow-import fuzz_canary"), without_hosts():
        load_run(canary / "run", "last")
    assert not (canary / "imported").exists()


def test_what_a_permitted_module_imports_is_not_permitted(canary):
    imports.allow("fuzz_canary")
    assert imports.load("fuzz_canary:data", "key")() == {}
    with pytest.raises(
        ConfigError, match=r"key: 'fuzz_canary:shell' is of module 'subprocess'; .* --allow-import subprocess"
    ):
        imports.load("fuzz_canary:shell", "key")
    with pytest.raises(ConfigError, match="does not take these options: got an unexpected keyword argument 'args'"):
        imports.call("fuzz_canary:data", "key", {"args": ["touch", "hacked"]})


# -- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".hidden", "nul", "COM1.txt", "a\0b", "a\nb", "", "a" * 101]
)
def test_names_of_runs_stay_in_their_folder(name, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps({**TINY, "name": name}))
    with pytest.raises(ConfigError, match="name: "):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("folder", ["checkpoint", "export", "state", "baselines/lsq", "seeds/1/checkpoint"])
def test_links_out_of_a_run_are_not_written_through(folder, tmp_path, capsys):
    from shutil import copytree, rmtree

    place, outside = tmp_path / "run", tmp_path / "outside"
    copytree(runs()[1], place)
    rmtree(place / folder, ignore_errors=True)
    outside.mkdir()
    (place / folder).parent.mkdir(parents=True, exist_ok=True)
    (place / folder).symlink_to(outside)
    with without_hosts():
        assert command("train", "--resume", "-o", place) == 2
    assert "leads out of the run's directory" in capsys.readouterr().err
    assert list(outside.iterdir()) == []


def test_links_within_a_run_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "export").symlink_to(tmp_path / "disk")
    check_inside(tmp_path, tmp_path / "export" / "model.xml", tmp_path / "new" / "model.xml")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"[Ss]ymlink|links"):
        check_inside(tmp_path, tmp_path / "loop" / "model.xml")


def test_export_does_not_follow_a_link_out_of_the_run(tmp_path, capsys):
    from shutil import copytree

    place, outside = tmp_path / "run", tmp_path / "outside"
    copytree(runs()[0], place)
    outside.mkdir()
    (place / "export").symlink_to(outside)
    with without_hosts():
        assert command("export", place, "-f", "onnx") == 2
    assert "leads out of the run's directory" in capsys.readouterr().err
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("key", ["extends", "compression"])
def test_files_that_a_recipe_names_lie_in_its_folder(key, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (tmp_path / "x.yaml").write_text("{}")
    (folder / "link.yaml").symlink_to(tmp_path / "x.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    for name, expected in (
        ("../x.yaml", "lies outside the recipe's folder"),
        (str(tmp_path / "x.yaml"), "lies outside the recipe's folder"),
        ("link.yaml", "lies outside the recipe's folder"),
        ("loop.yaml", "no file"),
        ("a\0b.yaml", "no file"),
        ("x" * 300 + ".yaml", "no file"),
    ):
        (folder / "r.yaml").write_text(json.dumps({**TINY, key: name}))
        with pytest.raises(ConfigError, match=f"{key}: .*{expected}"):
            load_recipe(folder / "r.yaml")


# -- limits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeds", [2**32]),
        ("seeds", list(range(1001))),
        ("threads", 1025),
        ("data.batch_size", 65_537),
        ("pretrain.epochs", 100_001),
        ("training.epochs", 10**30),
        ("training.accumulate", 65_537),
        ("training.norm_batches", 65_537),
        ("training.stages", [{}] * 101),
        ("training.schedule", {"name": "multistep", "milestones": [1] * 1001}),
        ("baselines", ["fat"] * 101),
        ("export", {"verify_samples": 65_537}),
        ("model.params.width", 257),
        ("data.params", {"split_seed": 2**32}),
        ("data", {"name": "shapes", "params": {"train": 100_001}}),
        ("data", {"name": "imagefolder", "params": {"size": 2049}}),
        ("data", {"name": "imagefolder", "params": {"workers": 257}}),
    ],
)
def test_limits_on_what_a_recipe_asks_for(key, value, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "r.yaml", [f"{key}={json.dumps(value)}"])
    assert key.split(".")[-1] in str(caught.value)
    assert any(words in str(caught.value) for words in ("less than or equal", "at most"))


def test_large_files_are_not_read(tmp_path):
    (tmp_path / "r.yaml").write_text("# " + "x" * 200_000)
    with pytest.raises(ConfigError, match=r"r\.yaml: larger than 200000 bytes"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("[" + "1," * 15_000 + "]")
    with pytest.raises(ConfigError, match="more than 20000 words and signs"):
        load_recipe(tmp_path / "r.yaml")


def test_widths_of_torchvisions_models_are_counted_before_memory_is_taken():
    pytest.importorskip("torchvision", reason="an optional package")
    from fat_plugins.recipes.models import build_torchvision

    with pytest.raises(ConfigError, match=r"model.params: [\d,]+ parameters, allowed: up to"):
        build_torchvision("mobilenet_v2", {"width_mult": 300.0}, 10)
    torch.manual_seed(3)
    one = build_torchvision("mobilenet_v2", {"width_mult": 0.25}, 10).state_dict()
    torch.manual_seed(3)
    other = build_torchvision("mobilenet_v2", {"width_mult": 0.25, "dropout": 0.2}, 10).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# -- the network -----------------------------------------------------------------------------------------------------
def test_importing_everything_opens_no_connection():
    code = """
import sys, importlib
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "subprocess.Popen"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
for name in ("cli", "cli_train", "recipes", "recipes.loaded", "convert", "inspect", "export.verify", "export.qonnx"):
    importlib.import_module("fat_plugins." + name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_opens_no_connection_and_writes_nowhere_else(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    recipe = load_recipe(tmp_path / "r.yaml")
    with watched(tmp_path) as seen, without_hosts():
        run.train(recipe, tmp_path / "run")
    assert seen == []


# -- damage ----------------------------------------------------------------------------------------------------------
def test_one_flipped_bit_is_found(tmp_path):
    good = (runs()[0] / "checkpoint" / "last.safetensors").read_bytes()
    body = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "x.safetensors"
    for at in range(body, len(good), max(1, (len(good) - body) // 40)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def test_checkpoints_without_a_digest_load(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(runs()[0] / "checkpoint" / "last.safetensors"), "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    del metadata["fat_plugins_sha256"]
    save_file(tensors, tmp_path / "old.safetensors", metadata=metadata)
    assert load_checkpoint(tmp_path / "old.safetensors").state.keys() == tensors.keys()
