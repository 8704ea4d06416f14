"""Files that a page shows, as the reader would create them."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib
from pages import FILE, blocks

from fat_plugins import plugins, registry


@pytest.fixture
def files_of(tmp_path, monkeypatch):
    """Creates the files that a page shows; algorithms that their entry points name are installed for one test."""
    before = set(sys.modules)

    def create(page: Path) -> None:
        found = [m for m in blocks(page, "python", "toml") if (m["mark"] or "").startswith(FILE)]
        points = list(plugins.entry_points(group=registry.GROUP))
        for m in found:
            (tmp_path / m["mark"].removeprefix(FILE)).write_text(m["code"])
            if m["lang"] == "toml":
                declared = tomllib.loads(m["code"]).get("project", {}).get("entry-points", {}).get(registry.GROUP, {})
                points += [EntryPoint(n, value, registry.GROUP) for n, value in declared.items()]
        if found:
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.setattr(plugins, "entry_points", lambda group: points)
            registry.refresh()

    yield create
    monkeypatch.undo()
    registry.refresh()
    for module in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[module], "__file__", None) or ""):
            del sys.modules[module]
