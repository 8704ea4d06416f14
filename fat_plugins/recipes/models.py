"""Models that recipes name: ours, torchvision's, or what a function of the user's own makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.errors import ConfigError, nearest, unknown
from fat_plugins.quantizer import Params
from fat_plugins.recipes import nets_cifar, nets_repvgg, nets_sr
from fat_plugins.recipes.imports import call
from fat_plugins.recipes.vision import torchvision

#: of torchvision's networks; twice the largest that it has
MAX_PARAMETERS = 1_500_000_000


class DigitsCNNParams(Params):
    """Options of the model ``digits_cnn``."""

    width: int = Field(32, ge=4, le=256, description="Channels of the first convolution; the others have twice that.")


def _block(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitsCNN(nn.Module):
    """Small network with the kinds of layer that matter: 3x3, depthwise 3x3 and 1x1 convolutions, and a linear head.

    :param in_channels: channels of the image.
    :param classes: number of outputs.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = _block(in_channels, width, 3)
        self.conv1 = _block(width, wide, 3, stride=2)
        self.depthwise = _block(wide, wide, 3, groups=wide)
        self.pointwise = _block(wide, wide, 1)
        self.conv2 = _block(wide, wide, 3)
        self.conv3 = _block(wide, wide, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x C x H x W."""
        x = self.conv1(self.stem(x))
        x = self.pointwise(self.depthwise(x))
        x = self.conv3(self.conv2(x))
        return self.head(self.pool(x).flatten(1))


def _digits_cnn(params: DigitsCNNParams, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return DigitsCNN(sample_shape[0], classes, params.width)


class CallableModelParams(Params):
    """Options of the model ``callable``."""

    factory: str = Field(
        description="'module:function'; it is called with the keyword arguments `sample_shape` (C, H, W) and `classes` "
        "and returns an nn.Module."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments of the function.")


def _own(params: CallableModelParams, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    key = "model.params.factory"
    model = call(params.factory, key, params.options, sample_shape=sample_shape, classes=classes)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}: {params.factory} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


#: what a recipe may name: options and maker (from the options, the shape of an image and the number of classes)
MODELS: dict[str, tuple[type[Params], Callable[[Any, tuple[int, ...], int], nn.Module]]] = {
    "digits_cnn": (DigitsCNNParams, _digits_cnn),
    **nets_cifar.NETS,
    **nets_sr.NETS,
    **nets_repvgg.REPVGG,
    "callable": (CallableModelParams, _own),
}
#: those of torchvision that need telling: logits only, images as its weights expect them
_PLAIN_LOGITS = {"aux_logits": False, "transform_input": True, "init_weights": True}
_TORCHVISION = {"googlenet": _PLAIN_LOGITS, "inception_v3": _PLAIN_LOGITS}


def check_model(name: str) -> None:
    """Refuse a name that is neither ours nor one of torchvision's classification models.

    :raises ConfigError: with the nearest name.
    """
    if name in MODELS:
        return
    try:
        models = torchvision(f"model {name!r}", "models")
    except ConfigError as error:
        raise ConfigError(f"{unknown('model', name, MODELS)}; torchvision's models are out of reach: {error}") from None
    known = models.list_models(module=models)
    if name not in known:
        close = nearest(name, [*MODELS, *known])
        raise ConfigError(f"unknown model {name!r}; allowed: {', '.join(MODELS)}, torchvision's classifiers{close}")


def build_torchvision(name: str, params: dict[str, Any], classes: int) -> nn.Module:
    """torchvision's model, without weights.

    :param params: keyword arguments of torchvision's function.
    :raises ConfigError: torchvision does not take them.
    """
    models = torchvision(f"model {name!r}", "models")
    options = {**_TORCHVISION.get(name, {}), **params}
    try:
        if params:  # which may ask for any width: count before any memory is taken
            with torch.random.fork_rng(), torch.device("meta"):
                _check_size(models.get_model(name, weights=None, num_classes=classes, **options))
        return models.get_model(name, weights=None, num_classes=classes, **options)
    except ConfigError:
        raise
    except Exception as error:  # torchvision checks nothing: whatever its layers say
        raise ConfigError(f"model.params: torchvision's {name}: {type(error).__name__}: {error}") from None


def _check_size(model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_PARAMETERS:
        raise ConfigError(f"model.params: {count:,} parameters, allowed: up to {MAX_PARAMETERS:,}")


def check_fit(model: nn.Module, name: str, example: Tensor, outputs: int | tuple[int, ...]) -> None:
    """Run a model on one image, which costs little compared with finding out in the middle of a training.

    :param example: 1 x C x H x W.
    :param outputs: number of classes, or the shape of what the data have in place of a label.
    :raises ConfigError: it refuses the image, or does not give one number for each class or an image of that shape.
    """
    shape = "x".join(map(str, example.shape[1:]))
    training = model.training
    try:
        with torch.random.fork_rng(), torch.no_grad():
            out = model.eval()(example)
    except Exception as error:  # whatever its layers say
        raise ConfigError(f"model: {name!r} does not take images of {shape}: {error}") from error
    finally:
        model.train(training)
    wanted, what_for = ((outputs,), "classes") if isinstance(outputs, int) else (outputs, "images to learn")
    if not isinstance(out, Tensor) or tuple(out.shape) != (1, *wanted):
        what = f"a tensor of {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ConfigError(
            f"model: {name!r} gives {what} for one image, expected {(1, *wanted)}: the {what_for} of the data"
        )
