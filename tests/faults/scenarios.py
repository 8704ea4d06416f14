"""Recipes that train for a second or two, one for each algorithm and for each thing that keeps a state of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from fat_plugins import algorithms

RECIPE = """\
name: tiny
seeds: SEEDS
threads: 1
model: {name: digits_cnn, params: {width: 4}}
data: DATA
host: HOST
compression: COMPRESSION
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 2
  optimizer: {name: adam, lr: 0.01}
MORE"""
DATA = "{name: shapes, batch_size: 20, params: {train: 100, validation: 50, test: 100, size: 12}}"
#: the same images through a function of the user's own, read by a process of its own
OWN_DATA = "{name: callable, batch_size: 20, params: {factory: 'own_data:images', workers: 1, calibration: 40}}"
OWN_DATA_MODULE = '''\
"""Random images of two kinds."""

import torch


def images():
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = [i % 2 for i in range(count)]
        return [(torch.randn(1, 12, 12, generator=generator) + label, label) for label in labels]

    return {"train": part(110), "test": part(50), "classes": 2}
'''
INITIALIZER = "initializer: {range: {num_init_samples: 40}, batchnorm_adaptation: {num_bn_adaptation_samples: 40}}"
#: options with which every stage of a method falls into the few epochs
PARAMS = {
    "bitat": "{epochs_per_layer: 1, calibration_samples: 40}",
    "quantization_networks": "{weight_epochs: 1, activation_epochs: 1}",
}
#: the width to train at, where the method has it
BITS = 3


class Scenario(NamedTuple):
    """One recipe and what it takes to run it.

    :param needs: distributions without which it is left out.
    :param options: of the command line.
    """

    text: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def recipe(
    compression: str, host: str = "nncf", more: str = "", export: str = "null", data: str = DATA, seeds: str = "[3]"
) -> str:
    """Text of a recipe; parameters are YAML."""
    more = f"{more}export: {export}\n"
    values = {"SEEDS": seeds, "DATA": data, "HOST": host, "COMPRESSION": compression, "MORE": more}
    text = RECIPE
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def section(name: str, params: str = "{}", bits: int = BITS) -> str:
    """A compression section, at the width that the algorithm has nearest to ``bits``."""
    algorithm = algorithms()[name]

    def within(limits: tuple[int, int]) -> int:
        return min(max(bits, limits[0]), limits[1])

    weights, activations = within(algorithm.weight_bits), within(algorithm.activation_bits)
    return (
        f"{{algorithm: {name}, weights: {{bits: {weights}}}, activations: {{bits: {activations}}}, {INITIALIZER}, "
        f"params: {params}}}"
    )


def _sparsity() -> str:
    schedule = "schedule: multistep, multistep_steps: [1, 2], multistep_sparsity_levels: [0.1, 0.3, 0.5]"
    return f"[{{algorithm: magnitude_sparsity, sparsity_init: 0.1, params: {{{schedule}}}}}, {section('lsq')}]"


def scenarios() -> dict[str, Scenario]:
    """All of them by name; those named like an algorithm train it on NNCF."""
    found = {n: Scenario(recipe(section(n, PARAMS.get(n, "{}"))), ("nncf",)) for n in algorithms()}
    stages = "  stages: [{weights: {bits: 5}}, {weights: {bits: 4}, carry: weights, epochs: 1}, {}]\n"
    parts = "  ema: {decay: 0.9}\n  distillation: {temperature: 2}\n  clip_norm: 1.0\n  accumulate: 2\n"
    learned = section("dropbits", "{mask: hierarchical, learn_epochs: 1}")
    lsq, fat = section("lsq"), section("fat")
    found |= {
        "learned widths": Scenario(recipe(learned), ("nncf",)),
        "stages": Scenario(recipe(lsq, more=stages), ("nncf",)),
        "sparsity": Scenario(recipe(_sparsity()), ("nncf",)),
        "ema+distillation": Scenario(recipe(section("rq"), more=parts), ("nncf",)),
        "bf16": Scenario(recipe(fat, more="  amp: bf16\n"), ("nncf",)),
        "fp16": Scenario(recipe(lsq, more="  amp: fp16\n  clip_norm: 1.0\n"), ("nncf",)),
        "loader workers": Scenario(
            recipe(lsq, data=OWN_DATA), ("nncf",), ("--allow-import", "own_data")
        ),
        "export+seeds": Scenario(
            recipe(fat, export="{checkpoint: best, verify_samples: 10}", seeds="[3, 5]", more="BASELINES").replace(
                "BASELINESexport", "baselines: [lsq]\nexport"
            ),
            ("nncf", "openvino"),
        ),
    }  # fmt: skip
    found |= {
        f"brevitas {n}": Scenario(recipe(section(n, PARAMS.get(n, "{}")), host="brevitas"), ("brevitas",))
        for n in (
            "fat", "bitat", "dropbits", "direct", "lsq", "rq", "quantization_networks", "squantizer", "apot", "lq_nets",
            "slb",
        )
    }  # fmt: skip
    return {name: s for name, s in found.items() if all(map(installed, s.needs))}


def installed(distribution: str) -> bool:
    """Whether a distribution is installed; nothing is imported."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
