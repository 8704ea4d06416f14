"""Put the tables of benchmark results into docs/performance.md.

    python -m benchmarks.page --quantizers quantizers.json --steps steps.json --deploy deploy.json --growth growth.json

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; what is not given keeps its old one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import deploy, growth

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right but for the first column."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def quantizers(found: dict[str, Any]) -> str:
    """Per candidate: time over the floor in every setting, with the peak and kept memory of the first one."""
    settings: list[tuple] = []
    table: dict[str, dict[tuple, dict[str, Any]]] = {}
    for row in found["rows"]:
        role, shape, dtype, per_channel = row["setting"]
        key = (role, tuple(shape), dtype, per_channel)
        settings.append(key) if key not in settings else None
        table.setdefault(row["name"], {})[key] = row
    names = [
        f"{role} {'x'.join(map(str, shape))}" + (f", {dtype}" if dtype != "float32" else "") + ", channel" * per_channel
        for role, shape, dtype, per_channel in settings
    ]
    rows = []
    for name, cells in table.items():
        first = next(cells[s] for s in settings if s in cells)
        times = [f"{cells[s]['time']:.1f}" if s in cells else "" for s in settings]
        rows.append([name, str(first["bits"]), *times, f"{first['peak']:.1f}", f"{first['saved']:.0f}"])
    facts = f"{found['threads']} thread(s), {found['device']}, {found['clock']} clock, torch {found['torch']}."
    return f"{facts}\n\n" + rows_of(["quantizer", "bits", *names, "peak", "kept, B"], rows)


def steps(found: dict[str, Any]) -> str:
    """Per network, host and candidate: step and evaluation over float and over the host's own, kept memory."""
    rows = []
    for row in found["rows"]:
        start = [row["net"], row["host"], row["candidate"]]
        if "error" in row:
            rows.append([*start, row["error"], *[""] * 4])
            continue
        keys = ("step_to_float", "step_to_own", "eval_to_float", "eval_to_own", "bytes_to_float")
        rows.append([*start, *(f"{row[k]:.2f}" if k in row else "" for k in keys)])
    facts = ", ".join(f"{k} {v}" for k, v in found["about"].items())
    head = ["net", "host", "quantizers", "step / float", "/ own", "evaluation / float", "/ own", "kept bytes / float"]
    return f"{facts}.\n\n" + rows_of(head, rows)


def deployed(found: dict[str, Any]) -> str:
    """The tables of :mod:`benchmarks.deploy`."""
    return "\n\n".join(deploy.table(net, rows) for net, rows in found["results"].items())


def grown(found: dict[str, Any]) -> str:
    """The tables of :mod:`benchmarks.growth`."""
    return growth.tables(found["imports"], found["growth"])


def facts(found: dict[str, Any]) -> str:
    """One line on the machine."""
    m = found["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    return f"{m['processor']} ({', '.join(m['instructions'])}), {m['cores']} cores, Python {m['python']}, {packages}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quantizers": quantizers,
    "steps": steps,
    "deploy": deployed,
    "growth": grown,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in TABLES:
        parser.add_argument(f"--{name}", type=Path, nargs="+", help="JSON files that the benchmark wrote")
    args = parser.parse_args()
    text = PAGE.read_text()
    for name, make in TABLES.items():
        parts = []
        for path in getattr(args, name) or []:
            found = json.loads(path.read_text())
            parts.append(make(found))
            if "machine" in found:
                text = put(text, "machine", facts(found))
        if parts:
            text = put(text, name, "\n\n".join(parts))
    PAGE.write_text(text)


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the marks of ``name``."""
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


if __name__ == "__main__":
    main()
