"""Averaged weights, distillation, mixed precision, clipping and accumulation: alone, and in a training that is cut."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes.data import DATASETS, DigitsParams
from fat_plugins.recipes.models import DigitsCNN
from fat_plugins.recipes.parts import Distillation, Precision, WeightAverage, parts_of
from fat_plugins.recipes.schema import FineTuneSection, OptimizerSection
from fat_plugins.recipes.state import from_bytes, to_bytes
from fat_plugins.recipes.trainer import Trainer


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"][1](DigitsParams())


def model(seed=0):
    torch.manual_seed(seed)
    return DigitsCNN(1, 10, width=4)


def section(epochs=2, **keys):
    return FineTuneSection(epochs=epochs, optimizer=OptimizerSection(lr=0.1), **keys)


def trainer(net, data, part, teacher=None, batch_size=256, **settings):
    return Trainer(net, data, part, batch_size=batch_size, seed=1, parts=parts_of(part, net, teacher), **settings)


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


# -- averages --------------------------------------------------------------------------------------------------------
def test_average_follows_the_formula_and_leaves_out_what_stands_still():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net[2].weight.requires_grad_(False)
    average, wanted = WeightAverage(net, 0.5), net[0].weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            net[0].weight.add_(1.0)
            net[2].weight.add_(1.0)
            net[1].running_mean.fill_(step)
        average.after_step()
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * net[0].weight.detach()
    assert torch.allclose(average.values["0.weight"], wanted, rtol=1e-5)
    assert "2.weight" not in average.values
    live = deepcopy(net.state_dict())
    with average.evaluated(net):
        assert torch.equal(net[0].weight, average.values["0.weight"])
        assert float(net[1].running_mean[0]) < 39
        assert torch.equal(net[2].weight, live["2.weight"])
        net[1].running_mean.fill_(-3.0)  # renewed for the averaged network
    assert same(net.state_dict(), live)
    state = from_bytes(to_bytes(average.state_dict()))
    average = WeightAverage(net, 0.5)
    average.load_state_dict(state)
    average.finish(net)
    assert torch.equal(net[0].weight, average.values["0.weight"])
    assert net[1].running_mean.tolist() == [-3.0, -3.0]


def test_layers_that_begin_to_train_join_with_their_present_value():
    net = nn.Linear(1, 1).requires_grad_(False)
    average = WeightAverage(net, 0.9)
    assert average.values == {}
    with torch.no_grad():
        net.requires_grad_(True).weight.fill_(7.0)
    average.after_step()
    assert average.values["weight"].item() == 7.0


def test_averages_of_another_model_are_refused():
    state = WeightAverage(nn.Linear(2, 2), 0.9).state_dict()
    with pytest.raises(CheckpointError, match=r"averaged weights: belong to another model: 'weight'"):
        WeightAverage(nn.Linear(3, 2), 0.9).load_state_dict(state)


def test_it_is_the_average_that_is_evaluated_and_left(data):
    plain, averaged = model(), model()
    plain_records = trainer(plain, data, section()).run()
    run = trainer(averaged, data, section(ema={"decay": 0.9}))
    records = run.run()
    assert [r.train_loss for r in records] == [r.train_loss for r in plain_records]  # training itself does not change
    assert [r.validation_loss for r in records] != [r.validation_loss for r in plain_records]
    assert torch.equal(averaged.head.weight, run.parts[0].values["head.weight"])
    assert not torch.equal(averaged.head.weight, plain.head.weight)


# -- distillation ----------------------------------------------------------------------------------------------------
class Context:
    def __init__(self, smoothing=0.0):
        self.precision = Precision(None, torch.device("cpu"))
        self.section = section(label_smoothing=smoothing)


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 4.0)])
def test_distillation_is_the_formula(alpha, temperature):
    teacher, images = nn.Linear(3, 4).double(), torch.rand(5, 3).double()
    logits = torch.rand(5, 4).double().requires_grad_()
    labels = torch.arange(5) % 4
    part = Distillation(teacher, alpha, temperature)
    total = cross_entropy(logits, labels) + part.loss(Context(), images, labels, logits)
    p = (teacher(images) / temperature).softmax(1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(1))).sum(1).mean()
    wanted = (1 - alpha) * cross_entropy(logits, labels) + alpha * temperature**2 * kl
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    total.backward()
    assert logits.grad.abs().sum() > 0
    assert teacher.weight.grad is None


def test_teacher_with_other_classes_is_refused():
    with pytest.raises(ConfigError, match=r"the teacher gives \(5, 3\), the model \(5, 4\)"):
        Distillation(nn.Linear(2, 3), 1, 1).loss(Context(), torch.rand(5, 2), torch.zeros(5).long(), torch.rand(5, 4))


def test_student_comes_to_agree_with_its_teacher(data):
    teacher = model(5)
    images = data.images("test", 200)[0]

    def agreement(net):
        with torch.no_grad():
            return float((net.eval()(images).argmax(1) == teacher.eval()(images).argmax(1)).float().mean())

    trainer(teacher, data, section(6), batch_size=64).run()
    kept = deepcopy(teacher.state_dict())
    student = model(1)
    before = agreement(student)
    trainer(student, data, section(6, distillation={"alpha": 1.0}), teacher, batch_size=64).run()
    assert agreement(student) > before + 0.3
    assert same(teacher.state_dict(), kept)


# -- one step --------------------------------------------------------------------------------------------------------
class Plain(nn.Module):
    """No batch norm, whose statistics are those of a part of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


