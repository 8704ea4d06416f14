"""Versions of other packages: an error outside of the supported range, one warning for newer ones than were tested."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tomllib

from fat_plugins import ExportError, HostError, versions

ROOT = Path(__file__).resolve().parents[2]
ALL = {s.name: s for s in vars(versions).values() if isinstance(s, versions.Supported)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("torch", "2.3.1+cpu", "2.4 to 2.x"),
        ("torch", "3.0.0", "2.4 to 2.x"),
        ("nncf", "2.13.0", "2.14 to 3.x"),
        ("nncf", "4.0.0", "2.14 to 3.x"),
        ("brevitas", "0.9.1", "0.10 to 0.13.x"),
        ("brevitas", "0.14.0", "0.10 to 0.13.x"),
        ("openvino", "2024.5.0", "2024.6 to 2026.x"),
        ("openvino", "2027.0.0", "2024.6 to 2026.x"),
        ("torch", "unknown", "2.4 to 2.x"),
    ],
)
def test_outside_of_the_range_is_one_line(name, text, allowed):
    with pytest.raises(ExportError if name == "openvino" else HostError) as error:
        ALL[name].check(text)
    line = str(error.value)
    assert line.startswith(f"{name} {text} is not supported, allowed: {allowed}; pip install '") and "\n" not in line


@pytest.mark.parametrize(
    ("name", "newest", "newer"),
    [
        ("torch", "2.13.7+cu130", "2.14.0.dev20261101+cpu"),
        ("nncf", "3.4.9", "3.5.0"),
        ("brevitas", "0.13.9", None),
        ("openvino", "2026.4.1-22000-abc", "2026.5.0-23000-def"),
    ],
)
def test_a_newer_version_warns_once(name, newest, newer):
    found = ALL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found.check(newest)[:2] == found.newest
        assert found.check(".".join(map(str, found.lowest)))[: len(found.lowest)] == found.lowest
    if newer is None:
        return
    with pytest.warns(UserWarning, match=rf"^{name} {re.escape(newer)} is newer than .* tested with") as record:
        found.check(newer)
        found.check(newer)
    assert len(record) == 1


def test_the_ranges_are_those_of_the_package():
    wanted = [*PROJECT["dependencies"], *(w for extra in PROJECT["optional-dependencies"].values() for w in extra)]
    for name, found in ALL.items():
        ranges = [w.split(";")[0] for w in wanted if re.match(rf"{name}[><]", w)]
        lows = [tuple(map(int, m.split("."))) for w in ranges for m in re.findall(r">=([\d.]+)", w)]
        highs = [tuple(map(int, m.split("."))) for w in ranges for m in re.findall(r"<([\d.]+)", w)]
        assert lows and min(lows) >= found.lowest, name
        assert max(highs, default=found.below)[: len(found.below)] == found.below, name


def test_the_newest_are_those_of_the_matrix():
    text = (ROOT / "tox.ini").read_text() + (ROOT / "constraints.txt").read_text()
    for name, found in ALL.items():
        pins = re.findall(rf"\b{name}(?:\[[a-z]+\])?==(\d+)\.(\d+)", text)
        assert max((int(a), int(b)) for a, b in pins) == found.newest, name


def test_an_unsupported_torch_is_told_before_anything_else():
    code = "import torch; torch.__version__ = '2.3.0'; torch.library = None\nimport fat_plugins"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "fat_plugins.errors.HostError: torch 2.3.0 is not supported, allowed: 2.4 to 2.x; pip install 'torch>=2.4'"
    )
