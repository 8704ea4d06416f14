"""The directory of a run: what stands where in it, and how an earlier run in it is replaced or gone on with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fat_plugins.errors import ConfigError
from fat_plugins.recipes.loader import load_recipe
from fat_plugins.recipes.schema import Recipe
from fat_plugins.recipes.targets import Target

FLOAT, LAST, BEST = "float", "last", "best"
RECIPE, REPORT, STATE = "recipe.yaml", "report.json", "state"


def checkpoint_path(directory: Path, which: str) -> Path:
    """File of one checkpoint of a run: ``float``, ``last`` or ``best``."""
    return directory / "checkpoint" / f"{which}.safetensors"


def model_path(directory: Path, target: Target, bits: int | None = None) -> Path:
    """The exported model of a run; of a run at several widths, with ``bits``, that of another width."""
    folder = directory / "export"
    return (folder if bits is None else folder / f"{bits}_bits") / target.file


def check_inside(directory: Path, *paths: Path) -> None:
    """Refuse to write below a run's directory where a link leads out of it.

    :param paths: of files or folders that are going to be written.
    :raises ConfigError: names the path and where it leads.
    """
    try:
        root = directory.resolve()
        for path in paths:
            real = path.parent.resolve()
            if not real.is_relative_to(root):
                raise ConfigError(f"{path}: leads out of the run's directory, to {real}: nothing is written there")
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ConfigError(f"{directory}: {error}") from None


@contextmanager
def run_directory(directory: Path, overwrite: bool, say: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """Where a run may write. An earlier run in ``directory`` is replaced only when the new one is complete.

    :raises ConfigError: the directory is not empty and ``overwrite`` is not set, or it holds something else than a run.
    """
    directory = directory.resolve()
    try:
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"output {directory} is a file, expected a directory")
        occupied = directory.is_dir() and not all(map(_left_by_a_kill, directory.iterdir()))
        if not occupied:
            directory.mkdir(parents=True, exist_ok=True)
            for unfinished in directory.iterdir():
                unfinished.unlink()
            if not os.access(directory, os.W_OK | os.X_OK):
                raise ConfigError(f"output {directory} cannot be written to")
        elif not overwrite:
            raise ConfigError(f"output {directory} is not empty: give another --output, or --overwrite to replace it")
        elif not (directory / RECIPE).is_file():
            raise ConfigError(f"output {directory} does not hold a run (no {RECIPE}): --overwrite refused")
        else:
            fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.new-", dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"output {directory} cannot be written to: {error.strerror or error}") from None
    if not occupied:
        yield directory
        return
    try:
        yield fresh
    except BaseException:
        say(f"the earlier run in {directory} is untouched; the unfinished one is in {fresh}")
        raise
    fresh.chmod(directory.stat().st_mode)
    old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
    try:
        os.replace(directory, old)
        try:
            os.replace(fresh, directory)
        except OSError:
            os.replace(old, directory)
            raise
    except OSError as error:
        raise ConfigError(
            f"output {directory} cannot be replaced: {error.strerror or error}; the complete new run is in {fresh}"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _left_by_a_kill(path: Path) -> bool:
    """Whether this is the recipe of a run that was killed while it was written, before everything else."""
    return path.is_file() and path.name.startswith(f".{RECIPE}.") and path.name.endswith(".tmp")


def no_run(directory: Path) -> str:
    """What to say of a directory without a run, for ``--resume``."""
    try:
        beside = sorted(p for p in directory.resolve().parent.glob(f".{directory.name}.*-*") if (p / RECIPE).is_file())
    except OSError:
        beside = []
    hint = f"; one that was to replace it, or was replaced, is in {beside[0]}" if beside else ""
    return f"--resume: {directory} holds no run (no {RECIPE}); start one without --resume{hint}"


def resumed_directory(directory: Path, recipe: Recipe) -> Path:
    """The directory of a run that is to go on.

    :raises ConfigError: there is no run in it, or one of another recipe; names the first key that differs.
    """
    stored = directory / RECIPE
    if not stored.is_file():
        raise ConfigError(no_run(directory))
    before, now = (r.model_dump(mode="json") for r in (load_recipe(stored), recipe))
    found = _first_difference(before, now)
    if found is not None:
        key, old, new = found
        raise ConfigError(f"--resume: {key} is {_short(new)}, the run in {directory} was started with {_short(old)}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"output {directory} cannot be written to")
    folders = ("checkpoint", "export", STATE, "baselines/x", "seeds/x")
    check_inside(directory, *(directory / folder / "x" for folder in folders))
    for part in (*directory.glob("baselines/*"), *directory.glob("seeds/*"), *directory.glob("seeds/*/baselines/*")):
        check_inside(directory, *(part / folder / "x" for folder in folders[:3]))
    return directory.resolve()


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


def _first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Key path and both values, in the order of the keys."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{path}.{k}" if path else str(k), old.get(k, _Absent()), new.get(k, _Absent())) for k in old | new]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (path, old, new)
    found = (_first_difference(a, b, where) for where, a, b in pairs)
    return next((f for f in found if f is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
