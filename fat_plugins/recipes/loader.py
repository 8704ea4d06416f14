"""Recipe files: YAML read by ``yaml.safe_load``, errors with file, line and key. A recipe may extend others."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fat_plugins.errors import ConfigError, nearest, shown
from fat_plugins.explain import explain, first_error
from fat_plugins.files import MAX_DEPTH, MAX_DIGITS, is_file, parse_json, read_text
from fat_plugins.recipes.schema import Recipe

#: no honest recipe is larger, and the parser takes seconds for a megabyte
MAX_BYTES = 200_000
MAX_TOKENS = 20_000
#: files that one recipe is made of
MAX_FILES = 16
#: a section that names another thing than the one it replaces has nothing to do with it
_KINDS = ("name", "algorithm")
_STARTS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name, such as ``cifar10/resnet20_fat_w4a4``."""
    folder = Path(str(resources.files("fat_plugins.recipes") / "shipped"))
    paths = (p for p in sorted(folder.rglob("*.yaml")) if not p.name.startswith("_"))  # _: parts of recipes
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in paths}


def list_recipes() -> list[dict[str, str]]:
    """Name, path and first sentence of the opening comment of every shipped recipe."""
    rows = []
    for name, path in shipped().items():
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line[1:].strip())
        rows.append({"name": name, "path": str(path), "about": re.split(r"(?<=\.) ", " ".join(comment))[0]})
    return rows


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe file, or of a shipped recipe by its name.

    :raises ConfigError: neither, with the nearest name.
    """
    path = Path(name)
    if is_file(path):
        return path
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if os.path.isdir(path):
        raise ConfigError(f"recipe {str(name)!r} is a directory; expected a YAML file")
    raise ConfigError(
        f"no recipe file {shown(str(name), 300)}; `fat-plugins recipes` lists the shipped ones{nearest(name, known)}"
    )


def read_json_config(path: Path) -> dict[str, Any]:
    """An NNCF JSON config.

    :raises ConfigError: missing file, broken JSON, or no ``compression`` in it.
    """
    config = parse_json(read_text(path), str(path))
    if not isinstance(config, dict) or "compression" not in config:
        raise ConfigError(f"{path}: expected an NNCF config, an object with the key 'compression'")
    return config


class _Loader(yaml.SafeLoader):
    """Values that JSON has too; what else YAML knows (dates, bytes, sets, tags) is refused with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OverflowError,
        ) as error:  # of a wrong !!int and such
            raise _not_plain(f"{shown(node.value, 40)}: {error}", node) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _not_plain(f"{node.value} is not a finite number", node)
        if isinstance(value, int) and value.bit_length() > 3 * MAX_DIGITS:
            raise _not_plain(f"a number of {len(node.value)} digits", node)
        if value is not None and not isinstance(value, (dict, list, str, int, float)):
            raise _not_plain(f"{shown(node.value, 40)} is a {type(value).__name__}; put text in quotes", node)
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise _not_plain(f"{shown(value)} is not Unicode text", node)
        return value


def _not_plain(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _lines(node: yaml.Node | None, path: tuple = (), found: dict[tuple, int] | None = None) -> dict[tuple, int]:
    """Line (from 1) of every key path of a composed document.

    :raises ConfigError: a key that occurs twice in one mapping.
    """
    found = {} if found is None else found
    if node is None:
        return found
    found.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"line {line}: key {shown(key.value)} is no text; put it in quotes")
            if key.value in seen:
                raise ConfigError(f"line {line}: key {shown(key.value)} occurs twice")
            seen.add(key.value)
            found[(*path, key.value)] = line
            _lines(value, (*path, key.value), found)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), found)
    return found


