"""Every snippet of the README and the docs works.

Python runs as it stands, in order, in an empty folder; commands, configs and recipes are those that the package takes.

A comment in front of a block marks it: ``<!-- NNCF 2 -->`` and ``<!-- NNCF 3 -->`` for Python that needs this
generation, ``<!-- file: NAME -->`` for a file that the reader creates, ``<!-- part -->`` for a part of a recipe.
"""

import json
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml
from pages import DOCS, FILE, ROOT, blocks, name, with_blocks
from torchvision_shim import import_torchvision

from fat_plugins.cli import app
from fat_plugins.config import CompressionConfig, is_plugin_section, split_sections
from fat_plugins.convert import convert
from fat_plugins.errors import ConfigError


def missing_host(code: str, hosts: set[str]) -> str | None:
    """The host that a page's code needs and that is not among ``hosts``."""
    if "brevitas" in code and "brevitas" not in hosts:
        return "Brevitas"
    return "NNCF" if "nncf" in code and not hosts & {"nncf2", "nncf3"} else None


@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_python_snippets_run(page, tmp_path, monkeypatch, files_of):
    found = [m for m in blocks(page, "python") if not (m["mark"] or "").startswith(FILE)]
    source = "\n".join(m["code"] for m in found)
    hosts = set(os.environ.get("FAT_PLUGINS_TEST_HOST", "").split(","))
    if missing := missing_host(source, hosts):
        pytest.skip(f"needs {missing}")
    generation = {m["mark"] for m in found if m["mark"]} & {"NNCF 2", "NNCF 3"}
    wanted = next((mark for host, mark in (("nncf2", "NNCF 2"), ("nncf3", "NNCF 3")) if host in hosts), None)
    monkeypatch.chdir(tmp_path)
    files_of(page)
    for m in blocks(page, "json"):  # a snippet may read the config that the page shows
        (tmp_path / "config.json").write_text(m["code"])
        break
    namespace: dict = {"__name__": "snippet"}
    ran = 0
    for m in found:
        if m["mark"] in generation and m["mark"] != wanted:
            continue
        exec(compile(m["code"], f"{page.name}", "exec"), namespace)
        ran += 1
    if not ran:
        pytest.skip(f"all snippets are for {generation}")


@pytest.mark.parametrize("page", with_blocks("json"), ids=name)
def test_json_snippets_are_valid_configs(page, files_of):
    files_of(page)
    for m in blocks(page, "json"):
        config = json.loads(m["code"])
        if "compression" in config:
            sections = split_sections(config["compression"])
            ours = [section for section in sections if is_plugin_section(section)]
            for section in ours:
                CompressionConfig.parse(section)
            if not ours:  # a config of NNCF 2, to be converted
                convert(config)
        elif "algorithm" in config:
            CompressionConfig.parse(config)


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name)
def test_yaml_snippets_are_valid_recipes(page, tmp_path):
    from fat_plugins.recipes import load_recipe
    from fat_plugins.recipes.schema import Recipe

    if find_spec("torchvision"):
        import_torchvision()
    for m in blocks(page, "yaml"):
        recipe = yaml.safe_load(m["code"])
        if m["mark"] == "part":  # sections of a recipe: their keys
            assert set(recipe) <= set(Recipe.model_fields)
        else:
            recipe.setdefault("name", "snippet")
            (tmp_path / "snippet.yaml").write_text(yaml.safe_dump(recipe))
            for config in (ROOT / "recipes").glob("*.json"):
                (tmp_path / config.name).write_text(config.read_text())
            try:
                load_recipe(str(tmp_path / "snippet.yaml"))
            except ConfigError as error:
                if "needs torchvision" in str(error):
                    pytest.skip("the recipe names a network of torchvision, which is not installed")
                raise


def test_shown_report_of_convert_is_what_convert_says():
    page = DOCS / "migrating.md"
    old = json.loads(next(m["code"] for m in blocks(page, "json") if '"quantization"' in m["code"]))
    command = shlex.split(next(m["code"] for m in blocks(page, "sh") if "convert" in m["code"]))
    options = dict(zip(command[3::2], command[4::2], strict=True))
    shown = next(m["code"] for m in blocks(page, "text") if m["code"].startswith("carried"))
    assert convert(old, options["--algorithm"], nncf=int(options["--nncf"])).to_text() == shown.rstrip("\n")


# -- commands --------------------------------------------------------------------------------------------------------
GROUP = typer.main.get_command(app)


def commands(page: Path):
    """Every call of this package's command line in the shell blocks of a page, as a list of words."""
    for m in blocks(page, "sh"):
        for line in m["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (("fat-plugins",), ("-m", "fat_plugins")):
                for i in range(len(words)):
                    if tuple(words[i : i + len(start)]) == start:
                        yield words[i + len(start) :]


def test_there_are_commands_to_check():
    assert sum(1 for page in with_blocks("sh") for _ in commands(page)) > 8


@pytest.mark.parametrize("page", [p for p in with_blocks("sh") if [*commands(p)]], ids=name)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        assert words, f"{page.name}: a command without a verb"
        assert words[0] in GROUP.commands, f"{page.name}: no command {words[0]!r}"
        # parses as the program does, up to the point where it would run
        context = GROUP.commands[words[0]].make_context(words[0], words[1:])
        if words[0] == "train":
            from fat_plugins.recipes import load_recipe

            recipe = context.params["recipe"]
            assert (recipe is None) == ("--resume" in words), f"{page.name}: a recipe, or --resume"
            if recipe is not None and not recipe.startswith("my_"):  # the reader's own
                load_recipe(str(ROOT / recipe) if recipe.startswith("recipes/") else recipe)
