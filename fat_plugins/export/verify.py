"""Proof that an exported model computes what was trained: integer codes, layer by layer, torch against the runtime.

Three comparisons. Weights: the codes as the runtime reads them, exactly. Activations, teacher-forced: every quantizer
of the file is fed with torch's own tensor, so that an error shows in the layer that makes it and nowhere else. End to
end: the model as it runs, where one flipped tie may cascade; reported, not judged.

:func:`compare` does this for any runtime that offers a :class:`Target`; :func:`verify` is its use with OpenVINO.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fat_plugins.errors import ExportError
from fat_plugins.export.common import as_inputs, first_line, on_device, reading, unique
from fat_plugins.export.verify_report import ActivationCheck, OutputCheck, VerifyReport, WeightCheck
from fat_plugins.forms import UniformGrid, grids
from fat_plugins.frozen import FrozenActivation, FrozenWeight, frozen_modules

#: activations held at once, in elements; larger batches are compared in slices
_BUDGET = 2**24
#: codes are compared as real numbers in units of the step: this much relative deviation is float noise
_STEP_TOLERANCE = 1e-3
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
    :param tie_guard: in steps of a grid of up to 16 codes; a code may differ where torch's value lies this close to a
        rounding threshold. Wider grids have it in proportion (17 times at 8 bits), as float32 rounding is relative.
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


def _steps(module: FrozenActivation, x: Tensor) -> Tensor:
    """``x`` in units of the scale, float64."""
    scale = module.form.scale.double()
    if scale.numel() > 1:
        view = [1] * x.ndim
        view[module.form.channel_axis] = scale.numel()
        scale = scale.reshape(view)
    return x.double() / scale


def _differs(module: FrozenActivation, values: Tensor, codes: Tensor) -> Tensor:
    """Where quantized ``values`` of the runtime are not what ``codes`` stand for. Not rounded or clipped on the way, so
    that a wrong scale or a missing clamp shows."""
    wanted = module.form.integers(codes).double()
    return ~((_steps(module, values) - wanted).abs() <= _STEP_TOLERANCE * wanted.abs().clamp(min=1))


def _guard(module: FrozenActivation, tie_guard: float) -> float:
    """The tie guard of one quantizer in its own steps."""
    form = module.form
    ends = torch.tensor([form.low, form.high]) if isinstance(form, UniformGrid) else form.levels
    return tie_guard * max(1.0, float(ends.abs().max()) / 15)


def _off_tie(module: FrozenActivation, x: Tensor, codes: Tensor, where: Tensor, guard: float) -> Tensor:
    """``x`` moved away from the threshold, within torch's own code, where the runtime decided a tie otherwise."""
    step = (x / _steps(module, x).clamp(min=1e-30)).abs() if module.form.scale.numel() > 1 else module.form.scale
    out = x.clone()
    for move in (4 * guard, -4 * guard):
        moved = (x.double() + move * step).to(x.dtype)
        out = torch.where(where & (module.form.encode(moved) == codes), moved, out)
    return out


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
    codes = {name: calls.modules["activation", name].form.encode(x) for name, x in feed.items()}
    arrays = [x.cpu().numpy() for x in inputs]
    result = forced.run(arrays, feed)
    flipped = False
    for check in report.activations:
        name, module = check.name, calls.modules["activation", check.name]
        bad = _differs(module, torch.from_numpy(result.quantized[name]), codes[name])
        tie = bad & (module.form.ties(feed[name]) < _guard(module, report.tie_guard))
        check.elements += bad.numel()
        check.ties += int(tie.sum())
        check.differences += int((bad & ~tie).sum())
        if bool(tie.any()):
            feed[name], flipped = _off_tie(module, feed[name], codes[name], tie, _guard(module, report.tie_guard)), True
    if flipped:  # the layers behind a tie must see torch's code
        result = forced.run(arrays, feed)
    end_to_end = whole.run(arrays, {})
    for check in report.activations:
        name, module = check.name, calls.modules["activation", check.name]
        x, computed = calls.inputs[name].float(), torch.from_numpy(result.computed[name])
        bad = module.form.encode(computed) != codes[name]
        tie = bad & (module.form.ties(x) < _guard(module, report.tie_guard))
        check.input_ties += int(tie.sum())
        check.input_differences += int((bad & ~tie).sum())
        check.max_error = max(check.max_error, _input_error(module, x, computed))
        quantized = torch.from_numpy(end_to_end.quantized[name])
        check.end_to_end += int(_differs(module, quantized, codes[name]).sum())
    if len(calls.outputs) != len(report.outputs):
        raise ExportError(
            f"the model has {len(calls.outputs)} outputs in torch and {len(report.outputs)} in the {target.file}"
        )
    for i, check in enumerate(report.outputs):
        wanted = calls.outputs[i].double().numpy()
        largest = float(np.abs(wanted).max()) if wanted.size else 0.0
        check.elements += wanted.size
        check.allowed = max(check.allowed, _OUTPUT_TOLERANCE * largest + 1e-6)
        check.max_error = max(check.max_error, _largest(result.outputs[i], wanted))
        check.end_to_end = max(check.end_to_end, _largest(end_to_end.outputs[i], wanted))


def _largest(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    error = float(np.abs(found.astype(np.float64) - wanted).max()) if wanted.size else 0.0
    return error if error == error else float("inf")


def _input_error(module: FrozenActivation, x: Tensor, computed: Tensor) -> float:
    """Largest deviation in steps, both clipped to the ends of the grid."""
    form = module.form
    ends = (form.low, form.high) if isinstance(form, UniformGrid) else (int(form.levels[0]), int(form.levels[-1]))
    a, b = (_steps(module, v).clamp(*ends) for v in (x, computed))
    return float((a - b).abs().max()) if a.numel() else 0.0


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
        if a.differences:
            what = f"{a.differences} of {a.elements} activations leave the quantizer with another code"
            found.append((a.position, a.name, what))
    last = max((x.position for x in (*report.weights, *report.activations)), default=0) + 1
    for o in report.outputs:
        if o.differs:
            found.append((last, ", ".join(o.layers) or o.name, f"output {o.name} deviates by {o.max_error:.3g}"))
    report.ok = not found
    if found:
        _, report.first_difference, report.detail = min(found, key=lambda f: f[0])
