"""The training loop: reproducible, schedules by name, driven controllers, refused divergence."""

import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes.data import DATASETS, DigitsParams
from fat_plugins.recipes.loading import Images, ShiftedImages
from fat_plugins.recipes.models import DigitsCNN
from fat_plugins.recipes.progress import LINES_PER_PHASE, Reporter
from fat_plugins.recipes.schema import OptimizerSection, ScheduleSection, TrainSection
from fat_plugins.recipes.trainer import evaluate, fit, lr_factor, make_optimizer

#: images of each digit in scikit-learn's set
COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"][1](DigitsParams())


def section(epochs=2, **optimizer):
    return TrainSection(epochs=epochs, optimizer=OptimizerSection(**{"lr": 0.1, **optimizer}))


def model(seed=0):
    torch.manual_seed(seed)
    return DigitsCNN(1, 10, width=4)


def train(data, seed, **settings):
    net = model()
    records = fit(net, data, section(**settings), batch_size=256, seed=seed)
    return net, records


# -- data ------------------------------------------------------------------------------------------------------------
def test_digits_are_the_real_ones_split_without_overlap(data):
    parts = [data.train, data.validation, data.test]
    images = torch.cat([p.tensors[0] for p in parts]).flatten(1)
    labels = torch.cat([p.tensors[1] for p in parts])
    assert images.shape == (1797, 64)
    assert data.sample_shape == (1, 8, 8)
    assert labels.bincount().tolist() == COUNTS
    # scikit-learn's set holds no image twice, so neither may the parts together
    assert len(torch.unique(images, dim=0)) == 1797
    assert abs(float(data.train.tensors[0].mean())) < 1e-5
    assert abs(float(data.train.tensors[0].std()) - 1) < 1e-3


def test_split_is_stratified_and_fixed(data):
    test = data.test.tensors[1].bincount().tolist()
    assert all(abs(n - 0.3 * whole) <= 1 for n, whole in zip(test, COUNTS, strict=True))
    again = DATASETS["digits"][1](DigitsParams())
    assert torch.equal(again.test.tensors[0], data.test.tensors[0])
    other = DATASETS["digits"][1](DigitsParams(split_seed=1))
    assert not torch.equal(other.test.tensors[0], data.test.tensors[0])


def test_shift_moves_images_and_fills_with_background():
    images = torch.zeros(100, 1, 8, 8)
    images[:, 0, 4, 4] = 1
    moved = ShiftedImages(Images(images, torch.arange(100)), 0, 1, -2.0)
    shifted, labels = moved.__getitems__([(0, i) for i in range(100)])
    assert labels.tolist() == list(range(100))
    places = (shifted == 1).nonzero()[:, 2:]
    assert places.shape == (100, 2)
    assert set(map(tuple, places.tolist())) == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
    assert float(shifted.min()) == -2.0
    inner = shifted[:, :, 1:7, 1:7]
    assert int((inner == -2).sum()) == 0


# -- schedules and optimizers ----------------------------------------------------------------------------------------
def test_cosine_falls_from_one_to_zero():
    schedule = ScheduleSection(name="cosine")
    assert [round(lr_factor(schedule, 10, e), 6) for e in (0, 5, 10)] == [1, 0.5, 0]


def test_warmup_rises_then_cosine_starts():
    schedule = ScheduleSection(name="cosine", warmup_epochs=2)
    assert 0 < lr_factor(schedule, 10, 0) < 0.001
    assert lr_factor(schedule, 10, 1) == pytest.approx(0.5, abs=1e-3)
    assert lr_factor(schedule, 10, 2) == 1
    assert lr_factor(schedule, 10, 6) == pytest.approx(0.5)


