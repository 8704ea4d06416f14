"""Networks for CIFAR, and pretrained weights from files."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes.nets_cifar import MobileNetV2, ResNet, VGGSmall
from fat_plugins.recipes.schema import ModelSection
from fat_plugins.recipes.weights import head_of, load_weights


def count(net):
    return sum(p.numel() for p in net.parameters())


def layers(net):
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())


@pytest.mark.parametrize(
    ("net", "parameters", "weighted"),
    [
        (lambda: ResNet(3, 3, 10, shortcut="pad"), 269_722, 20),  # He et al.: 0.27 million
        (lambda: ResNet(9, 3, 10, shortcut="pad"), 853_018, 56),  # 0.85 million
        (lambda: ResNet(3, 3, 10), 272_474, 22),
        (lambda: MobileNetV2(3, 10), 2_236_682, 53),
        (lambda: VGGSmall((3, 32, 32), 10), 4_660_106, 7),
        (lambda: VGGSmall((3, 32, 32), 10, hidden=1024), 12_978_058, 8),
    ],
)
def test_sizes_are_the_known_ones(net, parameters, weighted):
    with torch.device("meta"):
        built = net()
    assert (count(built), layers(built)) == (parameters, weighted)


class _Data:
    def __init__(self, shape=(3, 32, 32), classes=7):
        self.sample_shape, self.classes = shape, classes


@pytest.mark.parametrize(
    "section",
    [
        {"name": "resnet20", "params": {"width": 4, "shortcut": "pad"}},
        {"name": "resnet56", "params": {"width": 4}},
        {"name": "vgg_small", "params": {"width": 4, "hidden": 9}},
        {"name": "mobilenet_v2_cifar", "params": {"width": 0.25}},
    ],
)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 24)])
def test_nets_train_on_images_of_any_kind(section, shape):
    net = ModelSection(**section).build(_Data(shape))
    out = net(torch.rand(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_padded_shortcut_keeps_every_second_pixel():
    from fat_plugins.recipes.nets_cifar import _Pad

    x = torch.rand(1, 4, 6, 6)
    out = _Pad(4)(x)
    assert out.shape == (1, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert int((out != 0).sum()) == 4 * 9


# -- weights from files ----------------------------------------------------------------------------------------------
def net(classes=10, seed=0):
    torch.manual_seed(seed)
    return ResNet(1, 3, classes, 4)


def same(a, b, but=()):
    return {k for k, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])} == set(but)


def _safetensors(state, path):
    save_file({k: v.contiguous() for k, v in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.safetensors", _safetensors),
        ("w.pt", torch.save),
        ("w.pth", lambda s, p: torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, p)),
        ("w.pth", lambda s, p: torch.save({k: v for k, v in s.items() if "num_batches" not in k}, p)),
    ],
)
def test_weights_from_the_usual_files(tmp_path, name, write):
    source, target = net(), net(seed=1)
    write(source.state_dict(), tmp_path / name)
    load_weights(target, "resnet20", str(tmp_path / name))
    assert same(source, target)


def test_recipe_names_the_file(tmp_path):
    source = net()
    _safetensors(source.state_dict(), tmp_path / "w.safetensors")
    section = ModelSection(name="resnet20", params={"width": 4}, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"no 'stages.0.1.bn1.bias'|no 'stages"):
        section.pretrained(_Data(classes=10))  # resnet20 has three blocks a stage, the file one


def test_new_head_for_other_classes(tmp_path):
    path = str(tmp_path / "w.pt")
    torch.save(net(10).state_dict(), path)
    target = net(4, seed=1)
    fresh = net(4, seed=1)
    with pytest.raises(CheckpointError, match=r"'head.weight' has shape \(10, 16\).*set model.new_head: true"):
        load_weights(target, "x", path)
    assert same(target, fresh)
    load_weights(target, "x", path, new_head=True)
    assert torch.equal(target.head.weight, fresh.head.weight)
    assert torch.equal(target.conv.weight, net(10).conv.weight)


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_files_that_would_run_code_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Bomb()}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Bomb()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=rf"model.weights: {name}: not a") as caught:
            load_weights(net(), "x", name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.pt", None, "no file"),
        ("w.safetensors", b"nonsense", "not readable"),
        ("w.pt", b"nonsense", "not a"),
        ("w.pt", b"", "not readable"),
    ],
)
def test_damaged_files(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_weights(net(), "x", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_files_without_a_state_dict(tmp_path):
    path = tmp_path / "w.pt"
    for content in ([1], {}, {"a": 1}, {"model": {"a": "b"}}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="expected a state dict"):
            load_weights(net(), "x", str(path))


def test_weights_by_name_are_torchvisions():
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V1' is no file, and 'resnet20' is not torchvision's"):
        ModelSection(name="resnet20", weights="IMAGENET1K_V1")


def test_head_is_the_last_linear_layer():
    assert head_of(net()) == "head"
    assert head_of(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())) == "0"
    with pytest.raises(ConfigError, match="no linear layer"):
        head_of(nn.ReLU())
