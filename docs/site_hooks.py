"""What the site needs beside mkdocs: formulas as MathML, made when it is built, so that pages load no script for them.

A fenced block ``math`` holds LaTeX. GitHub renders the same blocks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

#: pages that programs write (a benchmark, for one), and that a checkout need not have
GENERATED = ("method_comparison.md",)
#: what the converter leaves of LaTeX that it does not know
_LEFT_OVER = re.compile(r"<m\w+>(&|\\\\\w*)</m\w+>")
_REMOTE = re.compile(
    r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*?(?:src|href)="?(?:https?:)?//[^ >]+"""
)


def formula(source: str, *_: Any, **__: Any) -> str:
    """A fenced block of LaTeX as MathML (the signature is that of pymdownx.superfences)."""
    made = convert(source.strip(), display="block")
    if found := _LEFT_OVER.search(made):
        raise PluginError(f"formula: {found[0]} cannot be converted in: {source.strip()}")
    return f'<div class="formula">{made}</div>'


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from the network."""
    if found := _REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri}: loads from the network: {found[0]}")
    return output


def _without_absent(nav: list[dict[str, Any]], docs: Path) -> list[dict[str, Any]]:
    kept = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = _without_absent(target, docs)
        elif target in GENERATED and not (docs / target).exists():
            continue
        if target:
            kept.append({title: target})
    return kept


def on_config(config: Any) -> Any:
    """Give the formatter to superfences, which a YAML file could not; leave out pages that were not generated."""
    config["nav"] = _without_absent(config["nav"], Path(config["docs_dir"]))
    settings = config["mdx_configs"].setdefault("pymdownx.superfences", {})
    settings["custom_fences"] = [{"name": "math", "class": "formula", "format": formula}]
    return config
