"""NNCF 2: the builder that NNCF runs for our algorithms. Placement, propagation and statistics are NNCF's own."""

from __future__ import annotations

import warnings
from typing import Any

from nncf.common.initialization.batchnorm_adaptation import BatchnormAdaptationAlgorithm
from nncf.config.extractors import extract_range_init_params
from nncf.config.structures import QuantizationRangeInitArgs
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.quantization.algo import QuantizationBuilder
from nncf.torch.quantization.init_range import PTRangeInitParams
from nncf.torch.quantization.layers import PTQuantizerSetup
from nncf.torch.utils import is_main_process

from fat_nncf.legacy_calibration import calibrate_on_data, calibrate_weights, fold_weights
from fat_nncf.legacy_controller import PluginController
from fat_nncf.legacy_placement import (
    Placement,
    check_scopes,
    excluded,
    keeps_zeros,
    placement_section,
    plugin_sections,
)
from fat_nncf.legacy_quantizer import PluginQuantizer, PluginQuantizerSpec
from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.mixed import parse_sections
from fat_plugins.network import begin
from fat_plugins.registry import get_algorithm
from fat_plugins.switching import each_width, follow_quantizers


class PluginBuilder(QuantizationBuilder):
    """Base of one class per algorithm: NNCF knows a builder by the name that its class was registered under."""

    def _get_algo_specific_config_section(self) -> dict[str, Any]:
        self.plugin_config = parse_sections(plugin_sections(self.config))
        return placement_section(self.plugin_config)

    # -- state -------------------------------------------------------------------------------------------------------
    def load_state(self, state: dict[str, Any]) -> None:
        if self.name not in state:
            raise CheckpointError(
                f"the compression state was saved for {', '.join(sorted(state)) or 'no algorithm'}, the config asks "
                f"for '{self.name}'"
            )
        super().load_state(state)

    def _load_state_without_name(self, state_without_name: dict[str, Any]) -> None:
        super()._load_state_without_name(state_without_name)
        # NNCF rebuilds its own description of each point, without what ours adds
        saved = state_without_name[self._state_names.QUANTIZER_SETUP]["quantization_points"]
        for point_id, point in saved.items():
            spec = PluginQuantizerSpec.from_state(point["qspec"])
            self._pt_quantizer_setup.quantization_points[int(point_id)].qspec = spec

    # -- placement ---------------------------------------------------------------------------------------------------
    def get_transformation_layout(self, model: NNCFNetwork):
        names = [n.node_name for n in model.nncf.get_original_graph().get_all_nodes()]
        if self.validate_scopes:
            check_scopes(self.plugin_config, names)
        if len(self.plugin_config.parts) > 1:  # a single section's scopes are in NNCF's hands
            for group in ("weights", "activations"):
                self._algo_config[group]["ignored_scopes"] = excluded(self.plugin_config, names)
        if self._pt_quantizer_setup is not None:
            known = set(names)
            for point in self._pt_quantizer_setup.quantization_points.values():
                if point.target_point.target_node_name not in known:
                    raise CheckpointError(
                        "the compression state belongs to another model: it quantizes "
                        f"'{point.target_point.target_node_name}', which this model does not have"
                    )
        self._should_setup_adjust_pad_ops = False
        return super().get_transformation_layout(model)

    def _get_single_config_quantizer_setup(self, target_model: NNCFNetwork):
        setup = super()._get_single_config_quantizer_setup(target_model)
        placement = Placement(target_model, self.plugin_config, keeps_zeros(self.config, self.name))
        self._plans = placement.resolve(setup)
        return setup

    def _get_quantizer_setup(self, target_model: NNCFNetwork) -> PTQuantizerSetup:
        setup = super()._get_quantizer_setup(target_model)
        for point_id, point in setup.quantization_points.items():
            state = self._plans[point_id].state(point.qspec.half_range, self._explicit_range)
            point.qspec = PluginQuantizerSpec.extend(point.qspec, state)
        return setup

    # -- initialisation ----------------------------------------------------------------------------------------------
    @property
    def _explicit_range(self) -> bool:
        return "range" in self.plugin_config.initializer

    def _parse_range_init_params(self):
        if self._explicit_range and not self.config.has_extra_struct(QuantizationRangeInitArgs):
            raise ConfigError(
                "compression.initializer.range needs data: call register_default_init_args(nncf_config, loader) before "
                "create_compressed_model"
            )
        params = extract_range_init_params(self.config, self.name)
        return None if params is None else PTRangeInitParams(**params)

    def initialize(self, model: NNCFNetwork) -> None:
        """Weights from themselves, activations from data where their algorithm wants it, then NNCF's batch norms.

        Where an algorithm acts on the whole network, batch norms wait for what its coordinator does to it.
        """
        if not self.should_init:
            return
        follow_quantizers(model)
        calibrate_weights(model)
        if not is_main_process():
            return
        if self._range_init_params is not None:
            calibrate_on_data(model, self._range_init_params)
        self._report_uncalibrated(model)
        if not self._coordinated:
            self._adapt_batch_norms(model)

    @property
    def _coordinated(self) -> bool:
        names = {info.quantizer_module_ref.algorithm for info in self._weight_quantizers.values()}
        return any(get_algorithm(name).coordinator is not None for name in names)

    def _adapt_batch_norms(self, model: NNCFNetwork) -> None:
        adaptation = self._parse_bn_adapt_params()
        if adaptation is not None:
            for _ in each_width(model):
                BatchnormAdaptationAlgorithm(**adaptation).run(model)

    def _report_uncalibrated(self, model: NNCFNetwork) -> None:
        waiting = [m for m in model.modules() if isinstance(m, PluginQuantizer) and not m.calibrated]
        if not waiting:
            return
        some = ", ".join(sorted(m.spec.name for m in waiting)[:3]) + (", ..." if len(waiting) > 3 else "")
        if self._range_init_params is not None and len(waiting) == len(self._non_weight_quantizers):
            raise ConfigError(f"the loader of register_default_init_args gives no batch to calibrate on ({some})")
        warnings.warn(
            f"{len(waiting)} activation quantizers pass their input unchanged until they are calibrated ({some}): "
            "register a loader with register_default_init_args, call compression_ctrl.init_range(...), or load a "
            "checkpoint",
            stacklevel=2,
        )

    def _build_controller(self, model: NNCFNetwork) -> PluginController:
        if self.should_init:
            calibrate_weights(model)  # again: controllers built before this one have set their masks
        follow_quantizers(model)
        controller = PluginController(
            self._algo_config,
            model,
            self.config,
            self._debug_interface,
            self._weight_quantizers,
            self._non_weight_quantizers,
            self._groups_of_adjacent_quantizers,
            self._quantizers_input_shapes,
            build_time_metric_info=self._build_time_metric_infos,
            build_time_range_init_params=self._range_init_params or self._data(),
        )
        if self.should_init and self._coordinated:
            if self._range_init_params is not None:
                begin(model)
            if is_main_process():
                self._adapt_batch_norms(model)
        fold_weights(model)
        return controller

    def _data(self) -> PTRangeInitParams | None:
        """The registered loader of a model that is resumed, for algorithms that look at data while they train."""
        return self._parse_range_init_params() if self.config.has_extra_struct(QuantizationRangeInitArgs) else None
