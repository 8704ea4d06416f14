"""ResNet-18 and MobileNetV2 in their ImageNet shapes, plain torch, from the blocks that recipes use."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fat_plugins.recipes.nets_cifar import BasicBlock, InvertedResidual, MobileNetV2


def _block(inputs: int, outputs: int, kernel: int, stride: int, act: type[nn.Module]) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), act())


class _Net(nn.Module):
    def __init__(self, features: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x 3 x H x W."""
        return self.head(self.pool(self.features(x)).flatten(1))


def resnet18(classes: int = 1000) -> nn.Module:
    """He et al.'s ResNet-18: 7x7 stem, max pooling, four stages of two basic blocks."""
    layers: list[nn.Module] = [_block(3, 64, 7, 2, nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage in range(4):
        for i in range(2):
            layers.append(BasicBlock(inputs, 64 * 2**stage, 2 if stage and not i else 1, "conv"))
            inputs = 64 * 2**stage
    return _Net(layers, inputs, classes)


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    """Sandler et al.'s MobileNetV2, width 1, with the strides for 224x224 images."""
    layers: list[nn.Module] = [_block(3, 32, 3, 2, nn.ReLU6)]
    inputs = 32
    strides = (1, 2, 2, 2, 1, 2, 1)
    for (expand, channels, count, _), stride in zip(MobileNetV2.STAGES, strides, strict=True):
        for i in range(count):
            layers.append(InvertedResidual(inputs, channels, 1 if i else stride, expand))
            inputs = channels
    return _Net([*layers, _block(inputs, 1280, 1, 1, nn.ReLU6)], 1280, classes)


NETS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}
