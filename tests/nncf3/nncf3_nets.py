"""Small networks and helpers for the NNCF 3 tests."""

from __future__ import annotations

import fat_nncf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (4, 3, 8, 8)


class Small(nn.Module):
    """Two convolutions with batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


class Zoo(nn.Module):
    """Depthwise, grouped, 1x1, transposed, shared and ModuleList layers; residual add; concat; a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1)])
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.table = nn.Parameter(torch.randn(4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.body(x) + x
        for block in self.blocks:
            y = F.relu(block(y))
        y = self.shared(F.relu(self.shared(y)))
        y = torch.cat([y, F.max_pool2d(x, 3, 1, 1)], 1)
        return self.fc(torch.matmul(self.up(y).mean((2, 3)), self.table))


def loader(batches: int = 2, shape: tuple[int, ...] = SHAPE) -> list[tuple[Tensor, Tensor]]:
    """``(input, target)`` batches from a generator of their own."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, 5, (shape[0],), generator=generator))
        for _ in range(batches)
    ]


def batch() -> Tensor:
    """An input that calibration has not seen."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def section(algorithm: str = "fat", bits: int = 4, **more) -> dict:
    """A compression section."""
    return {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}, **more}


def config(compression=None, data=True, **root) -> fat_nncf.NNCFConfig:
    """An NNCF config, with a loader unless told otherwise."""
    compression = section() if compression is None else compression
    found = fat_nncf.NNCFConfig.from_dict(
        {"input_info": {"sample_size": list(SHAPE)}, "compression": compression, **root}
    )
    return fat_nncf.register_default_init_args(found, loader() if data is True else data) if data else found


def compress(compression=None, net: nn.Module | None = None, data=True, **root):
    """Controller and compressed model."""
    return fat_nncf.create_compressed_model(net or Small(), config(compression, data, **root))


def train(controller, model: nn.Module, epochs: int = 1, lr: float = 0.01) -> list[float]:
    """A few steps of the loop that NNCF's users write; the losses."""
    optimizer = torch.optim.SGD(fat_nncf.param_groups(model, lr=lr), lr=lr)
    model.train()
    losses = []
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for x, y in loader():
            controller.scheduler.step()
            loss = F.cross_entropy(model(x), y) + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses


def quantizers(model: nn.Module) -> dict[tuple[str, str], object]:
    """Core quantizers by role and name."""
    from fat_plugins import named_quantizers

    return {(q.spec.role, q.spec.name): q for _, q in named_quantizers(model)}


def bits(model: nn.Module, role: str = "weight") -> dict[str, int]:
    """Bit widths by name."""
    return {name: q.spec.bits for (r, name), q in quantizers(model).items() if r == role}
