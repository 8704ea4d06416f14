"""Proof that an exported model computes what was trained: integer codes, layer by layer, torch against the runtime.

Four comparisons. Weights: the codes as the runtime reads them, exactly. Activations, teacher-forced: every quantizer of
the file is fed with torch's own tensor, so that an error shows in the layer that makes it and nowhere else. Thresholds:
every quantizer is fed with numbers beside each of its thresholds, where data may never lie. End to end: the model as it
runs; a flipped tie may cascade there, so a code is judged where no quantizer before it has given another one.

:func:`compare` does this for any runtime that offers a :class:`Target`; :func:`verify` is its use with OpenVINO.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.export._codes import differs, input_error, input_guard, largest, off_tie, quantizer_guard
from fat_plugins.export.common import as_inputs, first_line, on_device, reading, unique
from fat_plugins.export.probes import fill, points
from fat_plugins.export.verify_report import ActivationCheck, OutputCheck, VerifyReport, WeightCheck
from fat_plugins.forms import Form, grids
from fat_plugins.frozen import FrozenWeight, frozen_modules

#: activations held at once, in elements; larger batches are compared in slices
_BUDGET = 2**24
_OUTPUT_TOLERANCE = 1e-4


# --------------------------------------------------------------------------------------------------------------------
# the side of the runtime
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """Arrays of one inference.

    :param computed: what reaches each quantizer.
    :param quantized: what each quantizer gives.
    :param outputs: the model's own outputs.
    """

    computed: dict[str, np.ndarray] = field(default_factory=dict)
    quantized: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)


class Graph(Protocol):
    """A file made ready to run, with what its quantizers read and give laid open."""

    #: names of the model's outputs
    output_names: list[str]

    def producers(self, name: str) -> list[str]:
        """Quantized layers between the quantizers before and the input of quantizer ``name``."""

    def output_producers(self, index: int) -> list[str]:
        """Quantized layers between the last quantizers and an output of the model."""

    def quantizers(self, name: str) -> set[str]:
        """Quantizers that the input of quantizer ``name`` depends on; none in a graph that is cut."""

    def output_quantizers(self, index: int) -> set[str]:
        """Quantizers that an output of the model depends on."""

    def run(self, inputs: list[np.ndarray], feed: dict[str, Tensor]) -> Run:
        """One inference. ``feed``: input of every quantizer when the graph is cut."""


class Target(Protocol):
    """An exported file and what executes it.

    :param file: what messages call the file.
    :param runtime, device, versions: who executes it; ``versions`` by package name.
    :param entries: the exporter's description of the quantized tensors (``kind``, ``name``, ``bits``; ``readers`` of a
        weight: names of the layers that read it).
    """

    file: str
    runtime: str
    device: str
    versions: dict[str, str]
    entries: list[dict[str, Any]]

    def integers(self, layer: str) -> list[np.ndarray]:
        """Integers of a layer's weight as the runtime reads them, one array per grid, elements in torch's order."""

    def values(self, layer: str) -> list[np.ndarray] | None:
        """Real values of the same; ``None`` where the file folds something else into the scale."""

    def graph(self, names: list[str], layers: list[str], cut: bool) -> Graph:
        """The file made ready to run; ``cut`` feeds every quantizer of ``names`` from outside."""

    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes, ``None`` for any."""


def verify(
    frozen_model: nn.Module,
    xml_path: str | os.PathLike,
    inputs: Any,
    *,
    tie_guard: float = 1e-4,
    device: str = "CPU",
) -> VerifyReport:
    """Compare a frozen torch model with the IR that :func:`fat_plugins.export.openvino.export` wrote.

    :param inputs: one batch: a tensor, or a tuple of tensors, one per input of the model.
    :param tie_guard: in steps; a code may differ where torch's value lies this close to a rounding threshold. For what
        a layer computes it is that of 16 codes, and wider grids have it in proportion (17 times at 8 bits), as the
        rounding of float32 sums is; for the quantizers themselves it is the same up to 8 bits.
    :param device: OpenVINO device; float operations run in float32.
    :raises ExportError: unreadable IR, an IR of another model, or inputs that the model refuses.
    """
    from fat_plugins.export.graph import IR

    inputs = as_inputs(inputs)
    with reading(xml_path):
        return compare(frozen_model, IR(xml_path, device), xml_path, inputs, tie_guard)


