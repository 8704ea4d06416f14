"""A residual network with switchable norms, and what must hold for it at every width, on every host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fat_plugins
from fat_plugins.network import named_quantizers
from fat_plugins.switchable_norms import SwitchableNorm

WIDTHS = [8, 4, 2, 1]
#: the names of activation quantizers behind a norm must not depend on its width, hence the shortcut
CONFIG = {
    "input_info": {"sample_size": [1, 3, 8, 8]},
    "compression": {
        "algorithm": "one_model_for_all",
        "weights": {"bits": 2},
        "activations": {"bits": 2},
        "params": {"bit_set": WIDTHS},
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}},
    },
}


class Net(nn.Module):
    """Stem, a block with a shortcut, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.shortcut, self.norm2 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = (self.norm1(self.conv1(x)) + self.norm2(self.shortcut(x))).relu()
        return self.head(x.mean((2, 3)))


def float_model() -> nn.Module:
    """Fresh, with the same weights each time."""
    torch.manual_seed(0)
    net = Net()
    fat_plugins.rewrite(net, "switchable_norm", params={"bit_set": WIDTHS})
    return net


def batches() -> DataLoader:
    """Two batches of images and labels."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=4)


def images() -> Tensor:
    """The first batch."""
    return next(iter(batches()))[0]


def train(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Two steps at all widths."""
    optimizer = torch.optim.SGD(fat_plugins.param_groups(model, 0.05), 0.05)
    model.train()
    for x, labels in batches():
        optimizer.zero_grad()
        for _ in fat_plugins.each_width(model):
            (nn.functional.cross_entropy(model(x), labels) + loss()).backward()
        optimizer.step()
    model.eval()


def check(model: nn.Module, loss: Callable[[], Tensor], freeze: Callable[[nn.Module], nn.Module], export: Any) -> None:
    """Placement, training, switching, freezing and exporting at every width.

    :param export: writes a frozen model and gives the verifier's report.
    """
    assert fat_plugins.widths(model) == tuple(WIDTHS)
    quantizers = [q for _, q in named_quantizers(model)]
    assert {q.bits for q in quantizers if len(q.widths) > 1} == {2}
    assert {q.role for q in quantizers if len(q.widths) > 1} == {"weight", "activation"}
    assert all(q.spec.followed_by_norm for q in quantizers if q.role == "weight" and len(q.widths) > 1)
    norms = [m for m in model.modules() if isinstance(m, SwitchableNorm)]
    assert len(norms) == 3 and {n.active_bits for n in norms} == {2}
    statistics = [getattr(norms[0], f"running_mean_{bits}") for bits in WIDTHS]
    assert all(t.any() for t in statistics)  # adapted at every width, from zeros
    train(model, loss)
    x = images()
    with torch.no_grad():
        first = {}
        for bits in WIDTHS:
            fat_plugins.set_active_bits(model, bits)
            first[bits] = model(x)
        assert len({tuple(v.flatten().tolist()) for v in first.values()}) == len(WIDTHS)
        for bits in (2, 8, 1, 4):
            fat_plugins.set_active_bits(model, bits)
            assert torch.equal(model(x), first[bits])
            frozen = freeze(model)
            assert torch.equal(frozen(x), first[bits])
            if bits in (1, 4):
                report = export(frozen)
                assert report.ok, report.first_difference
    with pytest.raises(fat_plugins.QuantizationError, match="does not compute at 3 bits; allowed: 8, 4, 2, 1"):
        fat_plugins.set_active_bits(model, 3)
    for bits in WIDTHS:  # the frozen copies left the model alone
        fat_plugins.set_active_bits(model, bits)
        assert torch.equal(model(x).detach(), first[bits])
