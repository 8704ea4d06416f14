"""Model inputs for tracing and calibration on NNCF 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import nncf
import torch

from fat_nncf.modern_config import DefaultInitArgs, InputInfo, NNCFConfig
from fat_plugins.errors import ConfigError


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _move(v, device) for k, v in value.items()}
    return type(value)(_move(v, device) for v in value) if isinstance(value, (list, tuple)) else value


def _batch_size(inputs: Any) -> int:
    """Length of the first axis of the first tensor."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    first = next((v for v in values if isinstance(v, torch.Tensor) and v.ndim), None)
    return len(first) if first is not None else 1


def call(model: torch.nn.Module, inputs: Any) -> Any:
    """Run the model: a dictionary is keyword arguments, a tuple positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class Batches:
    """Model inputs, batch by batch, as often as needed.

    :param source: a re-iterable loader, or ``None`` for one random example.
    :param example: input for tracing when there is no loader.
    """

    def __init__(self, source: Any, device: torch.device, example: Any = None, where: str = "data loader") -> None:
        self.source, self.device = source, device
        #: whether there is data to calibrate from
        self.real = source is not None
        if not self.real:
            self.example = example
        else:
            try:
                iterator = iter(source)
            except TypeError:
                raise ConfigError(f"{where}: expected an iterable of batches, got {type(source).__name__}") from None
            if iterator is source:
                raise ConfigError(f"{where}: it can be iterated only once; give a loader or a list of batches")
            try:
                self.example = self._inputs(next(iterator))
            except StopIteration:
                raise ConfigError(f"{where}: it is empty; calibration needs at least one batch") from None
        self.batch_size = _batch_size(self.example)

    def _inputs(self, batch: Any) -> Any:
        if hasattr(self.source, "get_inputs"):  # NNCF 2's PTInitializingDataLoader and its relatives
            args, kwargs = self.source.get_inputs(batch)
            if args and kwargs:
                raise ConfigError("data loader: NNCF 3 takes positional or keyword inputs, not both")
            batch = kwargs or tuple(args)
        elif isinstance(batch, (list, tuple)):
            if not batch:
                raise ConfigError("data loader: a batch is an empty tuple; expected a tensor or (input, target)")
            batch = batch[0]
        return _move(batch, self.device)

    def __iter__(self) -> Iterator[Any]:
        return map(self._inputs, self.source) if self.real else iter([self.example])

    def __len__(self) -> int:
        return len(self.source) if self.real else 1

    def take(self, count: int) -> Iterator[Any]:
        """The first ``count`` inputs."""
        iterator = iter(self)
        for _ in range(count):
            try:
                yield next(iterator)
            except StopIteration:
                return

    def dataset(self) -> nncf.Dataset:
        """As NNCF wants it."""
        return nncf.Dataset(self if not self.real or hasattr(self.source, "__len__") else _Unsized(self))

    def length(self) -> int | None:
        """Number of batches when known."""
        return len(self) if not self.real or hasattr(self.source, "__len__") else None


class _Unsized:
    """Hides ``__len__`` from NNCF where the loader has none."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class DatasetBatches(Batches):
    """Batches of an ``nncf.Dataset``, whose transform already gives model inputs."""

    def __init__(self, dataset: nncf.Dataset, device: torch.device) -> None:
        if not isinstance(dataset, nncf.Dataset):
            raise ConfigError(f"calibration_dataset: expected nncf.Dataset, got {type(dataset).__name__}")
        self._dataset = dataset
        super().__init__(dataset.get_inference_data(), device, where="calibration_dataset")

    def _inputs(self, batch: Any) -> Any:
        return batch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset.get_inference_data())

    def length(self) -> int | None:
        """Number of items when known."""
        return self._dataset.get_length()

    def dataset(self) -> nncf.Dataset:
        """The user's own."""
        return self._dataset


def device_of(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def example_from(inputs: tuple[InputInfo, ...], device: torch.device) -> Any:
    """Example input of a config's ``input_info``, or ``None`` when it says nothing."""
    if not inputs:
        return None
    if inputs[0].keyword:
        return {i.keyword: i.tensor(device) for i in inputs}
    return tuple(i.tensor(device) for i in inputs)


def batches_of(config: Mapping[str, Any], inputs: tuple[InputInfo, ...], device: torch.device) -> Batches:
    """The registered loader of a config, or one random example of ``input_info``.

    :raises ConfigError: an empty loader, or neither loader nor ``input_info``.
    """
    if isinstance(config, NNCFConfig) and config.has_extra_struct(DefaultInitArgs):
        registered: DefaultInitArgs = config.get_extra_struct(DefaultInitArgs)
        return Batches(registered.loader, torch.device(registered.device or device))
    example = example_from(inputs, device)
    if example is None:
        raise ConfigError("input_info: missing; without a registered data loader the model cannot be traced")
    return Batches(None, device, example)
