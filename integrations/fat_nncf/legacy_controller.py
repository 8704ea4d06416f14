"""NNCF 2: the controller of a model with our quantizers: loss, schedule, statistics, strip."""

from __future__ import annotations

from typing import Any

import torch
from nncf.common.quantization.collectors import QuantizerDescription
from nncf.common.quantization.statistics import QuantizationStatistics
from nncf.common.schedulers import BaseCompressionScheduler
from nncf.common.sparsity.collector import BaseSparseModelStatisticsCollector, WeightDescription
from nncf.common.sparsity.statistics import ConstSparsityStatistics
from nncf.common.statistics import NNCFStatistics
from nncf.torch.compression_method_api import PTCompressionLoss
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.quantization.algo import QuantizationController
from nncf.torch.quantization.metrics import PTQuantizationStatisticsCollector
from nncf.torch.utils import get_model_device
from torch import Tensor

from fat_nncf.legacy_calibration import (
    Pass,
    calibrate_on_data,
    calibrate_weights,
    fold_weights,
    operand,
    quantized_layers,
)
from fat_nncf.legacy_placement import is_weighted
from fat_nncf.legacy_quantizer import PluginQuantizer
from fat_nncf.legacy_strip import COORDINATORS, copy_without_controller, strip_in_place
from fat_plugins.errors import ExportError
from fat_plugins.inspect import Summary, summary
from fat_plugins.quantizer import Coordinator, LayerQuantizers, Progress
from fat_plugins.registry import get_algorithm


class PluginLoss(PTCompressionLoss):
    """Sum of the regularisation terms of the quantizers and coordinators; zero when an algorithm has none."""

    def __init__(self, controller: PluginController) -> None:
        super().__init__()
        # in a tuple: the loss must not own the model's modules
        self._terms = (controller,)

    def calculate(self) -> Tensor:
        (controller,) = self._terms
        total = torch.zeros([], device=get_model_device(controller.model))
        for part in controller.parts():
            if getattr(part, "enabled", True) and (term := part.regularization()) is not None:
                total = total + term.reshape(())
        return total


class PluginScheduler(BaseCompressionScheduler):
    """Tells every quantizer and coordinator where training stands.

    :attr:`total_steps` and :attr:`total_epochs` may be set by the training script; they are saved with the rest.
    """

    def __init__(self, controller: PluginController) -> None:
        super().__init__()
        self._controller = controller
        self.total_steps: int | None = None
        self.total_epochs: int | None = None

    @property
    def progress(self) -> Progress:
        """Steps done and epochs begun; NNCF counts from -1, which means not started."""
        return Progress(max(self.current_step, 0), max(self.current_epoch, 0), self.total_steps, self.total_epochs)

    def _tell(self, begun: bool = True) -> None:
        """Announce the progress; to coordinators only when no state dict can be loaded any more."""
        for part in self._controller.parts():
            if begun or not isinstance(part, Coordinator):
                part.on_progress(self.progress)

    def step(self, next_step: int | None = None) -> None:
        super().step(next_step)
        self._tell()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        super().epoch_step(next_epoch)
        self._tell()

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "total_steps": self.total_steps, "total_epochs": self.total_epochs}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.total_steps, self.total_epochs = state.get("total_steps"), state.get("total_epochs")
        self._tell(begun=False)


class _StatisticsCollector(PTQuantizationStatisticsCollector):
    """NNCF takes every class that it does not know for an asymmetric quantizer; ours have no zero point."""

    def _collect_quantizers_descriptions(self) -> list[QuantizerDescription]:
        weights = [(True, q) for q in self._weight_quantizers.values()]
        activations = [(False, q) for q in self._non_weight_quantizers.values()]
        return [
            QuantizerDescription(q.num_bits, q.per_channel, q.signed, True, is_weight, q.is_enabled_quantization())
            for is_weight, q in weights + activations
        ]


class PluginStatistics(QuantizationStatistics):
    """NNCF's statistics of quantization, and below them every layer.

    :ivar summary: what :func:`fat_plugins.summary` gives.
    """

    def __init__(self, base: QuantizationStatistics, summary: Summary) -> None:
        self.__dict__.update(vars(base))
        self.summary = summary

    def to_str(self) -> str:
        return f"{super().to_str()}\n\nStatistics by layer:\n{self.summary}"


class _SparsityCollector(BaseSparseModelStatisticsCollector):
    """Zeros in the codes of weights whose quantizers prune, for NNCF's own statistics of sparsity."""

    def __init__(self, model: NNCFNetwork) -> None:
        self._model = model

    @torch.no_grad()
    def _collect_weights_descriptions(self) -> list[WeightDescription]:
        pruned = {
            id(m.weight): (m, q)
            for m, _, q in quantized_layers(self._model)
            if q.core.prunes and not q.spec.keep_zeros and q.is_enabled_quantization()
        }
        own = {id(p) for m in self._model.modules() if isinstance(m, PluginQuantizer) for p in m.parameters()}
        found = []
        for name, parameter in self._model.named_parameters():
            if id(parameter) in own or not parameter.numel():
                continue
            values, sparse = parameter, id(parameter) in pruned
            if sparse:
                module, quantizer = pruned[id(parameter)]
                name = quantizer.spec.name
                codes, form = quantizer.core.freeze(operand(module, quantizer)[0])
                values = form.decode(codes)
            found.append(WeightDescription(name, list(values.shape), int(values.count_nonzero()), sparse))
        return found


