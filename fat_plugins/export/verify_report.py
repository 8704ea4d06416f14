"""What :mod:`fat_plugins.export.verify` found, layer by layer, as JSON or as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from fat_plugins.export.common import with_versions


@dataclass
class WeightCheck:
    """Codes of one weight: how many there are and how many differ. ``position``: place in the execution order."""

    name: str
    position: int = 0
    elements: int = 0
    differences: int = 0


@dataclass
class ActivationCheck:
    """One activation quantizer, fed with torch's tensors.

    :param layers: quantized layers that compute its input.
    :param elements: activations compared.
    :param near: those that lie within the tie guard, where another code is a tie and no difference.
    :param ties, differences: codes of the quantizer that differ, within and outside the tie guard.
    :param input_ties, input_differences: the same for torch's code of the input that the runtime computed.
    :param max_error: largest deviation of that input, in steps, where torch does not clip it.
    :param probes, probe_differences: numbers beside the thresholds that it was fed with, and those with another code.
    :param end_to_end: codes that differ when nothing is fed in between (includes what ties cascade into).
    :param unexplained: those of them outside the tie guard in samples without a tie before.
    """

    name: str
    position: int = 0
    layers: list[str] = field(default_factory=list)
    elements: int = 0
    near: int = 0
    ties: int = 0
    differences: int = 0
    input_ties: int = 0
    input_differences: int = 0
    max_error: float = 0.0
    probes: int = 0
    probe_differences: int = 0
    end_to_end: int = 0
    unexplained: int = 0

    @property
    def all_differences(self) -> int:
        """Codes that differ outside the tie guard, wherever that was seen."""
        return self.differences + self.input_differences + self.probe_differences + self.unexplained


@dataclass
class OutputCheck:
    """One output of the model: largest absolute deviations, teacher-forced, end to end and that in samples without a
    tie; what is allowed of the first and the last."""

    name: str
    layers: list[str] = field(default_factory=list)
    elements: int = 0
    max_error: float = 0.0
    allowed: float = 0.0
    end_to_end: float = 0.0
    without_ties: float = 0.0

    @property
    def differs(self) -> bool:
        """Whether the output deviates by more than allowed (or is not a number), teacher-forced or without a tie."""
        return not (self.max_error <= self.allowed and self.without_ties <= self.allowed)


@dataclass
class VerifyReport:
    """What :func:`compare` found. ``ok`` means no difference outside ties.

    :param runtime, device, versions: who executed the file; in the JSON each version is a key of its own.
    :param first_difference: name of the first layer, in execution order, that differs, or ``None``.
    :param detail: one line on it.
    """

    ok: bool
    path: str
    device: str
    runtime: str
    versions: dict[str, str]
    samples: int
    tie_guard: float
    first_difference: str | None = None
    detail: str = ""
    weights: list[WeightCheck] = field(default_factory=list)
    activations: list[ActivationCheck] = field(default_factory=list)
    outputs: list[OutputCheck] = field(default_factory=list)

    @property
    def ties(self) -> int:
        """Codes that differ within the tie guard, all layers together."""
        return sum(a.ties + a.input_ties for a in self.activations)

    @property
    def near(self) -> int:
        """Codes that the tie guard would have let differ, all layers together."""
        return sum(a.near for a in self.activations)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**with_versions(asdict(self)), "ties": self.ties, "near": self.near}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_table(self) -> Any:
        """The report as a ``rich`` table."""
        from rich.markup import escape
        from rich.table import Table

        verdict = "[green]equal[/]" if self.ok else f"[red]first difference: {escape(self.first_difference or '')}[/]"
        title = f"torch and {self.runtime} {self.device}, {self.samples} samples: {verdict}"
        count = sum(a.elements for a in self.activations)
        near = f"{self.near:,} of {count:,} activations lie within the tie guard, {self.ties:,} codes differ there"
        table = Table(title=title, caption=f"{self.detail}\n{near}" if self.detail else near)
        for heading in ("layer", "tensor", "elements", "ties", "differences", "max error", "end to end"):
            table.add_column(heading, justify="left" if heading in ("layer", "tensor") else "right")

        rows = []
        for w in self.weights:
            rows.append((w.position, w.name, "weight", w.elements, "", w.differences, "", ""))
        for a in self.activations:
            bad, ties = a.all_differences, a.ties + a.input_ties
            error = f"{a.max_error:.1e} steps"
            rows.append((a.position, a.name, "activation", a.elements, ties, bad, error, a.end_to_end))
        rows.sort(key=lambda r: r[0])
        for o in self.outputs:
            rows.append(
                (0, o.name, "output", o.elements, "", int(o.differs), f"{o.max_error:.1e}", f"{o.end_to_end:.1e}")
            )
        for _, name, kind, elements, ties, bad, error, cascade in rows:
            marked = f"[red]{bad}[/]" if bad else "0"
            table.add_row(escape(name), kind, str(elements), str(ties), marked, error, str(cascade))
        return table
