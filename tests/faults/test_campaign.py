"""A few kills; hundreds are the business of ``tox -e faults``."""

import subprocess
import sys
from pathlib import Path

import pytest
from scenarios import scenarios

from fat_plugins import algorithms

HERE = Path(__file__).parent
#: a method that takes the weight over, stages of a bit progression, another host
SAMPLE = [name for name in ("direct", "stages", "brevitas dropbits") if name in scenarios()]


@pytest.mark.skipif(not SAMPLE, reason="no host is installed")
def test_killed_runs_end_as_if_they_had_not_been():
    names = [word for name in SAMPLE for word in ("--algorithm", name)]
    done = subprocess.run(
        [sys.executable, str(HERE / "campaign.py"), "--runs", "2", *names],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1]
    assert total.startswith(f"recipe all  runs {2 * len(SAMPLE)}  ")
    assert total.endswith(f"equal {2 * len(SAMPLE)}")


@pytest.mark.skipif("fat" not in scenarios(), reason="NNCF is not installed")
def test_every_algorithm_has_a_recipe():
    assert set(algorithms()) <= set(scenarios())
