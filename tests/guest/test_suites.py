"""The comparison of a host's own tests notices what an import changes."""

import suites

TESTS = """
import sys
import pytest

def test_same():
    pass

def test_other():
    assert "colorsys" not in sys.modules

def test_skipped():
    pytest.skip("as ever")
"""


def test_an_import_that_changes_something_is_found(tmp_path):
    (tmp_path / "test_host.py").write_text(TESTS)
    without, ours = (suites.run(tmp_path, ["test_host.py"], [], module) for module in (None, "colorsys"))
    assert without == {"test_host::test_same": "passed", "test_host::test_other": "passed",
                       "test_host::test_skipped": "skipped"}  # fmt: skip
    assert ours == {**without, "test_host::test_other": "failure"}


def test_a_test_that_cannot_be_collected_is_an_error(tmp_path):
    (tmp_path / "test_host.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    found = suites.run(tmp_path, ["."], [], None)
    assert "error" in found.values() and len(found) == 4
