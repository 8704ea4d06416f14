"""From a run directory to the data of its report. What is not there is left out and said in ``missing``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fat_plugins.errors import CheckpointError, FatPluginsError
from fat_plugins.files import MAX_RESULTS, parse_json, read_text
from fat_plugins.mixed import algorithms_of
from fat_plugins.placed import network_facts, parts
from fat_plugins.quantizer import Coordinator
from fat_plugins.recipes.checkpoint import load_checkpoint
from fat_plugins.recipes.directory import FLOAT, checkpoint_path
from fat_plugins.recipes.loaded import load_run
from fat_plugins.recipes.report import RunReport, VariantResult
from fat_plugins.recipes.sealed import contents_of
from fat_plugins.recipes.targets import TARGETS
from fat_plugins.recipes.tasks import CLASSIFICATION, metric_of
from fat_plugins.recipes.tasks import Metric as RecipeMetric
from fat_plugins.registry import get_algorithm
from fat_plugins.report.data import Accuracy, Check, CheckRow, Curve, Drawing, Epoch, Metric, OverTime, ReportData
from fat_plugins.report.headline import tiles
from fat_plugins.report.tensors import tensor_rows

#: test images that the activations are looked at with
_SAMPLES = 64
OWN, BASELINE = "own", "baseline"


@dataclass
class _Run:
    """The files of a run directory.

    :param metrics: contents of every ``metrics.json`` with ``kind``, the recipe's own algorithm and first seed first.
    """

    directory: Path
    results: RunReport | None = None
    metrics: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def collect(directory: Path, which: str | None = None) -> ReportData:
    """The report of a run.

    :param directory: of a run, or one of its ``baselines/...`` or ``seeds/...``.
    :param which: checkpoint whose layers are shown, ``"last"`` or ``"best"``; default: the one that was exported.
    :raises CheckpointError: there is no run, or its files cannot be read.
    """
    run = _read(directory)
    algorithm, label = _identity(run)
    data = ReportData(
        name=run.results.name if run.results else directory.resolve().name, title=label, algorithm=algorithm
    )
    metric = _metric(run)
    data.metric = Metric(**{key: getattr(metric, key) for key in Metric.model_fields})
    data.accuracy = list(_accuracy(run, algorithm, label))
    data.curves = list(_curves(run, label))
    data.over_time = _over_time(run)
    data.missing = run.missing
    if run.results is not None:
        data.facts = run.results.facts
        data.checks = list(_checks(run.results))
    else:
        data.missing.append("no report.json: the run is not complete")
    if not data.checks:
        data.missing.append("nothing was exported: no files, kernels and comparisons of codes")
    _add_model(data, run, which)
    data.headline = tiles(data)
    return data


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    data = parse_json(read_text(path, error=CheckpointError, limit=MAX_RESULTS), str(path), CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _read(directory: Path) -> _Run:
    if not directory.is_dir():
        raise CheckpointError(f"no run directory {directory}")
    run = _Run(directory)
    results = _json(directory / "report.json")
    if results is not None:
        run.results = RunReport.from_dict(results)
    roots = [directory, *sorted((directory / "seeds").glob("*"), key=lambda p: (len(p.name), p.name))]
    for root in roots:
        for kind, path in ((OWN, root), *((BASELINE, p) for p in sorted((root / "baselines").glob("*")))):
            metrics = _json(path / "metrics.json")
            if metrics is not None:
                with contents_of(str(path / "metrics.json")):
                    _check(kind, metrics, str(path / "metrics.json"))
                run.metrics.append((kind, metrics))
    if results is None and run.metrics:
        run.results = _of_whole_run(directory, run.metrics[0][1])
    if results is None and not run.metrics:
        raise CheckpointError(f"{directory} does not hold a run: neither report.json nor metrics.json is there")
    return run


def _of_whole_run(directory: Path, metrics: dict[str, Any]) -> RunReport | None:
    """Results of a baseline or of a further seed, from the ``report.json`` of the run that it is a part of."""
    root = directory.resolve()
    baseline = root.parent.name == "baselines"
    if baseline:
        root = root.parent.parent
    if root.parent.name == "seeds":
        root = root.parent.parent
    results = _json(root / "report.json")
    if results is None:
        return None
    algorithm = metrics.get("quantized", {}).get("algorithm")
    within = directory.resolve().relative_to(root).as_posix()
    part = RunReport.from_dict(results).part(metrics.get("seed", 0), algorithm if baseline else None, within)
    return part if part.results else None


def _check(kind: str, metrics: dict[str, Any], where: str) -> None:
    """Read what will be read, so that an error can name the file."""
    alone = _Run(Path(), metrics=[(kind, metrics)])
    _identity(alone)
    _metric(alone, where)
    list(_accuracy(alone, "", ""))
    list(_curves(alone, ""))
    _over_time(alone)


def _identity(run: _Run) -> tuple[str, str]:
    """Algorithm and label of the run's own variant."""
    if run.results is not None and run.results.results:
        name = run.results.main.algorithm
        return name, run.results.labels[name]
    name = next((m["quantized"]["algorithm"] for _, m in run.metrics if "quantized" in m), "")
    return name, name.upper() or "float"


