"""The procedural dataset: the same images everywhere, all classes, learnable but not trivial."""

from __future__ import annotations

import pytest
import torch

from fat_plugins import ConfigError
from fat_plugins.recipes.data import DATASETS
from fat_plugins.recipes.schema import DataSection

PARAMS, MAKE = DATASETS["shapes"]


def small(**changes):
    return MAKE(PARAMS(**{"train": 200, "validation": 60, "test": 100, **changes}))


def test_images_depend_on_their_seed_only():
    first, second, other = small(), small(), small(data_seed=1)
    assert torch.equal(first.train.tensors[0], second.train.tensors[0])
    assert not torch.equal(first.train.tensors[0], other.train.tensors[0])
    assert not torch.equal(first.train.tensors[0][:100], first.test.tensors[0])


def test_sizes_and_classes():
    data = small(size=20)
    assert data.sample_shape == (1, 20, 20) and data.classes == 10
    for part, count in ((data.train, 200), (data.validation, 60), (data.test, 100)):
        assert len(part) == count and torch.bincount(part.tensors[1]).tolist() == [count // 10] * 10
    assert data.train.tensors[0].isfinite().all()


def test_every_class_looks_different():
    """Without noise, nearest neighbours in a rotation-blind feature tell classes apart better than chance."""
    data = small(noise=0.0, train=400)
    spectrum = torch.fft.fft2(data.train.tensors[0][:, 0]).abs().flatten(1)
    distance = torch.cdist(spectrum, spectrum).fill_diagonal_(float("inf"))
    labels = data.train.tensors[1]
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.2


def test_noise_is_what_it_says():
    clean, noisy = small(noise=0.0), small(noise=0.5)
    corners = noisy.train.tensors[0][:, 0, :2, :2]
    assert corners.std() > clean.train.tensors[0][:, 0, :2, :2].std() + 0.1


def test_bad_options_name_the_key():
    with pytest.raises(ConfigError, match=r"data.params.noise"):
        DataSection(name="shapes", params={"noise": -1}).build()
