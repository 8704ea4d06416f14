"""Configs in which several algorithms share the network of :mod:`crossgen`, the same for every host."""

from __future__ import annotations

import pytest
from torch import nn

from fat_plugins import named_quantizers

FRONT, BACK = "{re}\\[(conv1|dw)\\]", "{re}\\[(pw|conv2|fc)\\]"
MIDDLE = "{re}\\[(pw|conv2)\\]"


def section(algorithm: str, bits: int, **more) -> dict:
    """A section with one width."""
    return {"algorithm": algorithm, "weights": {"bits": bits}, "activations": {"bits": bits}, **more}


def two(**more) -> list[dict]:
    """Two sections that share the layers."""
    return [section("fat", 4, target_scopes=[FRONT], **more), section("lsq", 3, ignored_scopes=[FRONT])]


def roles(weights: str, bits: int, activations: str, **params) -> dict:
    """Weights by one algorithm, activations by another."""
    return {
        "algorithm": weights,
        "weights": {"bits": bits, "params": params},
        "activations": {"bits": 4, "algorithm": activations},
    }


#: config, classes and bits of the weights of dw, pw and conv2, classes and bits of their inputs
CASES = [
    pytest.param(
        two(), ["FATWeight 4", "LSQWeight 3", "LSQWeight 3"],
        ["FATActivation 4", "LSQActivation 3", "LSQActivation 3"], id="sections",
    ),
    pytest.param(
        section("fat", 4, scope_overrides={
            "weights": {MIDDLE: {"algorithm": "squantizer", "bits": 3, "params": {"grid": "aligned"}}},
            "activations": {MIDDLE: {"algorithm": "dropbits", "bits": 3}},
        }),
        ["FATWeight 4", "SQuantizerWeight 3", "SQuantizerWeight 3"],
        ["FATActivation 4", "DropBitsActivation 3", "DropBitsActivation 3"], id="overrides",
    ),
    pytest.param(
        roles("direct", 2, "lsq"), ["DirectWeight 2"] * 3, ["LSQActivation 4"] * 3, id="direct-and-lsq"
    ),
    pytest.param(
        roles("bitat", 1, "lsq"), ["BiTATWeight 1"] * 3, ["LSQActivation 4"] * 3, id="bitat-and-lsq"
    ),
]  # fmt: skip


def found(model: nn.Module, role: str) -> list[str]:
    """Class and bits of the quantizers that are not those of the network's ends."""
    named = [f"{type(q).__name__} {q.spec.bits}" for _, q in named_quantizers(model) if q.role == role]
    return sorted(n for n in named if not n.startswith("MinMax"))
