"""Networks for super-resolution."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from fat_plugins.quantizer import Params


class EDSRTinyParams(Params):
    """Options of the model ``edsr_tiny``."""

    width: int = Field(16, ge=4, le=256, description="Channels of the body.")
    blocks: int = Field(4, ge=1, le=64, description="Residual blocks.")
    scale: int = Field(2, ge=2, le=4, description="Height of an output over that of an image.")
    residual_scale: float = Field(
        1.0, gt=0, le=1, description="Factor on the residual of a block; 0.1 keeps wide networks stable."
    )


class ResidualBlock(nn.Module):
    """Two convolutions without batch norm beside a shortcut; images N x width x H x W, and so the result."""

    def __init__(self, width: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(self.relu(self.conv1(x)))
        if self.residual_scale != 1:
            residual = residual * self.residual_scale
        return x + residual


class EDSRTiny(nn.Module):
    """The layout of EDSR's baseline with fewer blocks and channels: head, residual blocks and one more convolution
    beside a long shortcut, then pixel shuffling and the convolution that gives the image.

    :param channels: of the images.
    """

    def __init__(self, channels: int, width: int = 16, blocks: int = 4, scale: int = 2, residual_scale: float = 1.0):
        super().__init__()
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width, residual_scale) for _ in range(blocks)))
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.upsampler = nn.Conv2d(width, width * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        self.tail = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x sH x sW of images N x C x H x W."""
        x = self.head(x)
        x = x + self.after(self.body(x))
        return self.tail(self.shuffle(self.upsampler(x)))


def edsr_tiny(params: EDSRTinyParams, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the network of a recipe; there are no classes."""
    return EDSRTiny(sample_shape[0], params.width, params.blocks, params.scale, params.residual_scale)


#: as :data:`fat_plugins.recipes.models.MODELS`
NETS = {"edsr_tiny": (EDSRTinyParams, edsr_tiny)}
