"""One line, in the words of a JSON or YAML file, for what pydantic reports about it."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fat_plugins.errors import nearest, one_line, shown


class Expected:
    """What an annotated type is called in error messages, e.g. ``Annotated[int, Expected("a bit width")]``."""

    def __init__(self, text: str) -> None:
        self.text = text


def first_error(error: ValidationError) -> Any:
    """The error to report: an unknown key before anything else, since a misspelt key is why another one is missing."""
    errors = error.errors()
    return next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """One line for a pydantic error: the key's path, the value, what is allowed, the nearest valid key."""
    first = first_error(error)
    annotation, loc = _annotation_at(model, first["loc"])
    path = ".".join(one_line(str(p), 60) for p in ([where] if where else []) + list(loc))
    # the branches of one union are one mistake
    mistakes = len({tuple(_annotation_at(model, e["loc"])[1]) for e in error.errors()})
    more = f" (and {mistakes - 1} more)" if mistakes > 1 else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        fields = _fields_at(model, first["loc"][:-1])
        allowed = f"; allowed: {', '.join(sorted(fields))}" if fields else ""
        return f"{path}: unknown key{allowed}{nearest(first['loc'][-1], fields)}{more}"
    if kind == "missing":
        return f"{path}: this key is required{more}"
    if kind == "value_error":  # our own validators: they name the value themselves
        return f"{path}: {first['msg'].removeprefix('Value error, ')}{more}"
    value = _value_at(first, len(first["loc"]) - len(loc))
    if annotation is not None and (kind.endswith("_type") or kind in ("literal_error", "int_from_float")):
        words = _literals(annotation)
        return f"{path}: expected {describe(annotation)}, got {value}{nearest(first['input'], words)}{more}"
    return f"{path}: {first['msg'].replace('Input should be', 'must be')}, got {value}{more}"


def _value_at(error: Any, deeper: int) -> str:
    """The offending value, shortened. Inside a union pydantic shows the value of one branch, which is enough."""
    return shown(error["input"])


def _annotation_at(model: type[BaseModel], loc: tuple) -> tuple[Any, list]:
    """The annotation that an error location points to, and the part of the location that a user would recognise
    (pydantic appends the names of union branches)."""
    current: Any = model
    for i, part in enumerate(loc):
        current = _strip(current)
        arms = [a for a in get_args(current) if a is not type(None)] if _is_union(current) else []
        if len(arms) == 1:
            current = _strip(arms[0])
        elif arms:
            return current, list(loc[:i])
        origin = get_origin(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = _field(current, part)
            if field is None:
                return None, list(loc)
            current = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        elif origin is dict:
            current = get_args(current)[1]
        elif origin in (list, tuple, set):
            current = get_args(current)[0]
        else:
            return current, list(loc[:i])
    return current, list(loc)


def _field(model: type[BaseModel], name: object) -> Any:
    fields = model.model_fields
    return fields.get(name) or next((f for f in fields.values() if f.alias == name), None)


def _strip(annotation: Any) -> Any:
    """Without ``Annotated``, unless it says how it wants to be called."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [v for v in get_args(annotation) if isinstance(v, str)]
    return [v for a in get_args(annotation) for v in _literals(a)]


_WORDS = {
    int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def describe(annotation: Any) -> str:
    """What a type accepts, in words of a JSON or YAML file: ``a list of strings or null``."""
    if get_origin(annotation) is Annotated:
        said = [m.text for m in annotation.__metadata__ if isinstance(m, Expected)]
        return said[0] if said else describe(get_args(annotation)[0])
    origin, args = get_origin(annotation), get_args(annotation)
    if _is_union(annotation):
        parts = [p for a in args if a is not type(None) for p in _alternatives(a)]
        return _join(parts)
    if origin is Literal:
        return _join(_alternatives(annotation))
    if origin is list and args:
        inner = describe(args[0])
        return "a list of lists" + inner[6:] if inner.startswith("a list") else f"a list of {inner.split(' ', 1)[1]}s"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "an object"
    if annotation is bool:
        return "true or false"
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _alternatives(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [repr(v) for v in get_args(annotation)]
    return ["true", "false"] if annotation is bool else [describe(annotation)]


def _join(parts: list[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _fields_at(model: type[BaseModel], loc: tuple) -> list[str]:
    """Names of the keys of the (sub)model that an error location points into."""
    current, _ = _annotation_at(model, loc)
    current = _strip(current)
    candidates = [current, *(_strip(a) for a in get_args(current))]
    owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return [f.alias or n for n, f in owner.model_fields.items()] if owner else []