class PluginController(QuantizationController):
    """NNCF's quantization controller with our loss, schedule and strip."""

    def __init__(self, section: dict[str, Any], target_model: NNCFNetwork, *args: Any, **kwargs: Any) -> None:
        self._section = section
        super().__init__(target_model, *args, **kwargs)
        self._add_coordinators(target_model)
        self._loss = PluginLoss(self)
        self._scheduler = PluginScheduler(self)
        self._scheduler._tell(begun=False)

    def _get_algo_config(self) -> dict[str, Any]:
        return self._section

    # -- coordinators ------------------------------------------------------------------------------------------------
    def _add_coordinators(self, model: NNCFNetwork) -> None:
        layers = self._layers_in_order(model)
        found = torch.nn.ModuleDict()
        for name in sorted({algorithm for algorithm, _ in layers}):
            coordinator = get_algorithm(name).make_coordinator([layer for a, layer in layers if a == name])
            if coordinator is not None:
                if self._build_time_range_init_params is not None:
                    coordinator.set_calibration(Pass(model, self._build_time_range_init_params))
                found[name] = coordinator.to(get_model_device(model))
        if found:
            model.nncf.add_module(COORDINATORS, found)

    def _layers_in_order(self, model: NNCFNetwork) -> list[tuple[str, LayerQuantizers]]:
        """Algorithm and quantizers of every layer whose weight is quantized, in execution order."""
        inputs: dict[int, PluginQuantizer] = {}
        for info in self.non_weight_quantizers.values():
            for node_name in info.quantizer_module_ref.readers:
                inputs.setdefault(id(model.nncf.get_containing_module(node_name)), info.quantizer_module_ref)
        weights = {id(module): (module, quantizer) for module, _, quantizer in quantized_layers(model)}
        layers = []
        for node in model.nncf.get_original_graph().topological_sort():
            if not is_weighted(node):
                continue
            found = weights.pop(id(model.nncf.get_containing_module(node.node_name)), None)
            if found is not None:
                module, quantizer = found
                reader = inputs.get(id(module))
                layer = LayerQuantizers(
                    quantizer.spec.name,
                    quantizer.core,
                    reader.core if reader else None,
                    dict(module.named_parameters(recurse=False)),
                )
                layers.append((quantizer.algorithm, layer))
        return layers

    def parts(self) -> list[Any]:
        """Everything that follows the schedule and may add to the loss: quantizers, then coordinators."""
        coordinators: Any = getattr(self.model.nncf, COORDINATORS, {})
        return [q.core for q in self.all_quantizations.values()] + list(coordinators.values())

    def get_state(self) -> dict[str, dict[str, Any]]:
        """NNCF's state; taken when a checkpoint is written, so the parameters are brought up to date first."""
        fold_weights(self.model)
        return super().get_state()

    # -- NNCF's interface --------------------------------------------------------------------------------------------
    def init_range(self, range_init_params: Any = None) -> None:
        """Calibrate again: weights, ranges by NNCF's runner, and data where an algorithm wants it."""
        range_init_params = range_init_params or self._build_time_range_init_params
        calibrate_weights(self.model)
        super().init_range(range_init_params)
        if range_init_params is not None:
            calibrate_on_data(self.model, range_init_params)

    def _do_runtime_range_init(self, range_init_params: Any) -> None:
        weights, self.weight_quantizers = self.weight_quantizers, {}  # calibrated from the weights, not from ranges
        try:
            super()._do_runtime_range_init(range_init_params)
        finally:
            self.weight_quantizers = weights

    def statistics(self, quickly_collected_only: bool = False) -> NNCFStatistics:
        stats = NNCFStatistics()
        collector = _StatisticsCollector(
            self.weight_quantizers, self.non_weight_quantizers, self._build_time_metric_info
        )
        collected = collector.collect()
        if not quickly_collected_only:
            collected = PluginStatistics(collected, summary(self.model))
        stats.register("quantization", collected)
        cores = [q.core for _, _, q in quantized_layers(self.model) if q.is_enabled_quantization()]
        if not quickly_collected_only and any(c.prunes and not c.spec.keep_zeros for c in cores):
            # NNCF's word for zeros that no schedule of its own asks for
            stats.register("const_sparsity", ConstSparsityStatistics(_SparsityCollector(self.model).collect()))
        return stats

    def strip_model(self, model: NNCFNetwork, do_copy: bool = False, strip_format: Any = None) -> NNCFNetwork:
        """Weights folded, activations as torch's FakeQuantize where the grid is uniform.

        :raises ExportError: another format than NNCF's ``NATIVE``.
        """
        if strip_format is not None and getattr(strip_format, "name", "NATIVE") != "NATIVE":
            raise ExportError(
                f"strip_format {strip_format.name} has no low-bit form; use NATIVE, or fat_nncf.export_openvino for "
                "packed weights"
            )
        if do_copy:
            model = copy_without_controller(model)
        strip_in_place(model)
        return model