def _metric(run: _Run, where: str = "metrics.json") -> RecipeMetric:
    """What the run is judged by; a run that is not complete tells in its metrics."""
    if run.results is not None:
        return run.results.metric
    return metric_of(run.metrics[0][1].get("task", CLASSIFICATION.name), where)


# --------------------------------------------------------------------------------------------------------------------
# accuracy, curves, files
# --------------------------------------------------------------------------------------------------------------------
def _accuracy(run: _Run, algorithm: str, label: str) -> Iterator[Accuracy]:
    if run.results is None:
        yield from _accuracy_of_metrics(run, label)
        return
    groups: dict[str, list[VariantResult]] = {}
    for result in run.results.results:
        groups.setdefault(result.algorithm, []).append(result)
    own = groups[algorithm]
    seeds = [r.seed for r in own]
    yield Accuracy(name="float32", kind=FLOAT, seeds=seeds, torch=[r.float_accuracy for r in own])
    for name, results in groups.items():
        deployed: dict[str, list[float]] = {}
        for target in run.results.targets:
            found = [d.accuracy for r in results if (d := r.deployed_to(target)) is not None]
            if len(found) == len(results):
                deployed[target.runtime] = found
        size = run.results.size_of(results[0]) if results[0].deployments else (None, None)
        yield Accuracy(
            name=run.results.labels[name],
            kind=BASELINE if results[0].baseline else OWN,
            seeds=[r.seed for r in results],
            torch=[r.accuracy for r in results],
            deployed=deployed,
            weights_bytes=size[0],
            float_bytes=size[1],
        )


def _accuracy_of_metrics(run: _Run, label: str) -> Iterator[Accuracy]:
    """Without ``report.json``: from the metrics of the directory itself."""
    for kind, metrics in run.metrics[:1]:
        seeds = [metrics.get("seed", 0)]
        for name, part in (("float32", "float"), (label, "quantized")):
            value = metrics.get(part, {}).get("test_accuracy")
            if value is not None:
                yield Accuracy(name=name, kind=FLOAT if part == "float" else kind, seeds=seeds, torch=[value])


def _curves(run: _Run, label: str) -> Iterator[Curve]:
    labels = run.results.labels if run.results is not None else {}
    for kind, metrics in run.metrics:
        seed = metrics.get("seed", 0)
        history = metrics.get("float", {}).get("epochs", [])
        if kind == OWN and history:
            yield Curve(name="float32", kind=FLOAT, seed=seed, epochs=_epochs(history))
        quantized = metrics.get("quantized", {})
        name = labels.get(quantized.get("algorithm", ""), label)
        for stage in quantized.get("stages", []):
            if stage.get("epochs"):
                epochs, before = _epochs(stage["epochs"]), stage.get("before_training")
                before = _epochs([before])[0] if before else None
                yield Curve(name=name, kind=kind, seed=seed, stage=stage.get("stage", 0), before=before, epochs=epochs)


