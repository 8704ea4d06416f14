"""Algorithms by name, through entry points; plug-ins of other people must not take ours down."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import fat_plugins
from fat_plugins import Algorithm, ConfigError, algorithms, get_algorithm, plugins, registry
from fat_plugins.quantizer import Coordinator, TensorSpec
from fat_plugins.registry import make_quantizer


class Guest(Algorithm):
    """Somebody else's algorithm."""

    name = "guest"
    title = paper = fidelity = "none"


class Impostor(Guest):
    name = "fat"


@pytest.fixture
def install(monkeypatch):
    """Adds entry points to those that are installed, for one test."""

    def add(**points):
        real = list(plugins.entry_points(group=registry.GROUP))
        extra = [EntryPoint(n.rstrip("_"), v, registry.GROUP) for n, v in points.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: real + extra)
        registry.refresh()

    yield add
    monkeypatch.undo()
    registry.refresh()


def test_what_is_shipped():
    assert {"fat", "lsq", "minmax"} <= set(algorithms())
    assert get_algorithm("fat").arxiv == "2102.07444"
    assert callable(fat_plugins.algorithms)  # not the package of that name


def test_a_new_algorithm_needs_one_entry_point(install):
    install(guest=f"{__name__}:Guest")
    assert get_algorithm("guest") is Guest
    with pytest.raises(ConfigError, match="conv: algorithm 'guest' does not quantize weights"):
        make_quantizer("guest", TensorSpec("weight", 4, name="conv", shape=(2, 2)))


def test_algorithms_cannot_be_changed_through_the_table():
    algorithms().clear()
    assert "fat" in algorithms()


@pytest.mark.parametrize("name", ["fatt", "FAT", "", "quantization"])
def test_unknown_names(name):
    names = ", ".join(sorted(algorithms()))
    with pytest.raises(ConfigError, match=f"unknown algorithm '{name}'; allowed: {names}"):
        get_algorithm(name)


@pytest.mark.parametrize(
    "value,reason",
    [
        ("missing_module:Thing", "cannot be loaded: ModuleNotFoundError"),
        (f"{__name__}:Nothing", "cannot be loaded: AttributeError"),
        (f"{__name__}:install", "is not a fat_plugins Algorithm"),
        (f"{__name__}:Guest", "calls itself 'guest'"),
    ],
)
def test_a_broken_plug_in_is_left_out_with_a_warning(install, value, reason):
    install(broken=value)
    with pytest.warns(RuntimeWarning, match=f"algorithm 'broken' is left out: .*{reason}"):
        assert "fat" in algorithms()
    with pytest.raises(ConfigError, match=f"algorithm 'broken': .*{reason}"):
        get_algorithm("broken")


def test_two_packages_with_one_name(install):
    install(fat_=f"{__name__}:Impostor")
    with pytest.warns(RuntimeWarning, match="another installed package has an algorithm of this name"):
        assert "fat" not in algorithms() and "lsq" in algorithms()


def test_an_installation_without_entry_points(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    registry.refresh()
    with pytest.raises(ConfigError, match="no algorithms found: install the package"):
        algorithms()
    monkeypatch.undo()
    registry.refresh()


def test_coordinators_are_built_when_an_algorithm_has_one():
    class Coupled(Guest):
        coordinator = Coordinator

    assert Guest.make_coordinator([]) is None
    assert isinstance(Coupled.make_coordinator([]), Coordinator)


def test_the_core_imports_no_host():
    import subprocess
    import sys

    code = (
        "import sys, fat_plugins; fat_plugins.algorithms(); from fat_plugins.config import json_schema;"
        "hosts = {'nncf', 'brevitas', 'openvino', 'torchvision', 'onnx', 'fat_nncf'} & set(sys.modules);"
        "sys.exit(', '.join(hosts) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
