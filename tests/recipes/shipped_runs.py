"""Runs of the shipped recipes for two steps: thin networks, small random images in the formats of the real data sets.

What a recipe says about algorithm, widths, layers, optimizer, schedule and the rest of its training stays as it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_images import cifar, folders
from torch import nn

from fat_plugins.network import named_quantizers
from fat_plugins.recipes import Options, Recipe, RunReport, load_recipe, nets_cifar, run, schema, shipped, train
from fat_plugins.recipes.checkpoint import load_checkpoint
from fat_plugins.recipes.models import MODELS, build_torchvision
from fat_plugins.recipes.report import label

HAS_VISION = find_spec("torchvision") is not None
if HAS_VISION:
    from torchvision_shim import import_torchvision

    import_torchvision()

NAMES = [name for name in sorted(shipped()) if "/" in name]
#: runs that go on to export and verification: the form and bits of what kind of tensor are looked for in the files
EXPORTED = {
    "cifar10/vgg_small_fat_w4a4": ("weight", "uniform", 4),
    "cifar10/resnet20_fat_log_w3a3": ("weight", "codebook", 3),
    "cifar10/resnet20_bitat_w1a1": ("weight", "codebook", 1),
    "imagenet/resnet18_quantization_networks_w1a2": ("activation", "staircase", 2),
    "cifar10/resnet20_fat_w2a2_first_last_lsq_w8a8": ("activation", "uniform", 2),
    "cifar10/resnet20_gpfq_w4a8": ("weight", "uniform", 4),
    "cifar10/resnet20_fat_w4a4_brevitas": ("weight", "uniform", 4),
}
#: what makes the families of 32x32 networks thin of 32x32 networks
SMALL = {
    "mobilenet": "model.params.width=0.25",
    "vgg": "model.params.width=8",
    "resnet": "model.params.width=4",
    "repvgg": "model.params={width: 4, blocks: 2}",
}
#: runs with the whole depth
DEEP = ("cifar10/resnet56_squantizer_w4a4", "imagenet/resnet50_lsq_w4a4")
#: what torchvision's channels are divided by; 3 channels of images and the classes stay
THIN = 8


def of_host(host: str) -> list[str]:
    """Recipes for a host; those that need torchvision only where it is."""
    within_reach = (name for name in NAMES if HAS_VISION or not name.startswith("imagenet"))
    return [name for name in within_reach if load_recipe(name).host == host]


def only_trained(folder: str) -> list[str]:
    """Recipes for NNCF that are not among :data:`EXPORTED`."""
    return [name for name in of_host("nncf") if name.startswith(folder) and name not in EXPORTED]


def needs(host: str) -> pytest.MarkDecorator:
    """Skip where a host is not installed."""
    try:
        version(host)
        absent = False
    except PackageNotFoundError:
        absent = True
    return pytest.mark.skipif(absent, reason=f"{host} is not installed")


def images(folder: Path) -> dict[str, Path]:
    """Where the images of each data set are."""
    cifar(folder, 10)
    cifar(folder, 100, 5)
    if HAS_VISION:
        folders(folder / "imagenet", {"train": 5, "val": 2})
    return {"cifar10": folder, "cifar100": folder, "imagenet": folder / "imagenet"}


def thin_torchvision(name: str, params: dict, classes: int, *, shallow: bool) -> nn.Module:
    """torchvision's network with the same names of layers and an eighth of the channels.

    :param shallow: two blocks in every stage of a ResNet.
    """
    with torch.device("meta"):
        model = build_torchvision(name, params, classes)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        if shallow and hasattr(model, stage):
            del getattr(model, stage)[2:]

    def thin(count: int) -> int:
        return count if count in (3, classes) else max(count // THIN, 1)

    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            channels = thin(layer.in_channels), thin(layer.out_channels)
            shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, thin(layer.groups)
            model.set_submodule(path, nn.Conv2d(*channels, *shape, bias=layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(path, nn.BatchNorm2d(thin(layer.num_features)))
        elif isinstance(layer, nn.Linear):
            model.set_submodule(path, nn.Linear(thin(layer.in_features), thin(layer.out_features)))
    return model


@dataclass
class TinyRun:
    """What came out of :func:`tiny_run`; ``model`` is the trained one, with its quantizers."""

    recipe: Recipe
    report: RunReport
    model: nn.Module
    directory: Path
    metrics: dict


def tiny_run(name: str, root: Path, directory: Path, monkeypatch, *settings: str) -> TinyRun:
    """Train a shipped recipe for two steps of its last stage.

    :param root: images of the recipe's data set.
    """
    data, net = name.split("/")
    shallow = name not in DEEP
    sizes = [
        f"data.params.root={root}", "data.params.validation_fraction=0.2", "data.params.calibration=8",
        "data.batch_size=8",
    ]  # fmt: skip
    if data == "imagenet":
        sizes += ["data.params.size=32", "data.params.workers=0", "model.weights=null"]
        monkeypatch.setattr(schema, "build_torchvision", partial(thin_torchvision, shallow=shallow))
    else:
        sizes.append(next(v for k, v in SMALL.items() if net.startswith(k)))
    if shallow:
        monkeypatch.setitem(MODELS, "resnet56", MODELS["resnet20"])
        stages = [
            (expand, wide, min(count, 2), stride) for expand, wide, count, stride in nets_cifar.MobileNetV2.STAGES
        ]
        monkeypatch.setattr(nets_cifar.MobileNetV2, "STAGES", stages)
    recipe = load_recipe(name, [*sizes, *(settings or ["export=null"])])
    recipe.pretrain.epochs = min(1, recipe.pretrain.epochs)
    recipe.training.stages = recipe.training.stages[-1:]
    evaluated, evaluate = [], run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda model, *args: evaluated.append(model) or evaluate(model, *args))
    monkeypatch.chdir(directory)  # NNCF 2 writes its graphs to the current folder
    report = train(recipe, directory / "run", options=Options(max_steps=2))
    metrics = json.loads((directory / "run" / "metrics.json").read_text())
    return TinyRun(recipe, report, evaluated[-1], directory / "run", metrics)


def check(tiny: TinyRun) -> None:
    """It was quantized as the recipe says, trained, evaluated and saved."""
    recipe = tiny.recipe
    (result,) = tiny.report.results
    last = load_checkpoint(tiny.directory / "checkpoint" / "last.safetensors")
    trains = recipe.training.epochs > 0  # what is post-training does not
    assert (result.algorithm, last.progress["epoch"]) == (recipe.algorithm, int(trains))
    (stage,) = tiny.metrics["quantized"]["stages"]
    assert len(stage["epochs"]) == trains
    for numbers in (stage["before_training"], *stage["epochs"]):
        assert math.isfinite(numbers["validation_loss"]) and 0 <= numbers["validation_accuracy"] <= 1
    assert all(math.isfinite(epoch["train_loss"]) for epoch in stage["epochs"])
    sections = [s for _, s in schema.plugin_sections(recipe.config_for(None, recipe.training.stages[-1]))]
    for role, group in (("weight", "weights"), ("activation", "activations")):
        for section in sections:
            own = [q for _, q in named_quantizers(tiny.model) if (q.role, q.algorithm) == (role, section["algorithm"])]
            text = label({"compression": section})
            left_out = "W32A" in text if role == "weight" else text.endswith("A32")
            wanted = set() if left_out else {section[group]["bits"]}
            assert {q.spec.bits for q in own} == wanted, role
    if not trains:
        return
    starts = load_checkpoint(tiny.directory / "checkpoint" / "float.safetensors").state
    kept = [key for key in starts if key in last.state and key.endswith("bias")]
    assert any(not torch.equal(starts[key], last.state[key]) for key in kept)
