"""The candidates of :mod:`benchmarks.steps`: a network as it is, under a host's own quantizers, and under ours."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fat_plugins.registry import get_algorithm

#: a model in training mode, and what its schedule and loss terms want in each step
Candidate = tuple[nn.Module, Callable[[], Tensor | None]]


def _nothing() -> None:
    return None


def _config(algorithm: str, bits: int, shape: list[int]) -> dict[str, Any]:
    """First and last layer at 8 bits, as everywhere; widths that the algorithm has not are moved to the nearest."""
    found = get_algorithm(algorithm)
    section: dict[str, Any] = {
        "algorithm": algorithm,
        "initializer": {
            "range": {"num_init_samples": shape[0]}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
        },
    }  # fmt: skip
    for key, maker, (low, high) in (
        ("weights", found.weight_quantizer, found.weight_bits),
        ("activations", found.activation_quantizer, found.activation_bits),
    ):
        section[key] = {"bits": bits if maker is None else min(max(bits, low), high)}
    return {"input_info": {"sample_size": shape}, "compression": section}


def _controlled(controller: Any, model: nn.Module) -> Candidate:
    controller.scheduler.epoch_step()

    def each_step() -> Tensor:
        controller.scheduler.step()
        return controller.loss()

    return model, each_step


class Host:
    """Makes the candidates of one host.

    :param x: a batch; it calibrates activations.
    """

    def __init__(self, x: Tensor, bits: int) -> None:
        self.x, self.bits = x, bits
        # the calibration data come to the model's device in one piece
        self.loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=len(x))

    def own(self, net: nn.Module) -> Candidate:
        """The host's own quantizers with learned scales."""
        raise NotImplementedError

    def ours(self, net: nn.Module, algorithm: str) -> Candidate:
        """An algorithm of the registry."""
        raise NotImplementedError

    def notes(self) -> dict[str, str]:
        """Version and settings that belong beside the numbers."""
        raise NotImplementedError


class NNCF(Host):
    """NNCF of the generation that is installed."""

    def _compress(self, net: nn.Module, config: dict[str, Any]) -> Candidate:
        import fat_nncf

        nncf_config = fat_nncf.NNCFConfig.from_dict(config)
        nncf_config = fat_nncf.register_default_init_args(nncf_config, self.loader)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fat_nncf.create_compressed_model(net.to(self.x.device), nncf_config, dump_graphs=False)
        return _controlled(*made)

    def ours(self, net: nn.Module, algorithm: str) -> Candidate:
        return self._compress(net, _config(algorithm, self.bits, list(self.x.shape)))

    def own(self, net: nn.Module) -> Candidate:
        import fat_nncf

        if fat_nncf.GENERATION == 3:
            from benchmarks.method_comparison.stock import nncf_stock

            return nncf_stock(net.to(self.x.device), self.bits, self.loader, self.x).train(), _nothing
        from nncf import NNCFConfig
        from nncf.torch import create_compressed_model, register_default_init_args

        config = _config("lsq", self.bits, list(self.x.shape))
        section = config["compression"]
        section["algorithm"] = "quantization"
        config["target_device"] = "TRIAL"
        nncf_config = register_default_init_args(NNCFConfig.from_dict(config), self.loader)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = create_compressed_model(net.to(self.x.device), nncf_config, dump_graphs=False)
        return _controlled(*made)

    def notes(self) -> dict[str, str]:
        import nncf
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPU, QuantizedFunctionsCUDA
        from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

        functions = QuantizedFunctionsCUDA if self.x.is_cuda else QuantizedFunctionsCPU
        try:
            functions.get("Quantize_forward")
            compiled = functions._loaded_namespace is not ReferenceQuantizedFunctions
        except Exception as error:  # a compiler that is missing must not end the benchmark
            return {"nncf": nncf.__version__, "C++ extension": f"failed: {str(error).splitlines()[0][:80]}"}
        return {"nncf": nncf.__version__, "C++ extension": "compiled" if compiled else "not compiled: torch fallback"}


class Brevitas(Host):
    """Brevitas, with TorchScript or without (its switch is an environment variable, read at import)."""

    def ours(self, net: nn.Module, algorithm: str) -> Candidate:
        import fat_brevitas

        config = _config(algorithm, self.bits, list(self.x.shape))
        model = fat_brevitas.quantize(net.to(self.x.device), config, self.loader)
        return _controlled(fat_brevitas.Controller(model), model)

    def own(self, net: nn.Module) -> Candidate:
        from benchmarks.method_comparison.stock import brevitas_stock

        return brevitas_stock(net.to(self.x.device), self.bits, self.loader, self.x).train(), _nothing

    def notes(self) -> dict[str, str]:
        from importlib.metadata import version

        import brevitas.config

        return {"brevitas": version("brevitas"), "JIT": "on" if brevitas.config.JIT_ENABLED else "off"}


#: by the name of the process that runs it: class, environment
HOSTS: dict[str, tuple[type[Host], dict[str, str]]] = {
    "nncf3": (NNCF, {}),
    "nncf2": (NNCF, {"NNCF_TORCH_LEGACY_TRACING": "1"}),
    "brevitas": (Brevitas, {"BREVITAS_JIT": "0"}),
    "brevitas-jit": (Brevitas, {"BREVITAS_JIT": "1"}),
}


def make(host: Host, net: nn.Module, name: str) -> Candidate:
    """``"float"``, ``"own"`` or an algorithm, in training mode; ``net`` itself is left alone."""
    net = deepcopy(net)
    if name == "float":
        return net.to(host.x.device).train(), _nothing
    model, each_step = host.own(net) if name == "own" else host.ours(net, name)
    return model.train(), each_step