def test_a_batch_in_parts_is_the_same_step(data):
    nets = [Plain(), Plain()]
    records = [
        trainer(net, data, section(1, accumulate=parts), batch_size=100).run()[0]
        for net, parts in zip(nets, (1, 3), strict=True)
    ]
    assert records[0].train_accuracy == records[1].train_accuracy
    assert records[0].train_loss == pytest.approx(records[1].train_loss, rel=1e-5)
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradients_are_clipped_together(data):
    net = Plain()
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    part = section(1, clip_norm=0.01)
    part.optimizer = OptimizerSection(lr=1.0, momentum=0.0)
    trainer(net, data, part, max_steps=1).run()
    moved = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_reaches_the_forward_only(data):
    seen = set()
    net = Plain()
    net.layers[1].register_forward_hook(lambda m, i, out: seen.add((out.dtype, m.training)))
    records = trainer(net, data, section(1, amp="bf16"), max_steps=1).run()
    assert seen == {(torch.bfloat16, True), (torch.float32, False)}
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert records[0].train_loss < 5


def test_scale_of_float16_gradients_is_kept_and_overflow_skips_the_step():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    precision = Precision("fp16", torch.device("cpu"))
    before, scale = net.weight.detach().clone(), precision.scaler.get_scale()
    precision.backward(net(torch.tensor([[1e38, 1e38]])).sum())
    precision.step(optimizer, clip_norm=1.0)
    assert torch.equal(net.weight, before)
    assert precision.scaler.get_scale() < scale
    again = Precision("fp16", torch.device("cpu"))
    again.load_state_dict(precision.state_dict())
    assert again.scaler.get_scale() == precision.scaler.get_scale()


# -- resume ----------------------------------------------------------------------------------------------------------
class Cut(Exception):
    pass


def test_training_with_all_parts_resumes_bit_for_bit(data):
    part = section(
        2, ema={"decay": 0.95}, distillation={"alpha": 0.5, "temperature": 2.0}, clip_norm=1.0, accumulate=2,
        amp="bf16", reestimate_norms=True, norm_batches=2,
    )  # fmt: skip
    teacher = model(3)
    whole = model()
    wanted = trainer(whole, data, part, teacher).run()

    class Saving:
        state = None

        def by_step(self, step):
            return step == 6

        def by_time(self):
            return False

        def save(self, trainer):
            if trainer.epoch == 1 and trainer.step:
                Saving.state = to_bytes(trainer.state_dict())
                raise Cut

    with pytest.raises(Cut):
        trainer(model(), data, part, teacher, saving=Saving()).run()
    resumed = model(9)
    run = trainer(resumed, data, part, teacher)
    run.load_state_dict(from_bytes(Saving.state))
    assert run.run() == wanted
    assert same(whole.state_dict(), resumed.state_dict())
