"""A small grammar of damage: to trees of JSON types, to text, to bytes. Everything is drawn from one generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import yaml

#: names of modules that a file may name and nobody has permitted; importing one leaves a trace
CANARY = "fuzz_canary"


@dataclass
class Damage:
    """A damaged tree.

    :param what: what was done, for the report of a defect.
    :param names: one of these has to stand in the message, if it is refused.
    :param bad: it has to be refused; otherwise it may be, and if not it is a valid input.
    :param hint: the nearest valid name that the message has to offer.
    """

    tree: Any
    what: str
    names: tuple[str, ...] = ()
    bad: bool = False
    hint: str | None = None


def paths(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    """Key paths of everything in a tree, without its root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from paths(value, (*above, key))


def at(tree: Any, path: tuple) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _put(tree: Any, path: tuple, value: Any) -> None:
    at(tree, path[:-1])[path[-1]] = value


def _names(path: tuple) -> tuple[str, ...]:
    """What a message may call the place: the key, or a section that it belongs to."""
    return tuple(str(p) for p in path if isinstance(p, str))


def deep(rng: Random, depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree] if rng.random() < 0.5 else {"a": tree}
    return tree


HOSTILE = (
    "",
    " ",
    "\0",
    "a\0b",
    "../x",
    "/etc/passwd",
    "..",
    "\u202egnp.exe",
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "\ud800",
    "</script><script>alert(1)</script>",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "%s%n",
    "$\\frac{",
    f"{CANARY}:run",
    "os:system",
    "!!python/object/apply:os.system ['x']",
    "__import__('os').system('x')",
    "nul",
    "CON",
    "\N{FULLWIDTH LATIN SMALL LETTER F}at",
    "x" * 100_000,
)
NUMBERS = (
    0, -1, 1, 2, 3, 7, 9, 16, 33, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63), 0.0, -0.0, 0.5, 1.5, 4.0, 1e-320,
    1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_LOOKALIKES = str.maketrans({"a": "а", "e": "е", "o": "о", "c": "с", "p": "р", "x": "х", "i": "і"})  # noqa: RUF001


def junk(rng: Random) -> Any:
    """A value of any JSON type."""
    choice = rng.randrange(8)
    if choice == 0:
        return rng.choice((None, True, False))
    if choice in (1, 2):
        return rng.choice(NUMBERS)
    if choice in (3, 4):
        return rng.choice(HOSTILE)
    if choice == 5:
        return rng.choice(([], {}, [[]], [{}], {"": None}, [None] * 3, {"a": {"b": []}}))
    if choice == 6:
        return [rng.choice(NUMBERS)] * rng.choice((1, 2, 1000, 20_000))
    return deep(rng, rng.choice((3, 40, 60, 400)))


def misspelt(rng: Random, name: str) -> str:
    """One letter less, one more, two exchanged, or another one."""
    i = rng.randrange(len(name))
    how = rng.randrange(4)
    if how == 0:
        return name[:i] + name[i + 1 :]
    if how == 1:
        return name[:i] + rng.choice("xyzq_") + name[i:]
    if how == 2 and i + 1 < len(name):
        return name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    return name[:i] + rng.choice("xyzq") + name[i + 1 :]


def damage(rng: Random, tree: Any, free: Callable[[tuple], bool] = lambda path: False) -> Damage:
    """A tree with one thing changed.

    :param free: whether the object at a path takes keys of any name.
    """
    tree = copy.deepcopy(tree)
    places = list(paths(tree))
    path = rng.choice(places)
    names, here = _names(path), ".".join(map(str, path))
    value, parent = at(tree, path), at(tree, path[:-1])
    how = rng.randrange(11)
    if how <= 1 and isinstance(path[-1], str) and len(path[-1]) > 3 and not free(path[:-1]):
        new = misspelt(rng, path[-1])
        if new not in parent:
            items = [(new if k == path[-1] else k, v) for k, v in parent.items()]
            parent.clear()
            parent.update(items)
            return Damage(tree, f"{here} misspelt as {new!r}", (new, repr(new)), True, path[-1])
    if how == 2:
        owners = [p for p in [(), *places] if isinstance(at(tree, p), dict)]
        owner = rng.choice(owners)
        new = rng.choice(("zzz", "__class__", "__init__", "", "\x1b[2J", "a" * 5000, "ключ", "two\nlines", "\ud800"))
        at(tree, owner)[new] = junk(rng)
        return Damage(tree, f"key {new[:20]!r} added to {owner}", (), not free(owner))
    if how == 3:
        del parent[path[-1]]
        return Damage(tree, f"{here} taken away", ())
    if how == 4 and isinstance(value, str) and value:
        kind = rng.randrange(5)
        new = (value.upper(), value.translate(_LOOKALIKES), value + " ", misspelt(rng, value), value[::-1])[kind]
        _put(tree, path, new)
        return Damage(tree, f"{here} = {new!r}", names)
    if how == 5 and isinstance(value, (int, float)) and not isinstance(value, bool):
        new = rng.choice((-value, value * 10**6, str(value), [value], float(value), value + 0.5, not value))
        _put(tree, path, new)
        return Damage(tree, f"{here} = {new!r}", names)
    if how == 6:
        other = at(tree, rng.choice(places))
        _put(tree, path, copy.deepcopy(other))
        return Damage(tree, f"{here} = what stands elsewhere", names)
    if how == 7 and isinstance(parent, dict) and isinstance(value, (dict, list)):
        _put(tree, path, [copy.deepcopy(value)] * rng.choice((1, 2, 500)))
        return Damage(tree, f"{here} in a list", names)
    new = junk(rng)
    _put(tree, path, new)
    return Damage(tree, f"{here} = {repr(new)[:40] if not isinstance(new, (dict, list)) else type(new)}", names)


