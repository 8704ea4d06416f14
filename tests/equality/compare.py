"""One bank through one target: everything that the verifier compares, on random and on crafted inputs."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from banks import Bank, random_input
from torch import Tensor

from fat_plugins import ExportError
from fat_plugins.export._codes import differs, input_guard, quantizer_guard
from fat_plugins.export.probes import fill, points
from fat_plugins.export.verify import _record
from fat_plugins.recipes.targets import TARGETS, Target

GUARD = 1e-4
#: targets of which the packages are installed
HERE = {name: t for name, t in TARGETS.items() if all(find_spec(p) is not None for p in (*t.packages, "onnx"))}


@dataclass
class Tally:
    """Counts of one algorithm and target.

    :param codes: integers compared: of weights, of activations that a quantizer gives and that reach it, and of probes.
    :param ties, differences: those that differ, within and outside the tie guard.
    :param deployed, deployed_differences: codes of the file executed as it is, and those that no tie explains.
    :param refused: branches that the exporter refuses, with the reason.
    """

    branches: int = 0
    codes: int = 0
    differences: int = 0
    ties: int = 0
    deployed: int = 0
    deployed_differences: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def add(self, other: Tally) -> None:
        """Add the counts of another bank."""
        for name, value in asdict(other).items():
            if name == "refused":
                for reason, count in value.items():
                    self.refused[reason] = self.refused.get(reason, 0) + count
            elif name != "first":
                setattr(self, name, getattr(self, name) + value)
        self.first = self.first or other.first


def crafted(bank: Bank, batch: int) -> tuple[Tensor, ...]:
    """Inputs on, beside and far from every threshold of the first quantizers."""
    out = []
    for branch, like in zip(bank.branches, bank.inputs(batch), strict=True):
        form = branch.first.form
        out.append(fill(like.shape, points(form, 2 * quantizer_guard(form, GUARD), ulps=2).clamp(-1e4, 1e4), 1))
    return tuple(out)


def batches(bank: Bank, random: int = 5, around: int = 6, seed: int = 1) -> tuple[Tensor, ...]:
    """Random images, crafted ones, zeros and constants, as one batch."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for branch, hard in zip(bank.branches, crafted(bank, around), strict=True):
        x = random_input(branch.plan, random, generator)
        same = [torch.full_like(x[:1], value) for value in (0.0, -0.0, 0.3)]
        out.append(torch.cat([x, hard, *same]))
    return tuple(out)


def fitting(bank: Bank, target: Target, path: Path, refused: dict[str, int]) -> Bank | None:
    """The branches that the target takes, exported; ``None`` when there are none."""
    while len(bank.branches):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what runs in float is said there
                target.export(bank, path, bank.inputs(2))
            return bank
        except ExportError as error:
            name, _, reason = str(error).partition(": ")
            left = [b for b in bank.branches if b.name != name.partition(".")[0]]
            if len(left) == len(bank.branches):
                raise
            refused[reason] = refused.get(reason, 0) + 1
            bank.branches = torch.nn.ModuleList(left)
    return None


def compare(bank: Bank, target: Target, path: Path) -> tuple[Tally, Any]:
    """Export a frozen bank, verify it, probe every threshold to the ulp, and execute the file as it is.

    The bank loses the branches that the target refuses.
    """
    tally = Tally()
    if fitting(bank, target, path, tally.refused) is None:
        return tally, None
    tally.branches = len(bank.branches)
    inputs = batches(bank)
    report = target.verify(bank, path, inputs)
    tally.codes = sum(w.elements for w in report.weights) + sum(2 * a.elements + a.probes for a in report.activations)
    tally.differences = sum(w.differences for w in report.weights) + sum(a.all_differences for a in report.activations)
    tally.differences += sum(o.differs for o in report.outputs)
    tally.ties = report.ties
    tally.first = f"{_where(bank, report.first_difference)}: {report.detail}" if report.first_difference else ""
    for batch in (1, 3):
        _deployed(bank, target, path, bank.inputs(batch, seed=batch), tally)
    return tally, report


def _where(bank: Bank, name: str) -> str:
    plans = {b.name: str(b.plan) for b in bank.branches}
    return f"{name} ({plans.get(name.partition('.')[0], '')})"


def _deployed(bank: Bank, target: Target, path: Path, inputs: tuple[Tensor, ...], tally: Tally) -> None:
    """The file as users run it, on random inputs: its outputs are codes."""
    calls = _record(bank, inputs)
    found = import_module(target.module).execute(path, [x.numpy() for x in inputs])
    for branch, wanted, values in zip(bank.branches, calls.outputs, found, strict=True):
        x, form = calls.inputs[branch.second.name], branch.second.form
        bad = differs(form, torch.from_numpy(values), form.encode(x))
        # a tie of a quantizer moves everything that is computed from it
        moved = torch.zeros(len(wanted), *[1] * (wanted.ndim - 1), dtype=torch.bool)
        for module in branch.activations[:-1]:
            guard = quantizer_guard if module is branch.first else input_guard
            close = module.form.ties(calls.inputs[module.name]) < guard(module.form, GUARD)
            moved |= close.flatten(1).any(1).view_as(moved)
        explained = moved | (form.ties(x) < input_guard(form, GUARD))
        tally.deployed += bad.numel()
        tally.ties += int((bad & explained).sum())
        tally.deployed_differences += int((bad & ~explained).sum())
        if bool((bad & ~explained).any()):
            tally.first = tally.first or f"{_where(bank, branch.name)}: the file as it is gives other codes"
