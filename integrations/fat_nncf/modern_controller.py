"""The controller that ``create_compressed_model`` gives back on NNCF 3, with the members it has on NNCF 2."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from fat_nncf import modern_deploy
from fat_nncf.modern_data import device_of
from fat_nncf.modern_hooks import (
    COORDINATORS,
    cores,
    fold_weights,
    is_weight,
    parameter,
    plugin_hooks,
    quantizer_input,
)
from fat_nncf.modern_sparsity import Sparsity
from fat_nncf.modern_state import BUILDER, CONTROLLER, builder_state, check_state
from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.forms import form_kind
from fat_plugins.network import broadcast_state, regularization, set_progress
from fat_plugins.placed import network_facts
from fat_plugins.quantizer import Coordinator, Progress


class CompressionStage(IntEnum):
    """How far compression has come (NNCF 2's names)."""

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2


class Scheduler:
    """Counts steps and epochs and tells quantizers, coordinators and sparsity.

    Call :meth:`epoch_step` at the start of each epoch and :meth:`step` at the start of each training step, as on
    NNCF 2. Both counters are -1 before the first call.

    :ivar total_steps, total_epochs: what the training plans, when known; set them for algorithms whose schedules need
        an end.
    """

    def __init__(self, model: nn.Module, sparsity: Sparsity | None) -> None:
        self._model, self._sparsity = model, sparsity
        self.current_step = self.current_epoch = -1
        self.total_steps: int | None = None
        self.total_epochs: int | None = None

    def step(self, next_step: int | None = None) -> None:
        """Begin the next training step (or the one given)."""
        self.current_step = self.current_step + 1 if next_step is None else int(next_step)
        self.announce()

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begin the next epoch (or the one given)."""
        self.current_epoch = self.current_epoch + 1 if next_epoch is None else int(next_epoch)
        if self._sparsity is not None:
            self._sparsity.on_epoch(self.current_epoch)
        self.announce()

    def announce(self, begun: bool = True) -> None:
        """Tell everybody where training stands.

        :param begun: ``False`` as long as a state dict may still be loaded; coordinators are left out then.
        """
        progress = Progress(max(self.current_step, 0), max(self.current_epoch, 0), self.total_steps, self.total_epochs)
        set_progress(self._model, progress, begun=begun)

    def get_state(self) -> dict[str, Any]:
        """JSON-ready counters."""
        keys = ("current_step", "current_epoch", "total_steps", "total_epochs")
        return {key: getattr(self, key) for key in keys}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`get_state` was called.

        :raises CheckpointError: counters are missing.
        """
        try:
            self.current_step, self.current_epoch = int(state["current_step"]), int(state["current_epoch"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError("compression_state: the scheduler's counters are missing") from None
        self.total_steps, self.total_epochs = state.get("total_steps"), state.get("total_epochs")
        if self._sparsity is not None:
            self._sparsity.resume(self.current_epoch)
        self.announce(begun=False)


@dataclass(frozen=True)
class TensorStatistics:
    """One quantized tensor."""

    name: str
    role: str
    algorithm: str
    bits: int
    form: str
    elements: int
    zeros: float | None


@dataclass(frozen=True)
class Statistics:
    """What :meth:`Controller.statistics` returns.

    :ivar tensors: one entry per quantizer.
    :ivar sparsity_level: share of masked weights, ``None`` without a sparsity algorithm.
    :ivar facts: what algorithms tell of the whole network, such as compression rates.
    """

    tensors: list[TensorStatistics] = field(default_factory=list)
    sparsity_level: float | None = None
    sparsity_target: float | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def to_str(self) -> str:
        """A table by layer."""
        header = ("layer", "tensor", "algorithm", "bits", "form", "elements", "zeros")
        rows = [header] + [
            (t.name, t.role, t.algorithm, str(t.bits), t.form, str(t.elements or "-"),
             "-" if t.zeros is None else f"{t.zeros:.1%}")
            for t in self.tensors
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.sparsity_level is not None:
            target = "" if self.sparsity_target is None else f" (schedule: {self.sparsity_target:.1%})"
            lines.append(f"sparsity of the masked weights: {self.sparsity_level:.1%}{target}")
        lines += [f"{name}: {value:.4g}" for name, value in self.facts.items()]
        return "\n".join(lines)


class Controller:
    """Drives compression during training and prepares deployment.

    :param model: the compressed model; the user's own, with hooks.
    :param example: an input of the model, for export.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: str,
        example: Any,
        sparsity: Sparsity | None = None,
    ) -> None:
        self._model, self._algorithm, self._example, self._sparsity = model, algorithm, example, sparsity
        self.coordinators: list[Coordinator] = list(getattr(model, COORDINATORS, {}).values())
        self.scheduler = Scheduler(model, sparsity)
        self.scheduler.announce(begun=False)

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        return self._model

    @property
    def name(self) -> str:
        """Name of the algorithm in the config."""
        return self._algorithm

    def loss(self) -> Tensor:
        """What the algorithms add to the training loss: a scalar on the model's device, 0 when they add nothing."""
        device = device_of(self._model)
        terms = [regularization(self._model), self._sparsity.loss() if self._sparsity is not None else None]
        total = torch.zeros((), device=device)
        for term in terms:
            if term is not None:
                total = total + term.to(device)
        return total

    # -- state -------------------------------------------------------------------------------------------------------
    def get_compression_state(self) -> dict[str, Any]:
        """JSON-ready; pass it to ``create_compressed_model`` with a fresh model, then load the state dict."""
        fold_weights(self._model)
        own = {"scheduler": self.scheduler.get_state()}
        return {BUILDER: builder_state(self._model), CONTROLLER: {self._algorithm: own}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue the schedules of a compression state.

        :raises CheckpointError: it is not one of this algorithm's.
        """
        state = check_state(state)
        own = state.get(CONTROLLER, {}).get(self._algorithm)
        if not isinstance(own, Mapping):
            saved = ", ".join(state.get(CONTROLLER, {})) or "none"
            raise CheckpointError(f"compression_state: saved for {saved}, not for '{self._algorithm}'")
        self.scheduler.load_state(own.get("scheduler", {}))

    def distributed(self) -> None:
        """Make all processes agree on the quantizers that rank 0 calibrated; call it before DistributedDataParallel.

        Does nothing in a single process.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for core in cores(self._model):
            broadcast_state(core)

    # -- reports -----------------------------------------------------------------------------------------------------
    def compression_stage(self) -> CompressionStage:
        """Fully compressed, unless a sparsity schedule has not reached its target."""
        level = self._sparsity.level(self.scheduler.current_epoch) if self._sparsity is not None else None
        if level is None or level >= self._sparsity.final_level:
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    @torch.no_grad()
    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Bits, algorithm, form and zeros by tensor, and the sparsity of the model.

        :param quickly_collected_only: leave out what needs the weights' codes.
        """
        tensors = []
        for hook, slots in plugin_hooks(self._model).items():
            form, elements, zeros = "-", 0, None
            if is_weight(hook):
                elements = parameter(self._model, hook.tensor).numel()
                if not quickly_collected_only:
                    frozen = hook.core.freeze(quantizer_input(self._model, hook, slots[0]))
                    form = form_kind(frozen.form)
                    zeros = float((frozen.form.decode(frozen.codes) == 0).float().mean())
            elif hook.core.calibrated:
                form = form_kind(hook.core.nominal_form())
            spec = hook.core.spec
            bits = hook.core.bits  # the width in force, which an algorithm may have learned
            tensors.append(TensorStatistics(spec.name, spec.role, hook.algorithm, bits, form, elements, zeros))
        facts = {} if quickly_collected_only else network_facts(self._model)
        if self._sparsity is None:
            return Statistics(tensors, facts=facts)
        level = nncf.pruning_statistic(self._model).pruning_ratio
        return Statistics(tensors, level, self._sparsity.level(self.scheduler.current_epoch), facts)

    @property
    def compression_rate(self) -> float:
        """Share of the quantized weights' float32 bits that is saved, between 0 and 1."""
        sizes = [
            (parameter(self._model, h.tensor).numel(), h.core.bits) for h in plugin_hooks(self._model) if is_weight(h)
        ]
        total = sum(n for n, _ in sizes)
        return 1.0 - sum(n * bits for n, bits in sizes) / (32 * total) if total else 0.0

    @property
    def maximal_compression_rate(self) -> float:
        """The bits are those of the config or were learned, so this is :attr:`compression_rate`."""
        return self.compression_rate

    # -- deployment --------------------------------------------------------------------------------------------------
    def strip(self, do_copy: bool = True) -> nn.Module:
        """The model without our code: see :func:`fat_nncf.modern_deploy.strip`."""
        return modern_deploy.strip(self._model, do_copy)

    def prepare_for_export(self) -> None:
        """Strip the model in place."""
        modern_deploy.strip(self._model, do_copy=False)

    def export_model(
        self,
        save_path: str | Path,
        save_format: str | None = None,
        input_names: list[str] | None = None,
        output_names: list[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> None:
        """Write the model as ONNX with standard operators.

        :param save_format: ``None``, ``"onnx"`` or ``"onnx_<opset>"``.
        :param model_args: positional inputs; a dictionary at the end is keyword arguments, as for ``torch.onnx``.
        :raises ConfigError: unknown format.
        :raises ExportError: the directory cannot be written.
        """
        kind, _, opset = (save_format or "onnx").partition("_")
        if kind != "onnx" or (opset and not opset.isdecimal()):
            raise ConfigError(f"save_format: expected 'onnx' or 'onnx_<opset>', got {save_format!r}")
        example = copy.copy(self._example)
        if model_args:
            keywords = isinstance(model_args[-1], dict)
            example = model_args[-1] if keywords and len(model_args) == 1 else tuple(model_args)
        modern_deploy.export_onnx(
            self._model, save_path, example, input_names, output_names, int(opset) if opset else None
        )
