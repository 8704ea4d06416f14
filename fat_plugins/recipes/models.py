"""Models that recipes name. A name stands for a class of this file; nothing is imported from a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from fat_plugins.quantizer import Params


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


#: what a recipe may name: options and maker (from the options, the shape of an image and the number of classes)
MODELS: dict[str, tuple[type[Params], Callable[[Any, tuple[int, ...], int], nn.Module]]] = {
    "digits_cnn": (DigitsCNNParams, _digits_cnn)
}
