"""The networks that papers train on 32x32 images."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from fat_plugins.quantizer import Params


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _initialise(net: nn.Module) -> None:
    """He's initialisation of convolutions, which these papers use."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNetParams(Params):
    """Options of ``resnet20``, ``resnet32``, ``resnet44`` and ``resnet56``."""

    width: int = Field(16, ge=4, le=256, description="Channels of the first stage; doubled from stage to stage.")
    shortcut: Literal["conv", "pad"] = Field(
        "conv", description="Where the shape changes: a 1x1 convolution, or every second pixel and zero channels."
    )


class _Pad(nn.Module):
    """Every second pixel, zeros for the channels that are new."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.channels - half))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        if stride == 1 and inputs == outputs:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = _Pad(outputs - inputs)
        else:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Images N x C x H x W; H and W divided by the stride."""
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al.'s ResNet for CIFAR, of ``6 blocks + 2`` layers.

    :param blocks: per stage, of which there are three.
    """

    def __init__(self, blocks: int, in_channels: int, classes: int, width: int = 16, shortcut: str = "conv") -> None:
        super().__init__()
        self.conv, self.bn, self.relu = _conv(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()
        stages, inputs = [], width
        for i in range(3):
            outputs = width * 2**i
            stage = []
            for j in range(blocks):
                stage.append(BasicBlock(inputs, outputs, 2 if i and not j else 1, shortcut))
                inputs = outputs
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x C x H x W."""
        x = self.stages(self.relu(self.bn(self.conv(x))))
        return self.head(self.pool(x).flatten(1))


class VGGParams(Params):
    """Options of ``vgg_small``."""

    width: int = Field(128, ge=4, le=512, description="Channels of the first stage; doubled from stage to stage.")
    hidden: int = Field(
        0, ge=0, le=4096, description="Outputs of a hidden linear layer (1024 in the papers' VGG-7); 0: there is none."
    )


class VGGSmall(nn.Module):
    """Three stages of two 3x3 convolutions and a pooling layer each, then one or two linear layers."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 128, hidden: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = shape[0]
        for i in range(3):
            outputs = width * 2**i
            for _ in range(2):
                layers += [_conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = inputs * (shape[1] // 8) * (shape[2] // 8)
        self.hidden = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or flat, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x C x H x W."""
        return self.head(self.hidden(self.features(x).flatten(1)))


class MobileNetV2Params(Params):
    """Options of ``mobilenet_v2_cifar``."""

    width: float = Field(1.0, gt=0, le=4, description="Factor on the channels of every layer.")


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; added to the input where the shape is the same."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        expansion = [_conv(inputs, inner, 1), nn.BatchNorm2d(inner), nn.ReLU6()] if expand > 1 else []
        self.expand = nn.Sequential(*expansion)
        self.depthwise = nn.Sequential(_conv(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner), nn.ReLU6())
        self.project = nn.Sequential(_conv(inner, outputs, 1), nn.BatchNorm2d(outputs))
        self.add = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Images N x C x H x W; H and W divided by the stride."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.add else out


class MobileNetV2(nn.Module):
    """MobileNetV2 with the strides of its first two stages taken out, as is usual for 32x32 images.

    :param width: factor on the channels, rounded to multiples of 8.
    """

    #: expansion, channels, blocks, stride of the first of them
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, in_channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()

        def wide(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        inputs, last = wide(32), max(1280, wide(1280)) if width >= 1 else wide(1280)
        self.stem = nn.Sequential(_conv(in_channels, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU6())
        blocks = []
        for expand, channels, count, stride in self.STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(inputs, wide(channels), 1 if i else stride, expand))
                inputs = wide(channels)
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(_conv(inputs, last, 1), nn.BatchNorm2d(last), nn.ReLU6())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(last, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x C x H x W."""
        x = self.last(self.blocks(self.stem(x)))
        return self.head(self.pool(x).flatten(1))


def _resnet(blocks: int, params: ResNetParams, shape: tuple[int, ...], classes: int) -> nn.Module:
    return ResNet(blocks, shape[0], classes, params.width, params.shortcut)


def _vgg(params: VGGParams, shape: tuple[int, ...], classes: int) -> nn.Module:
    return VGGSmall(shape, classes, params.width, params.hidden)


def _mobilenet(params: MobileNetV2Params, shape: tuple[int, ...], classes: int) -> nn.Module:
    return MobileNetV2(shape[0], classes, params.width)


#: entries of the registry in :mod:`models`
NETS: dict[str, tuple[type[Params], Any]] = {
    **{f"resnet{6 * n + 2}": (ResNetParams, partial(_resnet, n)) for n in (3, 5, 7, 9)},
    "vgg_small": (VGGParams, _vgg),
    "mobilenet_v2_cifar": (MobileNetV2Params, _mobilenet),
}
