"""A run that was cut goes on and ends as if it had not been, bit for bit. On a toy host; hosts have their own file."""

import json

import pytest
from cuts import Killed, assert_same_run, cut_at

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.recipes import Options, Reporter, train
from fat_plugins.recipes import run as run_module
from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.resume import RunState

SMALL = """\
name: tiny
seeds: [3]
threads: 1
model: {name: digits_cnn, params: {width: 4}}
data: {name: digits, batch_size: 512}
compression: {algorithm: lsq, weights: {bits: 4}}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 2
  optimizer: {name: adam, lr: 0.01}
export: {checkpoint: best}
"""
#: two seeds, two algorithms, two stages; some moments of everything
LARGE = SMALL.replace("[3]", "[3, 5]").replace("epochs: 2", "epochs: 1\n  stages: [{weights: {bits: 5}}, {}]")
LARGE += "baselines: [fat]\n"


@pytest.fixture(autouse=True)
def quick(toy_host, monkeypatch):
    """Deployment is not the subject: a file of a few bytes that depend on the weights."""
    monkeypatch.setattr("fat_plugins.recipes.targets.Target.require", lambda self: None)
    monkeypatch.setattr("fat_plugins.recipes.targets.Target.versions", lambda self: {})

    def deploy(target, frozen, path, example, test, samples, task):
        path.parent.mkdir(parents=True, exist_ok=True)
        total = sum(p.double().sum() for p in frozen.state_dict().values())
        path.write_text(f"{float(total)!r}")
        return Deployment(str(path), 0.5, 1, 8, [LayerRow("conv1", "weight", "uniform", 4)], True)

    monkeypatch.setattr(run_module, "deploy", deploy)


def resumed(recipe, directory, moment, **options):
    """Cut a fresh run at a moment, then finish it."""
    with pytest.raises(Killed), cut_at(moment):
        train(recipe, directory, options=Options(**options))
    return train(recipe, directory, options=Options(resume=True, **options))


def test_every_third_moment(load, tmp_path):
    recipe = load(SMALL)
    with cut_at(None) as moments:
        whole = train(recipe, tmp_path / "whole")
    assert {"step", "file"} == set(moments)
    for moment in range(1, len(moments), 3):  # before recipe.yaml there is no run
        report = resumed(recipe, tmp_path / f"cut{moment}", moment)
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{moment}")
        assert report.to_dict() == whole.to_dict()


@pytest.mark.parametrize("moment", [6, 17, 26, 40, 55, 70, 78])
def test_seeds_stages_and_baselines(load, tmp_path, moment, large_run):
    recipe = load(LARGE)
    resumed(recipe, tmp_path / "cut", moment, save_steps=1)
    assert_same_run(large_run, tmp_path / "cut")


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    return tmp_path_factory.mktemp("large") / "whole"


@pytest.fixture(autouse=True)
def _large_run(request, quick, load):
    if "large_run" in request.fixturenames and not request.getfixturevalue("large_run").exists():
        train(load(LARGE, "large.yaml"), request.getfixturevalue("large_run"))


def test_cut_again_and_again(load, tmp_path):
    recipe = load(SMALL)
    train(recipe, tmp_path / "whole")
    options = Options(save_steps=1)
    for _ in range(100):
        try:
            with cut_at(5):  # a state takes two moves and a step one, so each attempt gets a little further
                train(recipe, tmp_path / "cut", options=options)
            break
        except Killed:
            options = Options(resume=True, save_steps=1)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


