"""Two processes train together and one of them is killed: the other ends soon, and both go on exactly.

    python tests/faults/processes.py --runs 10 --seed 0

Each run kills one of the two (or tells both to stop by SIGTERM) at a random moment after they have met, waits for the
other, which has to end within a minute and to say one line at most, then goes on with two. The result has to equal that
of two processes that nobody disturbed, byte by byte. Exit code 1 if it does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from campaign import BAR, difference
from children import TRACEBACK, Blow, Child, End, warm_up
from scenarios import recipe, section

#: how lines begin that torch's C++ prints when a connection breaks
NOISE = ("[W", "[E", "[rank", "frame #", "Exception raised", "<omitting")
#: seconds in which a process notices that the other one is gone
PATIENCE = 60


def start(folder: Path, *args: str) -> list[Child]:
    """Two processes, as ``torchrun`` starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Child(
            ["train", *args, "-q"], folder, name=str(rank), env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]


def said(end: End) -> list[str]:
    """Lines of a process, without bars of its host and what torch's own threads report."""
    lines = [line for line in end.output.splitlines() if line.strip() and BAR not in line]
    return [
        line for line in lines if not line.startswith(("[W", "[E", "[rank", "frame #", "Exception raised", "<omit"))
    ]


def once(folder: Path, dice: random.Random, seconds: float) -> tuple[str, str | None]:
    """One run that loses a process.

    :return: what was done, and what went wrong, if anything.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    which, moment = dice.choice(("first", "second", "both")), dice.uniform(0, seconds)
    children = start(folder, "recipe.yaml", "-o", "run", "--save-every", "1")
    while not (folder / "run" / "recipe.yaml").exists():  # before they have met, whoever started them has to notice
        if any(child.gone() for child in children):
            return "neither", f"{[child.output.read_text() for child in children]} before they had met"
        time.sleep(0.01)
    struck = children if which == "both" else [children[which == "second"]]
    met = time.monotonic() - children[0].start
    for child in struck:
        child.blow = Blow(signal.SIGTERM if which == "both" else signal.SIGKILL, after=met + moment)
        child.strike()
    try:
        ends = [child.wait(PATIENCE) for child in children]
    except TimeoutError as error:
        return which, str(error)
    lines = [line for end in ends if end.code for line in said(end)]
    if any(end.code == TRACEBACK or "Traceback" in end.output for end in ends) or len(lines) > 1:
        return which, f"{[e.code for e in ends]} said {lines}"
    codes = [end.code for child, end in zip(children, ends, strict=True) if child not in struck]
    if 0 in codes and not (folder / "run" / "report.json").exists():
        return which, "one process was lost, and the other took no notice"
    ends = [child.wait() for child in start(folder, "--resume", "-o", "run", "--save-every", "1")]
    if any(end.code for end in ends):
        return which, f"going on: {[(e.code, e.output) for e in ends]}"
    return which, difference(folder / "whole", folder / "run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    args = parser.parse_args()
    warm_up()
    dice, kinds, equal = random.Random(args.seed), Counter(), 0
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(recipe(section("dropbits")))
        ends = [child.wait() for child in start(folder, "recipe.yaml", "-o", "whole")]
        if any(end.code for end in ends):
            sys.exit(f"the undisturbed run ended with {[(e.code, e.output) for e in ends]}")
        for _ in range(args.runs):
            which, problem = once(folder, dice, ends[0].seconds)
            kinds[which] += 1
            equal += problem is None
            if problem is not None:
                print(f"{which}: {problem}", file=sys.stderr, flush=True)
    lost = "  ".join(f"{name} lost {kinds[name]}" for name in ("first", "second"))
    print(f"runs {args.runs}  {lost}  both stopped {kinds['both']}  equal {equal}")
    return int(equal < args.runs)


if __name__ == "__main__":
    sys.exit(main())
