"""Signals at moments that dice seldom find, and a training that diverges at the last step."""

import signal

import pytest
import torch
from cuts import assert_same_run
from test_disk import EVERY_STEP, GO_ON, RECIPE, at_step, refused

from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes import load_checkpoint, load_recipe, parts, run, train, variant
from fat_plugins.recipes.interrupt import Interrupted, Interrupts
from fat_plugins.recipes.trainer import Trainer

PARTS = "  ema: {decay: 0.5}\n  reestimate_norms: true\n"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("export: null", f"{PARTS}export: null"))
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def whole(recipe, tmp_path, toy_host):
    train(recipe, tmp_path / "whole")
    return tmp_path / "whole"


def stopped(recipe, directory):
    """Train until a signal stops it."""
    interrupts = Interrupts()
    with interrupts.caught(), pytest.raises(Interrupted) as stop:
        train(recipe, directory, options=EVERY_STEP, interrupts=interrupts)
    assert stop.value.directory == directory
    return stop.value


def signalling(monkeypatch, owner, name, call, before=True):
    """SIGTERM before or after the call of that number of a function."""
    real, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(name)
        hit = len(calls) == call
        if hit and before:
            signal.raise_signal(signal.SIGTERM)
        result = real(*args, **kwargs)
        if hit and not before:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


#: functions that change the model or what a part knows, and which of their calls
MOMENTS = [
    (variant.Keeper, "save", 1, True),  # "last": the choice of the best is made, and not written
    (variant.Keeper, "save", 1, False),
    (variant.Keeper, "save", 2, True),
    (variant.Keeper, "save", 3, True),  # in the last epoch: nothing will be better
    (parts, "_copy", 1, True),  # averages go into the model
    (parts, "_copy", 1, False),
    (parts, "_copy", 2, True),  # and out of it
    (parts, "norm_statistics", 3, True),
    (variant.QuantizerLog, "after_epoch", 1, False),
]


@pytest.mark.parametrize(("owner", "name", "call", "before"), MOMENTS)
def test_end_of_an_epoch_is_whole(recipe, whole, tmp_path, monkeypatch, owner, name, call, before):
    with monkeypatch.context() as patch:
        calls = signalling(patch, owner, name, call, before)
        stopped(recipe, tmp_path / "run")
        assert len(calls) >= call
    train(recipe, tmp_path / "run", options=GO_ON)
    assert_same_run(whole, tmp_path / "run")


def test_signal_does_not_wait_for_the_held_out_images(recipe, whole, tmp_path, monkeypatch):
    from fat_plugins.recipes import trainer

    with monkeypatch.context() as patch:
        # of the float model, of the quantized one before its training, and after its first epoch
        calls = signalling(patch, trainer, "evaluate", 3)
        patch.setattr(variant.Keeper, "after_epoch", lambda *args: pytest.fail("went on"))
        stopped(recipe, tmp_path / "run")
        assert len(calls) == 3
    train(recipe, tmp_path / "run", options=GO_ON)
    assert_same_run(whole, tmp_path / "run")


def test_signal_that_others_make_an_error_of_is_told_as_what_it_is(recipe, whole, tmp_path, monkeypatch):
    real = run.evaluate

    def foreign(*args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("cannot convert the model") from None

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", foreign)
        assert stopped(recipe, tmp_path / "run").signal == signal.SIGINT
    assert run.evaluate is real
    train(recipe, tmp_path / "run", options=GO_ON)
    assert_same_run(whole, tmp_path / "run")


def test_signal_that_is_lost_in_a_destructor_is_found(recipe, whole, tmp_path, monkeypatch):
    def lost():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pass

    with monkeypatch.context() as patch:
        at_step(patch, 4, lost)
        patch.setattr(Interrupts, "held", lambda self: self.released())  # as outside of any training
        stopped(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", options=GO_ON)
    assert_same_run(whole, tmp_path / "run")


def test_second_signal_does_not_disturb_the_end_of_the_first():
    interrupts = Interrupts()
    with interrupts.caught():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        interrupts._raised -= 10  # much later
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


# -- divergence ------------------------------------------------------------------------------------------------------
def test_divergence_in_the_last_step_of_an_epoch_keeps_the_good_checkpoint(tmp_path, toy_host, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    real, steps = Trainer._one_step, []

    def step(self, *args):
        real(self, *args)
        steps.append(self)
        if len(steps) == 6:  # two steps to an epoch, one of float training
            self.model.head.bias.data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_one_step", step)
    with pytest.raises(FatPluginsError) as error:
        train(recipe, tmp_path / "run")
    refused(error, "lsq: the validation loss is nan after epoch 2; lower the learning rate")
    stored = load_checkpoint(tmp_path / "run" / "checkpoint" / "last.safetensors")
    assert stored.progress["epoch"] == 1
    assert all(bool(torch.isfinite(t).all()) for t in stored.state.values())


# -- weights that an algorithm has taken over ------------------------------------------------------------------------
def test_checkpoint_has_the_weights_of_its_own_moment(recipe, tmp_path, monkeypatch, toy_host):
    """A host brings parameters up to date when its state is asked for."""
    ask = toy_host.compression_state

    def counting(self, controller):
        model = controller.scheduler._model
        model.head.parametrizations.weight.original.data.copy_(model.conv1.bias.detach().mean())
        return ask(self, controller)

    monkeypatch.setattr(toy_host, "compression_state", counting)
    train(recipe, tmp_path / "run", options=EVERY_STEP)
    for name in ("last", "best"):
        state = load_checkpoint(tmp_path / "run" / "checkpoint" / f"{name}.safetensors").state
        assert torch.equal(state["head.parametrizations.weight.original"], state["conv1.bias"].mean().expand(10, 16))
