"""Command line ``fat-plugins``. Exit codes: 0 fine, 1 a check failed, 2 bad input or a missing part."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fat_plugins.errors import ConfigError, FatPluginsError

# fat_plugins.recipes is imported where it is needed: `--help` and `algorithms` stay quick

OK, FAILED, BAD_INPUT = 0, 1, 2

app = typer.Typer(
    name="fat-plugins",
    help="Low-bit quantization-aware training: train recipes, export to OpenVINO, QONNX and ONNX, "
    "prove that codes are equal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_state = {"debug": False}


def _version(show: bool) -> None:
    if show:
        from fat_plugins import __version__

        typer.echo(f"fat-plugins {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    _state["debug"] = debug


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors raised on purpose become one line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (FatPluginsError, OSError) as error:
            if _state["debug"]:
                traceback.print_exc()
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(BAD_INPUT) from None

    return run


def _console() -> Console:
    # a pipe or a file has no width of its own: do not fold tables there
    return Console() if sys.stdout.isatty() else Console(width=200)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run; it stays until the new one is complete.")
]
Which = Annotated[
    str | None, typer.Option("--checkpoint", help="'last' or 'best'; default: the one that the recipe names.")
]
Format = Annotated[
    str | None, typer.Option("--format", "-f", help="openvino, qonnx or onnx; default: what the recipe names.")
]
Bits = Annotated[
    int | None, typer.Option("--bits", help="Of a model of several bit widths another one than the recipe's.")
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="Let the recipe run functions of this module or package of yours; repeatable."),
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Directory of a run, e.g. runs/demo or runs/demo/baselines/lsq.")
]


@app.command()
@_one_line_errors
def algorithms(as_json: Json = False) -> None:
    """List the algorithms: paper, bit widths, and how faithful the implementation is."""
    from fat_plugins.registry import algorithms as registered

    rows = [
        {
            "name": a.name,
            "title": a.title,
            "paper": a.paper,
            "arxiv": a.arxiv,
            "weight_bits": list(a.weight_bits),
            "activation_bits": list(a.activation_bits),
            "fidelity": a.fidelity,
        }
        for a in registered().values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(show_lines=True)
    for column in ("name", "title", "paper", "arXiv", "weights", "activations", "fidelity"):
        table.add_column(column, overflow="fold")
    for r in rows:
        weights, activations = (f"{low} to {high} bit" for low, high in (r["weight_bits"], r["activation_bits"]))
        table.add_row(r["name"], r["title"], r["paper"], r["arxiv"] or "-", weights, activations, r["fidelity"])
    _console().print(table)


@app.command()
@_one_line_errors
def rewrites(as_json: Json = False) -> None:
    """List the rewrites: what a recipe can do to the float network before quantizers are placed."""
    from fat_plugins.rewrites import rewrites as registered

    _list(registered(), as_json)


@app.command()
@_one_line_errors
def penalties(as_json: Json = False) -> None:
    """List the penalties: what a recipe can add to a loss to prepare for quantization."""
    from fat_plugins.penalties import penalties as registered

    _list(registered(), as_json)


def _list(classes: dict[str, Any], as_json: bool) -> None:
    """What classes by name say about their papers, as a table or JSON."""
    rows = [{k: getattr(c, k) for k in ("name", "title", "paper", "arxiv", "fidelity")} for c in classes.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "title", "paper", "arXiv", "fidelity", show_lines=True)
    for row in rows:
        table.add_row(*(value or "-" for value in row.values()))
    _console().print(table)


Seeds = Annotated[list[int] | None, typer.Option("--seed", min=0, help="Seed; give it again for more.")]
Epochs = Annotated[int | None, typer.Option(min=0, help="Fine-tuning epochs, of every stage.")]
PretrainEpochs = Annotated[int | None, typer.Option(min=0, help="Epochs of float training.")]


@app.command()
@_one_line_errors
def recipes(as_json: Json = False) -> None:
    """List the recipes that come with the package; each is trained by its name."""
    from fat_plugins.recipes.loader import list_recipes

    rows = list_recipes()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for column in ("name", "about"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(row["name"], row["about"])
    _console().print(table)


@app.command()
@_one_line_errors
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe; not with --resume."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run directory; default: runs/<name>.")] = None,
    epochs: Epochs = None,
    pretrain_epochs: PretrainEpochs = None,
    seed: Seeds = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. data.params.root=/data; repeatable."),
    ] = None,
    allow_import: AllowImport = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the directory, exactly.")] = False,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Save the state this often, beside every epoch and 5 minutes."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of every phase at most, to try a recipe out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto: cuda if there is one.")] = "auto",
    log_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append events and epochs to FILE, one JSON object per line.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write curves for TensorBoard, which must be installed.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a recipe: float, quantized, baselines; then export, verify and report.

    On several devices: torchrun --nproc-per-node N -m fat_plugins train RECIPE.
    """
    from fat_plugins.cli_train import Settings

    _allow(allow_import)
    _train(
        Settings(
            recipe, output, epochs, pretrain_epochs, seed, overwrite, quiet, resume, save_every, max_steps, device,
            log_json, tensorboard, changes or [],
        )
    )  # fmt: skip