def compare(
    frozen_model: nn.Module, target: Target, path: str | os.PathLike, inputs: Any, tie_guard: float
) -> VerifyReport:
    """Compare a frozen torch model with an exported file; the parameters and errors are those of :func:`verify`."""
    inputs = as_inputs(inputs)
    frozen_model.eval()
    calls = _call_order(frozen_model, tuple(x[:1] for x in inputs) if _sliceable(inputs) else inputs)
    _same_model(calls, target)

    samples = int(inputs[0].shape[0])
    report = VerifyReport(False, str(path), target.device, target.runtime, target.versions, samples, tie_guard)
    uses = {e["name"]: e["readers"] for e in target.entries if e["kind"] == "weight"}
    layers = [layer for names in uses.values() for layer in names]
    for i, (kind, name) in enumerate(calls.order):
        if kind == "weight":
            module = calls.modules[kind, name]
            report.weights += [_check_weight(target, layer, module, i) for layer in uses[name]]
    names = [name for kind, name in calls.order if kind == "activation"]
    forced, whole = target.graph(names, layers, True), target.graph(names, [], False)
    position = {key: i for i, key in enumerate(calls.order)}
    report.activations = [ActivationCheck(n, position["activation", n], forced.producers(n)) for n in names]
    report.outputs = [OutputCheck(n, forced.output_producers(i)) for i, n in enumerate(forced.output_names)]
    for part in _slices(inputs, target, calls):
        _compare(frozen_model, part, forced, whole, report, target)
    _judge(report)
    return report


# --------------------------------------------------------------------------------------------------------------------
# the torch side
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _Calls:
    order: list[tuple[str, str]] = field(default_factory=list)  # (kind, unique name), execution order
    modules: dict[tuple[str, str], nn.Module] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the activation quantizers
    outputs: list[Tensor] = field(default_factory=list)
    elements: int = 0


