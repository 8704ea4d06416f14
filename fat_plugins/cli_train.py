"""What ``fat-plugins train`` and ``demo`` do: options onto the recipe, processes, signals, logs, results."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import typer

from fat_plugins.errors import ConfigError, FatPluginsError
from fat_plugins.recipes import Options, Recipe, Reporter, RunReport, load_recipe
from fat_plugins.recipes import train as run
from fat_plugins.recipes.directory import RECIPE, no_run
from fat_plugins.recipes.imports import allowed
from fat_plugins.recipes.interrupt import Interrupted, Interrupts
from fat_plugins.recipes.logs import JsonLines, Log, TensorBoard
from fat_plugins.recipes.world import World, joined
from fat_plugins.report import PAGE, available, write_report


@dataclass(frozen=True)
class Settings:
    """What the command line said."""

    recipe: str | None
    output: Path | None = None
    epochs: int | None = None
    pretrain_epochs: int | None = None
    seeds: list[int] | None = None
    overwrite: bool = False
    quiet: bool = False
    resume: bool = False
    save_every: int | None = None
    max_steps: int | None = None
    device: str = "auto"
    log_json: Path | None = None
    tensorboard: Path | None = None
    changes: Sequence[str] = ()


def execute(settings: Settings) -> tuple[RunReport, Path] | None:
    """Train. Every process of a ``torchrun`` calls this.

    :return: report and directory of the run; ``None`` in all processes but the first.
    :raises FatPluginsError: one line.
    :raises Interrupted: a signal came.
    """
    with joined(settings.device) as world, _one_error(world):
        recipe, target = _planned(settings)
        interrupts, start = Interrupts(), perf_counter()
        with _reporting(settings, world) as reporter:
            options = Options(settings.resume, settings.save_every, max_steps=settings.max_steps)
            try:
                with interrupts.caught():
                    report = run(
                        recipe,
                        target,
                        overwrite=settings.overwrite,
                        reporter=reporter,
                        options=options,
                        world=world,
                        interrupts=interrupts,
                    )
            except Interrupted as stop:
                if world.main:
                    typer.echo(_how_to_go_on(stop, settings, world), err=True)
                raise
            if world.main:
                _write_report(target, reporter)
            reporter.say(f"done in {perf_counter() - start:.0f} s")
        return (report, target) if world.main else None


def _write_report(directory: Path, reporter: Reporter) -> None:
    """The page of the run, where its packages are installed."""
    if not available():
        return
    try:
        page, _ = write_report(directory)
    except Exception as error:  # the training is complete: whatever a plot does, its results stay
        reporter.say(f"no {PAGE}: {' '.join(str(error).split())}; try again with: fat-plugins report {directory}")
    else:
        reporter.say(f"report: {page}")


def _planned(settings: Settings) -> tuple[Recipe, Path]:
    """The recipe with what the command line changes in it, and the directory of the run."""
    name = settings.recipe
    if name is None:
        if not settings.resume or settings.output is None:
            raise ConfigError("train: which recipe? RECIPE may be left out only with --resume and --output")
        if not (settings.output / RECIPE).is_file():
            raise ConfigError(no_run(settings.output))
        name = str(settings.output / RECIPE)
    recipe = load_recipe(name, settings.changes)
    if settings.epochs is not None:
        recipe.training.epochs = settings.epochs
        for stage in recipe.training.stages:
            stage.epochs = None
    if settings.pretrain_epochs is not None:
        recipe.pretrain.epochs = settings.pretrain_epochs
    if settings.seeds:
        if len(set(settings.seeds)) != len(settings.seeds):
            raise ConfigError(f"--seed: {settings.seeds} repeat each other")
        recipe.seeds = list(settings.seeds)
    return recipe, settings.output or Path("runs") / recipe.name


@contextmanager
def _reporting(settings: Settings, world: World) -> Iterator[Reporter]:
    logs: list[Log] = []
    if world.main and settings.log_json is not None:
        logs.append(JsonLines(settings.log_json))
    if world.main and settings.tensorboard is not None:
        logs.append(TensorBoard(settings.tensorboard))
    reporter = Reporter(settings.quiet or not world.main, logs=logs)
    try:
        yield reporter
    finally:
        reporter.close()


@contextmanager
def _one_error(world: World) -> Iterator[None]:
    """Of several processes, the first that fails tells the user; the others fail too, and end silently."""
    try:
        yield
    except (Interrupted, typer.Exit):
        raise
    except Exception as error:
        if world.size == 1:
            raise
        if not world.first_to_fail(error):
            raise typer.Exit(2) from None
        if isinstance(error, FatPluginsError):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if world.is_loss(error):  # without the place in torch's sources and its advice
            what = re.sub(r"\w+: (\[[^]]*\] )?", "", what, count=1).split(". ")[0]
            what = f"another process is lost ({what}); go on with --resume and as many processes"
        raise FatPluginsError(f"process {world.rank} of {world.size}: {what}") from error


def _how_to_go_on(stop: Interrupted, settings: Settings, world: World) -> str:
    if stop.directory is None:
        return "interrupted: nothing was trained yet"
    program = "fat-plugins" if world.size == 1 else f"torchrun --nproc-per-node {world.size} -m fat_plugins"
    more = "" if settings.max_steps is None else f" --max-steps {settings.max_steps}"
    more += "".join(f" --allow-import {module}" for module in allowed())
    return f"interrupted: go on with: {program} train --resume --output {shlex.quote(str(stop.directory))}{more}"


def show(report: RunReport, target: Path, console: Any) -> bool:
    """Print the results; returns whether all codes are equal."""
    for table in report.tables(console.width):
        console.print(table)
    for key, value in report.facts.items():
        console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Run directory: {target}", markup=False, highlight=False, soft_wrap=True)
    for result in report.results:
        for deployment in result.deployments:
            if deployment.verified is False:
                what = f"{result.algorithm}, seed {result.seed}, {deployment.path}"
                print(f"failed: {what}: codes differ first in {deployment.first_difference}", file=sys.stderr)
    return report.verified
