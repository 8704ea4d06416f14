"""Sparsity algorithms of an NNCF JSON config on NNCF 3, through ``nncf.prune``."""

from __future__ import annotations

from typing import Any, Literal

import nncf
import torch
from nncf.parameters import PruneMode
from nncf.torch.function_hook.pruning.magnitude.algo import get_pruned_modules, update_pruning_ratio
from nncf.torch.function_hook.pruning.rb.algo import get_pruned_modules as get_rb_modules
from nncf.torch.function_hook.pruning.rb.losses import RBLoss
from nncf.torch.function_hook.pruning.scheduler_fns import exponential_ratio_scheduler, multi_step_ratio_scheduler
from nncf.torch.model_graph_manager import get_const_data_by_name
from pydantic import Field, StrictBool, StrictFloat, StrictInt, ValidationError
from torch import Tensor, nn

from fat_plugins.config import Section, explain
from fat_plugins.errors import ConfigError

Number = StrictFloat | StrictInt
_NO_ADAPTIVE = "NNCF 3 has no adaptive schedule; allowed: exponential, multistep, polynomial"


class ScheduleParams(Section):
    """``params`` of a sparsity section; the defaults are NNCF 2's."""

    schedule: Literal["polynomial", "exponential", "multistep", "adaptive"] | None = None
    sparsity_target: Number = Field(0.5, ge=0, lt=1)
    sparsity_target_epoch: Number = Field(90, ge=0)
    sparsity_freeze_epoch: Number = Field(100, ge=0)
    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    update_per_optimizer_step: StrictBool = False
    steps_per_epoch: StrictInt | None = None
    multistep_steps: list[StrictInt] = [90]
    multistep_sparsity_levels: list[Number] = [0.1, 0.5]
    patience: Number | None = None
    power: Number = Field(0.9, gt=0)
    concave: StrictBool = True
    weight_importance: Literal["normed_abs", "abs"] | None = None


class SparsitySection(Section):
    """A section of ``magnitude_sparsity``, ``rb_sparsity`` or ``const_sparsity``."""

    algorithm: Literal["magnitude_sparsity", "rb_sparsity", "const_sparsity"]
    sparsity_init: Number = Field(0.0, ge=0, lt=1)
    params: ScheduleParams = Field(default_factory=ScheduleParams)
    ignored_scopes: list[str] | str | None = None
    target_scopes: list[str] | str | None = None
    initializer: dict[str, Any] | None = None
    compression_lr_multiplier: Number | None = None

    def level(self, epoch: int) -> float:
        """Sparsity level of an epoch counted from 0 (-1: before the first), between 0 and 1."""
        p = self.params
        if self.schedule == "multistep":
            levels = {0: p.multistep_sparsity_levels[0]}
            levels.update(zip(sorted(p.multistep_steps), p.multistep_sparsity_levels[1:], strict=True))
            return float(multi_step_ratio_scheduler(max(epoch, 0), steps=levels))
        start, target, last = float(self.sparsity_init), float(p.sparsity_target), float(p.sparsity_target_epoch)
        if epoch < 0:
            return start
        if last == 0 or epoch >= last:
            return target
        if self.schedule == "exponential" and start < target:
            return exponential_ratio_scheduler(epoch, initial_ratio=start, target_ratio=target, target_epoch=last)
        if self.schedule == "exponential":
            return target
        progress = min(1.0, epoch / last)  # NNCF 3 has no polynomial schedule
        if p.concave:
            return target + (start - target) * (1 - progress) ** p.power
        return start + (target - start) * progress**p.power

    @property
    def final_level(self) -> float:
        """Level at which the schedule ends."""
        if self.schedule == "multistep":
            return float(self.params.multistep_sparsity_levels[-1])
        return float(self.params.sparsity_target)

    @property
    def schedule(self) -> str:
        """The schedule's name, with NNCF 2's defaults."""
        return self.params.schedule or ("exponential" if self.algorithm == "rb_sparsity" else "polynomial")


SPARSITY_SECTIONS = ("const_sparsity", "magnitude_sparsity", "rb_sparsity")


