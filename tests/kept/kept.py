"""What earlier versions of the package wrote, kept in ``tests/data/checkpoints/VERSION``, and how it is made and read.

``quantizers.safetensors`` holds, for every algorithm and every set of options in ``universal.OPTIONS``, the state of a
weight and of an activation quantizer with an input, its codes and its output. ``nncf2``, ``nncf3`` and ``brevitas``
hold runs of recipes as ``fat-plugins train`` leaves them (without the files that nothing reads back), each with codes
and outputs in ``expected.safetensors``, and one run that was cut.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from universal import OPTIONS, sample

from fat_plugins import ConfigError, TensorSpec, algorithms, get_algorithm
from fat_plugins.placed import parts

CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
#: those with files here, oldest first
VERSIONS = sorted(p.name for p in CHECKPOINTS.iterdir()) if CHECKPOINTS.is_dir() else []
SHAPES = {"weight": (4, 2, 3, 3), "activation": (1, 3, 4, 4)}

RECIPE = """\
name: kept
threads: 1
model: {name: digits_cnn, params: {width: 4}}
data: {name: shapes, batch_size: 20, params: {train: 100, validation: 50, test: 100, size: 12}}
host: HOST
compression: SECTION
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 2
  optimizer: {name: adam, lr: 0.01}
export: null
"""
INITIALIZER = "initializer: {range: {num_init_samples: 20}, batchnorm_adaptation: {num_bn_adaptation_samples: 20}}"


def _section(name: str, bits: int = 3, params: str = "{}") -> str:
    return (
        f"{{algorithm: {name}, weights: {{bits: {bits}}}, activations: {{bits: {bits}}}, {INITIALIZER}, "
        f"params: {params}}}"
    )


#: a state of each kind: plain, owned weights, learned widths, masks of another algorithm
SECTIONS = {
    "fat": _section("fat"),
    "direct": _section("direct", 2),
    "dropbits": _section("dropbits", 3, "{mask: hierarchical, learn_epochs: 1}"),
    "sparsity": "[{algorithm: magnitude_sparsity, sparsity_init: 0.3}, " + _section("lsq") + "]",
}
#: name of the run that was cut amid its training
CUT = "cut"


def recipe(host: str, name: str) -> str:
    """Text of the recipe of a run.

    :param host: ``nncf2``, ``nncf3`` or ``brevitas``.
    """
    section = SECTIONS["fat" if name == CUT else name]
    return RECIPE.replace("HOST", host.rstrip("23")).replace("SECTION", section)


def runs(host: str) -> list[str]:
    """Names of the runs of a host; Brevitas has no sparsity algorithm."""
    return [name for name in (*SECTIONS, CUT) if not (host == "brevitas" and name == "sparsity")]


def installed() -> Iterator[tuple[str, str]]:
    """Hosts by the names of their folders here, with their versions."""
    for package in ("nncf", "brevitas"):
        try:
            text = version(package)
        except PackageNotFoundError:
            continue
        yield (f"nncf{text.split('.')[0]}" if package == "nncf" else package), text


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every algorithm with every set of options, for weights and activations, with one scale and one per channel.

    :return: a name, and algorithm, spec and options in JSON types.
    """
    for name, algorithm in algorithms().items():
        for number, params in enumerate(OPTIONS.get(name, [{}])):
            for role, shape in SHAPES.items():
                low, high = getattr(algorithm, f"{role}_bits")
                for per_channel in (None, True) if role == "weight" else (None,):
                    weight = role == "weight"
                    spec = TensorSpec(
                        role, min(max(3, low), high), name="layer", shape=shape if weight else (),
                        followed_by_norm=weight, channel_axis=0 if weight else 1, per_channel=per_channel,
                    )  # fmt: skip
                    try:
                        algorithm.check(spec, algorithm.parse_params(params))
                    except ConfigError:
                        continue
                    words = [name, str(number), role, *(["per_channel"] if per_channel else [])]
                    yield "-".join(words), {"algorithm": name, "spec": spec.to_dict(), "params": params}


def made(case: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """A new quantizer of a case, calibrated, with its parameters moved a little; and an input."""
    quantizer = build(case)
    x = sample(SHAPES[quantizer.role], quantizer.role, signed=False)
    quantizer.calibrate(x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(1 - 0.3 * torch.rand(parameter.shape, generator=generator))
    return quantizer.eval(), x


def build(case: dict[str, Any]) -> nn.Module:
    """An empty quantizer of a case."""
    return get_algorithm(case["algorithm"]).make(TensorSpec.from_dict(case["spec"]), case["params"])


@torch.no_grad()
def answers(quantizer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Codes and output of a quantizer in evaluation."""
    if quantizer.role == "weight":
        codes = quantizer.freeze(x).codes
    else:
        codes = quantizer.form().encode(x)
    return {"codes": codes.to(torch.int16), "out": quantizer(x).contiguous()}


@torch.no_grad()
def model_answers(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Codes of all weights, codes of all activations on fixed numbers, and the outputs on ``images``."""
    found = {"outputs": model(images)}
    for name, part, weight in parts(model):
        if weight is not None:
            found[f"{name} codes"] = part.freeze(weight).codes.to(torch.int16)
        elif getattr(part, "role", None) == "activation":
            found[f"{name} codes"] = part.form().encode(numbers(part)).to(torch.int16)
    return found


def numbers(quantizer: nn.Module) -> Tensor:
    """Numbers that an activation quantizer of any shape takes: 1 x channels x 1 x 33, up to 2."""
    row = torch.linspace(-2.0, 2.0, 33) + 0.0137
    channels = max([p.shape[0] for p in quantizer.state_dict().values() if p.ndim == 2] or [1])
    return row.expand(1, channels, 1, len(row)).contiguous()


def images() -> Tensor:
    """Four images of the recipes' shape."""
    return torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(5))


def description(path: Path, key: str) -> Any:
    """JSON in the header of a safetensors file."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()[key])
