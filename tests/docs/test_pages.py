"""Pages of algorithms: the same sections in the same order, and facts that agree with the code."""

import json
import re
from fractions import Fraction

import pytest
import yaml
from pages import DOCS, blocks

from fat_plugins import algorithms, penalties

METHODS = {**algorithms(), **penalties()}
SECTIONS = ["The idea", "The maths", "Options (`params`)", "When to use it", "Cost", "Export", "Fidelity"]
ROW = re.compile(r"^\| `(?P<key>\w+)` \| `(?P<default>[^`]+)` \| (?P<meaning>.+) \|$", re.M)


def page(name):
    return (DOCS / "algorithms" / f"{name}.md").read_text()


def section(name, title):
    text = page(name)
    start = text.index(f"\n## {title}\n")
    end = text.find("\n## ", start + 1)
    return text[start : end if end >= 0 else None]


def test_every_algorithm_has_a_page_and_every_page_an_algorithm():
    assert {p.stem for p in (DOCS / "algorithms").glob("*.md")} == {*METHODS, "index"}


@pytest.mark.parametrize("name", METHODS)
def test_sections_stand_in_order(name):
    titles = [t for t in re.findall(r"^## (.*)$", page(name), re.M) if t in SECTIONS]
    assert titles == SECTIONS


@pytest.mark.parametrize("name", METHODS)
def test_options_are_those_of_the_code(name):
    """Every field of Params is in the table, with its default as JSON (a fraction may stand for a float)."""
    shown = {m["key"]: m["default"] for m in ROW.finditer(section(name, "Options (`params`)"))}
    fields = METHODS[name].Params.model_fields
    assert list(shown) == list(fields) or set(shown) == set(fields)
    for key, text in shown.items():
        value = float(Fraction(text)) if "/" in text else json.loads(text)
        default = fields[key].default
        assert (value, type(value)) == (default, type(default)), key


@pytest.mark.parametrize("name", algorithms())
def test_head_agrees_with_the_registry(name):
    algorithm, head = algorithms()[name], page(name).split("\n## ")[0]
    line = next(line for line in head.splitlines() if line.startswith('`"algorithm"'))
    assert f'`"algorithm": "{name}"`' in line
    for what, (low, high) in (("weights", algorithm.weight_bits), ("activations", algorithm.activation_bits)):
        assert (f"{what} {low} to {high} bits" if low != high else f"{what} {low} bit") in line
    grade = algorithm.fidelity.split(":")[0]
    assert line.endswith(f"fidelity {grade}") or grade == "folklore"
    assert not algorithm.arxiv or algorithm.arxiv in head
    assert re.search(r"\n\n\*\*[^*]+\.\*\*\n", head), "the fidelity in words"


@pytest.mark.parametrize("name", METHODS)
def test_fidelity_says_what_must_not_be_claimed(name):
    text = section(name, "Fidelity")
    grade = METHODS[name].fidelity.split(":")[0]
    assert f"Grade **{grade}**" in text or grade == "folklore"
    claims = text[text.index("Not to be claimed:\n\n* ") :]
    assert claims.count("\n* ") >= 1


@pytest.mark.parametrize("name", penalties())
def test_pages_of_penalties_agree_with_the_registry(name):
    head = page(name).split("\n## ")[0]
    grade, arxiv = METHODS[name].fidelity.split(":")[0], METHODS[name].arxiv
    assert re.search(rf"^`penalty: {name}` .* fidelity {grade}$", head, re.M) and arxiv in head
    assert re.search(r"\n\n\*\*[^*]+\.\*\*\n", head), "the fidelity in words"
    assert re.search(rf"^\| \[`{name}`\]\({name}\.md\) \| .+ \| {grade}: ", page("index"), re.M)
    shown = [yaml.safe_load(m["code"]) for m in blocks(DOCS / "algorithms" / f"{name}.md", "yaml")]
    assert name in {recipe["pretrain"]["penalty"]["name"] for recipe in shown}


@pytest.mark.parametrize("name", algorithms())
def test_page_shows_a_config_of_its_algorithm(name):
    shown = [json.loads(m["code"]) for m in blocks(DOCS / "algorithms" / f"{name}.md", "json")]
    assert name in {config["compression"]["algorithm"] for config in shown}


def test_tables_of_all_algorithms_agree_with_the_registry():
    rows = re.findall(r"^\| \[`(\w+)`\]\(\w+\.md\) \| .+? \| ([\d-]+), ([\d-]+) \|", page("index"), re.M)

    def width(bits):
        return f"{bits[0]}-{bits[1]}" if bits[0] != bits[1] else str(bits[0])

    assert {n: (w, a) for n, w, a in rows} == {
        n: (width(k.weight_bits), width(k.activation_bits)) for n, k in algorithms().items()
    }
