"""Re-estimation of batch norms, on plain modules: nothing here knows a host or an algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fat_plugins import ConfigError, reestimate_batch_norms


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3)
        self.drop, self.frozen = nn.Dropout(0.9), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x, shift=0.0):
        return self.frozen(self.norm(self.conv(self.drop(x)) + shift))


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 2, 4, 4, generator=generator) + i for i in range(count)]


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x, 0), lambda x: {"x": x, "shift": 0.0}])
def test_statistics_are_the_average_over_batches_of_the_evaluation_forward(kind):
    net = Net().train()
    net.conv.eval()
    net.norm.running_mean.fill_(77.0)
    assert reestimate_batch_norms(net, [kind(x) for x in batches()]) == 1
    outs = [net.conv(x) for x in batches()]  # without dropout
    torch.testing.assert_close(net.norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outs]).mean(0))
    torch.testing.assert_close(net.norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outs]).mean(0))
    assert net.norm.momentum == 0.3
    assert net.training and net.norm.training and net.drop.training and not net.conv.training


def test_count_limits_the_batches():
    one, same = Net(), Net()
    same.load_state_dict(one.state_dict())
    reestimate_batch_norms(one, batches(3), count=1)
    reestimate_batch_norms(same, batches(1))
    assert torch.equal(one.norm.running_mean, same.norm.running_mean)


def test_no_batch_leaves_everything_as_it_was():
    net = Net()
    net.norm.running_mean.fill_(7.0)
    with pytest.raises(ConfigError, match="there is no batch"):
        reestimate_batch_norms(net, [])
    assert net.norm.running_mean.tolist() == [7.0] * 3 and net.norm.momentum == 0.3 and net.training


def test_a_model_without_batch_norms_is_left_alone():
    assert reestimate_batch_norms(nn.Linear(2, 2), []) == 0