# --------------------------------------------------------------------------------------------------------------------
# text and bytes
# --------------------------------------------------------------------------------------------------------------------
def as_json(tree: Any) -> str:
    try:
        return json.dumps(tree, indent=rng_indent(tree))
    except ValueError:  # an integer too long for Python to print
        return json.dumps(tree, default=str).replace("1" + "0" * 400, "1" + "0" * 5000)


def rng_indent(tree: Any) -> int | None:
    return 2 if len(str(type(tree))) % 2 else None


def as_yaml(tree: Any, rng: Random) -> str:
    """Blocks, or JSON, which is YAML too."""
    if rng.random() < 0.3:
        return json.dumps(tree)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)


YAML_SNIPPETS = (
    "!!python/object/apply:os.system ['touch hacked']",
    f"!!python/module:{CANARY}",
    f"!!python/name:{CANARY}.run",
    "!!python/object/new:subprocess.Popen [['touch', 'hacked']]",
    "!<tag:yaml.org,2002:python/object/apply:os.system> [x]",
    "!unknown x",
    "!!binary 'not base64 at all'",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!int 9x",
    "!!float x",
    "!!timestamp x",
    "!!bool maybe",
    "!!null 3",
    "2001-99-99",
    "2001-01-01 99:99:99",
    "190:20:30",
    "0b1111",
    "0o777",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1e999",
    ".nan",
    "-.inf",
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "{1: 2, null: 3, true: 4}",
    "? [a]\n: b",
    "{? a, ? b}",
    "*nothing",
    "&a [*a]",
    "{<<: {a: 1}, a: 2}",
    '"\\0"',
    '"\\ud800"',
    '"\\x1b[2J"',
    "|\n  text\n  text",
    ">-9\n  text",
    "[" * 3000,
    "{" * 3000,
    "- " * 3000,
    "'unclosed",
    "\t x",
    "%YAML 9.9",
    "--- a\n--- b",
    "@x",
    "`x`",
    "\x07",
    "\u2028",
    "''",
    "~",
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def damage_text(rng: Random, text: str, comment: str) -> tuple[bytes, str]:
    """A text file with something wrong in its characters.

    :param comment: how a line of comment begins.
    """
    how = rng.randrange(14)
    middle = rng.randrange(max(len(text), 1))
    data = text.encode("utf-8", "surrogatepass")
    if how == 0:
        return data[: rng.randrange(len(data))], "cut off"
    if how == 1:
        return text.encode("utf-16"), "UTF-16"
    if how == 2:
        return data[:middle] + rng.randbytes(rng.choice((1, 2, 40))) + data[middle:], "random bytes inside"
    if how == 3:
        return rng.choice(
            (b"", b" ", b"\n\n", b"\xef\xbb\xbf", b"\0" * 100, b"null", b"[]", b"3", b'"text"')
        ), "no tree"
    if how == 4:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + data, "BOM"
    if how == 5:
        lines = text.splitlines(keepends=True)
        i = rng.randrange(len(lines))
        return "".join(lines[: i + 1] + lines[i:]).encode("utf-8", "surrogatepass"), "a line twice"
    if how == 6:
        return rng.randbytes(rng.choice((10, 3000))), "random bytes"
    if how == 7:
        one = rng.choice(("[", "{", '"', "/*", '\\"', ",", "a: ", "- ", "? ", "'", "&a ", "!", "/", "0", "-", "\\"))
        return (one * rng.choice((50, 5000, 60_000))).encode(), f"{one!r} again and again"
    if how == 8:
        return data[:middle] + (comment + "x" * 100_000 + "\n").encode() + data[middle:], "a long comment inside"
    if how == 9:
        return data[:middle] + data[middle + rng.choice((1, 2, 10)) :], "some characters less"
    if how == 10:
        return data[:middle] + rng.choice("[]{}:,\"'#&*!|>%@`\\\t\r\x00\x1b").encode() + data[
            middle:
        ], "a character more"
    if how == 11:
        return data + rng.choice((b"\0", b"}", b"]", b"\n---\nx: 1\n", b"\xff", data)), "something behind it"
    if how == 12:
        return (comment + "x" * 2_000_000 + "\n").encode() + data, "two megabytes"
    return text.replace(":", "=").encode("utf-8", "surrogatepass"), "no colons"


def damage_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A binary file that was cut, or in which bits were flipped, bytes lost, zeros written."""
    how = rng.randrange(7)
    where = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
    if how == 0:
        return data[:where], f"cut at {where} of {len(data)}"
    if how == 1:
        return data[:where] + bytes([data[where] ^ (1 << rng.randrange(8))]) + data[where + 1 :], f"a bit at {where}"
    if how == 2:
        return data[:where] + rng.randbytes(8) + data[where + 8 :], f"eight bytes at {where}"
    if how == 3:
        return data[:where] + bytes(min(512, len(data) - where)) + data[where + 512 :], f"zeros at {where}"
    if how == 4:
        return data[where:], f"the first {where} bytes lost"
    if how == 5:
        return data + rng.randbytes(rng.choice((1, 1000))), "something behind it"
    return rng.choice((b"", b"\0", rng.randbytes(100), data[:8], data[:9])), "hardly anything left"
