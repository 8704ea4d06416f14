"""Two processes with a batch each train as one process with both, on the installed hosts."""

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
from two_processes import assert_close_runs, recipe, start_two

from fat_plugins.recipes import load_recipe, train


def installed(name):
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("host", [h for h in ("nncf", "brevitas") if installed(h)])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, host):
    for rank, (code, out, err) in enumerate(start_two(tmp_path, recipe(tmp_path, host, 50), "-o", "two")):
        assert code == 0, err
        assert ("Run directory" in out) == (rank == 0)  # only the first one says and writes anything
        assert ("epoch 1/2" in err) == (rank == 0)
    train(load_recipe(recipe(tmp_path, host, 100)), tmp_path / "one")
    # sums in another order: nothing more
    assert_close_runs(tmp_path / "one", tmp_path / "two", 1e-4)
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert abs(one["float"]["epochs"][0]["train_loss"] - two["float"]["epochs"][0]["train_loss"]) < 1e-5
    for a, b in zip(one["quantized"]["stages"][0]["epochs"], two["quantized"]["stages"][0]["epochs"], strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-4
        assert a["lr"] == b["lr"]
