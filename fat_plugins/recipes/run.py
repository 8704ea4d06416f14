"""A recipe from beginning to end, and the directory that holds what came out.

``<run>/recipe.yaml`` (resolved), ``metrics.json``, ``report.json``, ``results.md``, ``checkpoint/`` and ``export/``.
Baselines and further seeds have directories of the same kind inside: ``baselines/lsq``, ``seeds/1``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.explain import explain
from fat_plugins.quantizer import named_quantizers
from fat_plugins.recipes.checkpoint import (
    Checkpoint,
    cpu_state,
    load_checkpoint,
    load_fitting,
    load_state,
    save_checkpoint,
    write_json,
    write_text,
)
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.deploy import Deployment, deploy, versions
from fat_plugins.recipes.hosts import Host, get_host
from fat_plugins.recipes.loader import dump_recipe
from fat_plugins.recipes.progress import Reporter
from fat_plugins.recipes.report import RunReport, VariantResult
from fat_plugins.recipes.schema import BaselineSection, Recipe
from fat_plugins.recipes.targets import Target
from fat_plugins.recipes.trainer import EpochRecord, evaluate, fit

FLOAT, LAST, BEST = "float", "last", "best"


def checkpoint_path(directory: Path, which: str) -> Path:
    """File of one checkpoint of a run: ``float``, ``last`` or ``best``."""
    return directory / "checkpoint" / f"{which}.safetensors"


def model_path(directory: Path, target: Target) -> Path:
    """The exported model of a run."""
    return directory / "export" / target.file


@contextmanager
def run_directory(directory: Path, overwrite: bool, say: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """Where a run may write. An earlier run in ``directory`` is replaced only when the new one is complete.

    :raises ConfigError: the directory is not empty and ``overwrite`` is not set, or it holds something else than a run.
    """
    directory = directory.resolve()
    try:
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"output {directory} is a file, expected a directory")
        occupied = directory.is_dir() and any(directory.iterdir())
        if not occupied:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise ConfigError(f"output {directory} cannot be written to")
            yield directory
            return
        if not overwrite:
            raise ConfigError(f"output {directory} is not empty: give another --output, or --overwrite to replace it")
        if not (directory / "recipe.yaml").is_file():
            raise ConfigError(f"output {directory} does not hold a run (no recipe.yaml): --overwrite refused")
        fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.new-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"output {directory} cannot be written to: {error.strerror or error}") from None
    try:
        yield fresh
    except BaseException:
        say(f"the earlier run in {directory} is untouched; the unfinished one is in {fresh}")
        raise
    fresh.chmod(directory.stat().st_mode)
    old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
    os.replace(directory, old)
    os.replace(fresh, directory)
    shutil.rmtree(old)


@dataclass
class _Context:
    """What all parts of one run share."""

    recipe: Recipe
    data: Data
    host: Host
    reporter: Reporter
    root: Path
    seed: int = 0

    def title(self, name: str) -> str:
        return f"{name}, seed {self.seed}" if len(self.recipe.seeds) > 1 else name


def train(
    recipe: Recipe,
    directory: Path,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> RunReport:
    """Run a recipe: float training, fine-tuning, export, verification, baselines, for every seed.

    :param directory: where everything goes; see :func:`run_directory`.
    :raises FatPluginsError: bad recipe, missing host or exporter, unwritable directory; found before any training.
    """
    reporter = reporter or Reporter(quiet=True)
    recipe.check()
    host = get_host(recipe.host)
    targets = recipe.export.targets if recipe.export is not None else []
    for wanted in targets:
        wanted.require()
    data = recipe.data.build()
    for variant in (None, *recipe.baselines):
        for stage in recipe.training.stages:
            host.check(recipe.config_for(variant, stage), data.example)
    with run_directory(directory, overwrite, reporter.say) as target, _threads(recipe.threads):
        write_text(target / "recipe.yaml", dump_recipe(recipe))
        context = _Context(recipe, data, host, reporter, target)
        results: list[VariantResult] = []
        for i, seed in enumerate(recipe.seeds):
            context.seed = seed
            results += _run_seed(context, target if i == 0 else target / "seeds" / str(seed))
        model = recipe.model.build(data)
        report = RunReport.collect(recipe, data.description, model, versions(host, targets), results)
        write_json(target / "report.json", report.to_dict())
        write_text(target / "results.md", report.to_markdown())
    return report


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sums depend on how they are split: a fixed number of threads makes runs comparable."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_seed(context: _Context, directory: Path) -> list[VariantResult]:
    """Float training once, then the recipe's algorithm and every baseline from the same float weights."""
    recipe, data = context.recipe, context.data
    torch.manual_seed(context.seed)
    model = recipe.model.build(data)
    history = fit(
        model,
        data,
        recipe.pretrain,
        batch_size=recipe.data.batch_size,
        seed=context.seed,
        reporter=context.reporter,
        title=context.title("float"),
    )
    accuracy = evaluate(model, data.test_loader())[1]
    metrics = {"seed": context.seed, "float": {"test_accuracy": accuracy, "epochs": [r.to_dict() for r in history]}}
    progress = {"variant": FLOAT, "seed": context.seed, "epoch": recipe.pretrain.epochs}
    save_checkpoint(
        checkpoint_path(directory, FLOAT),
        Checkpoint(
            cpu_state(model),
            recipe=recipe.model_dump(mode="json"),
            progress=progress,
            metrics={"test_accuracy": accuracy},
        ),
    )
    results = []
    for baseline in (None, *recipe.baselines):
        target = directory if baseline is None else directory / "baselines" / baseline.algorithm
        result, variant_metrics = _run_variant(context, model, baseline, target)
        result.float_accuracy = accuracy
        results.append(result)
        write_json(target / "metrics.json", {**metrics, "quantized": variant_metrics})
    return results


