"""How images reach the trainer: batches whose order and augmentation depend on (seed, epoch, index) and nothing else.

So training resumes in the middle of an epoch by skipping batches, and several processes share one epoch by taking
turns, without any state of a random generator.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fat_plugins.errors import ConfigError, FatPluginsError
from fat_plugins.recipes.tasks import CLASSIFICATION, Task

#: an image of one epoch: (epoch, index)
Key = tuple[int, int]


def mixed_seed(*numbers: int) -> int:
    """One seed (64 bits) of several non-negative numbers; close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generator_for(*numbers: int) -> torch.Generator:
    """A generator on the CPU that depends on these numbers only."""
    return torch.Generator().manual_seed(mixed_seed(*numbers) % 2**63)


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys ``(epoch, index)``: one shuffled pass, which depends on the seed and the epoch only.

    :param length: number of images.
    :param batch_size: images per batch of one process. ``world`` processes share batches of ``world * batch_size``,
        the same images in the same order as one process with that batch size.
    :param rank: which of the processes this is.

    An incomplete last batch is left out, unless it is the only one.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.length // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.length, generator=generator_for(self.seed, self.epoch)).tolist()
        share = min(self.batch_size, -(-self.length // self.world))  # of the one batch of a small set
        for batch in range(self.skip, len(self)):
            start = (batch * self.world + self.rank) * share
            yield [(self.epoch, i) for i in order[start : start + share]]


class _Flag:
    """``multiprocessing.Event`` as torch's loader uses it (set once, asked often), without a lock.

    A process that is killed while it asks keeps the lock of a real event for ever, and the training process would wait
    for it.
    """

    def __init__(self, byte: Any) -> None:
        self._byte = byte

    def set(self) -> None:
        self._byte.value = 1

    def is_set(self) -> bool:
        return bool(self._byte.value)


def _context() -> multiprocessing.context.BaseContext:
    """This platform's way to start processes, with events that survive the loss of one."""

    class Context(type(multiprocessing.get_context())):
        def Event(self) -> _Flag:
            return _Flag(self.RawValue("b", 0))

    return Context()


class Loader(DataLoader):
    """torch's loader with a random generator of its own, so that reading data leaves the global one alone.

    The loss of a process that reads ends in an error, wherever that process was.
    """

    def __init__(self, dataset: Dataset, batch_size: int | None = None, **options: Any) -> None:
        # None would switch batching off, where batches come from a sampler
        batched = isinstance(dataset, (Images, ShiftedImages, TurnedPairs))
        super().__init__(
            dataset,
            **({} if batch_size is None else {"batch_size": batch_size}),
            **({"collate_fn": _as_it_is} if batched else {}),
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
            **({"multiprocessing_context": _context()} if options.get("num_workers") else {}),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except FatPluginsError as error:  # a worker process wraps it in its own traceback
            last = str(error.args[0]).strip().splitlines()[-1]
            raise type(error)(last.split(f"{type(error).__name__}: ", 1)[-1]) from None

    def begin(self, epoch: int, step: int = 0) -> Loader:
        """Training loaders: the next pass is that of ``epoch``, without its first ``step`` batches."""
        self.batch_sampler.epoch, self.batch_sampler.skip = epoch, step
        return self


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """torch notices the end of a process that reads images wherever the main process happens to be; say what it means.

    :raises FatPluginsError: that has happened.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = " ".join(str(error).split()).rstrip(". ")
        raise FatPluginsError(
            f"data: a process that reads images is lost ({what}); go on with --resume, if memory is short with smaller "
            "data.params.workers"
        ) from None


def _as_it_is(batch: Any) -> Any:
    return batch


class Images(Dataset):
    """Images in memory, read batch by batch.

    :param images: N x C x H x W, float32, or uint8 together with ``mean`` and ``std``.
    :param labels: int64, N.
    :param mean, std: per channel, of pixel values 0 to 1; applied when uint8 images are read.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        self.tensors = (images, labels)
        self.mean, self.std = (None if v is None else torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.tensors[1])

    def _floats(self, images: Tensor) -> Tensor:
        return images if self.mean is None else (images.float().div_(255) - self.mean) / self.std

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._floats(self.tensors[0][index]), self.tensors[1][index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        return self._floats(self.tensors[0][index]), self.tensors[1][index]


class ShiftedImages(Dataset):
    """Training images of ``source`` by key ``(epoch, index)``: moved by up to ``shift`` pixels, perhaps mirrored.

    Moving by ``p`` pixels is what is also called a random crop of the image padded by ``p``.

    :param fill: value of the space that opens, in the source's own units (uint8 pixels, or floats).
    :param flip: mirror every second image, on average.
    """

    def __init__(self, source: Images, seed: int, shift: int, fill: float = 0, flip: bool = False) -> None:
        self.source, self.seed, self.shift, self.fill, self.flip = source, seed, shift, fill, flip
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        if self._drawn is None or self._drawn[0] != epoch:
            generator = generator_for(self.seed, epoch, 1)
            offsets = torch.randint(0, 2 * self.shift + 1, (2, len(self)), generator=generator)
            self._drawn = epoch, offsets, torch.rand(len(self), generator=generator) < 0.5
        return self._drawn[1:]

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        index = torch.tensor([i for _, i in keys])
        offsets, mirrored = self._draw(keys[0][0])
        images, labels = (t[index] for t in self.source.tensors)
        if self.shift:
            images = shift_images(images, offsets[:, index], self.shift, self.fill)
        if self.flip:
            images = torch.where(mirrored[index].view(-1, 1, 1, 1), images.flip(3), images)
        return self.source._floats(images), labels


def shift_images(images: Tensor, offsets: Tensor, pixels: int, fill: float) -> Tensor:
    """Images N x C x H x W moved by ``pixels - offsets``.

    :param offsets: 2 x N, rows and columns, 0 to ``2 * pixels``.
    :param fill: value of the space that opens.
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, value=fill)
    rows = offsets[0][:, None] + torch.arange(height)
    columns = offsets[1][:, None] + torch.arange(width)
    index = torch.arange(n)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class TurnedPairs(Dataset):
    """Training pairs of ``source`` by key ``(epoch, index)``: mirrored and transposed, image and target alike.

    :param source: square images, and in place of labels square images of another size.
    """

    def __init__(self, source: Images, seed: int) -> None:
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        images, targets = self.__getitems__([key])
        return images[0], targets[0]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        index = torch.tensor([i for _, i in keys])
        drawn = torch.rand((3, len(self)), generator=generator_for(self.seed, keys[0][0], 1)) < 0.5
        rows, columns, both = (flags[index].view(-1, 1, 1, 1) for flags in drawn)

        def turned(batch: Tensor) -> Tensor:
            batch = torch.where(rows, batch.flip(2), batch)
            batch = torch.where(columns, batch.flip(3), batch)
            return torch.where(both, batch.transpose(2, 3), batch)

        return tuple(turned(part) for part in self.source[index])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Global random generators of torch (CPU), numpy and Python that depend on these numbers; restored afterwards."""
    seed = mixed_seed(*numbers)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class DrawnImages(Dataset):
    """Training images by key ``(epoch, index)``, from a dataset that draws its augmentation from global generators.

    :param source: map-style dataset of ``(image, label)``.
    """

    def __init__(self, source: Dataset, seed: int) -> None:
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Any:
        with seeded(self.seed, *key):
            return self.source[key[1]]


class Mapped(Dataset):
    """Items ``indices`` of ``source``, their images passed through ``transform``."""

    def __init__(self, source: Dataset, indices: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[int(self.indices[index])]
        return self.transform(image), label


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the two parts, every class divided alike, both shuffled.

    :param fraction: size of the second part.
    """
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        second.append(members[: round(len(members) * fraction)])
    second = rng.permutation(np.concatenate(second))
    first = rng.permutation(np.setdiff1d(np.arange(len(labels)), second))
    return first, second


def split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`stratified_split` of training images: those to learn from, and a fraction that is held out.

    :raises ConfigError: one of the parts would be empty.
    """
    first, second = stratified_split(np.asarray(labels), fraction, np.random.default_rng(seed))
    if not len(first) or (fraction and not len(second)):
        raise ConfigError(f"data.params.validation_fraction: {fraction} of {len(labels)} images leaves a part empty")
    return first, second


@dataclass(frozen=True)
class Data:
    """One dataset, split once and for all.

    :param train, validation, test: map-style datasets of ``(image, label)``, image float32 C x H x W as evaluation sees
        it. The order of ``train`` mixes the classes.
    :param classes: number of labels; 1 where there are none.
    :param description: one line for reports.
    :param augmented: makes, from the seed of a run, the dataset that training reads by key ``(epoch, index)``.
    :param workers: processes that read and augment images; 0: the training process itself.
    :param calibration: how many of ``train`` initialise quantizers and batch norms; ``None``: all, if need be.
    :param task: what is learned; unless it is classification a "label" is an image, float32.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    classes: int
    description: str
    augmented: Callable[[int], Dataset]
    workers: int = 0
    calibration: int | None = None
    task: Task = CLASSIFICATION

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one image, C x H x W."""
        return tuple(self.example.shape[1:])

    @property
    def example(self) -> Tensor:
        """One training image as a batch, 1 x C x H x W."""
        return self.train[0][0][None]

    @property
    def output_shape(self) -> int | tuple[int, ...]:
        """What a network gives for one image: a number for each class, or an image of this shape."""
        label = self.train[0][1]
        return tuple(label.shape) if isinstance(label, Tensor) and label.ndim else self.classes

    def images(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """The first images and labels of ``"train"``, ``"validation"`` or ``"test"``, as one batch."""
        dataset = getattr(self, part)
        return next(iter(Loader(dataset, min(count, len(dataset)))))

    def training_loader(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> Loader:
        """Shuffled and augmented, both functions of (seed, epoch, index): see :meth:`Loader.begin`, which says which
        epoch is read, and from which batch on. An incomplete last batch is left out.

        :param rank, world: this process and how many there are; ``batch_size`` is that of each.
        """
        dataset = self.augmented(seed)
        batches = EpochBatches(len(dataset), batch_size, seed, rank, world)
        return Loader(dataset, batch_sampler=batches, **self._workers())

    def calibration_loader(self, batch_size: int) -> Loader:
        """Training images as they are, in a fixed order that mixes the classes."""
        some = self.calibration is not None and self.calibration < len(self.train)
        return Loader(self.train, batch_size, **({"sampler": range(self.calibration)} if some else {}))

    def validation_loader(self, batch_size: int = 256) -> Loader:
        """Held-out part of the training images, which chooses the best epoch."""
        return Loader(self.validation, batch_size, **self._workers())

    def test_loader(self, batch_size: int = 256) -> Loader:
        """Test images; nothing is chosen by them."""
        return Loader(self.test, batch_size, **self._workers())

    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "persistent_workers": self.workers > 0}
