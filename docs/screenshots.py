"""Makes the pictures of the docs again: ``python docs/screenshots.py RUN`` with the directory of a run.

``images/report.png`` is the report in a headless Chromium, ``images/cli.svg`` what ``fat-plugins train`` prints.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from fat_plugins.recipes import RunReport
from fat_plugins.report import write_report

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: pixels of the picture of the report
WIDTH, HEIGHT = 1200, 1800


def report_picture(run: Path, target: Path, browser: str) -> None:
    """The beginning of the report as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        page, _ = write_report(run, Path(folder) / "report.html")
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--screenshot={target}", f"--window-size={WIDTH},{HEIGHT}", page.resolve().as_uri(),
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip


def console_picture(run: Path, target: Path) -> None:
    """The tables of the command line as SVG."""
    report = RunReport.from_dict(json.loads((run / "report.json").read_text(encoding="utf-8")))
    console = Console(record=True, file=io.StringIO(), width=138, force_terminal=True)
    console.print(f"$ fat-plugins train {report.name}", markup=False, highlight=False)
    for table in report.tables(console.width):
        console.print(table)
    svg = console.export_svg(title="fat-plugins")
    # rich refers to fonts on the network: the reader's own will do
    target.write_text(re.sub(r"@font-face\s*{.*?}\s*", "", svg, flags=re.S), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None))
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    console_picture(arguments.run, IMAGES / "cli.svg")
    if arguments.browser is None:
        sys.exit(f"no browser for report.png: install one of {', '.join(BROWSERS)}, or give --browser")
    report_picture(arguments.run, IMAGES / "report.png", arguments.browser)


if __name__ == "__main__":
    main()
