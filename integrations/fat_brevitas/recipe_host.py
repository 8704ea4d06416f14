"""Brevitas as the host of a recipe (entry point ``fat_plugins.hosts``)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat_brevitas.config import parse_config
from fat_brevitas.controller import Controller
from fat_brevitas.deployed import frozen
from fat_brevitas.model import quantize, rebuild
from fat_plugins.errors import ConfigError


class BrevitasHost:
    """See :class:`fat_plugins.recipes.hosts.Host`. Importing this module fails as ``import fat_brevitas`` does."""

    def versions(self) -> dict[str, str]:
        """Version of Brevitas."""
        return {"brevitas": version("brevitas")}

    def check(self, config: dict[str, Any], example_input: Tensor) -> None:
        """Refuse a config before any training.

        :raises ConfigError: the images have another shape than the config says, or Brevitas cannot do what it asks.
        """
        shape = list(example_input.shape)
        info = config.get("input_info") or {"sample_size": shape}
        given = info.get("sample_size") if isinstance(info, dict) else None
        if not isinstance(given, list) or given[1:] != shape[1:]:
            raise ConfigError(f"compression: input_info.sample_size is {given}, the data gives {shape}")
        parse_config(config)

    def compress(
        self,
        model: nn.Module,
        config: dict[str, Any],
        loader: DataLoader,
        example_input: Tensor,
        compression_state: Any = None,
    ) -> tuple[Controller, nn.Module]:
        """Place and initialise quantizers; with a state, place them only."""
        self.check(config, example_input)
        if compression_state is not None:
            result = rebuild(model, compression_state, loader)
        else:
            result = quantize(model, config, loader, example_input=example_input)
        return Controller(result), result

    def compression_state(self, controller: Controller) -> Any:
        """What rebuilds the quantized model, in JSON types."""
        return controller.compression_state()

    def freeze(self, model: nn.Module) -> nn.Module:
        """Copy with frozen quantizers."""
        return frozen(model)
