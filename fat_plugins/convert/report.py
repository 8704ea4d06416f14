"""What ``fat-plugins convert`` says about each key of the old file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["carried", "changed", "added", "dropped"]


@dataclass(frozen=True)
class Line:
    """What happened to one key: its path in the old file (in the new one when ``status`` is ``"added"``)."""

    status: Status
    key: str
    text: str = ""


@dataclass
class Conversion:
    """A new config and what was done to get there.

    :param config: the whole config, JSON types only; every key that is not NNCF's is as it was.
    """

    config: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """``config`` and ``lines``, ready for JSON."""
        return {"config": self.config, "lines": [vars(line) for line in self.lines]}

    def to_text(self) -> str:
        """One line per key, and their number by status."""
        width = max((len(line.key) for line in self.lines), default=0)
        rows = [f"{line.status:<8} {line.key:<{min(width, 60)}}  {line.text}".rstrip() for line in self.lines]
        counts = {status: sum(line.status == status for line in self.lines) for status in Status.__args__}
        return "\n".join([*rows, ", ".join(f"{n} {status}" for status, n in counts.items())])


class Log:
    """Collects the lines, and knows which NNCF the new config is for."""

    def __init__(self, lines: list[Line], nncf: int | None) -> None:
        self._lines, self._nncf = lines, nncf

    def __call__(self, status: Status, key: str, text: str = "") -> None:
        self._lines.append(Line(status, key, text))

    def keeps(self, key: str, refusal: str) -> bool:
        """Whether something that NNCF 3 refuses stays; writes the line for it."""
        if self._nncf == 3:
            self("dropped", key, refusal)
            return False
        self("carried", key, f"for NNCF 2 only: {refusal}" if self._nncf is None else "")
        return True

    @property
    def for_nncf3(self) -> bool:
        return self._nncf == 3
