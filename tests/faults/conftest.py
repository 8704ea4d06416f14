import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
sys.path.insert(0, str(Path(__file__).parent))

from toy_host import ToyHost


@pytest.fixture
def toy_host(monkeypatch):
    """Recipes run on the toy host, whatever is installed."""
    ToyHost.calls, ToyHost.controllers = [], []
    for module in ("run", "loaded"):
        monkeypatch.setattr(f"fat_plugins.recipes.{module}.get_host", lambda name: ToyHost())
    return ToyHost
