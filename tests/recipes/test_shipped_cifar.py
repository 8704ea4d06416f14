"""Every shipped recipe for CIFAR with NNCF trains for two steps."""

import pytest
from shipped_runs import check, images, needs, only_trained, tiny_run

pytestmark = [needs("nncf"), pytest.mark.filterwarnings("ignore")]  # of NNCF and torch about each other


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", only_trained("cifar"))
def test_recipe_trains_for_two_steps(name, roots, tmp_path, monkeypatch):
    check(tiny_run(name, roots[name.split("/")[0]], tmp_path, monkeypatch))
