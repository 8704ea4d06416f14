"""What a penalty must find in a model that a host has compressed, whatever the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossgen import LAYERS
from stepping import batch, build_net
from torch import nn
from torch.nn.functional import cross_entropy

from fat_plugins import QuantizationError, get_penalty, named_quantizers

GradientL1 = get_penalty("gradient_l1")
#: 4 bits everywhere, batch norms as they are in the float network
SECTION = {
    "weights": {"bits": 4},
    "activations": {"bits": 4},
    "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
}


def section(algorithm: str) -> dict[str, Any]:
    """A config section of :data:`SECTION` for an algorithm."""
    return {"algorithm": algorithm, **copy.deepcopy(SECTION)}


def check_penalties(compress: Callable[[str, nn.Module], nn.Module]) -> None:
    """Disabled quantizers give the penalty of the float network; enabled ones are differentiated twice or refused.

    :param compress: gives the compressed model of an algorithm's :func:`section` and a network of :mod:`crossgen`.
    """
    x, y = batch()
    model = compress("minmax", build_net()).train()
    quantizers = [q for _, q in named_quantizers(model)]
    for q in quantizers:
        q.enabled = False
    found = _parts(model, x, y)
    wanted = _parts(build_net().train(), x, y)
    torch.testing.assert_close(found["weight"], wanted["weight"])
    # quantizers may stand behind a layer's input (pooling) or beside it, but never see less
    assert float(found["activation"]) >= float(wanted["activation"]) * (1 - 1e-5)

    for q in quantizers:
        q.enabled = True
    penalty = GradientL1(model, lambda_weights=0.1, lambda_activations=0.1)
    total = penalty(cross_entropy(model(x), y))
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(g).all()) for g in found.values())
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    seen = [(s.owner, s.role) for s in penalty.observer.take()]
    assert sorted(name for name, role in seen if role == "weight") == sorted(LAYERS)
    # all but the one that images go through
    assert len([name for name, role in seen if role == "activation"]) == len(quantizers) - len(LAYERS) - 1
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == found.keys()
    assert sum(not torch.allclose(plain[name], g) for name, g in found.items()) > len(LAYERS)

    refused = compress("fat", build_net()).train()
    with pytest.raises(QuantizationError, match=r"_Gate cannot be differentiated twice; disable the quantizers"):
        _parts(refused, x, y)


def _parts(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    penalty = GradientL1(model)
    penalty(cross_entropy(model(x), y))
    penalty.remove()
    return penalty.values()
