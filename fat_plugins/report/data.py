"""What a report says, as data: the JSON file beside the page, and all that the page shows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fat_plugins.recipes.tasks import ACCURACY

#: layout of the JSON; raised when a key changes its meaning or goes away (new keys do not count)
FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Tile(_Part):
    """One number of the headline."""

    title: str
    value: str
    note: str = ""
    #: False: something that was checked failed
    good: bool | None = None


class Metric(_Part):
    """What stands in the place of accuracies. It is shown times ``factor`` with ``unit`` behind it, differences with
    ``difference``."""

    name: str = ACCURACY.name
    unit: str = ACCURACY.unit
    difference: str = ACCURACY.difference
    factor: float = ACCURACY.factor
    higher_is_better: bool = ACCURACY.higher_is_better

    @property
    def title(self) -> str:
        """The name at the beginning of a line."""
        return self.name[:1].upper() + self.name[1:]


class Accuracy(_Part):
    """One variant of the run over all its seeds; accuracies 0 to 1 on the test images, or what ``metric`` says."""

    name: str
    kind: Literal["float", "own", "baseline"]
    seeds: list[int]
    torch: list[float]
    #: by the runtime of each deployed file
    deployed: dict[str, list[float]] = Field(default_factory=dict)
    weights_bytes: int | None = None
    float_bytes: int | None = None


class Epoch(_Part):
    """One epoch of training."""

    lr: float | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Curve(_Part):
    """One phase of training of one variant with one seed; ``before``: quantized, not trained yet."""

    name: str
    kind: Literal["float", "own", "baseline"]
    seed: int
    stage: int = 0
    before: Epoch | None = None
    epochs: list[Epoch]


class Histogram(_Part):
    """Values of one tensor and the grid that they are rounded to.

    :param unit: ``"value"``, or ``"step"`` where every channel has a scale of its own and values are counted in it.
    :param edges, counts: bins, one edge more than counts.
    :param levels: what the values become, ascending; thresholds: where one level ends and the next begins. Empty where
        there are too many to show, or where the value alone does not decide.
    """

    unit: Literal["value", "step"] = "value"
    edges: list[float] = Field(default_factory=list)
    counts: list[int] = Field(default_factory=list)
    levels: list[float] = Field(default_factory=list)
    thresholds: list[float] = Field(default_factory=list)


class Codes(_Part):
    """How often every code occurs, in the order of the levels."""

    codes: list[int] = Field(default_factory=list)
    counts: list[int] = Field(default_factory=list)


class Tensor(_Part):
    """One quantized tensor. ``None``: not known, or it does not apply.

    :param scale: lowest and highest; ``channels`` is how many there are.
    :param bytes: codes at their width and float32 scales; ``storage``, ``stored_bytes``, ``kernel`` and ``speed`` are
        those of the deployed file.
    :param macs: multiply-accumulates of the layer for one sample; ``bops`` = macs x bits x ``input_bits`` (32 where the
        input is not quantized).
    :param sqnr_db, relative_mse: of the quantized tensor against what was rounded, after the one factor that fits best.
    :param float_sqnr_db, float_relative_mse: the same against the weight of the float network that training began with;
        ``float_gain`` is the factor.
    :param clipped: share of activations outside of the levels.
    """

    name: str
    kind: Literal["weight", "activation"]
    algorithm: str = ""
    bits: int
    form: str
    shape: list[int] = Field(default_factory=list)
    scale: tuple[float, float]
    channels: int = 1
    zeros: float | None = None
    code_range: tuple[int, int] | None = None
    codes_used: int | None = None
    codes: int
    bytes: int | None = None
    storage: str | None = None
    stored_bytes: int | None = None
    kernel: str | None = None
    speed: str | None = None
    macs: int | None = None
    bops: int | None = None
    input: str | None = None
    input_bits: int | None = None
    sqnr_db: float | None = None
    relative_mse: float | None = None
    float_sqnr_db: float | None = None
    float_relative_mse: float | None = None
    float_gain: float | None = None
    clipped: float | None = None
    histogram: Histogram = Field(default_factory=Histogram)
    code_histogram: Codes = Field(default_factory=Codes)


class OverTime(_Part):
    """What one quantizer or coordinator said after every epoch (``None`` where it said nothing), by name."""

    name: str
    kind: Literal["weight", "activation", "network"]
    values: dict[str, list[float | None]]


class Drawing(_Part):
    """A figure that an algorithm offers; the fields are those of :class:`fat_plugins.Figure`."""

    layer: str
    title: str
    kind: Literal["image", "curve", "bars"]
    x_label: str = ""
    y_label: str = ""
    x: list[Any] = Field(default_factory=list)
    series: dict[str, list[float]] = Field(default_factory=dict)
    rows: list[list[float]] = Field(default_factory=list)
    limits: tuple[float, float] | None = None


class CheckRow(_Part):
    """Codes of one tensor in torch and in the deployed file; ``None``: not compared."""

    name: str
    kind: str
    compared: int | None
    differences: int | None
    ties: int | None


class Check(_Part):
    """One deployed file."""

    runtime: str
    file: str
    file_bytes: int
    weights_bytes: int
    verified: bool | None
    rows: list[CheckRow]
    notes: list[str] = Field(default_factory=list)


class Totals(_Part):
    """Of one forward of one sample.

    :param macs: multiply-accumulates with quantized weights, ``float_macs`` with others.
    :param bops: bit operations of all of them; ``float_bops`` if all were 32 x 32 bits.
    """

    macs: int
    float_macs: int
    bops: int
    float_bops: int


class ReportData(_Part):
    """A whole report."""

    format: int = FORMAT
    name: str
    title: str
    algorithm: str
    fidelity: str = ""
    metric: Metric = Field(default_factory=Metric)
    headline: list[Tile] = Field(default_factory=list)
    accuracy: list[Accuracy] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    totals: Totals | None = None
    tensors: list[Tensor] = Field(default_factory=list)
    over_time: list[OverTime] = Field(default_factory=list)
    figures: list[Drawing] = Field(default_factory=list)
    network: dict[str, float] = Field(default_factory=dict)
    checks: list[Check] = Field(default_factory=list)
    facts: dict[str, str] = Field(default_factory=dict)
    #: what could not be shown, and why
    missing: list[str] = Field(default_factory=list)


__all__ = [
    "FORMAT",
    "Accuracy",
    "Check",
    "CheckRow",
    "Codes",
    "Curve",
    "Drawing",
    "Epoch",
    "Histogram",
    "Metric",
    "OverTime",
    "ReportData",
    "Tensor",
    "Tile",
    "Totals",
]