def _run_variant(
    context: _Context, float_model: nn.Module, baseline: BaselineSection | None, directory: Path
) -> tuple[VariantResult, dict[str, Any]]:
    recipe, data = context.recipe, context.data
    name = recipe.algorithm if baseline is None else baseline.algorithm
    state: dict[str, torch.Tensor] | None = None
    stages = []
    for i, stage in enumerate(recipe.training.stages):
        config = recipe.config_for(baseline, stage)
        torch.manual_seed(context.seed)
        controller, model = context.host.compress(
            deepcopy(float_model), config, data.calibration_loader(recipe.data.batch_size), data.example
        )
        if state is not None:
            load_fitting(model, carried(state, model, stage.carry))
        phase = recipe.phase(stage)
        keeper = _Keeper(context, directory, name, config, controller, model, i)
        records = fit(
            model,
            data,
            phase,
            batch_size=recipe.data.batch_size,
            seed=context.seed,
            controller=controller,
            reporter=context.reporter,
            title=context.title(name if len(recipe.training.stages) == 1 else f"{name}, stage {i + 1}"),
            on_epoch=keeper,
        )
        if not records:
            model.eval()
            keeper.save(LAST, {})
            keeper.save(BEST, {})
        state = cpu_state(model)
        stages.append({"stage": i, "epochs": [r.to_dict() for r in records]})
    which = recipe.export.checkpoint if recipe.export is not None else LAST
    if which == BEST:
        path = checkpoint_path(directory, BEST)
        load_state(model, load_checkpoint(path).state, str(path))
    accuracy = evaluate(model, data.test_loader())[1]
    result = VariantResult(name, context.seed, baseline is not None, accuracy)
    if recipe.export is not None:
        result.deployments = _deploy(context, name, model, directory)
    metrics = {"algorithm": name, "checkpoint": which, "test_accuracy": accuracy, "stages": stages}
    return result, metrics


def carried(state: dict[str, torch.Tensor], model: nn.Module, carry: str) -> dict[str, torch.Tensor]:
    """What the next stage of a bit progression takes: everything, or all but the quantizers' own state."""
    if carry == "all":
        return state
    own = tuple(f"{name}." for name, _ in named_quantizers(model))
    return {k: v for k, v in state.items() if not k.startswith(own)}


