"""Rewrites by name: what they do to a model, and how a fresh model becomes like the rewritten one."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import EntryPoint

import pytest
import torch
from halves import Halves, Twice
from torch import nn

import fat_plugins
from fat_plugins import CheckpointError, ConfigError, get_rewrite, plugins, rebuild, registry, rewrite, rewrites
from fat_plugins.rewrites import GROUP, RewriteReport, replace_layer


@pytest.fixture(autouse=True)
def halves(monkeypatch):
    """The rewrite of the tests, beside those that are installed."""
    real, point = plugins.entry_points, EntryPoint("halves", "halves:Halves", GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real(group=group), *([point] * (group == GROUP))])
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)).eval()


def test_a_rewrite_needs_one_entry_point():
    assert get_rewrite("halves") is Halves
    assert callable(fat_plugins.rewrites)  # not the module of that name
    with pytest.raises(ConfigError, match=r"unknown rewrite 'halfs'; allowed: .*; did you mean 'halves'"):
        get_rewrite("halfs")
    rewrites().clear()
    assert "halves" in rewrites()


def test_same_function_and_a_report():
    model, x = net(), torch.randn(1, 2, 8, 8)
    before = model(x)
    (report,) = rewrite(model, "halves", x)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert isinstance(model[0], Twice) and not model[0].training
    assert (list(report.changed), report.left) == (["0", "3"], {"2": "kernel 1"})
    assert str(report) == "halves: 2 layers changed, 1 left as they were"
    assert RewriteReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_fresh_model_takes_the_state_of_a_rewritten_one():
    model, x = net(), torch.randn(1, 2, 8, 8)
    records = [r.to_dict() for r in rewrite(model, ["halves", {"name": "halves", "params": {"kernel": 1}}])]
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)).eval()
    rebuild(fresh, json.loads(json.dumps(records)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_errors_in_one_line():
    for args, text in (
        (("halves", None, {"kernal": 3}), "rewrites.0.params.kernal: unknown key; allowed: kernel; did you mean"),
        ((["halves", {"name": "halves", "params": {"kernel": 0}}],), "rewrites.1.params.kernel: must be greater"),
        ((["halves"], None, {"kernel": 3}), "params belong to one name"),
        (([{"nam": "halves"}],), "rewrites.0: expected a name"),
        (("halves", None, {"kernel": 5}), "halves: no convolution of kernel 5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            rewrite(net(), *args)


def test_nothing_is_changed_when_a_later_name_is_wrong():
    model = net()
    with pytest.raises(ConfigError, match="unknown rewrite"):
        rewrite(model, ["halves", "quarters"])
    assert isinstance(model[0], nn.Conv2d)


GOOD = {"name": "halves", "params": {"kernel": 3}, "changed": {"0": {}}, "left": {}}


@pytest.mark.parametrize(
    "record,text",
    [
        ({**GOOD, "name": "halfs"}, "unknown rewrite 'halfs'"),
        ({**GOOD, "params": {"kernel": "x"}}, "halves.params.kernel: expected an integer"),
        ({**GOOD, "changed": {"zero": {}}}, "the model has no layer 'zero'"),
        ({**GOOD, "changed": {"1": {}}}, "layer '1' is a ReLU, expected a Conv2d"),
        ({**GOOD, "changed": {"0": 1}}, "changed.0: expected an object, got 1"),
        ({**GOOD, "changed": []}, "changed: expected a dict"),
        ({**GOOD, "more": 1}, "expected the keys name, params, changed, left"),
        ([], "expected the keys"),
    ],
)
def test_records_of_a_file_are_checked(record, text):
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        rebuild(net(), [record], "file")
    assert str(caught.value).startswith("file.0")


def test_a_layer_is_replaced_wherever_it_stands():
    shared = nn.Conv2d(2, 2, 1)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    replace_layer(model, "b.0", new := nn.Identity())
    assert model["a"] is new and model["b"][0] is new
    with pytest.raises(ConfigError, match="the model itself cannot be replaced"):
        replace_layer(shared, "", new)
    assert copy.deepcopy(model)["a"] is not new
