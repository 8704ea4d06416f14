"""Images in folders and torchvision's models, through torchvision."""

import urllib.error
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_images import cifar, folders

if find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)
from torchvision_shim import import_torchvision

from fat_plugins.errors import ConfigError
from fat_plugins.recipes.data import DATASETS
from fat_plugins.recipes.schema import ModelSection
from fat_plugins.recipes.weights import load_weights, torchvision_weights

torchvision = import_torchvision()


def make(root, name="imagefolder", **options):
    params, maker = DATASETS[name]
    return maker(params(**{"root": str(root), "size": 24, "workers": 0, "validation_fraction": 0.25, **options}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("images"), {"train": 8, "val": 3})


# -- folders ---------------------------------------------------------------------------------------------------------
def test_parts_are_split_by_class_and_never_from_the_test_images(root):
    data = make(root, "imagenet")
    assert (data.classes, data.sample_shape, len(data.train), len(data.validation), len(data.test)) == (
        4, (3, 24, 24), 24, 8, 12,
    )  # fmt: skip
    assert data.images("validation", 8)[1].bincount().tolist() == [2, 2, 2, 2]
    assert len(set(data.images("train", 8)[1].tolist())) > 1  # classes are mixed
    parts = [data.images(part, 99)[0].flatten(1) for part in ("train", "validation", "test")]
    assert len(torch.unique(torch.cat(parts), dim=0)) == 44


def test_evaluation_resizes_crops_and_normalises(root):
    from PIL import Image

    data = make(root, resize=32)
    image, label = data.test[4]
    assert label == 1
    pil = Image.open(root / "val" / "class1" / "1.png")
    wide = pil.resize((40, 32), Image.Resampling.BILINEAR).crop((8, 4, 32, 28))
    pixels = torch.from_numpy(np.array(wide)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(image, (pixels - mean) / std, atol=1e-5)


@pytest.mark.parametrize("augment", ["resized_crop", "crop", "pad_crop"])
def test_training_images_differ_by_epoch_and_not_by_workers(root, augment):
    data = make(root, augment=augment)
    state = torch.get_rng_state()
    first = [x.clone() for x, _ in data.training_loader(8, 3).begin(1)]
    assert torch.equal(torch.get_rng_state(), state)
    workers = [x.clone() for x, _ in make(root, augment=augment, workers=2).training_loader(8, 3).begin(1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first[1:], workers, strict=True))
    augmented, index = data.augmented(3), 5
    assert not torch.equal(augmented[(1, index)][0], augmented[(2, index)][0])
    assert augmented[(1, index)][0].shape == (3, 24, 24)


def test_without_augmentation_training_sees_what_evaluation_sees(root):
    data = make(root, augment="none")
    assert torch.equal(data.augmented(0)[(4, 2)][0], data.train[2][0])


def test_validation_may_have_a_folder_of_its_own(tmp_path):
    data = make(folders(tmp_path, {"train": 3, "val": 2, "held": 1}), validation="held")
    assert (len(data.train), len(data.validation)) == (12, 4)


def test_mistakes_in_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.params.train: no folder .*train; set data.params.root"):
        make(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match=r"data.params.train: .*train: Couldn't find any class folder"):
        make(tmp_path)
    folders(tmp_path, {"train": 4})
    folders(tmp_path, {"val": 2}, classes=3)
    with pytest.raises(ConfigError, match=r"data.params.test: its classes are not those .* 'class3'"):
        make(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named(tmp_path, workers):
    folders(tmp_path, {"train": 4, "val": 1}, classes=1)
    (tmp_path / "val" / "class0" / "0.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"^cannot read the image .*val/class0/0.png: [^\n]*$"):
        next(iter(make(tmp_path, workers=workers).test_loader()))


def test_cifar_through_torchvision_needs_the_real_files(tmp_path):
    cifar(tmp_path, 10)
    params, maker = DATASETS["cifar10"]
    with pytest.raises(ConfigError, match=r"data.params.root: .*: Dataset not found or corrupted"):
        maker(params(root=str(tmp_path), format="torchvision"))


# -- models ----------------------------------------------------------------------------------------------------------
class _Data:
    sample_shape, classes = (3, 32, 32), 5


@pytest.mark.parametrize(
    ("name", "params"),
    [("resnet18", {}), ("mobilenet_v2", {"width_mult": 0.25}), ("googlenet", {"init_weights": False})],
)
def test_torchvisions_models_by_name(name, params):
    model = ModelSection(name=name, params=params).build(_Data()).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "resnet19"}, "unknown model 'resnet19'.*torchvision's classifiers; did you mean 'resnet"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "unknown model"),
        ({"name": "resnet18", "weights": "IMAGENET1K_V3"}, "unknown weights 'IMAGENET1K_V3'.*mean 'IMAGENET1K_V1'"),
    ],
)
def test_unknown_models_and_weights(section, expected):
    with pytest.raises(ValueError, match=expected):
        ModelSection(**section)


def test_wrong_options_are_one_line():
    with pytest.raises(ConfigError, match=r"model.params: torchvision's resnet18: .*'widht'"):
        ModelSection(name="resnet18", params={"widht": 3}).build(_Data())


def test_weights_come_through_torchvision(monkeypatch):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v2(weights=None)
    weights = torchvision_weights("mobilenet_v2", "IMAGENET1K_V1")
    asked = {}

    def cached(self, **options):
        asked.update(options)
        return source.state_dict()

    monkeypatch.setattr(type(weights), "get_state_dict", cached)
    section = ModelSection(name="mobilenet_v2", weights="IMAGENET1K_V1", new_head=True)
    model = section.pretrained(_Data())
    assert asked == {"progress": False, "check_hash": True, "weights_only": True}
    assert torch.equal(model.features[0][0].weight, source.features[0][0].weight)
    assert model.classifier[1].out_features == 5


def test_no_network_says_where_to_put_the_file(monkeypatch, tmp_path):
    torch.hub.set_dir(str(tmp_path))

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot be had .*no route to host.*: download https://\S+ to \S+checkpoints"
    ) as e:
        load_weights(torch.nn.Linear(1, 1), "resnet18", "IMAGENET1K_V1")
    assert "\n" not in str(e.value)
