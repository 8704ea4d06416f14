"""The errors that users see: one line that names the place, the value, what is allowed and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: a message is cut in its middle beyond this many characters
LONGEST = 1200


class FatPluginsError(ValueError):
    """Base of every error raised on purpose by this package.

    Its text is one printable line whatever file, name or other package it quotes; ``args`` hold what was given.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST)


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


def one_line(text: str, longest: int) -> str:
    """Text without line breaks and control characters (terminals obey them), cut in its middle if it is too long."""
    if len(text) > 2 * longest:
        text = f"{text[:longest]}{text[-longest:]}"  # of megabytes, look at the ends only
        longest = min(longest, len(text) - 1)
    text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def shown(value: object, longest: int = 80) -> str:
    """``repr`` of what a user gave, short enough for a message."""
    text = repr(value[:longest] if isinstance(value, (str, bytes, list, tuple)) else value)
    cut = isinstance(value, (str, bytes, list, tuple)) and len(value) > longest
    return f"{text[: longest - 3]}..." if cut or len(text) > longest else text


def nearest(name: object, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest option, or an empty string."""
    if len(str(name)) > LONGEST:
        return ""
    found = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def unknown(kind: str, name: object, options: Iterable[str]) -> str:
    """One line for an unknown name: what it is, what is allowed, the nearest valid name."""
    options = sorted(str(o) for o in options)
    return f"unknown {kind} {shown(name)}; allowed: {', '.join(options) or 'none'}{nearest(name, options)}"