ALGORITHMS = {
    "fat": "fat",
    "dropbits": "dropbits, params: {mask: hierarchical, learn_epochs: 1}",
    "rq": "rq",
    "quantization_networks": "quantization_networks, params: {weight_epochs: 1, activation_epochs: 1}",
    "squantizer": "squantizer",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_schedules_and_noise(load, tmp_path, name):
    recipe = load(SMALL.replace("lsq", ALGORITHMS[name]).replace("weights: {bits: 4}", "weights: {bits: 3}"))
    train(recipe, tmp_path / "whole")
    for step in (3, 5):  # amid the first and the last epoch of fine-tuning
        with pytest.raises(Killed), cut_at(step=step):
            train(recipe, tmp_path / f"cut{step}", options=Options(save_steps=1))
        train(recipe, tmp_path / f"cut{step}", options=Options(resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{step}")


def test_parts_of_a_training(load, tmp_path):
    """Averaged weights, a teacher, clipping, accumulation, renewed norms, a schedule: across two stages."""
    parts = "  ema: {decay: 0.9}\n  distillation: {temperature: 2}\n  clip_norm: 1.0\n  accumulate: 2\n"
    parts += "  reestimate_norms: true\n  stages: [{weights: {bits: 5}}, {}]\n"
    recipe = load(SMALL.replace("export:", f"{parts}export:"))
    train(recipe, tmp_path / "whole")
    for step in (3, 7):
        with pytest.raises(Killed), cut_at(step=step):
            train(recipe, tmp_path / f"cut{step}", options=Options(save_steps=1))
        train(recipe, tmp_path / f"cut{step}", options=Options(resume=True))
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{step}")


def test_finished_parts_are_not_done_again(load, tmp_path, toy_host):
    recipe = load(LARGE)
    with cut_at(None) as moments:
        train(recipe, tmp_path / "whole")
    calls = len(toy_host.calls)
    resumed(recipe, tmp_path / "cut", len(moments) - 1)  # before results.md of the last moment
    # eight stages in all; the second run rebuilds none
    assert len(toy_host.calls) == calls + 8


# -- what cannot go on -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 0.01", "lr: 0.02", r"training.optimizer.lr is 0.02, the run in .* was started with 0.01"),
        ("seeds: [3]", "seeds: [3, 4]", r"seeds is \[3, 4\], the run in .* was started with \[3\]"),
        ("weights: {bits: 4}", "weights: {bits: 3}", r"compression.compression.weights.bits is 3,"),
        ("lsq, ", "lsq, activations: {bits: 4}, ", "activations is .* was started with nothing"),
    ],
)  # fmt: skip
def test_changed_recipe_names_the_first_key(load, tmp_path, old, new, message):
    with pytest.raises(Killed), cut_at(4):
        train(load(SMALL), tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        train(load(SMALL.replace(old, new)), tmp_path / "run", options=Options(resume=True))


def test_changed_options_are_named(load, tmp_path):
    with pytest.raises(Killed), cut_at(4):
        train(load(SMALL), tmp_path / "run", options=Options(max_steps=3))
    with pytest.raises(ConfigError, match="--max-steps is None, the run was started with 3"):
        train(load(SMALL), tmp_path / "run", options=Options(resume=True))


def test_directory_without_a_run(load, tmp_path):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=r"holds no run \(no recipe.yaml\); start one without --resume"):
            train(load(SMALL), directory, options=Options(resume=True))
    assert not (tmp_path / "nothing").exists()


def test_resume_and_overwrite_exclude_each_other(load, tmp_path):
    with pytest.raises(ConfigError, match="--resume and --overwrite exclude each other"):
        train(load(SMALL), tmp_path / "run", overwrite=True, options=Options(resume=True))


def test_complete_run_says_so_and_is_left_alone(load, tmp_path, capsys, toy_host):
    report = train(load(SMALL), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    calls = len(toy_host.calls)
    again = train(load(SMALL), tmp_path / "run", options=Options(resume=True), reporter=Reporter())
    assert "is complete: nothing is left to do" in capsys.readouterr().err
    assert again.to_dict() == report.to_dict()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert len(toy_host.calls) == calls


def test_damaged_state_uses_the_one_before(load, tmp_path, capsys):
    train(load(SMALL), tmp_path / "whole")
    with pytest.raises(Killed), cut_at(19):
        train(load(SMALL), tmp_path / "cut", options=Options(save_steps=1))
    newest = tmp_path / "cut" / "state" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    train(load(SMALL), tmp_path / "cut", options=Options(resume=True), reporter=Reporter())
    assert f"warning: {newest}" in " ".join(capsys.readouterr().err.split())
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_damaged_results_are_one_line(load, tmp_path):
    with pytest.raises(Killed), cut_at(4):
        train(load(SMALL), tmp_path / "run")
    (tmp_path / "run" / "state" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: line 1: not JSON"):
        train(load(SMALL), tmp_path / "run", options=Options(resume=True))


# -- other things that a run records ---------------------------------------------------------------------------------
def test_accuracy_before_training_is_recorded(load, tmp_path):
    train(load(SMALL.replace("bits: 4", "bits: 2")), tmp_path / "run")
    (stage,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["quantized"]["stages"]
    before = stage["before_training"]
    assert set(before) == {"validation_loss", "validation_accuracy"}
    assert 0 <= before["validation_accuracy"] <= 1
    assert before["validation_loss"] not in {e["validation_loss"] for e in stage["epochs"]}


def test_max_steps_ends_every_phase(load, tmp_path):
    with cut_at(None) as moments:
        train(load(SMALL.replace("epochs: 2", "epochs: 9")), tmp_path / "run", options=Options(max_steps=3))
    assert moments.count("step") == 2 + 3  # an epoch has two steps, so float training is over before
    (stage,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["quantized"]["stages"]
    assert len(stage["epochs"]) == 2


def test_state_is_saved_by_time(load, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(RunState, "save", lambda self, seed, name, state: saved.append(state["trainer"]))
    train(load(SMALL), tmp_path / "always", options=Options(save_seconds=0))
    assert [(s["epoch"], s["step"]) for s in saved] == [(0, 1), (1, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    saved.clear()
    train(load(SMALL), tmp_path / "epochs", options=Options(save_seconds=300))
    assert [(s["epoch"], s["step"]) for s in saved] == [(1, 0), (1, 0), (2, 0)]


def test_what_a_kill_left_half_written_is_cleared(load, tmp_path):
    with pytest.raises(Killed), cut_at(8):
        train(load(SMALL), tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / ".best.safetensors.x1.tmp").write_text("half")
    train(load(SMALL), tmp_path / "run", options=Options(resume=True))
    assert not list((tmp_path / "run").rglob("*.tmp"))
