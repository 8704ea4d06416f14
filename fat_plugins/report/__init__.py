"""The report of a run: one HTML page that needs nothing else, and its data as JSON."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fat_plugins.errors import ConfigError
from fat_plugins.recipes.checkpoint import write_text

#: file names within a run's directory
PAGE, DATA = "report.html", "report_data.json"
_PACKAGES = ("jinja2", "matplotlib")


def available() -> bool:
    """Whether the packages of the extra ``report`` are installed."""
    return all(find_spec(name) is not None for name in _PACKAGES)


def require() -> None:
    """:raises ConfigError: a package is missing, with the command that installs it."""
    for name in _PACKAGES:
        if find_spec(name) is None:
            raise ConfigError(f"report: {name} is not installed: pip install 'fat-plugins[report]'")


def write_report(
    directory: Path, page: Path | None = None, data: Path | None = None, which: str | None = None
) -> tuple[Path, Path]:
    """Write the report of a run; earlier files are replaced at once, or stay if anything fails.

    :param directory: of a run, or one of its ``baselines/...`` or ``seeds/...``.
    :param page: the HTML file, default ``report.html`` in the run; ``data``: the JSON, default ``NAME_data.json``
        beside the page.
    :param which: checkpoint whose layers are shown, ``"last"`` or ``"best"``; default: the one that was exported.
    :return: both paths.
    :raises ConfigError: a package is missing, or both files would be the same.
    :raises CheckpointError: there is no run, or a file cannot be written.
    """
    require()
    page = page if page is not None else directory / PAGE
    data = data if data is not None else page.with_name(f"{page.stem}_data.json")
    if page.resolve() == data.resolve():
        raise ConfigError(f"report: {page} cannot be both the page and its data: give another --json")
    from fat_plugins.report.collect import collect
    from fat_plugins.report.page import render

    content = collect(directory, which)
    html = render(content)
    write_text(data, content.model_dump_json() + "\n")
    write_text(page, html)
    return page, data


__all__ = ["DATA", "PAGE", "available", "require", "write_report"]
