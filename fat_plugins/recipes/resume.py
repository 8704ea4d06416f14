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
from fat_plugins.recipes.directory import REPORT, STATE
from fat_plugins.recipes.report import VariantResult, read_result
from fat_plugins.recipes.state import StateFile

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
    return _read(path) if path.is_file() and not (directory / STATE).exists() else None


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
        path = self.directory / "run.json"
        if self.writes:
            for unfinished in self.directory.parent.rglob(".*.tmp"):  # files that a kill left half-written
                unfinished.unlink(missing_ok=True)
        if not path.is_file():  # cut before anything was done
            return self.begin()
        found = _read(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not of this version of fat-plugins")
        for key, value in self.options.items():
            if found["options"].get(key) != value:
                raise ConfigError(f"--resume: {key} is {value}, the run was started with {found['options'].get(key)}")
        self.results = [result_from_dict(r) for r in found["results"]]
        self._training = self._file.load(self._say)

    def _write(self) -> None:
        if not self.writes:
            return
        results = [result_to_dict(r) for r in self.results]
        write_json(self.directory / "run.json", {"format": FORMAT, "options": self.options, "results": results})

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
            self._file.save({"seed": seed, "variant": name, **state})

    def close(self) -> None:
        """The run is complete."""
        if not self.writes:
            return
        done = self.directory.with_name(f".{STATE}.done")
        shutil.rmtree(done, ignore_errors=True)  # of a run that was cut here
        os.replace(self.directory, done)
        shutil.rmtree(done)