def _refuse_bombs(text: str) -> None:
    """Aliases, which can grow without bound, and nesting and lengths that no recipe has but that take minutes."""
    depth = 0
    for number, token in enumerate(yaml.scan(text, Loader=yaml.SafeLoader)):
        if number > MAX_TOKENS:
            raise ConfigError(f"line {token.start_mark.line + 1}: more than {MAX_TOKENS} words and signs before it")
        depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
        if depth > MAX_DEPTH:
            raise ConfigError(f"line {token.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(token, yaml.AliasToken):
            raise ConfigError(f"line {token.start_mark.line + 1}: YAML aliases (*name) are not allowed in recipes")


def _parse(text: str, path: Path) -> tuple[Any, dict[tuple, int]]:
    try:
        _refuse_bombs(text)
        return yaml.load(text, Loader=_Loader), _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        if isinstance(error, yaml.constructor.ConstructorError):
            problem = f"only plain YAML values are allowed: {problem}"
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not a recipe: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _merge(base: Any, new: Any) -> Any:
    """``new`` in the place of ``base``: sections key by key, everything else replaced."""
    if not isinstance(base, dict) or not isinstance(new, dict):
        return new
    if any(key in base and key in new and base[key] != new[key] for key in _KINDS):
        return new
    return _merge_keys(base, new)


def _merge_keys(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The same of two mappings, whatever they name."""
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in new.items()}}


def _beside(name: str, path: Path, key: str) -> Path:
    """A file that a recipe names: beside it or below, links followed."""
    try:
        found = (path.parent / name).resolve()
        inside = found.is_relative_to(path.parent.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, links in a circle
        raise ConfigError(f"{path}: {key}: no file {shown(name)}") from None
    if not inside:
        raise ConfigError(f"{path}: {key}: {shown(name)} lies outside the recipe's folder")
    if not is_file(found):
        raise ConfigError(f"{path}: {key}: no file {shown(str(found), 300)}")
    return found


def _base(name: Any, path: Path) -> Path:
    """The file that ``extends`` means: one beside or below the recipe, or a shipped recipe by name."""
    if not isinstance(name, str):
        raise ConfigError(f"{path}: extends: expected a file or a list of files, got {shown(name)}")
    if Path(name).suffix not in (".yaml", ".yml"):
        known = shipped()
        if name not in known:
            raise ConfigError(
                f"{path}: extends: no shipped recipe {shown(name)}, nor a .yaml file{nearest(name, known)}"
            )
        return known[name]
    return _beside(name, path, "extends")


def _assemble(path: Path, above: tuple[Path, ...], read: list[Path]) -> tuple[dict[str, Any], dict[tuple, str]]:
    """A recipe's mapping with all that it extends, and where every key stands (file and line)."""
    read.append(path)
    if len(read) > MAX_FILES:
        raise ConfigError(f"{read[0]}: extends: made of more than {MAX_FILES} files")
    raw, lines = _parse(read_text(path, limit=MAX_BYTES), path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with keys such as model, data, compression")
    if isinstance(raw.get("compression"), str):
        raw["compression"] = read_json_config(_beside(raw["compression"], path, "compression"))
    above = (*above, path.resolve())
    merged: dict[str, Any] = {}
    places: dict[tuple, str] = {}
    bases = raw.pop("extends", None) or []
    for name in bases if isinstance(bases, list) else [bases]:
        base = _base(name, path)
        if base.resolve() in above:
            raise ConfigError(f"{path}: extends: {shown(name)} extends this recipe in turn")
        other, elsewhere = _assemble(base, above, read)
        other.pop("name", None)  # of the other recipe's run directory
        merged = _merge_keys(merged, other)
        places.update(elsewhere)
    places.update({loc: f"{path}:{line}" for loc, line in lines.items()})
    return _merge_keys(merged, raw), places


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Nested mapping of settings such as ``data.params.root=/images``, each value read as YAML.

    :raises ConfigError: no ``=``, or not YAML.
    """
    merged: dict[str, Any] = {}
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found or not all(key.split(".")):
            raise ConfigError(f"--set: expected key=value such as training.epochs=3, got {shown(setting)}")
        value, _ = _parse(text, Path("--set"))
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = _merge_keys(merged, value)
    return merged


def load_recipe(name: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    :param name: a YAML file, or the name of a shipped recipe.
    :param settings: what to change in it, each as ``key.of.recipe=value``.
    :raises ConfigError: one line with file, line, the key's path, the value, what is allowed and the nearest key.
    """
    path = find_recipe(name)
    raw, places = _assemble(path, (), [])
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem).lstrip("._-") or "recipe")
    changes = parse_settings(settings)
    try:
        recipe = Recipe.model_validate(_merge_keys(raw, changes))
    except ValidationError as error:
        loc = tuple(first_error(error)["loc"])
        place = "--set" if _given(changes, loc, places) else None
        while place is None and loc:
            place, loc = places.get(loc), loc[:-1]
        raise ConfigError(f"{place or f'{path}:1'}: {explain(error, Recipe)}") from None
    try:
        recipe.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def _given(changes: Any, loc: tuple, places: dict[tuple, str]) -> bool:
    """Whether the key at ``loc`` comes from a setting."""
    known = loc in places
    for part in loc:
        if not isinstance(changes, dict):
            return True  # within a value that was set
        if part not in changes:
            return False
        changes = changes[part]
    return not known or not isinstance(changes, dict)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
