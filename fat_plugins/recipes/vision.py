"""torchvision, an optional part: models, weights, images in folders and how they are augmented."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fat_plugins.errors import ConfigError

#: of ImageNet's pixels, as torchvision's weights expect them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision(what: str, module: str = "") -> Any:
    """The package, or a module of it.

    :param what: what needs it, for the message.
    :raises ConfigError: it is not installed, or not for this torch.
    """
    try:
        return import_module(f"torchvision.{module}" if module else "torchvision")
    except ImportError as error:
        raise ConfigError(f"{what} needs torchvision ({error}): pip install 'fat-plugins[vision]'") from None
    except RuntimeError as error:  # a build for another torch
        raise ConfigError(f"{what}: torchvision does not fit this torch: {error}") from None
