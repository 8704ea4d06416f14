"""Several bit widths in every step of a training: gradients, draws, distillation, runs that are cut, reports."""

import json
from copy import deepcopy

import pytest
import torch
from cuts import Killed, assert_same_run, cut_at
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from two_processes import start_two

import fat_plugins
from fat_plugins import ConfigError, QuantizationError, TensorSpec, get_algorithm
from fat_plugins.recipes import Options, load_checkpoint, load_run, train
from fat_plugins.recipes.data import DATASETS, DigitsParams
from fat_plugins.recipes.joint import JointSection, JointStep
from fat_plugins.recipes.models import DigitsCNN
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.schema import FineTuneSection, OptimizerSection
from fat_plugins.recipes.trainer import Trainer, evaluate
from fat_plugins.switchable_norms import norm_statistics

WIDTHS = [8, 4, 3, 2, 1]


@pytest.fixture(scope="module")
def data():
    return DATASETS["digits"][1](DigitsParams())


def model(algorithm="one_model_for_all", widths=WIDTHS):
    torch.manual_seed(0)
    net = DigitsCNN(1, 10, width=4)
    if algorithm == "one_model_for_all":
        fat_plugins.rewrite(net, "switchable_norm", params={"bit_set": widths})
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d):
            spec = TensorSpec("weight", widths[-1], name=name, shape=tuple(layer.weight.shape))
            params = {"bit_set": widths} if algorithm == "one_model_for_all" else {}
            quantizer = get_algorithm(algorithm).make(spec, params)
            quantizer.calibrate(layer.weight)
            parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    fat_plugins.switching.follow_quantizers(net)
    return net


def section(joint, epochs=1, **keys):
    return FineTuneSection(epochs=epochs, optimizer=OptimizerSection(lr=0.1), joint=joint, **keys)


def trainer(net, data, part, **settings):
    settings = {"batch_size": 128, "seed": 1, **settings}
    return Trainer(net, data, part, parts=parts_of(part, net), **settings)


# -- the step --------------------------------------------------------------------------------------------------------
def test_a_step_follows_the_mean_of_all_widths(data):
    net, part = model(), section({})
    plain = deepcopy(net)
    run = trainer(net, data, part, max_steps=1)
    batch = next(iter(data.training_loader(128, 1).begin(0, 0)))
    run.run()
    optimizer = trainer(plain, data, part).optimizer
    plain.train()
    losses = []
    for bits in fat_plugins.each_width(plain):  # the helper of plain loops
        loss = cross_entropy(plain(batch[0]), batch[1])
        (loss / len(WIDTHS)).backward()
        losses.append(float(loss.detach()))
        assert {q.bits for _, q in fat_plugins.named_quantizers(plain)} == {bits}
    optimizer.step()
    for (name, ours), (_, expected) in zip(net.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6), name
    assert run.records[0].train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert {q.bits for _, q in fat_plugins.named_quantizers(net)} == {1}  # that of the config again


def test_parts_of_a_batch_change_nothing_but_the_norms(data):
    gradients = []
    for count in (1, 2):
        net = model().eval()
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train = lambda mode=True, norm=norm: norm  # statistics of parts are others
        run = trainer(net, data, section({"alpha": 0.5}, accumulate=count), max_steps=1)
        run.run()
        gradients.append(net.state_dict())
        assert run.parts[0]._answers == []
    for name, one in gradients[0].items():
        assert torch.allclose(one, gradients[1][name], atol=1e-5), name


def test_a_sandwich_has_both_ends_and_draws_the_rest_by_seed_and_step():
    part = JointStep(JointSection(widths="sandwich"), (8, 6, 5, 4, 3, 2))
    drawn = [part.drawn(0, step) for step in range(40)]
    assert all(d[0] == 8 and d[-1] == 2 and len(d) == 4 and list(d) == sorted(set(d), reverse=True) for d in drawn)
    assert {b for d in drawn for b in d} == {8, 6, 5, 4, 3, 2}
    assert drawn == [part.drawn(0, step) for step in range(40)] != [part.drawn(1, step) for step in range(40)]
    assert JointStep(JointSection(widths="sandwich"), (8, 4, 3, 2)).drawn(0, 0) == (8, 4, 3, 2)
    assert JointStep(JointSection(widths="sandwich", random=0), (8, 4, 3, 2)).drawn(0, 0) == (8, 2)
    assert JointStep(JointSection(), (8, 6, 5, 4, 3, 2)).drawn(0, 0) == (8, 6, 5, 4, 3, 2)


