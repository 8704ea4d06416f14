"""Tests of the NNCF 2 adapter. In an environment with another NNCF, or none, nothing here is collected."""

import sys
from pathlib import Path

import pytest
import torch

from fat_plugins.errors import HostError

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

try:
    import fat_nncf

    available = fat_nncf.GENERATION == 2
except HostError:
    available = False

if not available:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    """NNCF writes its graphs to the working directory; every test starts from the same random state."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
