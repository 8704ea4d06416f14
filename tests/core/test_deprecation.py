"""Names that go away warn first, in the line that uses them, and work."""

import importlib
import warnings

import pytest

import fat_plugins.network
import fat_plugins.quantizer
from fat_plugins import deprecation

MOVED = ("broadcast_state", "coordinators", "named_quantizers", "param_groups", "regularization", "set_progress")


@pytest.mark.parametrize("name", MOVED)
def test_names_that_moved_are_found_with_a_warning(name):
    with pytest.warns(
        DeprecationWarning, match=rf"fat_plugins\.quantizer\.{name} .*0\.4: use fat_plugins\.network\."
    ) as r:
        found = getattr(fat_plugins.quantizer, name)
    assert found is getattr(fat_plugins.network, name)
    assert r[0].filename == __file__


def test_an_import_statement_warns_where_it_stands():
    with pytest.warns(DeprecationWarning, match="use fat_plugins.network.named_quantizers") as record:
        from fat_plugins.quantizer import named_quantizers
    assert named_quantizers is fat_plugins.network.named_quantizers
    assert record[0].filename == __file__


def test_other_names_are_unknown_as_ever():
    with pytest.raises(AttributeError, match=r"no attribute 'set_progres'; did you mean 'set_progress'\?"):
        _ = fat_plugins.quantizer.set_progres
    assert not hasattr(fat_plugins.quantizer, "__wrapped__")


def test_looking_through_a_module_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module("fat_plugins.deprecation"))
        assert not set(dir(fat_plugins.quantizer)) & set(MOVED)


def test_a_function_with_a_successor_works_and_warns():
    @deprecation.deprecated("new_one", until="9.0")
    def old_one(x, *, y=1):
        """Adds."""
        return x + y

    with pytest.warns(
        DeprecationWarning, match=r"old_one is deprecated and will be gone in fat-plugins 9\.0: use new_one"
    ) as r:
        assert old_one(1, y=2) == 3
    assert r[0].filename == __file__ and old_one.__doc__ == "Adds."
