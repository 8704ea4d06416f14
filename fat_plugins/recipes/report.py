"""What a run says about itself: tables for the terminal, markdown for a README, JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table
from torch import nn

from fat_plugins.config import DEFAULT_BITS, PLAIN_BITS
from fat_plugins.errors import CheckpointError, one_line, unknown
from fat_plugins.explain import explain
from fat_plugins.mixed import algorithms_of
from fat_plugins.penalties import get_penalty
from fat_plugins.recipes.deploy import Deployment, LayerRow
from fat_plugins.recipes.schema import Recipe, plugin_sections
from fat_plugins.recipes.targets import TARGETS, Target
from fat_plugins.recipes.tasks import CLASSIFICATION, Metric, Task, metric_of
from fat_plugins.registry import get_algorithm
from fat_plugins.scopes import as_list

#: columns of a terminal from which on the whole table of layers fits
WIDE = 140
#: columns of the table of layers that only some runtimes can fill
_KERNEL_COLUMNS = ("ran as", "kernel")
#: scopes that leave out all layers
_EVERYTHING = ("{re}.*", "{re}.+", "{re}")
_FLOAT_BITS = 32


@dataclass
class VariantResult:
    """One algorithm, trained with one seed, and the files made of it. Accuracies 0 to 1, on the test images, or what
    the task has in their place.

    :param widths: of a model of several bit widths the accuracy at each, by the width as text.
    """

    algorithm: str
    seed: int
    baseline: bool
    accuracy: float
    float_accuracy: float = 0.0
    deployments: list[Deployment] = field(default_factory=list)
    widths: dict[str, float] = field(default_factory=dict)

    def deployed_to(self, target: Target) -> Deployment | None:
        """The file of one target."""
        return next((d for d in self.deployments if d.format == target.name), None)


_RESULT = TypeAdapter(VariantResult)


class _Stored(BaseModel):
    """``report.json`` but for what is read result by result."""

    name: str
    facts: dict[str, str]
    labels: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    results: list[Any] = Field(min_length=1)
    task: str = CLASSIFICATION.name


def read_result(data: Any, where: str) -> VariantResult:
    """One result as ``report.json`` and the state of a run hold it.

    :raises CheckpointError: it is none; names the first entry that is missing or wrong.
    """
    try:
        result = _RESULT.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(one_line(str(p), 60) for p in first["loc"])
        raise CheckpointError(f"{where}: not of this version of fat-plugins: {path}: {first['msg']}") from None
    for deployment in result.deployments:
        if deployment.format not in TARGETS:
            raise CheckpointError(f"{where}: {unknown('format', deployment.format, TARGETS)}")
    return result


def _bits(section: dict[str, Any]) -> str:
    """``W4A4``; 32 for a group that its scopes leave float."""
    widths = []
    for group in (section.get("weights", {}), section.get("activations", {})):
        everything = any(scope in _EVERYTHING for scope in as_list(group.get("ignored_scopes")))
        widths.append(_FLOAT_BITS if everything else group.get("bits", DEFAULT_BITS))
    return f"W{widths[0]}A{widths[1]}"


def label(config: dict[str, Any]) -> str:
    """``FAT W4A4``, or of several sections ``FAT W2A2 + LSQ W8A8``."""
    return " + ".join(f"{s['algorithm'].upper()} {_bits(s)}" for _, s in plugin_sections(config))


def _widths(config: dict[str, Any]) -> str:
    """``W4A4``, or of several sections ``W2A2 + W8A8``."""
    return " + ".join(_bits(s) for _, s in plugin_sections(config))


def _at_each_width(results: list[VariantResult], metric: Metric) -> dict[str, str]:
    """The fact how good models of several widths are at each, if there are any: means over the seeds."""
    found = []
    for name in dict.fromkeys(r.algorithm for r in results if r.widths):
        each = [r.widths for r in results if r.algorithm == name]
        means = {bits: sum(w[bits] for w in each) / len(each) for bits in each[0]}
        found.append(f"{name}: " + ", ".join(f"{bits} bits {metric.text(mean)}" for bits, mean in means.items()))
    return {f"Test {metric.name} of one model at each width": "; ".join(found)} if found else {}


def _rewrites(recipe: Recipe, names: list[str]) -> dict[str, str]:
    """The fact which variants have what rewrites, if any has."""
    found = {
        name: ", ".join(s.name for s in recipe.rewrites_for(baseline))
        for name, baseline in zip(names, (None, *recipe.baselines), strict=True)
    }
    if not any(found.values()):
        return {}
    alike = len(set(found.values())) == 1
    text = next(iter(found.values())) if alike else "; ".join(f"{n}: {r or 'none'}" for n, r in found.items())
    return {"Rewrites of the float network": text}


def _layers(config: dict[str, Any]) -> str:
    """Which layers every section of this package quantizes, in words."""
    sections, texts = plugin_sections(config), []
    for _, section in sections:
        which = "all convolutions and linear layers"
        if targets := as_list(section.get("target_scopes")):
            which = f"the layers {', '.join(targets)}"
        if ignored := as_list(section.get("ignored_scopes")):
            which += f" but {', '.join(ignored)}"
        text = f"weights and inputs of {which}"
        edges = [(edge, section.get(f"{edge}_layer", PLAIN_BITS)) for edge in ("first", "last")]
        if len(sections) == 1 or any(bits != "same" for _, bits in edges):
            text += f"; bits of the {', '.join(f'{edge} layer: {bits}' for edge, bits in edges)}"
        texts.append(text if len(sections) == 1 else f"{_bits(section)}: {text}")
    return ". ".join(texts)


def _phase(section: Any) -> str:
    o = section.optimizer
    about = f"{o.name}, lr {o.lr:g}, weight decay {o.weight_decay:g}, {section.schedule.name}"
    if section.penalty is not None:
        about += f", penalty {section.penalty.name}"
        about += "".join(f" {key} {value}" for key, value in section.penalty.params.items())
    return f"{section.epochs} epochs ({about})"


@dataclass
class RunReport:
    """Results of a whole recipe.

    :param facts: what has to be said beside an accuracy: data, model, bits, which layers, epochs, seeds, versions.
    :param task: name of the task, which says what stands in the place of accuracies.
    """

    name: str
    facts: dict[str, str]
    labels: dict[str, str]
    results: list[VariantResult]
    versions: dict[str, str] = field(default_factory=dict)
    task: str = CLASSIFICATION.name

    @classmethod
    def collect(
        cls,
        recipe: Recipe,
        data: str,
        model: nn.Module,
        versions: dict[str, str],
        results: list[VariantResult],
        task: Task = CLASSIFICATION,
    ) -> RunReport:
        """Put a report together."""
        parameters = sum(p.numel() for p in model.parameters())
        stages = recipe.training.stages
        names = [recipe.algorithm, *(b.algorithm for b in recipe.baselines)]
        configs = [recipe.config_for(baseline, stages[-1]) for baseline in (None, *recipe.baselines)]
        labels = {name: label(config) for name, config in zip(names, configs, strict=True)}
        training = [f"{_widths(recipe.config_for(None, s))}: {_phase(recipe.phase(s))}" for s in stages]
        penalties = [s.penalty.name for s in (recipe.pretrain, recipe.training) if s.penalty is not None]
        used = [get_algorithm(a) for a in dict.fromkeys(a for name in names for a in algorithms_of(name))]
        used += [get_penalty(name) for name in dict.fromkeys(penalties)]
        facts = {
            "Data": data,
            **task.facts(),
            "Model": f"{recipe.model.name} {recipe.model.params or ''}".strip() + f", {parameters:,} parameters",
            "Float training": _phase(recipe.pretrain),
            "Fine-tuning from these float weights, the same for all": "; ".join(training),
            **_rewrites(recipe, names),
            **_at_each_width(results, task.metric),
            "Layers": _layers(configs[0]),
            "Fidelity": "; ".join(f"{kind.name}: {kind.fidelity}" for kind in used),
            "Seeds": f"{len(recipe.seeds)} ({', '.join(map(str, recipe.seeds))})"
            + ("; mean (lowest to highest)" if len(recipe.seeds) > 1 else ""),
        }
        report = cls(recipe.name, facts, labels, results, versions, task.name)
        sizes = report.sizes()
        if sizes:
            facts["Sizes"] = sizes
        facts["Versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
        return report

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunReport:
        """Read what :meth:`to_dict` wrote.

        :raises CheckpointError: it is no such dictionary.
        """
        try:
            known = _Stored.model_validate(data)
        except ValidationError as error:
            raise CheckpointError(f"report.json: not the results of a run: {explain(error, _Stored)}") from None
        results = [read_result(result, "report.json") for result in known.results]
        if not any(not result.baseline for result in results):
            raise CheckpointError("report.json: no result of the recipe's own algorithm")
        names = sorted({r.algorithm for r in results})
        labels = {name: known.labels.get(name, name.upper()) for name in names}
        metric_of(known.task, "report.json")
        return cls(known.name, known.facts, labels, results, known.versions, known.task)

    def part(self, seed: int, algorithm: str | None, within: str) -> RunReport:
        """The same of a part of the run.

        :param algorithm: a baseline, which is then what the report is about; ``None``: all variants of a seed.
        :param within: directory of the part within the run, to which the paths of files become relative.
        """
        kept = []
        for result in self.results:
            if result.seed == seed and algorithm in (None, result.algorithm):
                paths = [d.path.removeprefix(f"{within}/") for d in result.deployments]
                deployments = [replace(d, path=p) for d, p in zip(result.deployments, paths, strict=True)]
                baseline = result.baseline and algorithm is None
                kept.append(replace(result, baseline=baseline, deployments=deployments))
        part = replace(self, results=kept, facts={**self.facts, "Seeds": f"1 ({seed})"})
        if "Sizes" in part.facts and kept:
            part.facts["Sizes"] = part.sizes()
        return part

    @property
    def metric(self) -> Metric:
        """What results are compared by."""
        return metric_of(self.task, self.name)

    @property
    def verified(self) -> bool:
        """Nothing that was compared differs."""
        return all(d.verified is not False for r in self.results for d in r.deployments)

    @property
    def main(self) -> VariantResult:
        """The recipe's own algorithm with the first seed."""
        return next(r for r in self.results if not r.baseline)

    @property
    def targets(self) -> list[Target]:
        """What the models were deployed to."""
        return [TARGETS[d.format] for d in self.main.deployments]

    @property
    def _sized(self) -> Target | None:
        """The target whose file shows in the table of sizes: one that stores codes at their width, if there is one."""
        return next((t for t in self.targets if t.packed), None)

    def size_of(self, result: VariantResult) -> tuple[int, int]:
        """Bytes of a result's weights as the table of sizes counts them, and of the same in float32."""
        return _size(result, self._sized)

    def sizes(self) -> str:
        """What has to be said about files that do not store codes at their width; empty where all do."""
        files = []
        for deployment in self.main.deployments:
            stored = sorted({r.storage for r in deployment.layers if r.kind == "weight" and r.storage})
            how = f" (weights stored as {', '.join(stored)})" if stored else ""
            files.append(f"{deployment.path} {deployment.file_bytes:,} B{how}")
        if all(t.packed for t in self.targets):
            return ""
        codes = "" if self._sized else "weight codes: quantized weights at their bit widths, without scales; "
        return f"{codes}files: {', '.join(files)}"

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of accuracies and sizes."""
        targets, sized, metric = self.targets, self._sized, self.metric
        header = ["", f"{metric.name}, torch", *(f"{metric.name}, {t.runtime}" for t in targets)]
        if targets:
            which = {t: f", {t.runtime}" if len(targets) > 1 else "" for t in targets}
            header += [f"weights file{which[sized]}" if sized else "weight codes", "smaller by"]
            header += [f"codes differing (ties){which[t]}" for t in targets]
        groups: dict[str, list[VariantResult]] = defaultdict(list)
        for result in self.results:
            groups[result.algorithm].append(result)
        own = groups[self.main.algorithm]
        rows = [["float32", metric.mean([r.float_accuracy for r in own])]]
        if targets:
            rows[0] += ["-"] * len(targets) + [f"{_size(self.main, sized)[1]:,} B", "1.00"] + ["-"] * len(targets)
        for algorithm, results in groups.items():
            row = [self.labels[algorithm], metric.mean([r.accuracy for r in results])]
            done = [[d for r in results if (d := r.deployed_to(t)) is not None] for t in targets]
            if not all(done):
                rows.append(row + ["-"] * (len(header) - len(row)))
                continue
            row += [metric.mean([d.accuracy for d in each]) for each in done]
            if targets:
                size, float_size = _size(results[0], sized)
                row += [f"{size:,} B", f"{float_size / max(size, 1):.2f}"]
            rows.append(row + [_differing(each) for each in done])
        return header, rows

    def layers(self, deployment: Deployment) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of one file's layers."""
        header = ["layer", "tensor", "bits", "form", "stored", "ran as", "kernel", "codes", "differ", "ties"]
        rows = [_layer_row(r) for r in deployment.layers]
        if not any(r.kernel for r in deployment.layers):
            return _pick(header, rows, [name for name in header if name not in _KERNEL_COLUMNS])
        return header, rows

    def _layer_tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows for every file of the recipe's own algorithm with the first seed."""
        tables, several = [], len(self.main.deployments) > 1
        for deployment in self.main.deployments:
            title = f"Layers of {self.labels[self.main.algorithm]}, seed {self.main.seed}"
            title += f", {TARGETS[deployment.format].runtime}" if several else ""
            tables.append((title, *self.layers(deployment)))
        return [table for table in tables if table[2]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; reads as ``report.json``."""
        return {
            "name": self.name,
            # an old reader knows accuracies only
            **({} if self.task == CLASSIFICATION.name else {"task": self.task}),
            "verified": self.verified,
            "facts": self.facts,
            "labels": self.labels,
            "versions": self.versions,
            "results": [{**asdict(r), "deployments": [d.to_dict() for d in r.deployments]} for r in self.results],
        }

    def to_markdown(self) -> str:
        """Tables and facts as markdown."""
        parts = [_markdown(*self.summary()), "\n".join(f"* {k}: {v}" for k, v in self.facts.items())]
        for title, header, rows in self._layer_tables():
            parts += [f"{title}:", _markdown(header, rows)]
        return "\n\n".join(parts) + "\n"

    def tables(self, width: int = 160) -> list[Table]:
        """The same tables for a terminal of ``width`` columns; a narrow one gets fewer columns of layers."""
        tables = [_rich(f"{self.name}: {self.metric.name} on the test images", *self.summary())]
        for title, header, rows in self._layer_tables():
            if width < WIDE:
                kept = ("layer", "bits", *_KERNEL_COLUMNS, "differ", "ties")
                header, rows = _pick(header, rows, [name for name in kept if name in header])
            tables.append(_rich(title, header, rows, no_wrap=True))
        return tables


def _size(result: VariantResult, sized: Target | None) -> tuple[int, int]:
    """Bytes of a result's weights, and of the same in float32: in the file of ``sized``, or counted by codes."""
    if sized is None:
        return result.deployments[0].code_bytes, result.deployments[0].float_code_bytes
    deployment = result.deployed_to(sized)
    return deployment.weights_bytes, deployment.float_bytes


def _pick(header: list[str], rows: list[list[str]], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Some columns of a table."""
    kept = [header.index(name) for name in names]
    return names, [[row[i] for i in kept] for row in rows]


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
    table = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(header):
        table.add_column(
            escape(column), justify="left" if i == 0 else "right", overflow="fold", no_wrap=no_wrap and i > 0
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table
