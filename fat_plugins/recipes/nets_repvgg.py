"""A small RepVGG: blocks with parallel branches in training, one 3x3 convolution each afterwards."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fat_plugins.quantizer import Params


class RepVGGParams(Params):
    """Options of ``repvgg_tiny``."""

    width: int = Field(16, ge=4, le=256, description="Channels of the first stage; the second has twice that.")
    blocks: int = Field(3, ge=1, le=16, description="Blocks of a stage; the first of each halves the image.")


def _branch(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _folded(branch: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a branch in evaluation mode: convolution and batch norm, or a batch norm alone."""
    norm = branch if isinstance(branch, nn.BatchNorm2d) else branch[1]
    if isinstance(branch, nn.BatchNorm2d):
        kernel = torch.eye(channels, device=norm.weight.device).reshape(channels, channels, 1, 1)
    else:
        kernel = branch[0].weight
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return kernel * factor.reshape(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


class RepVGGBlock(nn.Module):
    """``relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x))``, the last where shapes allow (Ding et al., CVPR 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Identity()
        branches = [_branch(inputs, outputs, 3, stride), _branch(inputs, outputs, 1, stride)]
        branches += [nn.BatchNorm2d(outputs)] if stride == 1 and inputs == outputs else []
        self.branches = nn.ModuleList(branches)
        self.relu = nn.ReLU()
        self._shape = inputs, outputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """Images N x C x H x W; H and W divided by the stride."""
        x = self.conv(x)
        return self.relu(sum(branch(x) for branch in self.branches) if len(self.branches) else x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """One 3x3 convolution with bias in the place of the branches, the same function in evaluation mode."""
        if not len(self.branches):
            return
        inputs, outputs, stride = self._shape
        first = self.branches[0][0].weight
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, device=first.device, dtype=first.dtype)
        kernel, bias = torch.zeros_like(conv.weight), torch.zeros_like(conv.bias)
        for branch in self.branches:
            own, shift = _folded(branch, outputs)
            kernel += own if own.shape[-1] == 3 else nn.functional.pad(own, (1, 1, 1, 1))
            bias += shift
        conv.weight.copy_(kernel)
        conv.bias.copy_(bias)
        self.conv, self.branches = conv.train(self.training), nn.ModuleList()


class RepVGG(nn.Module):
    """A stem of full resolution, two stages, a linear head.

    :param in_channels: channels of the image.
    :param classes: number of outputs.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        layers, inputs = [RepVGGBlock(in_channels, width)], width
        for outputs in (width, 2 * width):
            for i in range(blocks):
                layers.append(RepVGGBlock(inputs, outputs, 1 if i else 2))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, N x classes, of images N x C x H x W."""
        return self.head(self.pool(self.blocks(x)).flatten(1))


def _repvgg(params: RepVGGParams, shape: tuple[int, ...], classes: int) -> nn.Module:
    return RepVGG(shape[0], classes, params.width, params.blocks)


#: entries of the registry in :mod:`models`
REPVGG: dict[str, tuple[type[Params], Any]] = {"repvgg_tiny": (RepVGGParams, _repvgg)}