def parse_sparsity(section: dict[str, Any], where: str) -> SparsitySection:
    """Check one section.

    :raises ConfigError: a bad value, or a wish that NNCF 3 cannot fulfil.
    """
    try:
        parsed = SparsitySection.model_validate(section)
    except ValidationError as error:
        raise ConfigError(explain(error, SparsitySection, where)) from None
    p = parsed.params
    if parsed.algorithm == "const_sparsity" and (p.model_fields_set or "sparsity_init" in parsed.model_fields_set):
        raise ConfigError(f"{where}: 'const_sparsity' keeps the zeros that are there and takes no params")
    if parsed.schedule == "adaptive":
        raise ConfigError(f"{where}.params.schedule: {_NO_ADAPTIVE}")
    if p.update_per_optimizer_step:
        raise ConfigError(f"{where}.params.update_per_optimizer_step: NNCF 3 changes sparsity once per epoch")
    if p.patience is not None:
        raise ConfigError(f"{where}.params.patience: {_NO_ADAPTIVE}")
    if len(p.multistep_sparsity_levels) != len(p.multistep_steps) + 1 or 0 in p.multistep_steps:
        raise ConfigError(f"{where}.params: multistep_sparsity_levels needs one entry more than multistep_steps, "
                          "whose entries are above 0")  # fmt: skip
    if any(not 0 <= level < 1 for level in p.multistep_sparsity_levels):
        raise ConfigError(f"{where}.params.multistep_sparsity_levels: expected levels from 0 to below 1, got "
                          f"{p.multistep_sparsity_levels}")  # fmt: skip
    if p.weight_importance == "abs" and p.sparsity_level_setting_mode == "global":
        raise ConfigError(f"{where}.params.weight_importance: NNCF 3 ranks weights of all layers by 'normed_abs' only; "
                          "'abs' needs sparsity_level_setting_mode 'local'")  # fmt: skip
    if parsed.algorithm != "rb_sparsity" and parsed.compression_lr_multiplier is not None:
        raise ConfigError(f"{where}.compression_lr_multiplier: '{parsed.algorithm}' learns nothing")
    if parsed.algorithm == "rb_sparsity":
        if p.sparsity_level_setting_mode == "local" or p.weight_importance:
            raise ConfigError(f"{where}.params: NNCF 3's rb_sparsity has one level for the whole network")
        if "sparsity_freeze_epoch" in p.model_fields_set:
            raise ConfigError(f"{where}.params.sparsity_freeze_epoch: NNCF 3 cannot freeze the masks of rb_sparsity")
    return parsed


class Sparsity:
    """One sparsity algorithm on a model.

    :param model: wrapped by NNCF; :meth:`attach` adds the masks.
    """

    def __init__(self, section: SparsitySection, model: nn.Module) -> None:
        self.section, self.model = section, model
        self._mode = (
            PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
            if section.params.sparsity_level_setting_mode == "local"
            else PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        )
        self._loss: RBLoss | None = None

    def attach(self, ignored: set[str], example: Any) -> None:
        """Put the masks in place.

        :param ignored: names of the nodes whose weights stay dense.
        :raises ConfigError: nothing is left to prune.
        """
        kind = self.section.algorithm
        mode = PruneMode.UNSTRUCTURED_REGULARIZATION_BASED if kind == "rb_sparsity" else self._mode
        scope = nncf.IgnoredScope(names=sorted(ignored), validate=False)
        ratio = None if kind == "rb_sparsity" else 0.0
        try:
            nncf.prune(self.model, mode, ratio=ratio, ignored_scope=scope, examples_inputs=example)
        except (nncf.InternalError, RuntimeError) as error:
            raise ConfigError(f"{kind}: {str(error).splitlines()[0]}") from None
        if kind == "rb_sparsity":
            self.resume(-1)
            factor = self.section.compression_lr_multiplier
            for hook in get_rb_modules(self.model).values() if factor is not None else ():
                hook.mask.register_hook(lambda g, f=float(factor): g * f)
            return
        if kind == "const_sparsity":
            with torch.no_grad():
                for name, mask in get_pruned_modules(self.model).items():
                    mask.binary_mask.copy_(get_const_data_by_name(name, self.model) != 0)
        else:
            self._set(self.section.level(-1))

    def _set(self, level: float) -> None:
        if level > 0:
            update_pruning_ratio(self.model, self._mode, level)
        else:  # NNCF's threshold is inclusive: its level 0 prunes the smallest weight
            for mask in get_pruned_modules(self.model).values():
                mask.binary_mask.fill_(True)

    def on_epoch(self, epoch: int) -> None:
        """Follow the schedule at the start of an epoch counted from 0."""
        if self.section.algorithm == "rb_sparsity":
            self.resume(epoch)
        elif self.section.algorithm == "magnitude_sparsity" and epoch < self.section.params.sparsity_freeze_epoch:
            self._set(self.section.level(epoch))

    def resume(self, epoch: int) -> None:
        """Continue after ``epoch``; masks come from the checkpoint."""
        if self.section.algorithm == "rb_sparsity":
            level = self.section.level(epoch)
            if self._loss is None:
                self._loss = RBLoss(self.model, level)
            self._loss.target_ratio = level

    def loss(self) -> Tensor | None:
        """The term of rb_sparsity, or ``None``."""
        return self._loss() if self._loss is not None else None

    def level(self, epoch: int) -> float | None:
        """Level that the schedule asks for."""
        return None if self.section.algorithm == "const_sparsity" else self.section.level(epoch)

    @property
    def final_level(self) -> float:
        """Level at which the schedule ends."""
        return self.section.final_level
