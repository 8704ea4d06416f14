"""Deployed = trained, for every algorithm in the registry on every target.

    python tests/equality/driver.py --json equality.json

Without ``--everything`` each weight setting and each activation setting of an algorithm (options, width, granularity,
sign) occurs at least once; with it, every pair of the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("NNCF_CI", "1")

import torch
from banks import Bank, plans
from compare import GUARD, HERE, Tally, compare

from fat_plugins import algorithms
from fat_plugins.export._codes import input_guard
from fat_plugins.export.verify import _record


def near_ties(bank: Bank, counts: dict[int, list[int]]) -> None:
    """Of random inputs: how many activations of each width lie within the tie guard, and how many there are."""
    calls = _record(bank, bank.inputs(8, seed=9))
    for branch in bank.branches:
        if branch.plan.data != "random":
            continue
        for module in branch.activations:
            x, row = calls.inputs[module.name], counts.setdefault(module.form.bits, [0, 0])
            row[0] += int((module.form.ties(x) < input_guard(module.form, GUARD)).sum())
            row[1] += x.numel()


def run(name: str, options: argparse.Namespace, near: dict[int, list[int]]) -> tuple[dict[str, Tally], int]:
    """All banks of one algorithm; also counts outputs in which the frozen model is not the trained one."""
    found = plans(name, options.seed, options.everything)
    tallies, unlike = {target: Tally() for target in options.targets}, 0
    with tempfile.TemporaryDirectory(prefix="equality-") as folder:
        for number, start in enumerate(range(0, len(found), options.size)):
            bank = Bank(found[start : start + options.size], number)
            inputs = bank.inputs(3)
            with torch.no_grad():
                trained = bank(*inputs)
                frozen = bank.freeze()(*inputs)
            unlike += sum(not torch.equal(a, b) for a, b in zip(trained, frozen, strict=True))
            near_ties(bank, near)
            for target in options.targets:
                path = Path(folder) / f"{target}{HERE[target].suffix}"
                tally, _ = compare(copy.deepcopy(bank), HERE[target], path)
                tallies[target].add(tally)
                if tally.first:
                    print(f"  {target} bank {number}: {tally.first}", flush=True)
    return tallies, unlike


def table(rows: dict[str, dict[str, Tally]]) -> str:
    """Markdown for the docs."""
    lines = [
        "| algorithm | target | branches | refused | codes | ties | differences |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    total: dict[str, Tally] = {}
    for name, tallies in rows.items():
        for target, tally in tallies.items():
            total.setdefault(target, Tally()).add(tally)
            lines.append(_row(name, target, tally))
    return "\n".join(lines + [_row("all", target, tally) for target, tally in total.items()])


def _row(name: str, target: str, tally: Tally) -> str:
    numbers = (
        tally.branches,
        sum(tally.refused.values()),
        tally.codes + tally.deployed,
        tally.ties,
        tally.differences + tally.deployed_differences,
    )
    return f"| {name} | {HERE[target].runtime} | " + " | ".join(f"{n:,}" for n in numbers) + " |"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", action="append", help="only this one; may be repeated")
    parser.add_argument("--target", action="append", dest="targets", choices=list(HERE), help="only this one")
    parser.add_argument("--everything", action="store_true", help="every weight with every activation (hours)")
    parser.add_argument("--size", type=int, default=16, help="branches in one model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.targets = options.targets or list(HERE)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, near, unlike, start = {}, {}, 0, perf_counter()
    for name in options.algorithm or algorithms():
        begin = perf_counter()
        rows[name], other = run(name, options, near)
        unlike += other
        for target, tally in rows[name].items():
            print(f"{_row(name, target, tally)} {tally.refused or ''}", flush=True)
        print(f"  {perf_counter() - begin:.0f} s", flush=True)
    share = {bits: f"{100 * a / b:.3f} % of {b:,}" for bits, (a, b) in sorted(near.items())}
    print(table(rows))
    print(f"within the tie guard, random inputs, by width: {share}")
    print(f"frozen models unlike the trained ones: {unlike}; seed {options.seed}, {perf_counter() - start:.0f} s")
    if options.json:
        data = {name: {t: vars(tally) for t, tally in tallies.items()} for name, tallies in rows.items()}
        text = {"seed": options.seed, "algorithms": data, "near": near, "frozen_unlike_trained": unlike}
        options.json.write_text(json.dumps(text, indent=2) + "\n")
    bad = sum(t.differences + t.deployed_differences for tallies in rows.values() for t in tallies.values())
    return 1 if bad or unlike else 0


if __name__ == "__main__":
    sys.exit(main())
