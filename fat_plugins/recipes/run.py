"""A recipe from beginning to end, and the directory that holds what came out.

``<run>/recipe.yaml`` (resolved), ``metrics.json``, ``report.json``, ``results.md``, ``checkpoint/`` and ``export/``.
Baselines and further seeds have directories of the same kind inside: ``baselines/lsq``, ``seeds/1``. Until the run is
complete, ``state/`` holds what it takes to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat_plugins.errors import ConfigError
from fat_plugins.kernels import using_backend
from fat_plugins.recipes.checkpoint import (
    Checkpoint,
    cpu_state,
    load_checkpoint,
    load_state,
    save_checkpoint,
    write_json,
    write_text,
)
from fat_plugins.recipes.data import Data
from fat_plugins.recipes.deploy import Deployment, deploy, versions
from fat_plugins.recipes.directory import (
    BEST,
    FLOAT,
    LAST,
    RECIPE,
    REPORT,
    checkpoint_path,
    model_path,
    resumed_directory,
    run_directory,
)
from fat_plugins.recipes.hosts import get_host
from fat_plugins.recipes.interrupt import Interrupted, Interrupts
from fat_plugins.recipes.loader import dump_recipe
from fat_plugins.recipes.loading import lost_workers_told
from fat_plugins.recipes.models import check_fit
from fat_plugins.recipes.parts import parts_of
from fat_plugins.recipes.penalty import try_penalties
from fat_plugins.recipes.progress import Reporter
from fat_plugins.recipes.report import RunReport, VariantResult
from fat_plugins.recipes.resume import RunState, finished_run, result_from_dict, result_to_dict
from fat_plugins.recipes.rewriting import rewritten
from fat_plugins.recipes.schema import BaselineSection, Recipe
from fat_plugins.recipes.sealed import contents_of
from fat_plugins.recipes.state import seed_everything
from fat_plugins.recipes.tasks import CLASSIFICATION, Task
from fat_plugins.recipes.trainer import evaluate
from fat_plugins.recipes.variant import Context, Options, Variant
from fat_plugins.recipes.world import World
from fat_plugins.switching import each_width


def train(
    recipe: Recipe,
    directory: Path,
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    options: Options | None = None,
    world: World | None = None,
    interrupts: Interrupts | None = None,
) -> RunReport:
    """Run a recipe: float training, fine-tuning, export, verification, baselines, for every seed.

    :param directory: where everything goes; see :func:`run_directory`.
    :param overwrite: replace an earlier run; it stays until the new one is complete.
    :param world: the processes that train together; default: this one, on the CPU.
    :param interrupts: of the caller that catches signals.
    :raises FatPluginsError: bad recipe, missing host or exporter, unwritable directory; found before any training.
    :raises Interrupted: a signal came; ``directory`` of it says where the run can go on.
    """
    options, world = options or Options(), world or World()
    reporter = reporter or Reporter(quiet=True)
    if options.resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    recipe.check()
    if options.resume and (done := finished_run(resumed_directory(directory, recipe))) is not None:
        reporter.say(f"the run in {directory} is complete: nothing is left to do")
        return _collected(recipe, recipe.data.build(), done["versions"], [result_from_dict(r) for r in done["results"]])
    host = get_host(recipe.host)
    targets = recipe.export.targets if recipe.export is not None else []
    for wanted in targets:
        wanted.require()
    data = recipe.data.build()
    check_fit(recipe.model.build(data), recipe.model.name, data.example, data.output_shape)
    check_task(data.task, recipe)
    for variant in (None, *recipe.baselines):
        for stage in recipe.training.stages:
            host.check(recipe.config_for(variant, stage), data.example)
    try_penalties(recipe, host, data)
    with (
        _directory(recipe, directory, overwrite, options, world, reporter) as target,
        _threads(recipe.threads),
        using_backend(recipe.backend),
    ):
        own = {"--max-steps": options.max_steps, "number of processes": world.size}
        state = RunState(target, own, reporter.say, writes=world.main)
        context = Context(recipe, data, host, reporter, target, state, options, world, interrupts or Interrupts())
        if options.resume:
            with contents_of(str(state.path.with_name("run.json"))):
                state.resume()
        else:
            if world.main:
                write_text(target / RECIPE, dump_recipe(recipe))
            state.begin()
        reporter.event("start", recipe=recipe.name, directory=str(target), resumed=options.resume, seeds=recipe.seeds)
        try:
            with lost_workers_told():
                for i, seed in enumerate(recipe.seeds):
                    context.seed = seed
                    _run_seed(context, target if i == 0 else target / "seeds" / str(seed))
        except BaseException as error:
            stop = error if isinstance(error, Interrupted) else context.interrupts.swallowed()
            reporter.event("end", status="failed" if stop is None else "interrupted")
            if stop is None:
                raise
            stop.directory = target
            raise stop from None
        report = _collected(recipe, data, versions(host, targets), state.results)
        if world.main:
            write_json(target / REPORT, report.to_dict())
            write_text(target / "results.md", report.to_markdown())
        state.close()
        reporter.about = {}
        reporter.event("end", status="complete", verified=report.verified)
    return report


def check_task(task: Task, recipe: Recipe) -> None:
    """Refuse settings of the training that belong to another task than that of the data.

    :raises ConfigError: one line with the key.
    """
    for place, section in (("pretrain", recipe.pretrain), ("training", recipe.training)):
        joint = getattr(section, "joint", None)
        distillation = getattr(section, "distillation", None) is not None or (joint is not None and joint.alpha > 0)
        try:
            task.check_training(smoothing=float(section.label_smoothing), distillation=distillation)
        except ConfigError as error:
            raise ConfigError(f"{place}.{error}") from None


def _collected(recipe: Recipe, data: Data, found: dict[str, str], results: list[VariantResult]) -> RunReport:
    return RunReport.collect(recipe, data.description, recipe.model.build(data), found, results, data.task)


@contextmanager
def _directory(
    recipe: Recipe, directory: Path, overwrite: bool, options: Options, world: World, reporter: Reporter
) -> Iterator[Path]:
    """Where the run writes: the first process sees to it."""
    if options.resume:
        yield resumed_directory(directory, recipe)
    elif world.main:
        with run_directory(directory, overwrite, reporter.say) as target:
            world.tell(str(target))
            yield target
    else:
        yield Path(world.tell())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sums depend on how they are split: a fixed number of threads makes runs comparable."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_seed(context: Context, directory: Path) -> None:
    """Float training once, then the recipe's algorithm and every baseline from the same float weights."""
    recipe, data, left = context.recipe, context.data, []
    for baseline in (None, *recipe.baselines):
        name = recipe.algorithm if baseline is None else baseline.algorithm
        if context.state.result(context.seed, name) is None:
            left.append((name, baseline))
    if not left:
        return
    model, metrics = _float_model(context, checkpoint_path(directory, FLOAT))
    for name, baseline in left:
        target = directory if baseline is None else directory / "baselines" / name
        result, quantized = _run_variant(context, model, name, baseline, target)
        result.float_accuracy = metrics["test_accuracy"]
        if context.world.main:
            told = {} if data.task.name == CLASSIFICATION.name else {"task": data.task.name}
            write_json(
                target / "metrics.json", {"seed": context.seed, **told, "float": metrics, "quantized": quantized}
            )
        context.state.add(result)
        files = [{"format": d.format, "accuracy": d.accuracy, "verified": d.verified} for d in result.deployments]
        context.reporter.about = {"variant": name, "seed": context.seed}
        context.reporter.event("result", test_accuracy=result.accuracy, deployments=files)


