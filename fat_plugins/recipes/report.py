"""What a run says about itself: tables for the terminal, markdown for a README, JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from rich.table import Table
from torch import nn

from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.schema import Recipe, plugin_section
from fat_plugins.registry import get_algorithm

#: columns of a terminal from which on the whole table of layers fits
WIDE = 140


@dataclass
class VariantResult:
    """One algorithm, trained with one seed. Accuracies 0 to 1, on the test images."""

    algorithm: str
    seed: int
    baseline: bool
    accuracy: float
    float_accuracy: float = 0.0
    deployment: Deployment | None = None


def _percent(values: list[float]) -> str:
    """Mean, and the lowest and highest when there are several."""
    text = f"{mean(values):.2%}"
    return text if len(values) == 1 else f"{text} ({min(values):.2%} to {max(values):.2%})"


def _label(config: dict[str, Any], algorithm: str) -> str:
    """``FAT W4A4``."""
    section = plugin_section(config)
    bits = [section.get(g, {}).get("bits", 4) for g in ("weights", "activations")]
    return f"{algorithm.upper()} W{bits[0]}A{bits[1]}"


def _phase(section: Any) -> str:
    o = section.optimizer
    return f"{section.epochs} epochs ({o.name}, lr {o.lr:g}, weight decay {o.weight_decay:g}, {section.schedule.name})"


@dataclass
class RunReport:
    """Results of a whole recipe.

    :param facts: what has to be said beside an accuracy: data, model, bits, which layers, epochs, seeds, versions.
    """

    name: str
    facts: dict[str, str]
    labels: dict[str, str]
    results: list[VariantResult]
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def collect(
        cls, recipe: Recipe, data: str, model: nn.Module, versions: dict[str, str], results: list[VariantResult]
    ) -> RunReport:
        """Put a report together."""
        parameters = sum(p.numel() for p in model.parameters())
        stages = recipe.training.stages
        labels, training = {}, []
        for baseline in (None, *recipe.baselines):
            config = recipe.config_for(baseline, stages[-1])
            algorithm = plugin_section(config)["algorithm"]
            labels[algorithm] = _label(config, algorithm)
        for stage in stages:
            bits = _label(recipe.config_for(None, stage), "").strip()
            training.append(f"{bits}: {_phase(recipe.phase(stage))}")
        section = plugin_section(recipe.compression)
        edges = [f"{edge} layer: {section.get(f'{edge}_layer', 8)}" for edge in ("first", "last")]
        facts = {
            "Data": data,
            "Model": f"{recipe.model.name} {recipe.model.params or ''}".strip() + f", {parameters:,} parameters",
            "Float training": _phase(recipe.pretrain),
            "Fine-tuning from these float weights, the same for all": "; ".join(training),
            "Layers": f"weights and inputs of all convolutions and linear layers; bits of the {', '.join(edges)}",
            "Fidelity": "; ".join(f"{a}: {get_algorithm(a).fidelity}" for a in labels),
            "Seeds": f"{len(recipe.seeds)} ({', '.join(map(str, recipe.seeds))})"
            + ("; mean (lowest to highest)" if len(recipe.seeds) > 1 else ""),
            "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        }
        return cls(recipe.name, facts, labels, results, versions)

    @property
    def verified(self) -> bool:
        """Nothing that was compared differs."""
        return all(r.deployment is None or r.deployment.verified is not False for r in self.results)

    @property
    def main(self) -> VariantResult:
        """The recipe's own algorithm with the first seed."""
        return next(r for r in self.results if not r.baseline)

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of accuracies and sizes."""
        header = ["", "accuracy, torch", "accuracy, OpenVINO", "weights file", "smaller by", "codes differing (ties)"]
        groups: dict[str, list[VariantResult]] = defaultdict(list)
        for result in self.results:
            groups[result.algorithm].append(result)
        own = groups[self.main.algorithm]
        size = f"{own[0].deployment.float_bytes:,} B" if own[0].deployment else "-"
        rows = [["float32", _percent([r.float_accuracy for r in own]), "-", size, "1.00", "-"]]
        for algorithm, results in groups.items():
            row = [self.labels[algorithm], _percent([r.accuracy for r in results])]
            done = [r.deployment for r in results if r.deployment is not None]
            if not done:
                rows.append([*row, "-", "-", "-", "-"])
                continue
            row.append(_percent([d.accuracy for d in done]))
            row += [f"{done[0].weights_bytes:,} B", f"{done[0].ratio:.2f}", _differing(done)]
            rows.append(row)
        return header, rows

    def layers(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of layers, of the recipe's own algorithm with the first seed."""
        header = ["layer", "tensor", "bits", "form", "stored", "ran as", "kernel", "codes", "differ", "ties"]
        deployment = self.main.deployment
        return header, [_layer_row(r) for r in deployment.layers] if deployment else []

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; reads as ``report.json``."""
        return {
            "name": self.name,
            "verified": self.verified,
            "facts": self.facts,
            "versions": self.versions,
            "results": [
                {**asdict(r), "deployment": r.deployment.to_dict() if r.deployment else None} for r in self.results
            ],
        }

    def to_markdown(self) -> str:
        """Tables and facts as markdown."""
        parts = [_markdown(*self.summary()), "\n".join(f"* {k}: {v}" for k, v in self.facts.items())]
        header, rows = self.layers()
        if rows:
            parts += [f"Layers of {self.labels[self.main.algorithm]}, seed {self.main.seed}:", _markdown(header, rows)]
        return "\n\n".join(parts) + "\n"

    def tables(self, width: int = 160) -> list[Table]:
        """The same two tables for a terminal of ``width`` columns; a narrow one gets fewer columns of the second."""
        title = f"{self.name}: accuracy on the test images"
        tables = [_rich(title, *self.summary())]
        header, rows = self.layers()
        if rows:
            if width < WIDE:
                kept = [header.index(name) for name in ("layer", "bits", "ran as", "kernel", "differ", "ties")]
                header, *rows = ([row[i] for i in kept] for row in (header, *rows))
            title = f"Layers of {self.labels[self.main.algorithm]}, seed {self.main.seed}"
            tables.append(_rich(title, header, rows, no_wrap=True))
        return tables


def _differing(done: list[Deployment]) -> str:
    rows = [r for d in done for r in d.layers]
    if any(d.verified is None for d in done):
        return "not compared"
    compared = sum(r.compared or 0 for r in rows)
    return f"{sum(r.differences or 0 for r in rows)} ({sum(r.ties or 0 for r in rows)}) of {compared:,}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _layer_row(row: LayerRow) -> list[str]:
    return [
        row.name,
        row.kind,
        str(row.bits),
        row.form,
        row.storage or "-",
        row.speed or "-",
        row.kernel or "-",
        _count(row.compared),
        _count(row.differences),
        _count(row.ties),
    ]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _rich(title: str, header: list[str], rows: list[list[str]], no_wrap: bool = False) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=no_wrap and i > 0)
    for row in rows:
        table.add_row(*row)
    return table
