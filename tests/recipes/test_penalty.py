"""The key ``penalty`` of recipes: in float training and with quantizers, resumed, in parts, in two processes."""

import json

import pytest
import torch
from cuts import Killed, assert_same_run, cut_at
from torch import nn
from two_processes import start_two

from fat_plugins.errors import ConfigError, FatPluginsError
from fat_plugins.recipes import Options, load_checkpoint, load_recipe, train
from fat_plugins.recipes.data import DATASETS, DigitsParams
from fat_plugins.recipes.models import DigitsCNN
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.penalty import PenaltySection
from fat_plugins.recipes.schema import OptimizerSection, TrainSection
from fat_plugins.recipes.trainer import Trainer


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"][1](DigitsParams())


class Plain(nn.Module):
    """No batch norm, whose statistics are those of a part of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x)


def cnn():
    torch.manual_seed(0)
    return DigitsCNN(1, 10, width=4)


def fitted(net, data, epochs=1, penalty=None, **keys):
    """The records of a training of ``net`` in place."""
    section = PenaltySection(name="gradient_l1", params=penalty) if penalty is not None else None
    part = TrainSection(epochs=epochs, optimizer=OptimizerSection(lr=0.1), penalty=section, **keys)
    return Trainer(net, data, part, batch_size=128, seed=1, parts=parts_of(part, net)).run()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_records_have_what_the_penalty_was_and_it_shrinks(data):
    free, held = cnn(), cnn()
    options = {"lambda_weights": 1e-8, "lambda_activations": 1e-8}
    loose = fitted(free, data, 3, options)[-1].values["penalty"]
    tight = fitted(held, data, 3, {"lambda_weights": 0.01, "lambda_activations": 0.01})[-1].values["penalty"]
    assert set(loose) == {"weight", "activation"}
    assert tight["weight"] < 0.7 * loose["weight"] and tight["activation"] < 0.7 * loose["activation"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in held.modules())


@pytest.mark.parametrize("penalty", [{"lambda_weights": 0, "lambda_activations": 0}, {"start": 2}])
def test_without_lambda_and_before_the_start_training_is_the_plain_one(data, penalty):
    plain, held = cnn(), cnn()
    records = fitted(plain, data, 2), fitted(held, data, 2, penalty)
    assert same(plain, held)
    assert records[0] == records[1]


def test_it_begins_in_the_middle_of_an_epoch(data):
    plain, late, later = cnn(), cnn(), cnn()
    fitted(plain, data)
    fitted(late, data, penalty={"start": 0.5})
    fitted(later, data, penalty={"start": 0.99})  # after the last step has begun
    assert same(plain, later) and not same(plain, late)


@pytest.mark.parametrize("role", ["weights", "activations"])
def test_a_batch_in_parts(data, role):
    """Gradients of activations are the whole batch's; those of weights are of each part, whose sums are larger."""
    others = {"lambda_weights", "lambda_activations"} - {f"lambda_{role}"}
    penalty = {f"lambda_{role}": 1e-3, others.pop(): 0}
    nets = [Plain(), Plain()]
    records = [fitted(net, data, 1, penalty, accumulate=n)[0] for net, n in zip(nets, (1, 4), strict=True)]
    values = [record.values["penalty"][role.removesuffix("s")] for record in records]
    if role == "activations":
        assert values[1] == pytest.approx(values[0], rel=1e-3)
        for a, b in zip(*(n.parameters() for n in nets), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    else:
        assert values[1] > 1.1 * values[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_and_averages(data, amp):
    full, half = Plain(), Plain()
    penalty = {"lambda_weights": 1e-3, "lambda_activations": 1e-3}
    records = fitted(full, data, 1, penalty), fitted(half, data, 1, penalty, amp=amp, ema={"decay": 0.5})
    a, b = (r[0].values["penalty"] for r in records)
    assert a == pytest.approx(b, rel=0.05)


RECIPE = """\
name: tiny
seeds: [3]
threads: 1
model: {name: digits_cnn, params: {width: 4}}
data: {name: digits, batch_size: 256}
compression: {algorithm: lsq, weights: {bits: 4}}
pretrain:
  epochs: 2
  optimizer: {name: sgd, lr: 0.1}
  penalty: {name: gradient_l1, params: {lambda_weights: 1.0e-3, warmup: 1.5}}
training:
  epochs: 2
  optimizer: {name: sgd, lr: 0.02}
  accumulate: 2
  penalty: {name: gradient_l1, params: {lambda_activations: 0, normalise: step}}
export: null
"""


def test_a_cut_run_goes_on_bit_for_bit(load, tmp_path, toy_host):
    recipe = load(RECIPE)
    report = train(recipe, tmp_path / "whole")
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    for epochs in (metrics["float"]["epochs"], metrics["quantized"]["stages"][0]["epochs"]):
        assert all(epoch["values"]["penalty"]["weight"] > 0 for epoch in epochs)
    assert "penalty gradient_l1 lambda_weights 0.001 warmup 1.5" in report.facts["Float training"]
    assert "gradient_l1: C: " in report.facts["Fidelity"]
    steps = len(metrics["float"]["epochs"]) * 5
    for step in (3, steps + 2):  # amid an epoch of float training, and of fine-tuning
        with pytest.raises(Killed), cut_at(step=step):
            train(recipe, tmp_path / f"cut{step}", options=Options(save_steps=1))
        train(recipe, tmp_path / f"cut{step}", options=Options(resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{step}")


def test_quantization_without_training_at_several_widths(load, tmp_path, toy_host):
    before, after = RECIPE.replace("algorithm: lsq", "algorithm: minmax").split("training:\n  epochs: 2")
    text = f"{before}training:\n  epochs: 0\n  stages: [{{weights: {{bits: 8}}}}, {{weights: {{bits: 3}}}}]{after}"
    train(load(text), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    eight, three = (stage["before_training"]["validation_loss"] for stage in metrics["quantized"]["stages"])
    assert eight == pytest.approx(metrics["float"]["epochs"][-1]["validation_loss"], rel=0.05)
    assert three != eight
    float_state = load_checkpoint(tmp_path / "run" / "checkpoint" / "float.safetensors").state
    last = load_checkpoint(tmp_path / "run" / "checkpoint" / "last.safetensors")
    assert last.config["compression"]["weights"]["bits"] == 3
    weight = last.state["conv2.0.parametrizations.weight.original"]
    assert torch.equal(weight, float_state["conv2.0.weight"])


def test_what_cannot_be_penalised_is_found_before_any_training(load, tmp_path, toy_host):
    for algorithm in ("fat", "direct"):
        recipe = load(RECIPE.replace("algorithm: lsq", f"algorithm: {algorithm}"))
        with pytest.raises(
            FatPluginsError, match=r"^training.penalty: [^\n]*(_Gate cannot be diff|'direct' trains)[^\n]*$"
        ):
            train(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    recipe = load(RECIPE.replace("compression: {algorithm: lsq", "baselines: [fat]\ncompression: {algorithm: lsq"))
    with pytest.raises(FatPluginsError, match=r"^training.penalty: gradient_l1: _Gate"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    "old,new,text",
    [
        (
            "name: gradient_l1",
            "name: gradient_l2",
            "pretrain.penalty.name: unknown penalty 'gradient_l2'; allowed: .*did you",
        ),
        (
            "lambda_weights:",
            "lambda_weight:",
            "pretrain.penalty.params.lambda_weight: unknown key; allowed: .*did you mean",
        ),
        ("normalise: step", "normalise: 1", "training.penalty.params.normalise: expected .*, got 1"),
        (
            "{name: gradient_l1, params: {lambda_weights: 1.0e-3, warmup: 1.5}}",
            "3",
            "pretrain.penalty: expected a name, or an",
        ),
    ],
)
def test_errors_name_the_key(load, old, new, text):
    with pytest.raises(ConfigError, match=text):
        load(RECIPE.replace(old, new, 1))


def test_a_name_alone_is_enough(load):
    text = RECIPE.replace("{name: gradient_l1, params: {lambda_weights: 1.0e-3, warmup: 1.5}}", "gradient_l1")
    assert load(text).pretrain.penalty == PenaltySection(name="gradient_l1")


def test_two_processes_are_one(tmp_path, toy_host):
    """Of activations: those of weights are of each process's own images."""
    import plain_net

    text = (
        "name: tiny\n" + plain_net.SECTIONS + "host: nncf\ncompression: {algorithm: lsq, weights: {bits: 4}}\n"
        "pretrain:\n  epochs: 2\n  optimizer: {name: sgd, lr: 0.1}\n"
        "  penalty: {name: gradient_l1, params: {lambda_weights: 0, lambda_activations: 0.01}}\n"
        "training: {epochs: 0, optimizer: {name: sgd, lr: 0.1}}\nexport: null\n"
    )
    for size in (50, 100):
        (tmp_path / f"{size}.yaml").write_text(text.replace("BATCH", str(size)))
    for code, _, err in start_two(tmp_path, tmp_path / "50.yaml", "-o", "two", words="toy"):
        assert code == 0, err
    train(load_recipe(tmp_path / "100.yaml"), tmp_path / "one")
    one, two = (load_checkpoint(tmp_path / n / "checkpoint" / "float.safetensors").state for n in ("one", "two"))
    for key, tensor in one.items():
        assert float((tensor - two[key]).abs().max()) < 1e-5, key
