"""Shipped recipes of every deployed form are exported, run in their runtime, and have equal codes there."""

import pytest
from shipped_runs import EXPORTED, HAS_VISION, check, images, needs, tiny_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of the hosts and torch about each other
vision = pytest.mark.skipif(not HAS_VISION, reason="torchvision is not installed")
ON_BREVITAS = [name for name in EXPORTED if name.endswith("_brevitas")]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data"))


def check_exported(name, roots, folder, monkeypatch):
    kind, form, bits = EXPORTED[name]
    tiny = tiny_run(name, roots[name.split("/")[0]], folder, monkeypatch, "export.verify_samples=4")
    check(tiny)
    (result,) = tiny.report.results
    assert [d.format for d in result.deployments] == [t.name for t in tiny.recipe.export.targets]
    for deployment in result.deployments:
        assert deployment.verified, deployment.first_difference
        # of 8 to 20 images; a tie may change one
        assert deployment.accuracy == pytest.approx(result.accuracy, abs=0.13)
        rows = [row for row in deployment.layers if row.kind == kind]
        assert (form, bits) in {(row.form, row.bits) for row in rows}
        assert all(row.compared for row in rows)


@needs("nncf")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[vision] * n.startswith("imagenet")) for n in EXPORTED if n not in ON_BREVITAS]
)
def test_recipe_is_exported_and_verified(name, roots, tmp_path, monkeypatch):
    check_exported(name, roots, tmp_path, monkeypatch)


@needs("brevitas")
@pytest.mark.parametrize("name", ON_BREVITAS)
def test_recipe_for_brevitas_is_exported_and_verified(name, roots, tmp_path, monkeypatch):
    check_exported(name, roots, tmp_path, monkeypatch)
