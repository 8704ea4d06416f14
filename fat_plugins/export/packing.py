"""How integer codes are stored in a weights file: true bit widths, packed the way OpenVINO reads them. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fat_plugins.errors import ExportError

#: bits of every element type that can hold codes
WIDTH = {"u1": 1, "u2": 2, "u3": 3, "u4": 4, "i4": 4, "u8": 8, "i8": 8, "i16": 16, "i32": 32}
_RANGE = {
    name: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if name[0] == "i" else (0, 2**bits - 1)
    for name, bits in WIDTH.items()
}


@dataclass(frozen=True)
class Storage:
    """Element type of a packed constant. ``code = stored - zero_point``.

    :param note: why the type is wider than the codes, or empty.
    """

    element: str
    zero_point: int = 0
    note: str = ""

    @property
    def bits(self) -> int:
        """Bits per stored element."""
        return WIDTH[self.element]


def choose_storage(low: int, high: int, available: set[str]) -> Storage:
    """The narrowest available type for codes ``low .. high``; a type that needs no zero point wins at equal width.

    :raises ExportError: the codes need more than 32 bits.
    """

    def fit(names) -> Storage | None:
        for name in names:
            least, most = _RANGE[name]
            if least <= low and high <= most:
                return Storage(name)
            # the zero point is subtracted in 8 bits, so shifted codes must stay within 0 .. 127
            if name in ("u1", "u2", "u3", "u4") and high - low <= most:
                return Storage(name, -low)
        return None

    by_width = ["u1", "u2", "u3", "i4", "u4", "i8", "u8", "i16", "i32"]
    wanted, chosen = fit(by_width), fit(n for n in by_width if n in available)
    if wanted is None or chosen is None:
        raise ExportError(f"codes {low} .. {high} fit no integer type; allowed: 32 bits")
    if chosen.bits > wanted.bits:
        note = f"stored as {chosen.element}: this OpenVINO writes no {wanted.element} constants"
        return Storage(chosen.element, chosen.zero_point, note)
    return chosen


def pack(stored: np.ndarray, element: str) -> np.ndarray:
    """Bytes (uint8, 1-d) of a constant: the values in row-major order, the last byte padded with zeros.

    :param stored: integers within the range of ``element``, any shape.
    """
    flat = stored.reshape(-1)
    least, most = _RANGE[element]
    if flat.size and (flat.min() < least or flat.max() > most):
        raise ExportError(f"values {flat.min()} .. {flat.max()} do not fit {element} ({least} .. {most})")
    if element in ("i8", "u8", "i16", "i32"):
        return np.frombuffer(flat.astype({"i8": "<i1", "u8": "<u1", "i16": "<i2", "i32": "<i4"}[element]), np.uint8)
    if element == "u1":  # first value in the highest bit
        return np.packbits(flat.astype(np.uint8))
    if element == "u3":  # eight values: two bytes of low bit pairs, one of high bits, each from the highest bit down
        v = _padded(flat, 8).reshape(-1, 8)
        pairs = (v & 3).reshape(-1, 4)
        lows = (pairs << np.array([6, 4, 2, 0], np.uint8)).sum(1, dtype=np.uint8).reshape(-1, 2)
        return np.concatenate([lows, np.packbits(v >> 2, axis=1)], axis=1).reshape(-1)
    bits = WIDTH[element]
    per_byte = 8 // bits
    v = _padded(flat, per_byte).reshape(-1, per_byte) & (2**bits - 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)  # first value in the lowest bits
    return (v << shifts).sum(1, dtype=np.uint8)


def _padded(flat: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(flat.astype(np.int16).astype(np.uint8), (0, -flat.size % multiple))


def collapse(values: np.ndarray) -> np.ndarray:
    """Shrink every axis along which ``values`` is constant to length one (broadcasts back to the same array)."""
    for axis in range(values.ndim):
        first = values.take([0], axis=axis)
        if values.shape[axis] > 1 and bool((values == first).all()):
            values = first
    return values
