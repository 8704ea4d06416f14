"""Runs on the installed hosts go on exactly: schedules, coordinators and noise amid their work."""

from importlib.metadata import PackageNotFoundError, version

import plain_net
import pytest
from cuts import Killed, assert_same_run, cut_at

from fat_plugins.recipes import Options, train
from fat_plugins.recipes.state import from_bytes

RECIPE = (
    "name: tiny\n"
    + plain_net.SECTIONS.replace("BATCH", "200").replace("{name: plain}", "{name: digits_cnn, params: {width: 4}}")
    + """\
host: HOST
compression:
  algorithm: ALGORITHM
  weights: {bits: BITS}
  activations: {bits: BITS}
  initializer:
    range: {num_init_samples: 100}
    batchnorm_adaptation: {num_bn_adaptation_samples: 100}
  params: PARAMS
pretrain:
  epochs: 0
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 3
  optimizer: {name: adam, lr: 0.01}
export: null
"""
)
#: bits and options; each has a state beside its weights
ALGORITHMS = {
    "fat": (4, "{}"),
    "bitat": (1, "{epochs_per_layer: 1, calibration_samples: 100}"),
    "dropbits": (3, "{mask: hierarchical, learn_epochs: 2}"),
    "quantization_networks": (2, "{weight_epochs: 1, activation_epochs: 1}"),
    "direct": (2, "{}"),
}


def installed(name):
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("host", [h for h in ("nncf", "brevitas") if installed(h)])
def test_resume_is_exact(load, tmp_path, host, algorithm):
    bits, params = ALGORITHMS[algorithm]
    text = RECIPE.replace("HOST", host).replace("ALGORITHM", algorithm)
    recipe = load(text.replace("BITS", str(bits)).replace("PARAMS", params))
    train(recipe, tmp_path / "whole")
    with pytest.raises(Killed), cut_at(step=3):  # an epoch has two: amid the second one
        train(recipe, tmp_path / "cut", options=Options(save_steps=1))
    state = from_bytes((tmp_path / "cut" / "state" / "training.safetensors").read_bytes())["trainer"]
    assert (state["epoch"], state["step"]) == (1, 1)
    train(recipe, tmp_path / "cut", options=Options(resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(not installed("nncf"), reason="NNCF is not installed")
def test_sparsity_beside_an_algorithm_goes_on(load, tmp_path):
    sections = (
        "[{algorithm: magnitude_sparsity, sparsity_init: 0.1, params: {schedule: multistep, multistep_steps: [1, 2], "
        "multistep_sparsity_levels: [0.1, 0.3, 0.5]}}, {algorithm: lsq, weights: {bits: 4}, initializer: "
        "{range: {num_init_samples: 100}}}]"
    )
    before, after = RECIPE.index("compression:"), RECIPE.index("pretrain:")
    recipe = load(f"{RECIPE[:before]}compression: {sections}\n{RECIPE[after:]}".replace("HOST", "nncf"))
    train(recipe, tmp_path / "whole")
    with pytest.raises(Killed), cut_at(step=3):
        train(recipe, tmp_path / "cut", options=Options(save_steps=1))
    state = from_bytes((tmp_path / "cut" / "state" / "training.safetensors").read_bytes())["trainer"]
    schedulers = state["scheduler"] if isinstance(state["scheduler"], list) else [state["scheduler"]]
    assert 3 in [s.get("total_epochs") for s in schedulers]
    train(recipe, tmp_path / "cut", options=Options(resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