def _record(model: nn.Module, inputs: tuple[Tensor, ...], keep: bool = True) -> _Calls:
    """One forward pass; what every frozen quantizer received, in execution order."""
    calls, taken = _Calls(), set()

    def hook(module: nn.Module, args: tuple, _: Any) -> None:
        kind = "weight" if isinstance(module, FrozenWeight) else "activation"
        name = unique(module.name, kind, taken)
        calls.order.append((kind, name))
        calls.modules[kind, name] = module
        if kind == "activation":
            calls.elements += args[0].numel()
            if keep:
                calls.inputs[name] = args[0].detach().cpu()

    handles = [m.register_forward_hook(hook) for m in frozen_modules(model)]
    try:
        with torch.no_grad():
            calls.outputs = list(_tensors(model(*on_device(model, inputs))))
    except Exception as error:
        raise ExportError(f"the torch model refuses the inputs: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _call_order(model: nn.Module, inputs: tuple[Tensor, ...]) -> _Calls:
    return _record(model, inputs, keep=False)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach().cpu()
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


def _same_model(calls: _Calls, target: Target) -> None:
    """The file must name the same quantizers with the same widths."""
    file, written = target.file, {(e["kind"], e["name"]): e for e in target.entries}
    for key, module in calls.modules.items():
        if key not in written:
            raise ExportError(f"{key[1]}: this {key[0]} is not in the {file}; was it exported from another model?")
        if written[key]["bits"] != module.form.bits:
            raise ExportError(f"{key[1]}: {module.form.bits} bits in torch, {written[key]['bits']} in the {file}")
    for kind, name in written:
        if (kind, name) not in calls.modules:
            raise ExportError(
                f"{name}: this {kind} of the {file} is not in the model; was it exported from another model?"
            )


def _sliceable(inputs: tuple[Tensor, ...]) -> bool:
    return all(x.ndim and x.shape[0] == inputs[0].shape[0] for x in inputs) and inputs[0].shape[0] > 0


def _slices(inputs: tuple[Tensor, ...], target: Target, calls: _Calls) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the batch that fit the budget, and the file's batch size when that is fixed."""
    if not _sliceable(inputs):
        yield inputs
        return
    batch, fixed = inputs[0].shape[0], target.fixed_batch()
    size = fixed or max(1, min(batch, _BUDGET // max(calls.elements, 1)))
    if fixed and batch % fixed:
        raise ExportError(f"the {target.file} has a fixed batch of {fixed}; {batch} samples are not a multiple of it")
    for start in range(0, batch, size):
        yield tuple(x[start : start + size] for x in inputs)


# --------------------------------------------------------------------------------------------------------------------
# comparisons
# --------------------------------------------------------------------------------------------------------------------
def _check_weight(target: Target, layer: str, module: FrozenWeight, position: int) -> WeightCheck:
    """Count the elements of which an integer, or a real value where the file tells, is another one."""
    wanted = grids(module.form, module.codes.cpu())
    integers, values = target.integers(layer), target.values(layer)
    elements = module.codes.numel()
    if len(integers) != len(wanted):
        return WeightCheck(layer, position, elements, elements)
    wrong = np.zeros(elements, bool)
    for i, (grid, codes) in enumerate(wanted):
        pairs = [(integers[i], grid.integers(codes))]
        if values is not None:
            pairs.append((values[i], grid.decode(codes)))
        for found, torchs in pairs:
            same_size = found.size == elements
            wrong |= (found.reshape(-1) != torchs.numpy().reshape(-1)) if same_size else True
    return WeightCheck(layer, position, elements, int(wrong.sum()))


def _compare(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    forced: Graph,
    whole: Graph,
    report: VerifyReport,
    target: Target,
) -> None:
    calls = _record(model, inputs)
    feed = {name: x.float().contiguous() for name, x in calls.inputs.items()}
    forms = {check.name: calls.modules["activation", check.name].form for check in report.activations}
    codes = {name: forms[name].encode(x) for name, x in feed.items()}
    arrays = [x.cpu().numpy() for x in inputs]
    if not report.activations or not report.activations[0].elements:  # the first slice
        _probe(forms, feed, arrays, forced, report)
    result = forced.run(arrays, feed)
    flipped = False
    for check in report.activations:
        name, form, guard = check.name, forms[check.name], quantizer_guard(forms[check.name], report.tie_guard)
        bad = differs(form, torch.from_numpy(result.quantized[name]), codes[name])
        tie = bad & (form.ties(feed[name]) < guard)
        check.elements += bad.numel()
        check.ties += int(tie.sum())
        check.differences += int((bad & ~tie).sum())
        if bool(tie.any()):
            feed[name], flipped = off_tie(form, feed[name], codes[name], tie, guard), True
    if flipped:  # the layers behind a tie must see torch's code
        result = forced.run(arrays, feed)
    near = {}
    for check in report.activations:
        name, form = check.name, forms[check.name]
        x, computed = calls.inputs[name].float(), torch.from_numpy(result.computed[name])
        near[name] = form.ties(x) < input_guard(form, report.tie_guard)
        bad = form.encode(computed) != codes[name]
        check.near += int(near[name].sum())
        check.input_ties += int((bad & near[name]).sum())
        check.input_differences += int((bad & ~near[name]).sum())
        check.max_error = max(check.max_error, input_error(form, x, computed))
    if len(calls.outputs) != len(report.outputs):
        raise ExportError(
            f"the model has {len(calls.outputs)} outputs in torch and {len(report.outputs)} in the {target.file}"
        )
    end_to_end = whole.run(arrays, {})
    unmoved = _end_to_end(forms, codes, near, end_to_end, whole, report)
    for i, check in enumerate(report.outputs):
        wanted = calls.outputs[i].double().numpy()
        check.elements += wanted.size
        check.allowed = max(check.allowed, _OUTPUT_TOLERANCE * largest(np.zeros_like(wanted), wanted) + 1e-6)
        check.max_error = max(check.max_error, largest(result.outputs[i], wanted))
        check.end_to_end = max(check.end_to_end, largest(end_to_end.outputs[i], wanted))
        same = unmoved(whole.output_quantizers(i), wanted).numpy()
        if end_to_end.outputs[i].shape == wanted.shape:
            check.without_ties = max(check.without_ties, largest(end_to_end.outputs[i][same], wanted[same]))


def _probe(
    forms: dict[str, Form], feed: dict[str, Tensor], arrays: list[np.ndarray], forced: Graph, report: VerifyReport
) -> None:
    """Feed every quantizer with numbers beside its thresholds, just outside the guard."""
    probes = {}
    for name, x in feed.items():
        rows = points(forms[name], 2 * quantizer_guard(forms[name], report.tie_guard))
        probes[name] = fill(x.shape, rows, forms[name].channel_axis)
    result = forced.run(arrays, probes)
    for check in report.activations:
        found, form, x = torch.from_numpy(result.quantized[check.name]), forms[check.name], probes[check.name]
        # where a threshold is zero, the tiny ones are on it: runtimes may take subnormal numbers for zero
        tie = form.ties(x) < quantizer_guard(form, report.tie_guard)
        bad = differs(form, found, form.encode(x)) & ~tie
        check.probes += bad.numel()
        check.probe_differences += int(bad.sum())


def _end_to_end(
    forms: dict[str, Form],
    codes: dict[str, Tensor],
    near: dict[str, Tensor],
    run: Run,
    whole: Graph,
    report: VerifyReport,
) -> Callable[[set[str], Any], Tensor]:
    """Judge the codes of samples in which no quantizer before has given another one.

    :return: function of names of quantizers and an array: a mask of such samples in the array.
    """
    flipped: dict[str, Tensor] = {}  # per sample, or for the whole batch where the first dimension is not that

    def unmoved(before: set[str], of: Any) -> Tensor:
        moved = torch.zeros(of.shape[:1], dtype=torch.bool)
        for each in (flipped[name] for name in before):
            moved |= each if each.shape == moved.shape else each.any()
        return ~moved

    for check in report.activations:
        name, form = check.name, forms[check.name]
        bad = differs(form, torch.from_numpy(run.quantized[name]), codes[name])
        check.end_to_end += int(bad.sum())
        clean = unmoved(whole.quantizers(name), bad)
        check.unexplained += int((bad & ~near[name])[clean].sum())
        flipped[name] = bad.flatten(1).any(1) if bad.ndim > 1 else bad
    return unmoved


def _judge(report: VerifyReport) -> None:
    """Find the first difference in execution order."""
    found = []
    for w in report.weights:
        if w.differences:
            found.append((w.position, w.name, f"{w.differences} of {w.elements} weight codes differ"))
    for a in report.activations:
        if a.input_differences:
            what = f"{a.input_differences} of {a.elements} activations reach {a.name} with another code"
            found.append((a.position, ", ".join(a.layers) or a.name, what))
        if a.differences or a.probe_differences:
            seen = (a.differences, a.elements) if a.differences else (a.probe_differences, a.probes)
            kind = "activations" if a.differences else "numbers beside thresholds"
            found.append((a.position, a.name, f"{seen[0]} of {seen[1]} {kind} leave the quantizer with another code"))
        if a.unexplained:
            what = f"{a.unexplained} of {a.elements} activations have another code end to end, without a tie before"
            found.append((a.position, ", ".join(a.layers) or a.name, what))
    last = max((x.position for x in (*report.weights, *report.activations)), default=0) + 1
    for o in report.outputs:
        if o.differs:
            error = max(o.max_error, o.without_ties)
            found.append((last, ", ".join(o.layers) or o.name, f"output {o.name} deviates by {error:.3g}"))
    report.ok = not found
    if found:
        _, report.first_difference, report.detail = min(found, key=lambda f: f[0])
