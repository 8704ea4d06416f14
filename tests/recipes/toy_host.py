"""A host of few lines for the core's tests: quantizers as parametrizations of convolutions and linear layers."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils import parametrize

import fat_plugins
from fat_plugins import ConfigError, TensorSpec, get_algorithm
from fat_plugins.frozen import FrozenWeight
from fat_plugins.mixed import parse_sections
from fat_plugins.network import set_progress
from fat_plugins.quantizer import Progress
from fat_plugins.recipes.schema import plugin_sections
from fat_plugins.switching import follow_quantizers


class Scheduler:
    """Counts what the trainer drives, and tells the quantizers."""

    def __init__(self, model: nn.Module) -> None:
        self.steps = self.epochs = 0
        self.total_epochs = self.total_steps = None
        self._model = model

    def _tell(self) -> None:
        progress = Progress(max(self.steps - 1, 0), max(self.epochs - 1, 0), self.total_steps, self.total_epochs)
        set_progress(self._model, progress)

    def step(self) -> None:
        self.steps += 1
        self._tell()

    def epoch_step(self) -> None:
        self.epochs += 1
        self._tell()

    def get_state(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "_model"}

    def load_state(self, state: dict) -> None:
        vars(self).update(state)
        self._tell()


class ToyHost:
    """Quantizes weights only; remembers what it was asked."""

    calls: list[dict] = []
    controllers: list[SimpleNamespace] = []

    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def check(self, config, example_input):
        if "refused" in config:
            raise ConfigError("the toy host refuses")

    def compress(self, model, config, loader, example_input, compression_state=None):
        type(self).calls.append({"config": config, "state": compression_state, "batches": len(list(loader))})
        parsed = parse_sections(plugin_sections(config))
        specs = []
        for name, module in list(model.named_modules()):
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            spec = TensorSpec("weight", 4, name=name, shape=tuple(module.weight.shape), followed_by_norm=True)
            if (found := parsed.resolve(spec, name.__eq__)) is None:
                continue
            algorithm, spec, params = found
            quantizer = get_algorithm(algorithm).make(spec, params)
            if compression_state is None:
                quantizer.calibrate(module.weight)
            parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)
            specs.append([algorithm, spec.to_dict()])
        follow_quantizers(model)
        zero = torch.zeros(())
        controller = SimpleNamespace(scheduler=Scheduler(model), loss=lambda: fat_plugins.regularization(model) or zero)
        controller.state = json.loads(json.dumps(specs))
        type(self).controllers.append(controller)
        return controller, model

    def compression_state(self, controller):
        return controller.state

    def freeze(self, model):
        model = copy.deepcopy(model).eval()
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                tensors = module.parametrizations.weight
                tensors[0] = FrozenWeight(*tensors[0].freeze(tensors.original), name=name)
        return model
