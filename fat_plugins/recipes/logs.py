"""Where the numbers of a run go beside the terminal: a file of JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from fat_plugins.errors import ConfigError


class Log(Protocol):
    """Receives every event of a run."""

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """:param kind: ``start``, ``before_training``, ``stage``, ``epoch``, ``result`` or ``end``.
        :param fields: JSON types.
        """
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class JsonLines:
    """One JSON object per line, each on the disk at once. An earlier file is continued.

    :raises ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--log-json {path}: {error.strerror or error}") from None

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"event": kind, "time": now, **_finite(fields)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Curves of every phase: ``<phase>/loss/train``, ``<phase>/accuracy/validation`` and so on, over epochs.

    :raises ConfigError: TensorBoard is not installed, or the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard: TensorBoard is not installed: pip install tensorboard") from None
        try:
            self._writer = SummaryWriter(str(directory))
        except OSError as error:
            raise ConfigError(f"--tensorboard {directory}: {error.strerror or error}") from None

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind != "epoch":
            return
        metric = fields.get("metric", "accuracy")
        names = {
            "train_loss": "loss/train", "validation_loss": "loss/validation", "train_accuracy": f"{metric}/train",
            "validation_accuracy": f"{metric}/validation", "lr": "lr", "images_per_second": "images_per_second",
        }  # fmt: skip
        for key, name in names.items():
            if fields.get(key) is not None:
                self._writer.add_scalar(f"{fields['phase']}/{name}", fields[key], fields["epoch"] + 1)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
