"""Looking at models from Python: what is quantized and how (:func:`summary`), what it changed (:func:`compare`).

Both work on the models of every host, on frozen ones, and on plain models in which quantizers stand.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fat_plugins.errors import QuantizationError
from fat_plugins.forms import Form, form_kind
from fat_plugins.frozen import FrozenActivation, FrozenWeight
from fat_plugins.measure import code_count, cosine, error_of, packed_bytes, scale_text, sqnr_text
from fat_plugins.network import named_quantizers
from fat_plugins.placed import float_weights, network_facts
from fat_plugins.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer

if TYPE_CHECKING:
    from rich.table import Table

#: columns of a table printed as text
_WIDTH = 200


class _Shown:
    """Something with a title, a header and rows of text, for terminals and notebooks."""

    def _title(self) -> str:
        raise NotImplementedError

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        raise NotImplementedError

    def _notes(self) -> list[str]:
        return []

    def __rich__(self) -> Table:
        header, rows = self._cells()
        # here, since the import draws from Python's random numbers
        from rich.markup import escape
        from rich.table import Table

        caption = escape("\n".join(self._notes())) or None
        table = Table(title=escape(self._title()), title_justify="left", caption=caption, caption_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=_WIDTH)
        console.print(self.__rich__())
        return console.file.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        header, rows = self._cells()
        cells = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"]
        cells += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table><caption>{html.escape(self._title())}</caption>{''.join(cells)}</table>{notes}"


# --------------------------------------------------------------------------------------------------------------------
# summary
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerSummary:
    """One quantized tensor. ``None``: not known, or it does not apply.

    :param role: ``"weight"`` or ``"activation"``.
    :param algorithm: empty in frozen models, which have none any more.
    :param form: kind of the deployed form.
    :param shape: of the weight.
    :param scale: lowest and highest scale.
    :param zeros: share of weights that are zero.
    :param code_range: lowest and highest code in use.
    :param codes_used, codes: how many different codes occur, and how many the form has.
    :param bytes: codes at their width and float32 scales.
    :param sqnr_db: of the quantized weight against what was rounded, in dB, after the one factor that fits best (some
        algorithms learn levels apart from thresholds).
    """

    name: str
    role: str
    quantizer: str
    algorithm: str
    bits: int
    form: str | None = None
    shape: tuple[int, ...] = ()
    scale: tuple[float, float] | None = None
    zeros: float | None = None
    code_range: tuple[int, int] | None = None
    codes_used: int | None = None
    codes: int | None = None
    bytes: int | None = None
    sqnr_db: float | None = None
    calibrated: bool = True
    enabled: bool = True


@dataclass(frozen=True)
class Summary(_Shown):
    """What :func:`summary` gives; print it, or show it in a notebook."""

    model: str
    layers: list[LayerSummary] = field(default_factory=list)
    #: what algorithms tell of the whole network, such as compression rates
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(row.bytes or 0 for row in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return sum(4 * torch.Size(row.shape).numel() for row in self.layers if row.shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        layers = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(r).items()} for r in self.layers]
        return {
            "model": self.model,
            "weight_bytes": self.weight_bytes,
            "float_bytes": self.float_bytes,
            "layers": layers,
            "facts": self.facts,
        }

    def _notes(self) -> list[str]:
        return [f"{name}: {value:.4g}" for name, value in self.facts.items()]

    def _title(self) -> str:
        ratio = f", {self.float_bytes / self.weight_bytes:.2f} times smaller than float32" if self.weight_bytes else ""
        return f"{self.model}: {self.weight_bytes:,} B of quantized weights{ratio}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["layer", "tensor", "algorithm", "bits", "form", "shape", "scale", "zeros", "codes", "used", "bytes"]
        header.append("SQNR dB")
        return header, [_summary_cells(row) for row in self.layers]


def _summary_cells(row: LayerSummary) -> list[str]:
    state = "" if row.enabled else " (disabled)"
    state += "" if row.calibrated else " (not calibrated)"
    low, high = row.code_range or (None, None)
    return [
        row.name,
        row.role + state,
        row.algorithm or "-",
        str(row.bits),
        row.form or "-",
        "x".join(map(str, row.shape)) or "-",
        "-" if row.scale is None else scale_text(torch.tensor(row.scale)),
        "-" if row.zeros is None else f"{row.zeros:.1%}",
        "-" if low is None else f"{low} .. {high}",
        "-" if row.codes_used is None else f"{row.codes_used} of {row.codes}",
        "-" if row.bytes is None else f"{row.bytes:,}",
        sqnr_text(row.sqnr_db),
    ]


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """What is quantized in ``model`` and how, one row per tensor.

    :param model: of any host, or a frozen one. It is left as it is.
    :raises QuantizationError: nothing in it is quantized by this package.
    """
    weights = float_weights(model)
    rows = [_row_of(name, q, weights.get(q)) for name, q in named_quantizers(model)]
    for path, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            rows.append(_frozen_row(module.name or path, "weight", module, module.form, module.codes))
        elif isinstance(module, FrozenActivation):
            rows.append(_frozen_row(module.name or path, "activation", module, module.form))
    if not rows:
        raise QuantizationError(f"{type(model).__name__} holds no quantizer of fat-plugins: nothing to summarize")
    return Summary(type(model).__name__, rows, network_facts(model))


def _row_of(path: str, quantizer: Quantizer, weight: Tensor | None) -> LayerSummary:
    spec, form, codes, error = quantizer.spec, None, None, None
    if isinstance(quantizer, WeightQuantizer) and weight is not None and quantizer.calibrated:
        codes, form = quantizer.freeze(weight)
        if not quantizer.owns_weight:
            error = error_of(quantizer.rounded(weight), form.decode(codes), fit=True)
    elif isinstance(quantizer, ActivationQuantizer) and quantizer.calibrated:
        form = quantizer.nominal_form()
    return LayerSummary(
        spec.name or path,
        spec.role,
        type(quantizer).__name__,
        quantizer.algorithm,
        quantizer.bits,
        shape=tuple(spec.shape),
        sqnr_db=error.sqnr_db if error else None,
        calibrated=quantizer.calibrated,
        enabled=quantizer.enabled,
        **_form_facts(form, codes),
    )


def _frozen_row(name: str, role: str, module: nn.Module, form: Form | None, codes: Tensor | None = None):
    facts, shape = _form_facts(form, codes), tuple(codes.shape) if codes is not None else ()
    bits = form.bits if form is not None else 0
    return LayerSummary(name, role, type(module).__name__, "", bits, shape=shape, calibrated=form is not None, **facts)


def _form_facts(form: Form | None, codes: Tensor | None) -> dict[str, Any]:
    if form is None:
        return {}
    facts: dict[str, Any] = {
        "form": form_kind(form),
        "scale": (float(form.scale.min()), float(form.scale.max())),
        "codes": code_count(form),
    }
    if codes is not None:
        used = codes.unique()
        facts["zeros"] = float((form.decode(codes) == 0).double().mean())
        facts["code_range"] = (int(used[0]), int(used[-1]))
        facts["codes_used"] = used.numel()
        facts["bytes"] = packed_bytes(codes.numel(), form)
    return facts


# --------------------------------------------------------------------------------------------------------------------
# compare
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerDifference:
    """One layer of two models; the first is the reference. ``None``: not known, or the reference is all zero.

    Some algorithms scale a layer that a batch norm follows, which takes it out again. So outputs and weights of layers
    are compared after the one factor (gain) on the second model's that makes the difference smallest.

    :param sqnr_db, gain: of the outputs, in dB, and their factor; the output of the model has none.
    :param cosine: of the outputs.
    :param largest: largest difference of the outputs, behind the factor.
    :param weight_sqnr_db, weight_gain: of the weights as they are used.
    """

    name: str
    sqnr_db: float | None
    gain: float | None
    cosine: float | None
    largest: float
    weight_sqnr_db: float | None = None
    weight_gain: float | None = None


@dataclass(frozen=True)
class Comparison(_Shown):
    """What :func:`compare` gives. ``layers`` in the order in which they run, ``output`` is that of the whole model."""

    models: tuple[str, str]
    layers: list[LayerDifference]
    output: LayerDifference
    unmatched: tuple[list[str], list[str]] = ((), ())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "models": list(self.models),
            "layers": [asdict(row) for row in self.layers],
            "output": asdict(self.output),
            "unmatched": [list(names) for names in self.unmatched],
        }

    def _title(self) -> str:
        left = sum(len(names) for names in self.unmatched)
        return f"{self.models[0]} against {self.models[1]}" + (f"; {left} layers in one of them only" if left else "")

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["layer", "output SQNR dB", "gain", "cosine", "largest difference", "weight SQNR dB", "weight gain"]

        def text(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        return header, [
            [
                row.name,
                sqnr_text(row.sqnr_db),
                text(row.gain, ".3g"),
                text(row.cosine, ".4f"),
                text(row.largest, ".3g"),
                sqnr_text(row.weight_sqnr_db),
                text(row.weight_gain, ".3g"),
            ]
            for row in [*self.layers, self.output]
        ]


@torch.no_grad()
def compare(model_a: nn.Module, model_b: nn.Module, example: Any) -> Comparison:
    """Outputs and weights of two models, layer by layer, in evaluation mode: float against quantized, for instance.

    Layers (modules with a weight of two or more dimensions) are matched by their names.

    :param model_a: the reference.
    :param example: an input of both: a tensor, a tuple of arguments or a dictionary of keyword arguments.
    :raises QuantizationError: no layer has the same name in both, or outputs have different shapes.
    """
    layers_a, layers_b = _layers(model_a), _layers(model_b)
    common = [name for name in layers_a if name in layers_b]
    if not common:
        raise QuantizationError(
            f"no layer of {type(model_a).__name__} ({_some(layers_a)}) has the name of one of "
            f"{type(model_b).__name__} ({_some(layers_b)}): give two versions of one model"
        )
    outputs_a, whole_a = _outputs(model_a, {n: layers_a[n] for n in common}, example)
    outputs_b, whole_b = _outputs(model_b, {n: layers_b[n] for n in common}, example)
    weights_a, weights_b = _weights(model_a, layers_a), _weights(model_b, layers_b)
    rows = [
        _difference(name, output, outputs_b[name], weights_a.get(name), weights_b.get(name))
        for name, output in outputs_a.items()
        if name in outputs_b
    ]
    return Comparison(
        (type(model_a).__name__, type(model_b).__name__),
        rows,
        _difference("(output)", whole_a, whole_b, fit=False),
        ([n for n in layers_a if n not in layers_b], [n for n in layers_b if n not in layers_a]),
    )


def _some(layers: Mapping[str, Any]) -> str:
    names = list(layers)
    return (", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "no layers"


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a weight, by name; parts of quantizers left out."""
    inside = {id(m) for _, q in named_quantizers(model) for m in q.modules()}
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if id(module) not in inside else None
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            found[_plain(name)] = module
    return found


