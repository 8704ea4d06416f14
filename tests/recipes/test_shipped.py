"""The recipes of the papers: all of them load, and every algorithm and family of networks trains for two steps, on
small random images in the formats of the real data sets."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest
from tiny_images import cifar, folders

from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes import Options, load_recipe, shipped, train

HAS_VISION = find_spec("torchvision") is not None
if HAS_VISION:
    from torchvision_shim import import_torchvision

    import_torchvision()

NAMES = [n for n in sorted(shipped()) if "/" in n]
vision = pytest.mark.skipif(not HAS_VISION, reason="torchvision is not installed")
#: one recipe of each algorithm and family: those that differ in bits only run the same code
RUN = {
    "cifar10/resnet20_fat_w4a4": "nncf",
    "cifar10/resnet20_fat_log_w2a2": "nncf",
    "cifar10/resnet20_fat_w4a4_brevitas": "brevitas",
    "cifar10/mobilenet_v2_lsq_w4a4": "nncf",
    "cifar10/resnet20_lsq_plus_w4a4": "nncf",
    "cifar10/resnet20_pact_w2a2": "nncf",
    "cifar10/resnet20_dorefa_w2a2": "nncf",
    "cifar10/resnet56_squantizer_w4a4": "nncf",
    "cifar10/vgg_small_direct_w2a2": "nncf",
    "cifar10/vgg7_rq_w4a4": "nncf",
    "cifar10/vgg7_dropbits_learned_w4a4": "nncf",
    "cifar10/resnet20_quantization_networks_w3": "nncf",
    "cifar10/resnet20_bitat_w1a1": "nncf",
    "cifar100/mobilenet_v2_lsq_w4a4": "nncf",
    "imagenet/resnet18_quantization_networks_w1a2": "nncf",
    "imagenet/mobilenet_v2_fat_w4a4": "nncf",
    "imagenet/resnet50_lsq_w4a4": "nncf",
}
SMALL = {"mobilenet": "model.params.width=0.25", "vgg": "model.params.width=8", "resnet": "model.params.width=4"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[vision] * n.startswith("imagenet")) for n in NAMES])
def test_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "_")
    assert recipe.data.name == name.split("/")[0]
    assert (recipe.model.weights is not None) == name.startswith("imagenet/")
    last = recipe.config_for(None, recipe.training.stages[-1])["compression"]
    bits = f"w{last['weights']['bits']}" + (
        f"a{last['activations']['bits']}" if "bits" in last.get("activations", {}) else ""
    )
    assert name.removesuffix("_brevitas").endswith(f"_{bits}")
    assert f"_{recipe.algorithm}_" in name


def test_every_algorithm_has_a_recipe():
    from fat_plugins.registry import algorithms

    used = {load_recipe(n).algorithm for n in NAMES if n.startswith("cifar")}
    assert used == set(algorithms()) - {"minmax"}
    assert {n.split("_")[0] for n in RUN} <= {n.split("_")[0] for n in NAMES}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cifar(folder, 10)
    cifar(folder, 100, 5)
    if HAS_VISION:
        folders(folder / "imagenet", {"train": 5, "val": 2})
    return {"cifar10": folder, "cifar100": folder, "imagenet": folder / "imagenet"}


@pytest.mark.filterwarnings("ignore")  # of NNCF, torch and Brevitas about each other
@pytest.mark.parametrize(
    ("name", "host"), [pytest.param(n, h, marks=[vision] * n.startswith("imagenet")) for n, h in RUN.items()]
)
def test_recipe_trains_for_two_steps(name, host, roots, tmp_path, monkeypatch):
    try:
        version(host)
    except PackageNotFoundError:
        pytest.skip(f"{host} is not installed")
    monkeypatch.chdir(tmp_path)  # NNCF 2 writes its graphs to the current folder
    data, net = name.split("/")
    settings = [f"data.params.root={roots[data]}", "data.params.validation_fraction=0.2", "data.batch_size=8"]
    if data == "imagenet":
        settings += ["data.params.size=32", "data.params.workers=0", "model.weights=null"]
    else:
        settings.append(next(v for k, v in SMALL.items() if net.startswith(k)))
    recipe = load_recipe(name, [*settings, "export=null"])
    assert recipe.host == host
    recipe.pretrain.epochs = min(1, recipe.pretrain.epochs)
    recipe.training.stages = recipe.training.stages[-2:]
    report = train(recipe, tmp_path / "run", options=Options(max_steps=2))
    (result,) = report.results
    assert result.algorithm == recipe.algorithm
    assert 0 <= result.accuracy <= 1


def test_missing_images_are_one_line(tmp_path):
    recipe = load_recipe("cifar10/resnet20_lsq_w4a4", [f"data.params.root={tmp_path}"])
    with pytest.raises(FatPluginsError, match=r"^data.params.root: no data_batch_1.bin in [^\n]*$"):
        recipe.data.build()
