"""The networks that benchmarks run: ResNet-18 and MobileNetV2 for ImageNet's shapes, and a small CNN. Random weights:
time does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fat_plugins.recipes.nets_cifar import BasicBlock, InvertedResidual, MobileNetV2


def _stem(outputs: int, kernel: int, activation: nn.Module) -> list[nn.Module]:
    conv = nn.Conv2d(3, outputs, kernel, 2, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), activation]


class _Classifier(nn.Module):
    """Features, global average pooling, one linear layer. NNCF refuses a bare Sequential."""

    def __init__(self, features: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.features, self.pool = nn.Sequential(*features), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x 3 x H x W."""
        return self.head(self.pool(self.features(x)).flatten(1))


def resnet18(classes: int = 1000) -> nn.Module:
    """11.7 million parameters, 1.8 G multiplications at 224 x 224."""
    layers = [*_stem(64, 7, nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        layers += [BasicBlock(inputs, outputs, 1 if outputs == 64 else 2, "conv")]
        layers += [BasicBlock(outputs, outputs, 1, "conv")]
        inputs = outputs
    return _Classifier(layers, inputs, classes)


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    """3.5 million parameters, 0.3 G multiplications at 224 x 224; most layers depthwise or 1x1."""
    layers, inputs = _stem(32, 3, nn.ReLU6()), 32
    strides = (1, 2, 2, 2, 1, 2, 1)  # those of the CIFAR network are for small images
    for (expand, outputs, count, _), stride in zip(MobileNetV2.STAGES, strides, strict=True):
        for i in range(count):
            layers.append(InvertedResidual(inputs, outputs, 1 if i else stride, expand))
            inputs = outputs
    layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return _Classifier(layers, 1280, classes)


def small_cnn(classes: int = 10, width: int = 64, depth: int = 10) -> nn.Module:
    """A stack of equal 3x3 convolutions, the shape in which kernels differ most."""
    layers, inputs = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return _Classifier(layers, width, classes)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "small_cnn": small_cnn,
}
#: sides of the images that they are deployed for
SIDES = {"resnet18": 224, "mobilenet_v2": 224, "small_cnn": 56}


def settled(model: nn.Module, images: Tensor, passes: int = 3) -> nn.Module:
    """``model`` with batch-norm statistics of ``images`` instead of zeros and ones, in evaluation mode.

    Activations of a random network would shrink or grow from layer to layer otherwise, down to denormal numbers, which
    some kernels compute slowly.
    """
    with torch.no_grad():
        model.train()
        for _ in range(passes):
            model(images)
    return model.eval()


def batches(images: Tensor, batch_size: int) -> Any:
    """A loader of ``images`` with label 0."""
    data = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.int64))
    return torch.utils.data.DataLoader(data, batch_size=batch_size)
