"""What GPFQ must have done on any host: problems between the right networks, and codes that solve them."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from fat_plugins.algorithms._gpfq import follow
from fat_plugins.algorithms.gpfq import GPFQWeight, to_rows
from fat_plugins.network import coordinators
from fat_plugins.quantizer import ROLES
from fat_plugins.unfold import input_rows

#: every input of every layer, so that the rows can be computed from a hook
PARAMS = {"patches": None, "accumulate": "direct", "samples": 8}


def section(**changes) -> dict:
    """The compression section of these tests."""
    params = {**PARAMS, **changes.pop("params", {})}
    return {"algorithm": "gpfq", "weights": {"bits": 4}, "activations": {"bits": 8}, "params": params, **changes}


@contextmanager
def recorded():
    """The problem of every layer by name, in the order in which they were solved."""
    found: dict[str, tuple[GPFQWeight, object]] = {}
    original = GPFQWeight.follow

    def keep(self, pairs):
        found[self.spec.name] = (self, pairs)
        return original(self, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPFQWeight, "follow", keep)
        yield found


def module_path(name: str) -> str:
    """The path of a module, of which NNCF 2 tells the class too: ``Net/NNCFConv2d[body]/conv2d_0``."""
    return ".".join(re.findall(r"\[(\w+)\]", name)) or name


def float_rows(net: nn.Module, layers: dict[str, GPFQWeight], batches: list[Tensor]) -> dict[str, Tensor]:
    """Rows that modules of the float network read, by the names of quantizers whose layers are modules."""
    modules, rows, hooks = dict(net.named_modules()), {}, []
    for name, quantizer in layers.items():
        module = modules.get(module_path(name))
        if module is None:
            continue

        def keep(_, args, name=name, spec=quantizer.spec):
            every = lambda _n, positions, _d: torch.arange(positions)  # noqa: E731
            rows.setdefault(name, []).append(input_rows(args[0], spec, every))

        hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for x in batches:
            net.eval()(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts, 1) for name, parts in rows.items()}


def quantized_rows(model: nn.Module, roles=ROLES) -> dict[str, Tensor]:
    """Rows that the layers of the finished network read, behind their activation quantizers."""
    (path,) = coordinators(model)
    for layer in path.layers:
        layer.weight.collect(torch.zeros(layer.weight.spec.shape))
    path._calibration(PARAMS["samples"], turns=((), roles))
    return {layer.name: layer.weight.collected().joined()[1] for layer in path.layers}


def check(
    net: nn.Module, model: nn.Module, problems: dict, batches: list[Tensor], *, quantized: bool = True, repeated=()
) -> None:
    """
    :param net: the float network as it was, its modules named as quantizers name their layers.
    :param model: what a host made of it, without adaptation of batch norms.
    :param problems: of :func:`recorded`.
    :param repeated: layers that are called twice.
    """
    (path,) = coordinators(model)
    assert list(problems) == [layer.name for layer in path.layers]
    exact = float_rows(net, {name: quantizer for name, (quantizer, _) in problems.items()}, batches)
    assert exact
    final = quantized_rows(model, ROLES if quantized else ("weight",))
    for name, (quantizer, pairs) in problems.items():
        x, xq = pairs.joined()
        if name in exact:
            assert torch.allclose(x.float(), exact[name].float(), atol=1e-5), name
        # a layer that reads its own output read another one while it was quantized
        assert module_path(name) in repeated or torch.allclose(xq, final[name], atol=1e-5), name
        d, alphabet = quantizer._row_step().squeeze(2), quantizer.alphabet
        codes = follow(pairs, lambda z, _, d=d, a=alphabet: a.codes(z, d), lambda c, d=d, a=alphabet: a.values(c, d))
        assert torch.equal(to_rows(quantizer.signed_codes(), quantizer.spec).double(), codes), name
        assert quantizer.owns_weight, name


def check_parameters(model: nn.Module) -> None:
    """Parameters hold the codes' values and are out of training."""
    (path,) = coordinators(model)
    for layer in path.layers:
        (weight,) = [p for p in layer.parameters.values() if tuple(p.shape) == layer.weight.spec.shape]
        assert not weight.requires_grad and torch.equal(weight, layer.weight.eval()(weight)), layer.name
