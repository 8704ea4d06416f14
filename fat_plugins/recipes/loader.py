"""Recipe files: YAML read by ``yaml.safe_load``, errors with file, line and key."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fat_plugins.errors import ConfigError, nearest
from fat_plugins.explain import explain, first_error
from fat_plugins.recipes.schema import Recipe

#: no honest recipe is larger; keeps a wrong file name from filling the memory
MAX_BYTES = 1_000_000
MAX_DEPTH = 50
_STARTS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(str(resources.files("fat_plugins.recipes") / "shipped"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe file, or of a shipped recipe by its name.

    :raises ConfigError: neither, with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if path.is_dir():
        raise ConfigError(f"recipe {str(name)!r} is a directory; expected a YAML file")
    raise ConfigError(
        f"no recipe file {str(name)!r}; shipped recipes: {', '.join(known) or 'none'}{nearest(path.stem, known)}"
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, not a recipe or config")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def read_json_config(path: Path) -> dict[str, Any]:
    """An NNCF JSON config.

    :raises ConfigError: missing file, broken JSON, or no ``compression`` in it.
    """
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(config, dict) or "compression" not in config:
        raise ConfigError(f"{path}: expected an NNCF config, an object with the key 'compression'")
    return config


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
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} occurs twice")
            seen.add(key.value)
            found[(*path, key.value)] = key.start_mark.line + 1
            _lines(value, (*path, key.value), found)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), found)
    return found


def _refuse_bombs(text: str) -> None:
    """Aliases, which can grow without bound, and nesting that no recipe has but that takes the parser minutes."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
        if depth > MAX_DEPTH:
            raise ConfigError(f"line {token.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(token, yaml.AliasToken):
            raise ConfigError(f"line {token.start_mark.line + 1}: YAML aliases (*name) are not allowed in recipes")


def _parse(text: str, path: Path) -> tuple[Any, dict[tuple, int]]:
    try:
        _refuse_bombs(text)
        return yaml.safe_load(text), _lines(yaml.compose(text, Loader=yaml.SafeLoader))
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


def load_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe.

    :param name: a YAML file, or the name of a shipped recipe.
    :raises ConfigError: one line with file, line, the key's path, the value, what is allowed and the nearest key.
    """
    path = find_recipe(name)
    raw, lines = _parse(_read(path), path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with keys such as model, data, compression")
    if isinstance(raw.get("compression"), str):
        raw["compression"] = read_json_config(path.parent / raw["compression"])
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        loc = tuple(first_error(error)["loc"])
        while loc not in lines and loc:
            loc = loc[:-1]
        raise ConfigError(f"{path}:{lines.get(loc, 1)}: {explain(error, Recipe)}") from None
    try:
        recipe.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
