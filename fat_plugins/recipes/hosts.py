"""Host frameworks by name, through the entry-point group ``fat_plugins.hosts``. The core imports none of them."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fat_plugins.errors import HostError, unknown

GROUP = "fat_plugins.hosts"


class Host(Protocol):
    """What a recipe needs of a framework. An entry point names a class that is called without arguments."""

    def versions(self) -> dict[str, str]:
        """Names and versions of what took part, for reports."""
        ...

    def check(self, config: dict[str, Any], example_input: Tensor) -> None:
        """Refuse a config that the framework does not know or that does not fit the data, before any training.

        :raises FatPluginsError: one line that says why.
        """
        ...

    def compress(
        self,
        model: nn.Module,
        config: dict[str, Any],
        loader: DataLoader,
        example_input: Tensor,
        compression_state: Any = None,
    ) -> tuple[Any, nn.Module]:
        """Place and initialise quantizers.

        :param config: NNCF config with ``input_info`` and ``compression``.
        :param loader: batches ``(images, labels)`` for initialisation.
        :param compression_state: of :meth:`compression_state`; rebuilds the quantizers without initialising them.
        :return: controller (``loss()``; ``scheduler`` with ``step()``, ``epoch_step()``, ``get_state()`` in JSON types
            and ``load_state(state)``) and the model to train.
        """
        ...

    def compression_state(self, controller: Any) -> Any:
        """What :meth:`compress` needs to rebuild the model, in JSON types."""
        ...

    def freeze(self, model: nn.Module) -> nn.Module:
        """Copy in evaluation mode in which frozen quantizers stand in the place of the trained ones."""
        ...


def get_host(name: str) -> Host:
    """The host called ``name``, ready for use.

    :raises HostError: unknown name, or the framework is not installed (with the command that installs it).
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise HostError(f"host: {unknown('host', name, known)}")
    try:
        return known[name].load()()
    except ImportError as error:
        raise HostError(f"host '{name}' is not installed ({error}): pip install 'fat-plugins[{name}]'") from None
