"""NNCF as the host of a recipe (entry point ``fat_plugins.hosts``); the same code serves both generations."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

import fat_nncf
from fat_plugins.errors import ConfigError


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class NNCFHost:
    """See :class:`fat_plugins.recipes.hosts.Host`. Importing this module fails as ``import fat_nncf`` does."""

    def __init__(self) -> None:
        logging.getLogger("nncf").addFilter(_errors_only)  # a recipe run has its own progress

    def versions(self) -> dict[str, str]:
        """Version of NNCF."""
        return {"nncf": version("nncf")}

    def check(self, config: dict[str, Any], example_input: Tensor) -> None:
        """Refuse a config before any training.

        :raises ConfigError: the images have another shape than the config says, or NNCF knows no such section.
        """
        self._config(config, example_input)

    def _config(self, config: dict[str, Any], example_input: Tensor) -> Any:
        shape = list(example_input.shape)
        info = config.get("input_info") or {"sample_size": shape}
        given = info.get("sample_size") if isinstance(info, dict) else None
        if not isinstance(given, list) or given[1:] != shape[1:]:
            raise ConfigError(f"compression: input_info.sample_size is {given}, the data gives {shape}")
        with redirect_stdout(sys.stderr):
            return fat_nncf.NNCFConfig.from_dict({**config, "input_info": info})

    def compress(
        self,
        model: nn.Module,
        config: dict[str, Any],
        loader: DataLoader,
        example_input: Tensor,
        compression_state: Any = None,
    ) -> tuple[Any, nn.Module]:
        """Place and initialise quantizers by the NNCF config."""
        nncf_config = self._config(config, example_input)
        nncf_config = fat_nncf.register_default_init_args(nncf_config, loader)
        # NNCF draws bars on standard output, where a command's results belong
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            # NNCF 2 advertises its other API here
            warnings.filterwarnings("ignore", category=FutureWarning, module="nncf")
            return fat_nncf.create_compressed_model(
                model, nncf_config, compression_state=compression_state, dump_graphs=False
            )

    def compression_state(self, controller: Any) -> Any:
        """What rebuilds the compressed model."""
        return controller.get_compression_state()

    def freeze(self, model: nn.Module) -> nn.Module:
        """Copy with frozen quantizers."""
        return fat_nncf.freeze(model)
