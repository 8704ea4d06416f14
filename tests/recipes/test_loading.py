"""Order and augmentation of training images depend on (seed, epoch, index) and nothing else; CIFAR's files."""

import numpy as np
import pytest
import torch
from tiny_images import cifar

from fat_plugins.errors import ConfigError
from fat_plugins.recipes.data import DATASETS
from fat_plugins.recipes.loading import DrawnImages, EpochBatches, Images, Loader, ShiftedImages, split


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


# -- order -----------------------------------------------------------------------------------------------------------
def keys(*args, epoch=0, skip=0, **kwargs):
    sampler = EpochBatches(*args, **kwargs)
    sampler.epoch, sampler.skip = epoch, skip
    return list(sampler)


def test_every_image_comes_once_and_epochs_differ():
    first, second = keys(20, 5, 1), keys(20, 5, 1, epoch=1)
    assert sorted(i for batch in first for _, i in batch) == list(range(20))
    assert {e for batch in second for e, _ in batch} == {1}
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]
    assert first == keys(20, 5, 1) != keys(20, 5, 2)


def test_skipping_leaves_the_rest_of_the_epoch():
    assert keys(23, 5, 1, skip=2) == keys(23, 5, 1)[2:]
    assert len(keys(23, 5, 1)) == 4  # the incomplete batch is left out
    assert [len(b) for b in keys(3, 5, 1)] == [3]  # unless it is the only one


@pytest.mark.parametrize("length", [24, 26, 5])
def test_processes_share_the_batches_of_one(length):
    whole = keys(length, 8, 1)
    parts = [keys(length, 4, 1, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


# -- augmentation ----------------------------------------------------------------------------------------------------
def test_augmented_images_depend_on_seed_epoch_and_index_only():
    source = Images(torch.rand(40, 3, 8, 8), torch.arange(40))
    images = ShiftedImages(source, 7, 2, flip=True)
    alone = images[(3, 11)][0]
    assert torch.equal(images.__getitems__([(3, 5), (3, 11)])[0][1], alone)
    assert torch.equal(ShiftedImages(source, 7, 2, flip=True)[(3, 11)][0], alone)
    others = [images[(4, i)][0] for i in range(40)]
    assert sum(torch.equal(o, images[(3, i)][0]) for i, o in enumerate(others)) < 10
    assert sum(torch.equal(o, ShiftedImages(source, 8, 2, flip=True)[(4, i)][0]) for i, o in enumerate(others)) < 10


def test_half_of_the_images_are_mirrored_and_nothing_else_happens():
    source = Images(torch.rand(400, 1, 4, 4), torch.arange(400))
    seen, labels = ShiftedImages(source, 0, 0, flip=True).__getitems__([(0, i) for i in range(400)])
    assert labels.tolist() == list(range(400))
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(seen, source.tensors[0], strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(seen, source.tensors[0], strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 150 < sum(mirrored) < 250


class Noisy(torch.utils.data.Dataset):
    """Draws from all global generators, as the transforms of a user may."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        import random

        return torch.rand(1, 2, 2) + random.random() + float(np.random.rand()), index


def test_generators_that_a_dataset_draws_from_are_seeded_by_key_and_restored():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = DrawnImages(Noisy(), 1)
    first, second = drawn[(0, 3)][0], drawn[(1, 3)][0]
    assert torch.equal(drawn[(0, 3)][0], first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_workers_and_skipping_change_nothing(tmp_path):
    make = [Loader(DrawnImages(Noisy(), 1), batch_sampler=EpochBatches(12, 4, 1), num_workers=n) for n in (0, 2)]
    for epoch in range(2):
        assert equal(batches(make[0].begin(epoch)), batches(make[1].begin(epoch)))
    assert equal(batches(make[0].begin(1, 2)), batches(make[1].begin(1))[2:])


def test_reading_leaves_the_global_generator_alone():
    data = DATASETS["shapes"][1](DATASETS["shapes"][0](train=100, validation=50, test=100))
    state = torch.get_rng_state()
    for loader in (
        data.training_loader(10, 0),
        data.calibration_loader(10),
        data.validation_loader(),
        data.test_loader(),
    ):
        assert len(batches(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), state)


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise ConfigError(f"cannot read image {index}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_stays_one_line(workers):
    with pytest.raises(ConfigError, match=r"^cannot read image 0$"):
        list(Loader(Broken(), 2, num_workers=workers))


def test_splits_that_leave_a_part_empty_are_refused():
    with pytest.raises(ConfigError, match=r"validation_fraction: 0.01 of 20 images"):
        split([0, 1] * 10, 0.01, 0)
    first, second = split([0, 1] * 10, 0.2, 0)
    assert sorted([*first, *second]) == list(range(20))
    assert len(second) == 4


# -- CIFAR -----------------------------------------------------------------------------------------------------------
def make_cifar(root, name="cifar10", **options):
    params, make = DATASETS[name]
    return make(params(root=str(root), validation_fraction=0.2, **options))


@pytest.mark.parametrize(("classes", "train", "file"), [(10, 250, "test_batch.bin"), (100, 50, "test.bin")])
def test_cifar_reads_labels_and_pixels(tmp_path, classes, train, file):
    data = make_cifar(cifar(tmp_path, classes, 5), f"cifar{classes}")
    assert (data.classes, data.sample_shape) == (classes, (3, 32, 32))
    assert (len(data.train), len(data.validation), len(data.test)) == (0.8 * train, 0.2 * train, 50)
    skip = 1 if classes == 10 else 2
    raw = np.fromfile(next(tmp_path.rglob(file)), np.uint8).reshape(50, -1)
    images, labels = data.images("test", 50)
    assert labels.tolist() == raw[:, skip - 1].tolist()
    mean, std = (t.double() for t in (data.test.mean, data.test.std))
    pixels = torch.from_numpy(raw[:, skip:].reshape(50, 3, 32, 32).astype(np.float64) / 255)
    assert torch.allclose(images.double(), (pixels - mean) / std, atol=1e-6)


def test_cifar_training_images_are_cropped_and_mirrored(tmp_path):
    data = make_cifar(cifar(tmp_path, 10))
    plain = make_cifar(tmp_path, shift=0, flip=False)
    moved, still = (d.augmented(0).__getitems__([(0, i) for i in range(80)])[0] for d in (data, plain))
    assert torch.equal(still, data.images("train", 80)[0])
    black = (0 - data.train.mean) / data.train.std  # where the crop leaves the image, pixels are 0 before normalisation
    edges = (moved == black).all(1)
    assert 0.05 < float(edges.float().mean()) < 0.35
    assert make_cifar(tmp_path, calibration=7).calibration_loader(4).__len__() == 2


def test_folder_may_be_the_one_with_the_files(tmp_path):
    folder = cifar(tmp_path, 10) / "cifar-10-batches-bin"
    assert len(make_cifar(folder).test) == 20


def test_broken_cifar_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.params.root: no data_batch_1.bin in .* cifar-10-binary.tar.gz"):
        make_cifar(tmp_path)
    cifar(tmp_path, 10)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"data_batch_3.bin: \d+ bytes, expected a multiple of 3073"):
        make_cifar(tmp_path)
    file.write_bytes(bytes([11]) + whole[1:])
    with pytest.raises(ConfigError, match=r"data_batch_3.bin: label 11, expected 0 to 9"):
        make_cifar(tmp_path)
