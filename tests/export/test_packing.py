"""Packed integers: choice of the element type and the bytes themselves."""

import numpy as np
import pytest

from fat_plugins.errors import ExportError
from fat_plugins.export.packing import WIDTH, choose_storage, collapse, pack

ALL = set(WIDTH)


@pytest.mark.parametrize(
    ("low", "high", "element", "zero_point"),
    [
        (0, 1, "u1", 0), (-1, 0, "u1", 1), (-1, 1, "u2", 1), (-2, 1, "u2", 2), (0, 3, "u2", 0), (-3, 3, "u3", 3),
        (-4, 3, "u3", 4), (-7, 7, "i4", 0), (-8, 7, "i4", 0), (0, 15, "u4", 0), (-15, 15, "i8", 0),
        (-128, 127, "i8", 0), (0, 255, "u8", 0), (-300, 300, "i16", 0), (0, 70000, "i32", 0),
    ],
)  # fmt: skip
def test_narrowest_type(low, high, element, zero_point):
    storage = choose_storage(low, high, ALL)
    assert (storage.element, storage.zero_point, storage.note) == (element, zero_point, "")


def test_missing_type_falls_back_to_the_next_wider_and_says_so():
    storage = choose_storage(-1, 1, ALL - {"u2", "u3"})
    assert storage.element == "i4"
    assert storage.zero_point == 0
    assert "u2" in storage.note


def test_codes_that_fit_nothing():
    with pytest.raises(ExportError, match="fit no integer type"):
        choose_storage(-(2**40), 2**40, ALL)


def unpack(data: np.ndarray, element: str, count: int) -> np.ndarray:
    """Bit by bit, from the layouts' definition: an independent reading."""
    bits = [[(int(byte) >> i) & 1 for i in range(8)] for byte in data]  # lowest bit first
    out = []
    for i in range(count):
        if element == "u1":
            value = bits[i // 8][7 - i % 8]
        elif element == "u3":
            group, j = divmod(i, 8)
            low, shift = bits[3 * group + j // 4], 6 - 2 * (j % 4)
            value = low[shift] + 2 * low[shift + 1] + 4 * bits[3 * group + 2][7 - j]
        else:
            width = WIDTH[element]
            flat = [b for byte in bits for b in byte][i * width : (i + 1) * width]
            value = sum(b << k for k, b in enumerate(flat))
            if element[0] == "i" and value >= 2 ** (width - 1):
                value -= 2**width
        out.append(value)
    return np.array(out)


@pytest.mark.parametrize("element", ["u1", "u2", "u3", "u4", "i4", "u8", "i8", "i16"])
@pytest.mark.parametrize("count", [1, 7, 8, 29, 64])
def test_bytes(element, count):
    bits = WIDTH[element]
    low = -(2 ** (bits - 1)) if element[0] == "i" else 0
    values = np.random.default_rng(0).integers(low, low + 2**bits, count).astype(np.int32)
    data = pack(values, element)
    assert data.dtype == np.uint8
    assert np.array_equal(unpack(data, element, count), values)
    assert len(data) <= -(-count // 8) * bits


def test_out_of_range_is_refused():
    with pytest.raises(ExportError, match="do not fit u2"):
        pack(np.array([0, 4]), "u2")


def test_collapse():
    x = np.broadcast_to(np.arange(6.0).reshape(2, 3, 1, 1), (2, 3, 4, 5))
    assert collapse(x).shape == (2, 3, 1, 1)
    assert np.array_equal(np.broadcast_to(collapse(x), x.shape), x)
