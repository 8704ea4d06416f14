import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_host import ToyHost

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture
def toy_host(monkeypatch):
    """Recipes run on the toy host, whatever is installed."""
    ToyHost.calls, ToyHost.controllers = [], []
    for module in ("run", "loaded"):
        monkeypatch.setattr(f"fat_plugins.recipes.{module}.get_host", lambda name: ToyHost())
    return ToyHost


@pytest.fixture
def recipe_text():
    """A recipe that trains in a second and exports nothing."""
    return """\
name: tiny
seeds: [3]
model: {name: digits_cnn, params: {width: 4}}
data: {name: digits, batch_size: 256}
compression: {algorithm: lsq, weights: {bits: 4}}
pretrain:
  epochs: 2
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 1
  optimizer: {name: sgd, lr: 0.02}
export: null
"""


@pytest.fixture
def load(tmp_path):
    """Load a recipe from text."""
    from fat_plugins.recipes import load_recipe

    def loader(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return load_recipe(path)

    return loader