def _plain(name: str) -> str:
    """The name without what hosts and torch wrap around models and frozen layers."""
    dropped = ("module", "layer", "nncf_module")
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in dropped:
        parts = parts[1:]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "layer" else parts)


def _tensor(value: Any) -> Tensor | None:
    """The tensor in what a layer gives: itself, that of a tensor class of Brevitas, or the first of several."""
    if isinstance(value, Tensor):
        return value.detach()
    inner = getattr(value, "value", None)
    if isinstance(inner, Tensor):
        return inner.detach()
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return _tensor(value[0]) if isinstance(value, (tuple, list)) and value else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _outputs(model: nn.Module, layers: dict[str, nn.Module], example: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of layers in the order of their first call, flat, and that of the model."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if (tensor := _tensor(out)) is not None:
                found.setdefault(name, []).append(tensor.float().flatten().clone())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        with _evaluating(model):
            if isinstance(example, Mapping):
                out = model(**example)
            else:
                out = model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
    whole = _tensor(out)
    if whole is None:
        raise QuantizationError(f"{type(model).__name__} gives {type(out).__name__}, expected a tensor")
    return {name: torch.cat(parts) for name, parts in found.items()}, whole.float().flatten()


def _weights(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Weights as they are used: quantized ones as deployed, the others as they are."""
    found = {name: layer.weight.detach() for name, layer in layers.items()}
    for quantizer, weight in float_weights(model).items():
        if quantizer.enabled and quantizer.calibrated and _plain(quantizer.spec.name) in found:
            codes, form = quantizer.freeze(weight)
            found[_plain(quantizer.spec.name)] = form.decode(codes)
    for module in model.modules():
        if isinstance(module, FrozenWeight) and _plain(module.name) in found:
            found[_plain(module.name)] = module.form.decode(module.codes)
    return found


def _difference(
    name: str,
    a: Tensor,
    b: Tensor,
    weight_a: Tensor | None = None,
    weight_b: Tensor | None = None,
    *,
    fit: bool = True,
) -> LayerDifference:
    if a.shape != b.shape:
        raise QuantizationError(f"{name}: the outputs have {a.numel()} and {b.numel()} elements: give equal models")
    b = b.to(a.device)
    error, weight = error_of(a, b, fit=fit), None
    if weight_a is not None and weight_b is not None and weight_a.shape == weight_b.shape:
        weight = error_of(weight_a, weight_b, fit=True)
    return LayerDifference(
        name,
        error.sqnr_db if error else None,
        error.gain if error and fit else None,
        cosine(a, b),
        float((a - (error.gain if error else 1.0) * b).abs().max()) if a.numel() else 0.0,
        weight.sqnr_db if weight else None,
        weight.gain if weight else None,
    )


__all__ = ["Comparison", "LayerDifference", "LayerSummary", "Summary", "compare", "summary"]
