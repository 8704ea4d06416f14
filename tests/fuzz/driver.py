"""Feeds the program with bad inputs and counts what comes of them.

    python tests/fuzz/driver.py --inputs 12000

The same numbers give the same inputs: ``--kind recipes --only 17`` runs one of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("NNCF_CI", "1")
os.environ.setdefault("NO_COLOR", "1")

import kinds_text
from harness import Tally, judge
from programs import without_hosts

#: bytes of address space: an input that asks for more gets an error instead of the machine
ADDRESSES = 8 * 2**30


def kinds() -> list[type]:
    """What can be damaged, of which the packages are installed."""
    from importlib.util import find_spec

    if find_spec("torchvision") is not None:
        from torchvision_shim import import_torchvision

        import_torchvision()
    found = [*kinds_text.KINDS]
    for name in ("kinds_runs", "kinds_data", "kinds_exports"):
        if (Path(__file__).parent / f"{name}.py").exists():
            found += __import__(name).KINDS
    return [kind for kind in found if all(find_spec(p) is not None for p in kind.needs)]


def run(kind: type, seed: int, numbers: Any, report: Any = print) -> Tally:
    """Inputs ``numbers`` of one kind."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder).resolve() / "work"
        place.mkdir()
        before = os.getcwd()
        os.chdir(place)
        try:
            maker = kind(place)
            for number in numbers:
                case = maker.case(Random(f"{seed}/{kind.name}/{number}"))
                verdict = judge(case)
                tally.add(verdict, f"{kind.name} {number} ({case.what[:100]})")
                if verdict.status == "defect" and report:
                    report(tally.defects[-1])
        finally:
            os.chdir(before)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only kinds whose name begins like that")
    parser.add_argument("--only", type=int, help="only this input of a kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    warnings.simplefilter("ignore")
    all_kinds = kinds()
    whole = sum(kind.share for kind in all_kinds)
    table, start = {}, perf_counter()
    with without_hosts():
        for kind in all_kinds:
            if options.kind and not kind.name.startswith(options.kind):
                continue
            count = max(1, round(options.inputs * kind.share / whole))
            numbers = range(count) if options.only is None else [options.only]
            begin = perf_counter()
            tally = run(kind, options.seed, numbers)
            table[kind.name] = {
                "inputs": len(numbers), "refused": tally.refused, "valid after all": tally.accepted,
                "defects": len(tally.defects), "slowest, s": round(tally.slowest[0], 1),
                "all, s": round(perf_counter() - begin),
            }  # fmt: skip
            print(f"{kind.name}: {table[kind.name]} slowest: {tally.slowest[1]}", flush=True)
    total = {
        key: sum(row[key] for row in table.values()) for key in ("inputs", "refused", "valid after all", "defects")
    }
    print(f"all: {total}, seed {options.seed}, {perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "kinds": table, "all": total}, indent=2) + "\n")
    return 1 if total["defects"] else 0


if __name__ == "__main__":
    sys.exit(main())
