"""One small network, one batch and a few configs that every host quantizes alike, bit for bit.

Weights come from a formula, not from a random generator. :func:`quantized_weights` reads any compressed model through
the core's interface only, so the same file serves both generations of NNCF; layer names are torch module paths.

``python tests/crossgen.py`` (with NNCF 2 installed) writes ``tests/data/cross_generation.safetensors`` again.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "cross_generation.safetensors"
INPUT_SHAPE = (4, 3, 12, 12)


class Net(nn.Module):
    """conv, depthwise conv, 1x1 conv (each with batch norm), a conv without norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dw, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pw, self.bn3 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.dw(x)))
        x = torch.relu(self.bn3(self.pw(x)))
        x = torch.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


LAYERS = ("conv1", "dw", "pw", "conv2", "fc")


def formula(shape: tuple[int, ...], seed: int) -> Tensor:
    """Deterministic float32 values in about [-0.5, 0.5], exact in float32, no two tensors alike."""
    count = 1
    for n in shape:
        count *= n
    values = (torch.arange(count, dtype=torch.int64) * (7919 + 2 * seed) + 104729 * seed) % 4093
    return ((values - 2046).to(torch.float32) / 4096.0).reshape(shape)


def build_net() -> Net:
    """The network in training mode, every parameter by formula."""
    net = Net()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(net.named_parameters(), 1):
            values = formula(tuple(parameter.shape), seed)
            parameter.copy_(values.abs() + 0.5 if name.startswith("bn") and name.endswith("weight") else values)
    return net


def batch() -> Tensor:
    """The input batch, shape :data:`INPUT_SHAPE`."""
    return formula(INPUT_SHAPE, 97)


def configs() -> dict[str, dict]:
    """NNCF configs by name."""
    bits = {"weights": {"bits": 4}, "activations": {"bits": 4}}
    sections = {
        "fat_uniform": {"algorithm": "fat", **bits},
        "fat_power_of_two": {"algorithm": "fat", **bits, "params": {"levels": "power_of_two"}},
        "lsq": {"algorithm": "lsq", **bits},
    }
    info = {"sample_size": list(INPUT_SHAPE)}
    return {name: {"input_info": dict(info), "compression": section} for name, section in sections.items()}


def loader() -> torch.utils.data.DataLoader:
    """A calibration loader of ``(input, target)`` whose only batch is :func:`batch`."""
    data = torch.utils.data.TensorDataset(batch(), torch.zeros(INPUT_SHAPE[0], dtype=torch.long))
    return torch.utils.data.DataLoader(data, batch_size=INPUT_SHAPE[0])


def quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Quantized weight by layer of a compressed :class:`Net` whose float weights are still those of the formula.

    Evaluation forward of every weight quantizer in ``model``; its spec's name is the layer's path, with or without
    ``.weight`` at the end.
    """
    from fat_plugins import named_quantizers

    reference = build_net().state_dict()
    found = {}
    for _, quantizer in named_quantizers(model):
        if quantizer.role == "weight":
            name = quantizer.spec.name.removesuffix(".weight")
            with torch.no_grad():
                found[name] = copy.deepcopy(quantizer).eval()(reference[f"{name}.weight"])
    return found


def compress(config: dict) -> nn.Module:
    """The network compressed by ``config`` through ``fat_nncf``, on whichever generation is installed."""
    import fat_nncf

    nncf_config = fat_nncf.NNCFConfig.from_dict(config)
    nncf_config = fat_nncf.register_default_init_args(nncf_config, loader())
    no_files = {"dump_graphs": False} if fat_nncf.GENERATION == 2 else {}
    return fat_nncf.create_compressed_model(build_net(), nncf_config, **no_files)[1]


def main() -> None:
    """Write the stored results."""
    import os

    from safetensors.torch import save_file

    tensors = {}
    for name, config in configs().items():
        weights = quantized_weights(compress(config))
        tensors.update({f"{name}/{layer}": w.contiguous() for layer, w in weights.items()})
    temporary = DATA.with_suffix(".tmp")
    save_file(tensors, str(temporary))
    os.replace(temporary, DATA)
    print(f"{len(tensors)} tensors, {DATA.stat().st_size} bytes: {DATA}")


if __name__ == "__main__":
    main()
