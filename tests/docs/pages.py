"""The README and the pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<lang>\w+)\n(?P<code>.*?)^```", re.M | re.S)
#: start of the comment in front of a block that is a file
FILE = "file: "


def name(page: Path) -> str:
    """Path of a page as test ids show it."""
    return str(page.relative_to(ROOT))


def generation(package: str) -> int | None:
    """Major version of an installed package."""
    try:
        return int(version(package).split(".")[0])
    except PackageNotFoundError:
        return None


def blocks(page: Path, *langs: str) -> list[re.Match[str]]:
    """Fenced blocks of a page in these languages; ``mark`` is the comment in front of one."""
    return [m for m in FENCE.finditer(page.read_text()) if m["lang"] in langs]


def with_blocks(*langs: str) -> list[Path]:
    """Pages that have such blocks."""
    return [page for page in PAGES if blocks(page, *langs)]
