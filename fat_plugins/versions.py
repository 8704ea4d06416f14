"""Which versions of other packages are supported: one clear error outside, one warning for those that came later."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from fat_plugins.errors import ExportError, FatPluginsError, HostError

_warned: set[str] = set()


@dataclass(frozen=True)
class Supported:
    """The range of versions of one package, as ``pyproject.toml`` declares it.

    :param name: of the distribution.
    :param lowest, below: first version that is supported, and first one that is not any more.
    :param newest: newest one that the test matrix runs, ``(major, minor)``; patch releases of it are as good.
    :param install: what gets a supported one.
    :param error: raised outside of the range.
    """

    name: str
    lowest: tuple[int, ...]
    below: tuple[int, ...]
    newest: tuple[int, int]
    install: str
    error: type[FatPluginsError] = HostError

    @property
    def allowed(self) -> str:
        """The range in words, such as ``2.14 to 3.x``."""
        *start, last = self.below
        while last == 0 and start:
            *start, last = start
        return f"{_text(self.lowest)} to {_text((*start, last - 1))}.x"

    def check(self, text: str) -> tuple[int, ...]:
        """The version ``text`` as numbers, ``(major, minor, patch)``.

        Warns, once in a process, of a version newer than any that was tested.

        :raises FatPluginsError: :attr:`error`, for a version outside of the range.
        """
        found = tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])
        if not self.lowest <= found < self.below:
            raise self.error(f"{self.name} {text} is not supported, allowed: {self.allowed}; {self.install}")
        if found[:2] > self.newest and self.name not in _warned:
            _warned.add(self.name)
            warnings.warn(
                f"{self.name} {text} is newer than {_text(self.newest)}, the newest that this version of fat-plugins "
                f"was tested with; if something fails, try {self.name} {_text(self.newest)} or a newer fat-plugins",
                UserWarning,
                stacklevel=2,
            )
        return found


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


TORCH = Supported("torch", (2, 4), (3,), (2, 13), "pip install 'torch>=2.4'")
#: of the distribution ``nncf``; both generations
NNCF = Supported(
    "nncf", (2, 14), (4,), (3, 4),
    "pip install 'fat-plugins[nncf]', or 'fat-plugins[nncf-legacy]' for the JSON config of NNCF 2",
)  # fmt: skip
BREVITAS = Supported("brevitas", (0, 10), (0, 14), (0, 13), "pip install 'fat-plugins[brevitas]'")
OPENVINO = Supported("openvino", (2024, 6), (2027,), (2026, 4), "pip install 'fat-plugins[openvino]'", ExportError)
