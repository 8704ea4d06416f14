"""Kill training at random moments, go on, and compare what came out with the run that nobody disturbed.

    python tests/faults/campaign.py --runs 20 --seed 0 [--algorithm fat] [--json figures.json]

Every run is cut one to three times, by SIGKILL, SIGTERM or SIGINT, at a random moment or amid the writing of a file
(half of it written, before it is flushed, before it is moved), sometimes twice in a row; then it is finished. All files
of the run directory have to be equal byte by byte: tensors, metrics, report, exported models. Exit code 1 if one is
not, or if a process said more than one line.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from children import Blow, End, run, warm_up
from cuts import assert_same_run
from scenarios import OWN_DATA_MODULE, Scenario, scenarios

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: exit codes that a signal may lead to, beside that of the signal itself: the run was over, or click's for Ctrl-C
ENDED = {signal.SIGTERM: (0, 143), signal.SIGINT: (0, 1, 130), signal.SIGKILL: (0,)}
OK = 0
BAR = " • "


@dataclass
class Tally:
    """What was done to one recipe.

    :ivar kills: signals sent, by name.
    :ivar amid_write: those of them that came while a file was written.
    :ivar restarts: runs that were killed before there was anything to go on with.
    """

    runs: int = 0
    resumes: int = 0
    restarts: int = 0
    amid_write: int = 0
    kills: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def row(self, name: str) -> dict[str, object]:
        """JSON-ready."""
        counts = {s.name: self.kills[s] for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}
        return {
            "recipe": name, "runs": self.runs, **counts, "amid a write": self.amid_write, "resumes": self.resumes,
            "restarts": self.restarts, "equal": self.runs - len(self.problems),
        }  # fmt: skip


class Campaign:
    """Runs of one recipe in one folder.

    :raises RuntimeError: the run that nobody disturbs does not end well.
    """

    def __init__(self, name: str, scenario: Scenario, folder: Path, dice: random.Random) -> None:
        self.name, self.scenario, self.folder, self.dice, self.tally = name, scenario, folder, dice, Tally()
        (folder / "recipe.yaml").write_text(scenario.text)
        (folder / "own_data.py").write_text(OWN_DATA_MODULE)
        self.whole = self._train("recipe.yaml", "-o", "whole")
        if self.whole.code != OK:
            raise RuntimeError(f"{name}: the undisturbed run ended with {self.whole.code}: {self.whole.output}")

    def _train(self, *args: str, blow: Blow | None = None) -> End:
        return run(["train", *args, *self.scenario.options, "-q"], self.folder, blow)

    def _blow(self) -> Blow:
        number = self.dice.choice(SIGNALS)
        again = self.dice.uniform(0, 0.05) if number != signal.SIGKILL and self.dice.random() < 0.3 else None
        if self.dice.random() < 0.5:
            return Blow(number, write=self.dice.randrange(2 * self.whole.writes), again=again)
        return Blow(number, after=self.dice.uniform(0, self.whole.seconds), again=again)

    def once(self) -> None:
        """Cut one run as often as the dice say, finish it, compare."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        self.tally.runs += 1
        every = ["--save-every", str(self.dice.choice((1, 2, 3)))]
        args, history = ["recipe.yaml", "-o", "run", *every], []
        for _ in range(self.dice.choice((1, 1, 2, 3))):
            blow = self._blow()
            end = self._train(*args, blow=blow)
            history.append(f"{' '.join(args)}, {blow}: {end.code}")
            if self._struck(blow, end):
                self.tally.kills[signal.Signals(blow.signal)] += 1
                self.tally.amid_write += blow.write is not None
            if (problem := self._bad_end(blow, end)) is not None:
                return self._failed(problem, history, end)
            args = self._going_on(every)
        end = self._train(*args)
        if end.code != OK:
            return self._failed(f"ended with {end.code}", history, end)
        found = difference(self.folder / "whole", self.folder / "run")
        if found is not None:
            self._failed(f"differs: {found}", history, end)

    @staticmethod
    def _struck(blow: Blow, end: End) -> bool:
        return end.code != OK or (blow.write is not None and end.writes > blow.write)

    @staticmethod
    def _bad_end(blow: Blow, end: End) -> str | None:
        if end.code not in (-blow.signal, *ENDED[blow.signal]):
            return f"exit code {end.code} after {signal.Signals(blow.signal).name}"
        # hosts draw bars for what takes time
        lines = [line for line in end.output.splitlines() if line.strip() and BAR not in line]
        return f"said {len(lines)} lines" if end.code != OK and len(lines) > 1 else None

    def _going_on(self, every: list[str]) -> list[str]:
        if (self.folder / "run" / "recipe.yaml").exists():
            self.tally.resumes += 1
            return ["--resume", "-o", "run", *every]
        self.tally.restarts += 1
        return ["recipe.yaml", "-o", "run", *every]

    def _failed(self, problem: str, history: list[str], end: End) -> None:
        lines = [f"{self.name}: {problem}", *history, end.output.strip()]
        self.tally.problems.append("\n    ".join(lines))
        keep = Path(tempfile.mkdtemp(prefix="unequal-")) / "folder"
        shutil.copytree(self.folder, keep)
        print(f"{self.tally.problems[-1]}\n    kept in {keep}", file=sys.stderr, flush=True)


def difference(one: Path, other: Path) -> str | None:
    """What differs first between two run directories, ``None`` where every file is equal byte by byte."""
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (one, other)]
    if files[0] == files[1]:
        return None
    try:
        assert_same_run(one, other)
    except AssertionError as error:
        return str(error)
    return "bytes of " + ", ".join(str(name) for name, data in files[0].items() if files[1][name] != data)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of every recipe")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    parser.add_argument("--algorithm", action="append", help="a recipe by name; repeatable; default: all")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def main() -> int:
    args = parse()
    known = scenarios()
    for name in args.algorithm or ():
        if name not in known:
            sys.exit(f"unknown recipe {name!r}; allowed: {', '.join(known)}")
    warm_up()
    rows, unequal = [], 0
    for name in args.algorithm or known:
        with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
            campaign = Campaign(name, known[name], Path(folder), random.Random(f"{args.seed} {name}"))
            for _ in range(args.runs):
                campaign.once()
        row = campaign.tally.row(name)
        rows.append(row)
        unequal += len(campaign.tally.problems)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    total = {k: sum(r[k] for r in rows) for k in rows[0] if k != "recipe"}
    print("  ".join(f"{k} {v}" for k, v in {"recipe": "all", **total}.items()))
    if args.json is not None:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": rows, "total": total}, indent=2) + "\n")
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
