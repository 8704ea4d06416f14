"""Every shipped recipe for ImageNet trains for two steps."""

import pytest
from shipped_runs import HAS_VISION, check, images, needs, only_trained, tiny_run

if not HAS_VISION:
    pytest.skip("torchvision is not installed", allow_module_level=True)
pytestmark = [needs("nncf"), pytest.mark.filterwarnings("ignore")]  # of NNCF and torch about each other


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))["imagenet"]


@pytest.mark.parametrize("name", only_trained("imagenet"))
def test_recipe_trains_for_two_steps(name, root, tmp_path, monkeypatch):
    check(tiny_run(name, root, tmp_path, monkeypatch))
