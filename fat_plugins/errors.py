"""The errors that users see: one line that names the place, the value, what is allowed and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FatPluginsError(ValueError):
    """Base of every error raised on purpose by this package."""


class ConfigError(FatPluginsError):
    """A configuration or recipe that cannot be used."""


class QuantizationError(FatPluginsError):
    """A tensor, bit width or layer that an algorithm cannot quantize."""


class CheckpointError(FatPluginsError):
    """A checkpoint that does not belong to the model or cannot be read."""


class ExportError(FatPluginsError):
    """A deployed form or model that a target cannot hold."""


class HostError(FatPluginsError):
    """The host framework is missing, has an unsupported version or refused the model."""


def nearest(name: object, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest option, or an empty string."""
    found = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def unknown(kind: str, name: object, options: Iterable[str]) -> str:
    """One line for an unknown name: what it is, what is allowed, the nearest valid name."""
    options = sorted(str(o) for o in options)
    return f"unknown {kind} {name!r}; allowed: {', '.join(options) or 'none'}{nearest(name, options)}"