def test_others_learn_from_the_widest_one(data):
    alpha, t = 0.3, 2.0
    net = model(widths=[8, 2])
    run = trainer(net, data, section({"alpha": alpha, "temperature": t}))
    wide, narrow = torch.rand(5, 4), torch.rand(5, 4, requires_grad=True)
    labels, images = torch.arange(5) % 4, torch.rand(5, 1, 8, 8)
    joint = run.parts[0]
    for logits, each in zip((wide, narrow), joint.passes(run), strict=True):
        with each:
            term = joint.loss(run, images, labels, logits)
            assert (term is None) == (logits is wide)
    p = (wide / t).softmax(1)
    kl = (p * (p.log() - (narrow / t).log_softmax(1))).sum(1).mean()
    expected = (1 - alpha) * cross_entropy(narrow, labels) + alpha * t**2 * kl
    assert float((cross_entropy(narrow, labels) + term).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_every_width_is_evaluated_averaged_and_renewed(data):
    net = model(widths=[8, 2])
    part = section({}, epochs=2, ema={"decay": 0.5}, reestimate_norms=True, norm_batches=2)
    run = trainer(net, data, part)
    records = run.run()
    assert set(run.parts[1].norms) == set(norm_statistics(net)) and any(k.endswith("_8") for k in run.parts[1].norms)
    found = records[-1].values["widths"]
    for bits in (8, 2):
        with fat_plugins.at_bits(net, bits):
            loss, accuracy = evaluate(net, data.validation_loader())
        assert found[str(bits)] == {"validation_loss": loss, "validation_accuracy": accuracy}
    assert found["2"]["validation_loss"] == records[-1].validation_loss != found["8"]["validation_loss"]
    counters = {k: int(v) for k, v in net.state_dict().items() if "num_batches_tracked" in k}
    assert set(counters.values()) == {2}  # all of them anew


def test_a_model_of_one_width_trains_as_ever(data):
    plain, joint = model("lsq", [4]), model("lsq", [4])
    trainer(plain, data, section(None), max_steps=3).run()
    run = trainer(joint, data, section({}), max_steps=3)
    run.run()
    assert run.parts == [] and run.records[0].values == {}
    assert all(torch.equal(v, joint.state_dict()[k]) for k, v in plain.state_dict().items())


# -- whole runs ------------------------------------------------------------------------------------------------------
@pytest.fixture
def text(recipe_text):
    text = recipe_text.replace("compression: {algorithm: lsq, weights: {bits: 4}}", "")
    return text.replace("  epochs: 1\n", "  epochs: 1\n  joint: {widths: sandwich, random: 1, alpha: 0.3}\n") + (
        "threads: 1\n"
        "compression:\n  algorithm: one_model_for_all\n  weights: {bits: 2}\n  activations: {bits: 2}\n"
        "  params: {bit_set: [8, 4, 3, 2]}\n"
        "rewrites: [{name: switchable_norm, params: {bit_set: [8, 4, 3, 2]}}]\n"
    )


def test_a_run_says_how_good_every_width_is_and_loads_at_its_own(load, text, tmp_path, toy_host):
    report = train(load(text + "baselines: [lsq]\n"), tmp_path / "run")
    own, baseline = report.results
    assert list(own.widths) == ["8", "4", "3", "2"] and own.widths["2"] == own.accuracy and baseline.widths == {}
    assert "Test accuracy of one model at each width: one_model_for_all: 8 bits " in report.to_markdown()
    loaded = load_run(tmp_path / "run")
    assert {q.bits for _, q in fat_plugins.named_quantizers(loaded.model)} == {2}
    for bits, accuracy in own.widths.items():
        fat_plugins.set_active_bits(loaded.model, int(bits))
        assert evaluate(loaded.model, loaded.data.test_loader())[1] == accuracy
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["quantized"]["stages"][0]["epochs"][0]["values"]["widths"]) == {"8", "4", "3", "2"}


def test_a_run_that_was_cut_goes_on(load, text, tmp_path, toy_host):
    recipe = load(text)
    with cut_at(None) as moments:
        train(recipe, tmp_path / "whole")
    for moment in (len(moments) // 2, len(moments) - 6):
        with pytest.raises(Killed), cut_at(moment):
            train(recipe, tmp_path / f"cut{moment}", options=Options(save_steps=1))
        train(recipe, tmp_path / f"cut{moment}", options=Options(save_steps=1, resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{moment}")


def test_two_processes_train_all_widths(tmp_path, text, toy_host):
    """Norms of other widths have no gradient in a pass; each process has half a batch in its norms."""
    (tmp_path / "two.yaml").write_text(text.replace("widths: sandwich", "widths: all"))
    for code, _, err in start_two(tmp_path, "two.yaml", "-o", "two", "-q", words="toy"):
        assert code == 0, err
    start, end = (load_checkpoint(tmp_path / f"two/checkpoint/{n}.safetensors").state for n in ("float", "last"))
    for bits in (8, 4, 3, 2):
        assert not torch.equal(end[f"stem.1.weight_{bits}"], start["stem.1.weight"])
        assert not torch.equal(end[f"stem.1.running_mean_{bits}"], start["stem.1.running_mean"])


# -- mistakes --------------------------------------------------------------------------------------------------------
def test_mistakes_are_one_line(load, text, recipe_text, tmp_path, toy_host):
    with pytest.raises(ConfigError, match=r"training.joint: 'lsq' computes at one bit width here; leave the key out"):
        load(recipe_text.replace("  epochs: 1\n", "  epochs: 1\n  joint: {}\n"))
    single = text.replace("  params: {bit_set: [8, 4, 3, 2]}\nrew", "  params: {bit_set: [2]}\nrew")
    with pytest.raises(ConfigError, match="'one_model_for_all' computes at one bit width here"):
        load(single)
    with pytest.raises(ConfigError, match=r"training.joint.widths: expected 'all' or 'sandwich', got 'each'"):
        load(text.replace("sandwich", "each"))
    shares = text.replace("  joint:", "  distillation: {alpha: 0.8}\n  joint:")
    with pytest.raises(ConfigError, match=r"distillation.alpha and joint.alpha are shares of one loss; together"):
        load(shares)
    other = text.replace("switchable_norm, params: {bit_set: [8, 4, 3, 2]}", "switchable_norm, params: {bit_set: [8]}")
    few = load(other)
    few.pretrain.epochs = 0
    with pytest.raises(QuantizationError, match=r"stem.1: it does not compute at 2 bits; allowed: 8"):
        train(few, tmp_path / "few")
