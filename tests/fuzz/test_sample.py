"""A sample of the inputs of ``driver.py`` (tox environment ``fuzz``) in every run of the tests."""

import subprocess
import sys
from pathlib import Path

import driver
import pytest
from harness import Case, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import without_hosts

from fat_plugins.config import CompressionConfig
from fat_plugins.errors import ConfigError, FatPluginsError, one_line, shown

#: inputs of each kind; those of slow ones
COUNT, FEW = 12, 2
SLOW = ("run directories", "training states (--resume)", "QONNX files", "ONNX files", "OpenVINO files")
NAMES = [kind.name for kind in driver.kinds()]


@pytest.mark.parametrize("name", NAMES)
def test_sample_of_bad_inputs(name, recwarn):
    kind = next(kind for kind in driver.kinds() if kind.name == name)
    with without_hosts():
        tally = driver.run(kind, 0, range(FEW if name in SLOW else COUNT), report=None)
    assert tally.defects == []
    assert tally.refused


# -- the judge -------------------------------------------------------------------------------------------------------
def _raise(error):
    raise error


def _touch(path):
    path.write_text("x")
    raise ConfigError("no")


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (lambda folder: Case("", lambda: _raise(KeyError("x"))), "KeyError"),
        (lambda folder: Case("", lambda: None, bad=True), "it was accepted"),
        (lambda folder: Case("", lambda: _raise(ConfigError(""))), "an empty message"),
        (lambda folder: Case("", lambda: _raise(ConfigError("a")), names=("key",)), "names none of"),
        (lambda folder: Case("", lambda: _raise(ConfigError("a")), hint="key"), "does not offer 'key'"),
        (lambda folder: Case("", lambda: _raise(ConfigError("<x object at 0x7f>"))), "address of memory"),
        (lambda folder: Case("", lambda: _touch(folder / "new"), folder=folder), "files changed"),
        (lambda folder: Case("", lambda: _touch(folder / "new")), "opened for writing"),
        (lambda folder: Case("", lambda: __import__("fuzz_canary")), "import of fuzz_canary"),
        (lambda folder: Case("", lambda: subprocess.run([sys.executable, "-V"]) and None), "subprocess.Popen"),
        (lambda folder: Case("", lambda: print("x") or 2), "standard error is not one line"),
        (lambda folder: Case("", lambda: print("error: a", file=sys.stderr) or 7), "exit code 7"),
        (lambda folder: Case("", lambda: bytearray(10**9) and None), "MB of memory"),
    ],
)
def test_the_judge_sees(case, fault, tmp_path):
    verdict = judge(case(tmp_path))
    assert (verdict.status, fault in verdict.message) == ("defect", True), verdict


def test_the_judge_stops_a_hang(monkeypatch):
    monkeypatch.setattr("harness.CLOCK", 0.2)
    assert "a hang" in judge(Case("", lambda: [None for _ in iter(int, 1)] and None)).message


def test_the_same_number_is_the_same_input(tmp_path):
    kind = next(kind for kind in driver.kinds() if kind.name == "compression sections")
    from random import Random

    assert [kind(tmp_path).case(Random("7")).what for _ in range(2)] == [kind(tmp_path).case(Random("7")).what] * 2


# -- messages --------------------------------------------------------------------------------------------------------
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_KEYS = st.sampled_from(sorted(CompressionConfig.model_fields))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(_KEYS | st.text(max_size=12), ANY_JSON, max_size=4), st.sampled_from(["lsq", "fat", "rq"]))
def test_any_section_is_taken_or_refused_in_one_line(section, algorithm):
    try:
        CompressionConfig.parse({**section, "algorithm": algorithm})
    except ConfigError as error:
        assert str(error).isprintable()
        assert 0 < len(str(error)) <= 1200


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=5000))
def test_any_message_is_one_printable_line(text):
    message = str(FatPluginsError(text))
    assert message.isprintable()
    assert len(message) <= 1200
    assert FatPluginsError(text).args == (text,)
    assert one_line(message, 1200) == message


def test_long_values_are_cut_and_short_ones_kept():
    assert shown("a" * 1000) == "'" + "a" * 76 + "..."
    assert shown("abc") == "'abc'"
    assert len(shown(list(range(10**6)))) == 80
    assert one_line("x" * 10**7, 100) == "x" * 62 + " ... " + "x" * 33


# -- real processes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not a recipe"),
        ("modle: {name: digits_cnn}", "did you mean 'model'?"),
        ("!!python/object/apply:os.system ['touch hacked']", "only plain YAML values"),
    ],
)
def test_a_real_process_ends_with_one_line_and_code_2(text, expected, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    command = [sys.executable, "-m", "fat_plugins", "train", "bad.yaml", "-o", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: bad.yaml") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert [p.name for p in Path(tmp_path).iterdir()] == ["bad.yaml"]
