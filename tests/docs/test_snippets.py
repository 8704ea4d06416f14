"""Every Python snippet of the README and the docs runs as it stands, in order, in an empty folder."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<lang>\w+)\n(?P<code>.*?)^```", re.M | re.S)


def blocks(page: Path, lang: str):
    return [m for m in FENCE.finditer(page.read_text()) if m["lang"] == lang]


def missing_host(code: str, hosts: set[str]) -> str | None:
    """The host that a page's code needs and that is not among ``hosts``."""
    if "brevitas" in code and "brevitas" not in hosts:
        return "Brevitas"
    return "NNCF" if "nncf" in code and not hosts & {"nncf2", "nncf3"} else None


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_snippets_run(page, tmp_path, monkeypatch):
    found = blocks(page, "python")
    source = "\n".join(m["code"] for m in found)
    hosts = set(os.environ.get("FAT_PLUGINS_TEST_HOST", "").split(","))
    if missing := missing_host(source, hosts):
        pytest.skip(f"needs {missing}")
    generation = {m["mark"] for m in found if m["mark"]} & {"NNCF 2", "NNCF 3"}
    wanted = next((mark for host, mark in (("nncf2", "NNCF 2"), ("nncf3", "NNCF 3")) if host in hosts), None)
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "json")], ids=lambda p: str(p.relative_to(ROOT)))
def test_json_snippets_are_valid_configs(page):
    from fat_plugins.config import CompressionConfig, is_plugin_section, split_sections

    for m in blocks(page, "json"):
        config = json.loads(m["code"])
        if "compression" in config:
            for section in split_sections(config["compression"]):
                if is_plugin_section(section):
                    CompressionConfig.parse(section)