def test_multistep_drops_at_milestones():
    schedule = ScheduleSection(name="multistep", milestones=[4, 2], gamma=0.1)
    assert [lr_factor(schedule, 9, e) for e in (0, 1.9, 2, 3.9, 4, 8)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_optimizers_by_name():
    net = model()
    sgd = make_optimizer(net, OptimizerSection(lr=0.1, weight_decay=0.01))
    assert (type(sgd), sgd.defaults["momentum"]) == (torch.optim.SGD, 0.9)
    assert sgd.param_groups[0]["weight_decay"] == 0.01
    assert type(make_optimizer(net, OptimizerSection(name="adam", lr=0.1))) is torch.optim.Adam
    assert type(make_optimizer(net, OptimizerSection(name="adamw", lr=0.1))) is torch.optim.AdamW


# -- the loop --------------------------------------------------------------------------------------------------------
def test_same_seed_gives_the_same_bits_another_seed_does_not(data):
    (a, records_a), (b, records_b), (c, _) = train(data, 1), train(data, 1), train(data, 2)
    assert records_a == records_b
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    assert not torch.equal(a.head.weight, c.head.weight)


def test_training_learns(data):
    records = fit(model(), data, section(8), batch_size=64, seed=0)
    assert [r.epoch for r in records] == list(range(8))
    assert records[-1].train_loss < 0.5 * records[0].train_loss
    assert records[-1].validation_accuracy > 0.5  # chance is 0.1


def test_evaluate_counts_right_and_keeps_the_mode(data):
    class Oracle(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            wanted = data.test.tensors[1][(data.test.tensors[0][:, None] == x).flatten(2).all(2).int().argmax(0)]
            return 5.0 * torch.nn.functional.one_hot(wanted, 10).float()

    net = Oracle().train()
    loss, accuracy = evaluate(net, data.test_loader(100))
    assert accuracy == 1.0
    assert loss == pytest.approx(math.log(1 + 9 * math.exp(-5)), rel=1e-5)
    assert net.training
    _, accuracy = evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), data.test_loader())
    assert accuracy < 0.5


class Recorder:
    """A controller that adds a loss and counts what it is told."""

    def __init__(self, parameter):
        self.parameter, self.log = parameter, []
        self.scheduler = SimpleNamespace(
            step=lambda: self.log.append("step"), epoch_step=lambda: self.log.append("epoch"), total_epochs=None
        )

    def loss(self):
        return 1e6 * (self.parameter**2).sum()


def test_controller_is_driven_and_its_loss_counts(data):
    net = model()
    controller = Recorder(net.head.bias)
    with torch.no_grad():
        net.head.bias.fill_(1.0)
    fit(net, data, section(lr=1e-7), batch_size=256, seed=0, controller=controller)
    steps = len(data.training_loader(256, 0))
    assert controller.log == (["epoch"] + ["step"] * steps) * 2
    assert controller.scheduler.total_epochs == 2
    assert float(net.head.bias.detach().abs().max()) < 0.9  # without the extra loss it would stay at 1


def test_divergence_is_an_error(data):
    with pytest.raises(FatPluginsError, match="the loss is nan in epoch 1; lower the learning rate"):
        fit(model(), data, section(lr=1e30), batch_size=256, seed=0)


def test_callback_sees_every_epoch(data):
    seen = []
    records = fit(model(), data, section(), batch_size=256, seed=0, on_epoch=seen.append)
    assert seen == records


# -- progress --------------------------------------------------------------------------------------------------------
def lines(data, quiet, terminal, epochs, tmp_path):
    path = tmp_path / "out.txt"
    with path.open("w") as file:
        console = Console(file=file, force_terminal=terminal, width=200)
        reporter = Reporter(quiet, console)
        fit(model(), data, section(epochs), batch_size=1024, seed=0, reporter=reporter, title="phase one")
        reporter.say("the end")
    return path.read_text()


def test_progress_without_a_terminal_is_a_few_plain_lines(data, tmp_path):
    text = lines(data, False, False, 8, tmp_path)
    assert text.count("phase one: epoch") == LINES_PER_PHASE
    assert "epoch 8/8" in text
    assert "val acc" in text
    assert "the end" in text
    assert "\x1b" not in text


def test_progress_on_a_terminal_is_a_bar(data, tmp_path):
    text = lines(data, False, True, 2, tmp_path)
    assert "\x1b" in text
    assert "epoch 2/2" in text
    assert "loss" in text


def test_quiet_is_silent(data, tmp_path):
    assert lines(data, True, True, 2, tmp_path) == ""