def _float_model(context: Context, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The float model of a seed and its metrics: from its checkpoint if an earlier run finished it, else trained."""
    recipe, data, world = context.recipe, context.data, context.world
    seed_everything(context.seed)
    if world.tell(path.is_file()):  # of a run that goes on: any other has an empty directory
        model = recipe.model.build(data).to(world.device)
        stored = load_checkpoint(path)
        load_state(model, stored.state, str(path))
        return model.eval(), stored.metrics
    model = recipe.model.pretrained(data).to(world.device)
    parts = parts_of(recipe.pretrain, model)
    trainer = context.trainer(model, recipe.pretrain, FLOAT, FLOAT, dict, parts=parts)
    saved = context.state.take(context.seed, FLOAT)
    if saved is not None:
        trainer.load_state_dict(saved["trainer"], str(context.state.path))
    history = [r.to_dict() for r in trainer.run()]
    metrics = {"test_accuracy": evaluate(model, data.test_loader(), world, data.task)[1], "epochs": history}
    progress = {"variant": FLOAT, "seed": context.seed, "epoch": len(history)}
    if world.main:
        stored = Checkpoint(cpu_state(model), recipe=recipe.model_dump(mode="json"), progress=progress, metrics=metrics)
        save_checkpoint(path, stored)
    return model, metrics


def _run_variant(
    context: Context, float_model: nn.Module, name: str, baseline: BaselineSection | None, directory: Path
) -> tuple[VariantResult, dict[str, Any]]:
    """All stages of one algorithm, then what is deployed; finished results come back as metrics."""
    recipe, data, world = context.recipe, context.data, context.world
    variant = Variant(context, name, baseline, directory)
    float_model, changes = rewritten(float_model, recipe.rewrites_for(baseline), data.example.to(world.device))
    for change in changes:
        context.reporter.say(f"{context.title(name)}: {change}")
    variant.rewrites = [change.to_dict() for change in changes]
    saved = context.state.peek(context.seed, name)
    first = 0
    if saved is not None:
        first, variant.done = saved["stage"], saved["done"]
    state = None
    for number in range(first, len(recipe.training.stages)):
        model = variant.stage(number, float_model, state)
        state = cpu_state(model)
    which = recipe.export.checkpoint if recipe.export is not None else LAST
    if which == BEST:
        path = checkpoint_path(directory, BEST)
        world.tell()  # the first process has written it
        load_state(model, load_checkpoint(path).state, str(path))
    accuracy = evaluate(model, data.test_loader(), world, data.task)[1]
    at_each = {
        str(b): evaluate(model, data.test_loader(), world, data.task)[1] for b in each_width(model) if b is not None
    }
    result = VariantResult(name, context.seed, baseline is not None, accuracy, widths=at_each)
    if world.main and recipe.export is not None:
        result.deployments = _deploy(context, name, model.cpu(), directory)
    told = world.tell(result_to_dict(result))
    if not world.main:
        result = result_from_dict(told)
    metrics = {"algorithm": name, "checkpoint": which, "test_accuracy": accuracy, "stages": variant.done}
    if variant.rewrites:
        metrics["rewrites"] = variant.rewrites
    return result, metrics


def _deploy(context: Context, name: str, model: nn.Module, directory: Path) -> list[Deployment]:
    export, data, done = context.recipe.export, context.data, []
    samples = data.images("test", export.verify_samples)[0] if export.verify else None
    frozen = context.host.freeze(model)
    for target in export.targets:
        path = model_path(directory, target)
        context.reporter.say(f"{context.title(name)}: {target.file}" + (", comparing codes" if export.verify else ""))
        deployment = deploy(target, frozen, path, data.example, data.test_loader(), samples, data.task)
        deployment.path = path.relative_to(context.root).as_posix()  # the directory may still be moved
        done.append(deployment)
    return done