class _Keeper:
    """Writes ``last`` after every epoch and ``best`` when the validation loss is the lowest of the stage."""

    def __init__(
        self,
        context: _Context,
        directory: Path,
        name: str,
        config: dict[str, Any],
        controller: Any,
        model: nn.Module,
        stage: int,
    ) -> None:
        self.context, self.directory, self.name, self.config = context, directory, name, config
        self.controller, self.model, self.stage = controller, model, stage
        self.lowest = float("inf")

    def __call__(self, record: EpochRecord) -> None:
        self.save(LAST, record.to_dict())
        if record.validation_loss < self.lowest:
            self.lowest = record.validation_loss
            self.save(BEST, record.to_dict())

    def save(self, which: str, metrics: dict[str, Any]) -> None:
        progress = {
            "variant": self.name,
            "seed": self.context.seed,
            "stage": self.stage,
            "stages": len(self.context.recipe.training.stages),
            "epoch": metrics.get("epoch", -1) + 1,
        }
        checkpoint = Checkpoint(
            cpu_state(self.model),
            config=self.config,
            compression_state=self.context.host.compression_state(self.controller),
            recipe=self.context.recipe.model_dump(mode="json"),
            progress=progress,
            metrics=metrics,
        )
        save_checkpoint(checkpoint_path(self.directory, which), checkpoint)


def _deploy(context: _Context, name: str, model: nn.Module, directory: Path) -> list[Deployment]:
    export, data, done = context.recipe.export, context.data, []
    samples = data.test.tensors[0][: export.verify_samples] if export.verify else None
    frozen = context.host.freeze(model)
    for target in export.targets:
        path = model_path(directory, target)
        context.reporter.say(f"{context.title(name)}: {target.file}" + (", comparing codes" if export.verify else ""))
        deployment = deploy(target, frozen, path, data.example, data.test_loader(), samples)
        deployment.path = path.relative_to(context.root).as_posix()  # the directory may still be moved
        done.append(deployment)
    return done


@dataclass
class LoadedRun:
    """A trained model, read back from its run directory."""

    recipe: Recipe
    data: Data
    host: Host
    model: nn.Module
    checkpoint: Checkpoint


def _stored(directory: Path, which: str) -> tuple[Checkpoint, Recipe]:
    """A checkpoint of a run and the recipe in it."""
    if not directory.is_dir():
        raise CheckpointError(f"no run directory {directory}")
    path = checkpoint_path(directory, which)
    checkpoint = load_checkpoint(path)
    try:
        return checkpoint, Recipe.model_validate(checkpoint.recipe)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its recipe is not one of this version: {explain(error, Recipe)}") from None


def run_recipe(directory: Path, which: str | None = None) -> Recipe:
    """The recipe of a run; nothing is built. Parameters and errors are those of :func:`load_run`."""
    return _stored(directory, which or LAST)[1]


def load_run(directory: Path, which: str | None = None) -> LoadedRun:
    """Rebuild the trained model of a run.

    :param directory: a run, or one of its ``baselines/...`` or ``seeds/...`` directories.
    :param which: ``"last"`` or ``"best"``; default: the one that the recipe exports.
    :raises CheckpointError: no run there, or its checkpoint is damaged or belongs to another model.
    """
    if which is None:
        export = run_recipe(directory).export
        which = export.checkpoint if export is not None else LAST
    checkpoint, recipe = _stored(directory, which)
    recipe.check()
    data, host = recipe.data.build(), get_host(recipe.host)
    torch.manual_seed(0)
    _, model = host.compress(
        recipe.model.build(data),
        checkpoint.config,
        data.calibration_loader(recipe.data.batch_size),
        data.example,
        compression_state=checkpoint.compression_state,
    )
    load_state(model, checkpoint.state, str(checkpoint_path(directory, which)))
    return LoadedRun(recipe, data, host, model.eval(), checkpoint)
