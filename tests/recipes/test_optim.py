"""Optimizers and schedules by name."""

import pytest
import torch
from pydantic import ValidationError

from fat_plugins.recipes.optim import OPTIMIZERS, lr_factor, make_optimizer
from fat_plugins.recipes.schema import OptimizerSection, ScheduleSection


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_steps_with_decay(name):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    before = net.weight.detach().clone()
    optimizer = make_optimizer(net, OptimizerSection(name=name, lr=0.1, weight_decay=0.01))
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    net(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.weight, before)


def test_options_reach_torch():
    net = torch.nn.Linear(3, 2)
    adam = make_optimizer(net, OptimizerSection(name="adam", lr=0.1, options={"betas": [0.5, 0.9], "amsgrad": True}))
    assert (adam.defaults["betas"], adam.defaults["amsgrad"]) == ((0.5, 0.9), True)
    assert (
        make_optimizer(net, OptimizerSection(name="rmsprop", lr=1, options={"momentum": 0.3})).defaults["momentum"]
        == 0.3
    )


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "adam", "options": {"beta": [0.5, 0.9]}}, r"unknown option of adam 'beta'.*did you mean 'betas'"),
        ({"name": "sgd", "options": {"momentum": 0.5}}, r"unknown option of sgd 'momentum'"),
        ({"name": "adam", "options": {"fused": True}}, r"unknown option of adam 'fused'"),
        ({"name": "adamw", "momentum": 0.5}, r"momentum and nesterov belong to 'sgd'"),
        ({"name": "lbfgs"}, r"'sgd'"),
    ],
)
def test_bad_options_are_named(section, expected):
    with pytest.raises(ValidationError, match=expected):
        OptimizerSection(lr=0.1, **section)


def test_what_torch_refuses_is_one_line():
    with pytest.raises(ValueError, match=r"^optimizer.options: adam: Invalid beta parameter"):
        make_optimizer(torch.nn.Linear(1, 1), OptimizerSection(name="adam", lr=0.1, options={"betas": [2.0, 0.9]}))


def factors(epochs, at, **section):
    return [round(lr_factor(ScheduleSection(**section), epochs, e), 6) for e in at]


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"name": "constant"}, [1, 1, 1, 1]),
        ({"name": "linear"}, [1, 0.75, 0.25, 0]),
        ({"name": "linear", "hold_epochs": 4}, [1, 1, 0.5, 0]),
        ({"name": "linear", "final": 0.5}, [1, 0.875, 0.625, 0.5]),
        ({"name": "polynomial"}, [1, 0.5625, 0.0625, 0]),
        ({"name": "polynomial", "power": 3.0}, [1, 0.421875, 0.015625, 0]),
        ({"name": "cosine", "final": 0.1}, [1, 0.868198, 0.231802, 0.1]),
        ({"name": "step", "step_epochs": 2, "gamma": 0.5}, [1, 0.5, 0.125, 0.0625]),
        ({"name": "exponential", "gamma": 0.9}, [1, 0.81, 0.531441, 0.430467]),
    ],
)
def test_course_of_the_rate(section, wanted):
    assert factors(8, [0, 2, 6, 8], **section) == pytest.approx(wanted, abs=1e-6)


def test_one_cycle_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=1001, cycle_momentum=False)
    for step in range(1000):
        assert lr_factor(ScheduleSection(name="onecycle"), 1000, step) == pytest.approx(
            cycle.get_last_lr()[0], abs=0.01
        )
        optimizer.step()
        cycle.step()


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "step"}, "step_epochs belongs to 'step', which needs it"),
        ({"name": "cosine", "step_epochs": 3}, "step_epochs belongs to 'step'"),
        ({"name": "multistep", "milestones": [3], "hold_epochs": 2}, "hold_epochs and final belong to cosine"),
        ({"name": "cosine", "final": 1.5}, "less than or equal to 1"),
    ],
)
def test_schedules_refuse_what_is_not_theirs(section, expected):
    with pytest.raises(ValidationError, match=expected):
        ScheduleSection(**section)