def _epochs(records: list[dict[str, Any]]) -> list[Epoch]:
    return [Epoch(**{k: v for k, v in record.items() if k in Epoch.model_fields}) for record in records]


def _over_time(run: _Run) -> list[OverTime]:
    """What the quantizers of the directory's own variant said after every epoch, stage after stage."""
    stages = run.metrics[0][1].get("quantized", {}).get("stages", []) if run.metrics else []
    epochs = [epoch for stage in stages for epoch in stage.get("epochs", [])]
    moments = [epoch.get("values", {}).get("quantizers", {}) for epoch in epochs]
    found: dict[str, OverTime] = {}
    for i, moment in enumerate(moments):
        for name, entry in moment.items():
            row = found.setdefault(name, OverTime(name=name, kind=entry["kind"], values={}))
            for key, value in entry["values"].items():
                row.values.setdefault(key, [None] * len(moments))[i] = value
    return list(found.values())


def _checks(results: RunReport) -> Iterator[Check]:
    for deployment in results.main.deployments:
        yield Check(
            runtime=TARGETS[deployment.format].runtime,
            file=deployment.path,
            file_bytes=deployment.file_bytes,
            weights_bytes=deployment.weights_bytes,
            verified=deployment.verified,
            rows=[
                CheckRow(name=r.name, kind=r.kind, compared=r.compared, differences=r.differences, ties=r.ties)
                for r in deployment.layers
            ],
            notes=deployment.notes,
        )


# --------------------------------------------------------------------------------------------------------------------
# the trained model
# --------------------------------------------------------------------------------------------------------------------
def _add_model(data: ReportData, run: _Run, which: str | None) -> None:
    """Layers, figures and what the algorithm's paper tells of a network."""
    try:
        loaded = load_run(run.directory, which)
        frozen = loaded.host.freeze(loaded.model)
    except (FatPluginsError, OSError) as error:
        data.missing.append(f"layers: the trained model cannot be rebuilt: {' '.join(str(error).split())}")
        return
    samples = _samples(loaded.data.test_loader(_SAMPLES))
    data.tensors, data.totals = tensor_rows(loaded.model, frozen, samples, _float_state(run))
    for name, part, weight in parts(loaded.model):
        figures = part.figures() if isinstance(part, Coordinator) else part.figures(weight)
        data.figures += [Drawing(layer=name, **f.to_dict()) for f in figures]
    data.network = network_facts(loaded.model)
    names = algorithms_of(data.algorithm)
    labels = [get_algorithm(name).fidelity for name in names]
    data.fidelity = labels[0] if len(names) == 1 else "; ".join(map(": ".join, zip(names, labels, strict=True)))
    _add_deployed(data, run.results)


def _samples(loader: Iterable[Any]) -> torch.Tensor:
    """Images of the first batch."""
    batch = next(iter(loader))
    return (batch[0] if isinstance(batch, (tuple, list)) else batch)[:_SAMPLES]


def _float_state(run: _Run) -> dict[str, torch.Tensor]:
    """The float weights that the run began with; a baseline's stand two directories above."""
    for root in (run.directory, run.directory.resolve().parent.parent):
        path = checkpoint_path(root, FLOAT)
        if path.is_file():
            return load_checkpoint(path).state
    run.missing.append("no float checkpoint: nothing to compare the weights with")
    return {}


def _add_deployed(data: ReportData, results: RunReport | None) -> None:
    """How the first deployed file stores and runs every layer."""
    if results is None or not results.main.deployments:
        return
    rows = {(r.kind, r.name): r for r in results.main.deployments[0].layers}
    for tensor in data.tensors:
        row = rows.get((tensor.kind, tensor.name))
        if row is not None and tensor.kind == "weight":
            tensor.storage, tensor.stored_bytes = row.storage or None, row.bytes or None
            tensor.kernel, tensor.speed = row.kernel or None, row.speed or None


__all__ = ["collect"]
