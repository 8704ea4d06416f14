"""A rewrite for tests: convolutions become the sum of two of half the weight."""

from __future__ import annotations

import copy

from pydantic import Field
from torch import nn

from fat_plugins.errors import ConfigError
from fat_plugins.quantizer import Params
from fat_plugins.rewrites import Rewrite, RewriteReport, layer_of, replace_layer


class Twice(nn.Module):
    """``a(x) + b(x)``."""

    def __init__(self, a: nn.Conv2d, b: nn.Conv2d) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


class HalvesParams(Params):
    kernel: int = Field(3, ge=1, description="Convolutions of this kernel size.")


class Halves(Rewrite):
    name = "halves"
    title = "Two halves"
    paper = "none"
    fidelity = "folklore: no paper"
    Params = HalvesParams

    @classmethod
    def apply(cls, model, params, example_input):
        report = RewriteReport(cls.name, params.model_dump())
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Conv2d):
                if layer.kernel_size[0] != params.kernel:
                    report.left[name] = f"kernel {layer.kernel_size[0]}"
                    continue
                report.changed[name] = {"kernel": params.kernel}
                for tensor in layer.parameters():
                    tensor.data /= 2
                replace_layer(model, name, Twice(layer, copy.deepcopy(layer)))
        if not report.changed:
            raise ConfigError(f"halves: no convolution of kernel {params.kernel}")
        return report

    @classmethod
    def rebuild(cls, model, params, changed):
        for name in changed:
            layer = layer_of(model, name, nn.Conv2d)
            replace_layer(model, name, Twice(layer, copy.deepcopy(layer)))
