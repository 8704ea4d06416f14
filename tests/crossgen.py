"""One small network, one batch and a few configs that every host quantizes alike, bit for bit.

Weights come from a formula, not from a random generator. :func:`quantized_weights` reads any compressed model through
the core's interface only, so the same file serves both generations of NNCF and Brevitas; layer names are torch module
paths. :func:`training_step` adds what every quantizer gives in training and its gradients.

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


def compress(config: dict, host: str = "nncf") -> nn.Module:
    """The network compressed by ``config`` through ``fat_nncf``, on whichever generation is installed, or Brevitas."""
    if host == "brevitas":
        import fat_brevitas

        return fat_brevitas.quantize(build_net(), config, loader())
    import fat_nncf

    nncf_config = fat_nncf.NNCFConfig.from_dict(config)
    nncf_config = fat_nncf.register_default_init_args(nncf_config, loader())
    no_files = {"dump_graphs": False} if fat_nncf.GENERATION == 2 else {}
    return fat_nncf.create_compressed_model(build_net(), nncf_config, **no_files)[1]


#: activation quantizers in execution order, by what reads them
ACTIVATIONS = ("conv1", "dw", "pw", "conv2", "mean", "fc")


def _input_of(index: int, shape: torch.Size) -> Tensor:
    """What the activation quantizer of that index is given: signed for the network's input, else as after a ReLU."""
    values = 3 * formula(tuple(shape), 211 + index)
    return values if index == 0 else values.relu()


def training_step(model: nn.Module) -> dict[str, Tensor]:
    """One training forward and backward of a compressed :class:`Net` through its host, with forced values.

    Each activation quantizer is calibrated from, and then given, values by formula, so that the order in which a host
    adds floats cannot turn a code; gradients still run through the whole network.

    :return: by name: codes (``int16``) and scale of every activation quantizer and the local gradients of all
        quantizers, which are the same on every host; gradients of the network's weights, the same but for rounding.
    """
    from fat_plugins import named_quantizers

    found: dict[str, Tensor] = {}
    count = 0
    handles = []

    def force(quantizer: nn.Module, inputs: tuple) -> tuple:
        nonlocal count
        (x,) = inputs
        forced = _input_of(count, x.shape)
        quantizer.reset_calibration()
        quantizer.calibrate(forced)
        count += 1
        return (forced + (x - x.detach()),)

    def record(quantizer: nn.Module, inputs: tuple, out: Tensor) -> None:
        weight = quantizer.role == "weight"
        name = f"weight {quantizer.spec.name.removesuffix('.weight')}" if weight else f"input {ACTIVATIONS[count - 1]}"
        x = inputs[0].detach().requires_grad_()
        parameters = [p for p in quantizer.parameters() if p.requires_grad]
        with torch.enable_grad():
            again = quantizer.quantize(x)
            gradients = torch.autograd.grad(
                again, [x, *parameters], 5 * formula(tuple(x.shape), 307), allow_unused=True
            )
        assert torch.equal(again, out), name
        found[f"{name}/grad"] = gradients[0]
        for i, gradient in enumerate(gradients[1:]):
            if gradient is not None:
                found[f"{name}/grad of parameter {i}"] = gradient.reshape(-1)
        if not weight:
            form = quantizer.form()
            found[f"{name}/codes"], found[f"{name}/scale"] = form.encode(out.detach()).to(torch.int16), form.scale

    for _, quantizer in named_quantizers(model):
        if quantizer.role == "activation":
            handles.append(quantizer.register_forward_pre_hook(force))
        handles.append(quantizer.register_forward_hook(record))
    model.train()
    output = model(batch())
    for handle in handles:
        handle.remove()
    assert count == len(ACTIVATIONS)
    output.backward(formula(tuple(output.shape), 401))
    found["output"] = output.detach()
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in LAYERS:
            found[f"total {name}"] = parameter.grad.detach().clone()
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


#: sums of older releases round otherwise in their last bit, and with them a scale
SAME_BITS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def check_weights(found: dict[str, Tensor], stored: dict[str, Tensor], name: str) -> None:
    """Compare quantized weights with the stored ones of ``name``, bit for bit.

    :raises AssertionError: names the layer.
    """
    assert set(found) == set(LAYERS)
    for layer, weight in found.items():
        wanted = stored[f"{name}/{layer}"]
        assert torch.equal(weight, wanted) or (not SAME_BITS and torch.allclose(weight, wanted, 1e-6, 0)), layer


def check_training_step(found: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Compare :func:`training_step` with the stored one: codes and scales bit for bit, sums of floats but for rounding.

    :raises AssertionError: names the tensor.
    """
    assert found.keys() == stored.keys(), sorted(found.keys() ^ stored.keys())
    for name, tensor in found.items():
        wanted = stored[name]
        assert tensor.shape == wanted.shape, name
        if name.endswith(("/codes", "/scale")):
            close = not SAME_BITS and torch.allclose(tensor.double(), wanted.double(), 1e-6, 0)
            assert torch.equal(tensor, wanted) or close, name
        else:
            torch.testing.assert_close(
                tensor,
                wanted,
                rtol=1e-4,
                atol=1e-5 * float(wanted.abs().max()),
                msg=lambda text, n=name: f"{n}: {text}",
            )


def stored_step(name: str) -> dict[str, Tensor]:
    """The stored :func:`training_step` of one config."""
    from safetensors.torch import load_file

    prefix = f"{name}/step/"
    return {k.removeprefix(prefix): v for k, v in load_file(str(DATA)).items() if k.startswith(prefix)}


def main() -> None:
    """Write the stored results."""
    import os

    from safetensors.torch import save_file

    torch.set_num_threads(1)  # as in the tests

    tensors = {}
    for name, config in configs().items():
        model = compress(config)
        weights = quantized_weights(model)
        tensors.update({f"{name}/{layer}": w.contiguous() for layer, w in weights.items()})
        tensors.update({f"{name}/step/{key}": tensor for key, tensor in training_step(model).items()})
    temporary = DATA.with_suffix(".tmp")
    save_file(tensors, str(temporary))
    os.replace(temporary, DATA)
    print(f"{len(tensors)} tensors, {DATA.stat().st_size} bytes: {DATA}")


if __name__ == "__main__":
    main()
