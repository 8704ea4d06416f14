"""torchvision's models with FAT at 4 bits, the same way on both NNCF generations: compress, train a step, save, resume
bit for bit, export to OpenVINO, compare codes, and every convolution and linear layer on an integer kernel.

Random weights and small images: nothing here says how well a model learns.
"""

from __future__ import annotations

import copy
import json

import fat_nncf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision_shim import import_torchvision

from fat_plugins.export.openvino import kernels
from fat_plugins.export.verify import verify
from fat_plugins.forms import UniformGrid
from fat_plugins.frozen import FrozenWeight
from fat_plugins.network import named_quantizers

models = import_torchvision().models
heavy = pytest.mark.heavy
pytestmark = [pytest.mark.filterwarnings("ignore")]  # of NNCF, torch and OpenVINO about each other

#: image size, batch, arguments. Inception's auxiliary head needs 299 pixels, the network itself does not.
MODELS = {
    "resnet18": (64, 4, {}),
    "squeezenet1_1": (64, 2, {}),
    "mobilenet_v2": (64, 4, {}),
    "resnet50": (64, 4, {}),
    "inception_v3": (128, 4, {"aux_logits": False, "init_weights": False}),
}
HEAVY = ("resnet50", "inception_v3")
CLASSES = 10


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)(weights=None, num_classes=CLASSES, **MODELS[name][2])


def settle_batch_norm(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Running statistics of ``x``, as a trained model has them: untrained ones let the activations of a deep net fade,
    and ranges collected from those say nothing."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # plain average
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


def config(size: int, batch: int) -> dict:
    return {
        "input_info": {"sample_size": [batch, 3, size, size]},
        "compression": {
            "algorithm": "fat",
            "weights": {"bits": 4},
            "activations": {"bits": 4},
            "initializer": {
                "range": {"num_init_samples": batch},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": batch},
            },
        },
    }


def compress(model, description, loader, state=None):
    section = fat_nncf.NNCFConfig.from_dict(copy.deepcopy(description))
    prepared = fat_nncf.register_default_init_args(section, loader)
    if state is None:
        return fat_nncf.create_compressed_model(model, prepared)
    return fat_nncf.create_compressed_model(model, prepared, compression_state=state)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[heavy] * (n in HEAVY)) for n in MODELS])
def test_model_from_float_to_integer_kernels(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # NNCF 2 writes its graphs to the current folder
    size, batch, _ = MODELS[name]
    original = build(name)
    layers = {n: m for n, m in original.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items()}
    x = torch.rand(batch, 3, size, size)
    y = torch.arange(batch) % CLASSES
    settle_batch_norm(original, x)
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=batch)
    description = config(size, batch)
    controller, model = compress(original, description, loader)

    # every weighted layer has a weight quantizer: 4 bits inside, 8 at the edges
    weights = {q.spec.name: q for _, q in named_quantizers(model) if q.role == "weight"}
    assert {n: q.spec.shape for n, q in weights.items()} == shapes
    edges = [n for n, q in weights.items() if q.spec.bits == 8]
    assert edges == [next(iter(layers)), list(layers)[-1]]
    assert all(q.spec.bits == 4 for n, q in weights.items() if n not in edges)

    # one step
    clips = {n: p for n, p in model.named_parameters() if n.endswith(".alpha")}
    before = {n: p.detach().clone() for n, p in clips.items()}
    # Adam: with random weights the gradients of some nets are too small to be seen next to a float32 parameter
    optimizer = torch.optim.Adam(fat_nncf.param_groups(model, 1e-4))
    model.train()
    torch.manual_seed(1)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    loss = torch.nn.functional.cross_entropy(model(x), y) + controller.loss()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # the clips of all low-bit tensors learn; the transform's gradient is there, but zero in large layers (FAT, 10.1)
    assert [n for n, p in clips.items() if torch.equal(p, before[n])] == []
    assert len(clips) >= len(weights) - 2
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith(".transform"))

    # saved and resumed
    model.eval()
    with torch.no_grad():
        expected = model(x)
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    compression_state = json.loads(json.dumps(controller.get_compression_state()))
    resumed_controller, resumed = compress(build(name), description, loader, compression_state)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed.eval()
    with torch.no_grad():
        assert torch.equal(resumed(x), expected)
    assert resumed_controller.scheduler.get_state() == controller.scheduler.get_state()

    # exported, and the codes are those that were trained
    frozen = fat_nncf.freeze(resumed)
    codes = [m for m in frozen.modules() if isinstance(m, FrozenWeight)]
    inner = [m for m in codes if m.name not in edges]
    assert len(codes) == len(layers)
    assert all(isinstance(m.form, UniformGrid) and int(m.codes.abs().max()) <= 7 for m in inner)
    path = tmp_path / "model.xml"
    report = fat_nncf.export_openvino(resumed, path, x)
    result = verify(frozen, path, x)
    assert result.ok, result.detail
    assert sum(w.elements for w in result.weights) == sum(m.codes.numel() for m in codes)

    # sizes and kernels
    bits = {n: weights[n].spec.bits for n in layers}
    packed = sum(torch.Size(shapes[n]).numel() * bits[n] // 8 for n in layers)
    others = 4 * sum(p.numel() for n, p in original_biases(name))
    assert report.weights_bytes <= 1.01 * packed + others + 4096
    ran = {k.name: k for k in kernels(path)}
    assert set(ran) == set(layers)
    assert [k for k in ran.values() if k.speed != "int8"] == []


def original_biases(name: str):
    """What stays float: biases and what batch norm leaves in their place (one number per channel, scales likewise)."""
    for n, p in build(name).named_parameters():
        if p.ndim == 1:
            yield n, p
