"""Float networks that the tests quantize as a whole, and a way to read where quantizers are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fat_plugins import named_quantizers

SECTION = {"algorithm": "fat", "weights": {"bits": 4}, "activations": {"bits": 4}}
LSQ = {**SECTION, "algorithm": "lsq"}


class Residual(nn.Module):
    """Shared ReLU module, in-place addition, a downsampling branch, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.c1, self.b1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.gap, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.bn(self.stem(x))))
        y = self.b2(self.c2(self.act(self.b1(self.c1(x)))))
        y += self.down(x)
        x = self.act(y)
        return self.fc(F.dropout(torch.flatten(self.gap(x), 1), 0.5, training=self.training))


class Mobile(nn.Module):
    """ReLU6, a depthwise layer, hard swish, concatenation, and an output that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )
        self.wide, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.features(x)
        x = x + F.hardswish(self.wide(x))[:, :8]
        x = torch.cat([x, x.relu()], 1)
        return self.fc(F.avg_pool2d(x, 6).flatten(1)), x


class Fork(nn.Module):
    """A ReLU that a layer and the output read, a transposed convolution, 1-d layers, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.relu = nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ReLU()
        self.conv, self.last = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.relu(self.up(x))
        y = torch.sigmoid(self.conv(self.conv(x)))
        return self.last(y.permute(0, 2, 1)), x


class Recurrent(nn.Module):
    """Has layers that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embed(tokens))[0])


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    """A batch for the networks above with images."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def where(model: nn.Module, role: str) -> dict[str, tuple[int, str]]:
    """Bits and class of every quantizer of a role by the name that it has in reports."""
    return {q.spec.name: (q.spec.bits, type(q).__name__) for _, q in named_quantizers(model) if q.role == role}


def step(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """One optimizer step, then evaluation mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    out = model(x)
    (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
    optimizer.step()
    return model.eval()
