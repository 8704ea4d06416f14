"""Two processes with a batch each train as one process with both; one that fails ends both."""

import json

import plain_net
import pytest
import torch
from cuts import assert_same_run
from two_processes import RECIPE, assert_close_runs, recipe, start_two

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import Options, load_checkpoint, load_recipe, train
from fat_plugins.recipes.data import DATASETS, ShapesParams
from fat_plugins.recipes.trainer import Trainer
from fat_plugins.recipes.world import World, choose_device


def test_a_process_that_fails_ends_all_and_the_run_goes_on(tmp_path, toy_host):
    path = recipe(tmp_path, "nncf", 50)
    args = [path, "-o", "two", "--save-every", "1", "-q"]
    failed = start_two(tmp_path, *args, words="toy fail1")
    assert [code for code, _, _ in failed] == [2, 2]
    lines = [line for _, _, err in failed for line in err.splitlines()]
    assert lines == ["error: the disk of process 1 is full"]
    with pytest.raises(CheckpointError, match="saved by 2 processes, these are 1") as error:
        Trainer.load_state_dict(*_trainer_and_state(tmp_path / "two"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="--resume: number of processes is 1, the run was started with 2"):
        train(load_recipe(path), tmp_path / "two", options=Options(resume=True))
    for code, _, err in start_two(tmp_path, *args, "--resume", words="toy"):
        assert code == 0, err
    train(load_recipe(recipe(tmp_path, "nncf", 100)), tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "two", 1e-4)


#: everything that changes a step beside the optimizer
EXTRAS = """\
training:
  epochs: 3
  optimizer: {name: sgd, lr: 0.3}
  label_smoothing: 0.1
  clip_norm: 0.03
  amp: AMP
  ema: {decay: 0.8}
  distillation: {alpha: 0.5, temperature: 2.0}
"""


def recipe_with_extras(folder, batch, amp):
    text = RECIPE.replace("HOST", "nncf").replace("algorithm: dropbits", "algorithm: lsq")
    text = text[: text.index("training:")] + EXTRAS + text[text.index("export:") :].replace("[lsq]", "[]")
    path = folder / f"{batch}_{amp}.yaml"
    path.write_text(text.replace("BATCH", str(batch)).replace("AMP", amp))
    return path


def assert_close_states(one, other, tolerance):
    """Final weights of two runs, and what the training moved them by."""
    a, b = (load_checkpoint(d / "checkpoint" / "last.safetensors").state for d in (one, other))
    start = load_checkpoint(one / "checkpoint" / "float.safetensors").state
    assert list(a) == list(b)
    for key, tensor in a.items():
        assert float((tensor.double() - b[key].double()).abs().max()) <= tolerance, key
    assert float((a["conv3.bias"] - start["conv3.bias"]).abs().max()) > 20 * tolerance


@pytest.mark.parametrize(("amp", "tolerance"), [("null", 1e-5), ("bf16", 1e-4)])
def test_averages_teacher_and_clipping_are_those_of_one_process(tmp_path, toy_host, amp, tolerance):
    for code, _, err in start_two(tmp_path, recipe_with_extras(tmp_path, 50, amp), "-o", "two", words="toy"):
        assert code == 0, err
    train(load_recipe(recipe_with_extras(tmp_path, 100, amp)), tmp_path / "one")
    assert_close_states(tmp_path / "one", tmp_path / "two", tolerance)
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text())["quantized"] for n in ("one", "two"))
    for a, b in zip(one["stages"][0]["epochs"], two["stages"][0]["epochs"], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 10 * tolerance
        assert abs(a["validation_loss"] - b["validation_loss"]) < 10 * tolerance


def test_averages_and_teacher_of_two_processes_go_on_exactly(tmp_path):
    path = recipe_with_extras(tmp_path, 50, "null")
    for code, _, err in start_two(tmp_path, path, "-o", "whole", "-q", words="toy"):
        assert code == 0, err
    args = [path, "-o", "cut", "--save-every", "1", "-q"]
    failed = start_two(tmp_path, *args, words="toy fail2")
    assert [code for code, _, _ in failed] == [2, 2]
    for code, _, err in start_two(tmp_path, *args, "--resume", words="toy"):
        assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def _trainer_and_state(run):
    from fat_plugins.recipes.schema import OptimizerSection, TrainSection
    from fat_plugins.recipes.state import from_bytes

    data = DATASETS["shapes"][1](ShapesParams(train=400, validation=50, test=100, size=12))
    section = TrainSection(epochs=1, optimizer=OptimizerSection(lr=0.1))
    state = from_bytes((run / "state" / "training.safetensors").read_bytes())
    return Trainer(plain_net.Plain(1, 10), data, section, batch_size=50, seed=0), state["trainer"]


# -- parts of it -----------------------------------------------------------------------------------------------------
def test_processes_share_every_step_of_one_process():
    data = DATASETS["shapes"][1](ShapesParams(train=410, validation=50, test=100, size=12))
    whole = list(data.training_loader(100, 3).begin(epoch=2))
    parts = [list(data.training_loader(50, 3, rank=r, world=2).begin(epoch=2)) for r in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 4
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([share[0] for share in shares]))
        assert torch.equal(labels, torch.cat([share[1] for share in shares]))


def test_an_epoch_goes_on_in_the_middle_and_every_epoch_differs():
    data = DATASETS["shapes"][1](ShapesParams(train=400, validation=50, test=100, size=12))
    loader = data.training_loader(100, 3)
    whole = list(loader.begin(1))
    for (a, _), (b, _) in zip(whole[2:], loader.begin(1, 2), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole[0][0], next(iter(loader.begin(0)))[0])


def test_one_process_alone_needs_nothing():
    world, net = World(), torch.nn.Linear(2, 2)
    assert world.main
    assert world.parallel(net) is net
    assert world.gather({"x": 1}) == [{"x": 1}]
    assert world.tell("y") == "y"
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.sum(torch.tensor([2.0])).tolist() == [2.0]


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device auto: 2 CUDA devices for local process 2; start fewer"):
        choose_device("auto", 2)