@app.command()
@_one_line_errors
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")] = Path("runs/demo"),
    seed: Seeds = None,
    epochs: Epochs = None,
    pretrain_epochs: PretrainEpochs = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """The main job on real handwritten digits: FAT and LSQ at 4 bits, exported and verified, in about two minutes."""
    from fat_plugins.cli_train import Settings

    _train(Settings("digits_fat_w4a4", output, epochs, pretrain_epochs, seed, overwrite, quiet))


def _train(settings: Any) -> None:
    from fat_plugins.cli_train import execute, show
    from fat_plugins.recipes.interrupt import Interrupted

    try:
        done = execute(settings)
    except Interrupted as stop:
        raise typer.Exit(128 + stop.signal) from None
    if done is not None and not show(*done, _console()):
        raise typer.Exit(FAILED)


@app.command()
@_one_line_errors
def export(
    run: Run,
    format: Format = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="One file, its suffix may name the format; default: below RUN/export."),
    ] = None,
    bits: Bits = None,
    checkpoint: Which = None,
    allow_import: AllowImport = None,
) -> None:
    """Write the deployed model of a run again, from its checkpoint."""
    from fat_plugins.recipes import model_path
    from fat_plugins.recipes.directory import check_inside

    _allow(allow_import)
    loaded, targets = _load(run, checkpoint, format, output, bits)
    frozen = loaded.host.freeze(loaded.model)
    for target in targets:
        path = output or model_path(run, target, bits)
        if output is None:
            check_inside(run, path)
            path.parent.mkdir(parents=True, exist_ok=True)
        report = target.export(frozen, path, loaded.data.example)
        if target.packed:
            ratio = report.float_bytes / report.weights_bytes
            typer.echo(f"{path}: weights {report.weights_bytes:,} B, {ratio:.2f} times smaller than float32")
        else:
            typer.echo(f"{path}: {target.size(path):,} B, for {target.runtime}")
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)


@app.command()
@_one_line_errors
def verify(
    run: Run,
    format: Format = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="One file, its suffix may name the format; default: all below RUN/export."),
    ] = None,
    bits: Bits = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Test images to use; default: the recipe's.")] = None,
    checkpoint: Which = None,
    allow_import: AllowImport = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one report, or of several files one per name.")
    ] = False,
) -> None:
    """Compare integer codes between torch and the exported model, layer by layer. Exit code 1 if any differ."""
    from fat_plugins.recipes import model_path

    _allow(allow_import)
    loaded, targets = _load(run, checkpoint, format, model, bits)
    settings = loaded.recipe.export
    count = samples or (settings.verify_samples if settings is not None else 64)
    frozen, images = loaded.host.freeze(loaded.model), loaded.data.images("test", count)[0]
    reports = {}
    for target in targets:
        path = model or model_path(run, target, bits)
        reports[path.name] = target.verify(frozen, path, images)
    if as_json:
        data = {name: report.to_dict() for name, report in reports.items()}
        typer.echo(json.dumps(data if len(data) > 1 else next(iter(data.values())), indent=2))
    else:
        for report in reports.values():
            _console().print(report.to_table())
    failed = {name: report for name, report in reports.items() if not report.ok}
    for name, report in failed.items():
        where = f"{name}: " if len(reports) > 1 else ""
        typer.echo(f"failed: {where}codes differ first in {report.first_difference}", err=True)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
