"""What is public is listed, and stays as it is listed until somebody decides otherwise."""

import copy
import json
import re

import api
import pytest
from pages import PAGES

LISTED = json.loads(api.SNAPSHOT.read_text())
IMPORT = re.compile(r"^\s*from (fat_[a-z_.]+) import ([A-Za-z_0-9, ]+|\([^)]*\))", re.M)


def test_the_public_api_is_the_listed_one():
    found = api.differences(LISTED, api.current())
    assert not found, "\n".join(["the public API changed; if it is meant to: python tests/api/api.py", *found])


def test_the_page_has_the_lists():
    text = api.PAGE.read_text()
    assert text == api.page(text, LISTED), "docs/api.md is not that of tests/data/api.json: python tests/api/api.py"


def changed(path, value):
    """The list with one entry replaced, or taken out."""
    tree = copy.deepcopy(LISTED)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1], None)
    if value is not None:
        inner[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (["fat_plugins.network", "set_progress"], None, "gone:    fat_plugins.network: set_progress"),
        (["fat_plugins.network", "set_progress"], "function ()", "changed: fat_plugins.network: set_progress"),
        (["command line", "fat-plugins train", "--resume"], None, "gone:    command line: fat-plugins train --resume"),
        (["entry points", "fat_plugins.algorithms", "fat"], None, "gone:    entry points: fat_plugins.algorithms fat"),
        (["fat_plugins", "more"], "function ()", "new:     fat_plugins: more function ()"),
    ],
)
def test_a_difference_is_told(path, value, line):
    assert line in api.differences(LISTED, changed(path, value))


def test_new_algorithms_and_absent_hosts_are_no_difference():
    more = copy.deepcopy(LISTED)
    more["entry points"]["fat_plugins.algorithms"]["newest"] = "entry point"
    del more["fat_brevitas"]
    assert api.differences(LISTED, more) == []


def names_in(page):
    for module, names in IMPORT.findall(page.read_text()):
        yield from ((module, name.split(" as ")[0].strip()) for name in names.strip("()").split(",") if name.strip())


def test_the_docs_import_public_names_only():
    used = {pair for page in PAGES for pair in names_in(page)}
    assert len(used) > 15
    assert sorted(pair for pair in used if not listed(*pair)) == [], (
        "not in tests/api/api.py, which lists what is public"
    )


def listed(module, name):
    # an algorithm may be built upon another one, as the page on writing them shows
    if module.startswith("fat_plugins.algorithms."):
        return True
    sections = [s for s in LISTED if s.split(" on ")[0] == module]
    per_algorithm = module == "fat_brevitas" and re.search("(Quant|Linear|Conv[A-Za-z]*[123]d)$", name)
    return bool(per_algorithm) or any(name in LISTED[s] for s in sections)
