"""Files that released versions wrote are read by this one, and mean the same."""

import json
import shutil

import kept
import pytest
import torch
from cuts import cut_at
from safetensors.torch import load_file

from fat_plugins.recipes import Options, load_recipe, load_run, train
from fat_plugins.recipes.report import RunReport

QUANTIZERS = {
    f"{version} {name}": (version, name, case)
    for version in kept.VERSIONS
    for name, case in kept.description(kept.CHECKPOINTS / version / "quantizers.safetensors", "cases").items()
}
RUNS = [
    (version, host, name)
    for version in kept.VERSIONS
    for host, _ in kept.installed()
    for name in kept.runs(host)
    if (kept.CHECKPOINTS / version / host / name).is_dir()
]
TENSORS = {v: load_file(kept.CHECKPOINTS / v / "quantizers.safetensors") for v in kept.VERSIONS}


def stored(version, name):
    """Tensors of one quantizer: its state, and what it answered."""
    tensors = {k.removeprefix(f"{name}/"): v for k, v in TENSORS[version].items() if k.startswith(f"{name}/")}
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return state, tensors


def test_files_of_released_versions_are_here():
    assert "0.1.0" in kept.VERSIONS
    assert {case["algorithm"] for _, _, case in QUANTIZERS.values()} >= {
        "apot", "bitat", "direct", "dorefa", "dropbits", "fat", "lq_nets", "lsq", "lsq_plus", "minmax", "pact",
        "quantization_networks", "rq", "slb", "squantizer",
    }  # fmt: skip


@pytest.mark.parametrize("key", QUANTIZERS)
def test_state_of_a_quantizer_loads(key):
    version, name, case = QUANTIZERS[key]
    state, wanted = stored(version, name)
    quantizer = kept.build(case).eval()
    quantizer.load_state_dict({k: v.clone() for k, v in state.items()})
    found = kept.answers(quantizer, TENSORS[version][f"{quantizer.role} input"])
    assert torch.equal(found["codes"], wanted["codes"])
    torch.testing.assert_close(found["out"], wanted["out"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("version", "host", "name"), [r for r in RUNS if r[2] != kept.CUT])
def test_a_run_loads(version, host, name):
    folder = kept.CHECKPOINTS / version / host / name
    model = load_run(folder, "last").model
    wanted, found = load_file(folder / "expected.safetensors"), kept.model_answers(model, kept.images())
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        if key == "outputs":
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(("version", "host", "name"), [r for r in RUNS if r[2] == kept.CUT])
def test_a_run_that_was_cut_goes_on(version, host, name, tmp_path):
    shutil.copytree(kept.CHECKPOINTS / version / host / name, tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    with cut_at() as passed:
        report = train(recipe, tmp_path / "run", options=Options(resume=True, save_steps=100))
    assert [r.algorithm for r in report.results] == ["fat"]
    # of 5 steps of float training and 10 of fine-tuning, 7 were done
    assert passed.count("step") == 8
    load_run(tmp_path / "run", "last")


@pytest.mark.parametrize(("version", "host", "name"), [r for r in RUNS if r[2] == "fat"])
def test_a_report_loads(version, host, name):
    path = kept.CHECKPOINTS / version / host / name / "report.json"
    report = RunReport.from_dict(json.loads(path.read_text()))
    assert report.versions["fat-plugins"] == version and [r.algorithm for r in report.results] == ["fat"]