@_one_line_errors
def report(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; default: RUN/report.html.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Its data; default: beside it, NAME_data.json.")
    ] = None,
    checkpoint: Which = None,
    allow_import: AllowImport = None,
) -> None:
    """Write the report of a run: one HTML page that needs nothing else, and its data as JSON."""
    from fat_plugins.report import write_report

    _allow(allow_import)
    for path in write_report(run, output, as_json, _which(checkpoint)):
        typer.echo(path)


@app.command()
@_one_line_errors
def summary(run: Run, checkpoint: Which = None, as_json: Json = False, allow_import: AllowImport = None) -> None:
    """What is quantized in the trained model of a run, and how, layer by layer."""
    from fat_plugins.inspect import summary as summarize
    from fat_plugins.recipes import load_run

    _allow(allow_import)
    found = summarize(load_run(run, _which(checkpoint)).model)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _console().print(found)


def _allow(modules: list[str] | None) -> None:
    from fat_plugins.recipes.imports import allow

    allow(*modules or ())


def _load(
    run: Path, checkpoint: str | None, format: str | None, path: Path | None, bits: int | None
) -> tuple[Any, list[Any]]:
    """The trained model of a run, at a width, and the targets that a command means, all of them installed."""
    from fat_plugins.recipes import load_run, run_recipe
    from fat_plugins.recipes.schema import ExportSection
    from fat_plugins.recipes.targets import choose
    from fat_plugins.switching import set_active_bits

    which = _which(checkpoint)
    settings = run_recipe(run, which).export or ExportSection()
    targets = choose(settings.format, format, path)
    for target in targets:  # before the model is rebuilt, which takes its time
        target.require()
    loaded = load_run(run, which)
    if bits is not None:
        set_active_bits(loaded.model, bits)
    return loaded, targets


def _which(checkpoint: str | None) -> str | None:
    if checkpoint not in (None, "last", "best"):
        raise ConfigError(f"--checkpoint: unknown checkpoint {checkpoint!r}; allowed: last, best")
    return checkpoint


@app.command()
@_one_line_errors
def convert(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="A config of NNCF 2 with a quantization section.")],
    algorithm: Annotated[str, typer.Option("--algorithm", "-a", help="See 'fat-plugins algorithms'.")] = "fat",
    weight_bits: Annotated[int | None, typer.Option(help="Width of weights; default: as in OLD.json.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Width of activations; default: as in OLD.json.")] = None,
    nncf: Annotated[
        int | None, typer.Option(help="3: leave out what NNCF 3 refuses; default: keep and say it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: print the new config.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the new config and a line for each key.")
    ] = False,
) -> None:
    """Rewrite an NNCF 2 quantization config for an algorithm; say what was carried, changed and dropped."""
    from fat_plugins.config import read_config
    from fat_plugins.convert import convert as rewrite
    from fat_plugins.recipes.checkpoint import write_text

    if output is not None and output.exists() and not overwrite:
        raise ConfigError(f"--output: {str(output)!r} exists; --overwrite replaces it")
    result = rewrite(read_config(old), algorithm, weight_bits=weight_bits, activation_bits=activation_bits, nncf=nncf)
    text = json.dumps(result.config, indent=4)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        typer.echo(result.to_text(), err=output is None)
        if output is None:  # the config alone on standard output, for a pipe
            typer.echo(text)


def main() -> None:
    """Entry point."""
    try:
        app()
    except SystemExit as end:
        if not end.code or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # what one of several processes holds of gloo may wait for a lost one, for hours, when it is freed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else FAILED)


if __name__ == "__main__":
    main()
