"""How far a run is: which variants are finished, and the state of the training that was cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fat_plugins.errors import CheckpointError, ConfigError
from fat_plugins.files import MAX_RESULTS, parse_json, read_text
from fat_plugins.recipes.checkpoint import write_json
from fat_plugins.recipes.directory import RECIPE, REPORT, STATE
from fat_plugins.recipes.report import VariantResult, read_result
from fat_plugins.recipes.state import StateFile, previous_of

FORMAT = 1


def result_to_dict(result: VariantResult) -> dict[str, Any]:
    """JSON-ready, as in ``report.json``."""
    return {**asdict(result), "deployments": [d.to_dict() for d in result.deployments]}


def result_from_dict(data: dict[str, Any]) -> VariantResult:
    """Inverse of :func:`result_to_dict`.

    :raises CheckpointError: the dictionary is no result.
    """
    return read_result(data, "the results of the run")


def finished_run(directory: Path) -> dict[str, Any] | None:
    """``report.json`` of a run that is complete, else ``None``.

    :raises CheckpointError: it is damaged.
    """
    path = directory / REPORT
    if not path.is_file() or (directory / STATE).exists():
        return None
    shutil.rmtree(_done(directory), ignore_errors=True)  # a kill left it in the last moment
    return _read(path)


def _done(directory: Path) -> Path:
    """Where the state of a run goes, in one move, when it is complete."""
    return directory / f".{STATE}.done"


def _read(path: Path) -> Any:
    return parse_json(read_text(path, error=CheckpointError, limit=MAX_RESULTS), str(path), CheckpointError)


class RunState:
    """The directory ``state`` of a run that is not complete.

    ``run.json`` holds how it was started and the results of finished variants, ``training.safetensors`` the training
    that is going on. Nothing is left of it when the run is complete.

    :param options: what has to be the same when the run goes on, by the name that the user knows.
    :param writes: whether this process writes the files.
    """

    def __init__(self, directory: Path, options: dict[str, Any], say: Callable[[str], None], writes: bool) -> None:
        self.directory, self.options, self._say, self.writes = directory / STATE, options, say, writes
        self.results: list[VariantResult] = []
        self._file = StateFile(self.directory / "training.safetensors")
        self._run, self._damaged = self.directory / "run.json", False
        self._training: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """File of the training that is going on."""
        return self._file.path

    def begin(self) -> None:
        """A run starts from nothing."""
        self._write()

    def resume(self) -> None:
        """A run goes on.

        :raises ConfigError: it was started with other options.
        :raises CheckpointError: the state is damaged.
        """
        if self.writes:
            for unfinished in self.directory.parent.rglob(".*.tmp"):  # files that a kill left half-written
                unfinished.unlink(missing_ok=True)
        found = self._started()
        if found is None:  # cut before anything was done
            return self.begin()
        for key, value in self.options.items():
            if found["options"].get(key) != value:
                raise ConfigError(f"--resume: {key} is {value}, the run was started with {found['options'].get(key)}")
        self.results = [result_from_dict(r) for r in found["results"]]
        self._training = self._file.load(self._say)

    def _started(self) -> dict[str, Any] | None:
        """What ``run.json`` says, or the one before it: with that, an algorithm at most is trained again.

        :return: ``None`` when there is neither.
        :raises CheckpointError: none of them is readable.
        """
        error = None
        for path in (self._run, previous_of(self._run)):
            if not path.exists():
                continue
            try:
                found = _read(path)
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    raise CheckpointError(f"{path}: not of this version of fat-plugins")
                if not isinstance(found.get("options"), dict) or not isinstance(found.get("results"), list):
                    raise CheckpointError(f"{path}: its options or results are missing")
            except CheckpointError as problem:
                error = error or problem
                continue
            if error is not None:
                self._damaged = True
                self._say(f"warning: {error}; going on from the one before it")
            return found
        if error is not None:
            raise error
        return None

    def _write(self) -> None:
        if not self.writes:
            return
        self.require()
        data = {"format": FORMAT, "options": self.options, "results": [result_to_dict(r) for r in self.results]}
        write_json(self._run, data, keep=None if self._damaged else previous_of(self._run))
        self._damaged = False

    def require(self) -> None:
        """Before anything is written: a directory that was taken away must not come back without what was in it.

        :raises CheckpointError: the run's directory is gone.
        """
        root = self.directory.parent
        if not (root / RECIPE).is_file():
            raise CheckpointError(f"{root}: the directory of the run is gone, or its {RECIPE}: nothing more is written")

    def result(self, seed: int, name: str) -> VariantResult | None:
        """Result of a variant that is finished."""
        return next((r for r in self.results if (r.seed, r.algorithm) == (seed, name)), None)

    def add(self, result: VariantResult) -> None:
        """A variant is finished."""
        self.results.append(result)
        self._write()

    def peek(self, seed: int, name: str) -> dict[str, Any] | None:
        """State of the training of this variant, if that is what was cut."""
        found = self._training
        return found if found is not None and (found["seed"], found["variant"]) == (seed, name) else None

    def take(self, seed: int, name: str) -> dict[str, Any] | None:
        """The same, handed out once: what follows it starts from nothing."""
        found = self.peek(seed, name)
        if found is not None:
            self._training = None
        return found

    def save(self, seed: int, name: str, state: dict[str, Any]) -> None:
        """Keep the state of the training of a variant, and the one before."""
        if self.writes:
            self.require()
            self._file.save({"seed": seed, "variant": name, **state})

    def close(self) -> None:
        """The run is complete."""
        if not self.writes:
            return
        done = _done(self.directory.parent)
        shutil.rmtree(done, ignore_errors=True)  # of a run that was cut here
        os.replace(self.directory, done)
        shutil.rmtree(done)
