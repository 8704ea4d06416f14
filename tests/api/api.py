"""The public API: what ``docs/api.md`` lists, described from the code.

    python tests/api/api.py

writes ``tests/data/api.json`` and the lists in ``docs/api.md`` again. What needs a host that is not installed is kept
as it is: run it in an environment with NNCF 3 and Brevitas and in one with NNCF 2. The test beside it fails when a name
or a signature is not the listed one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT, PAGE = ROOT / "tests" / "data" / "api.json", ROOT / "docs" / "api.md"
BEGIN, END = "<!-- lists: written by tests/api/api.py -->\n", "<!-- end of lists -->\n"

#: modules with a list of their own (``__all__``), or the names that are public there
MODULES: dict[str, tuple[str, ...]] = {
    "fat_plugins": (),
    "fat_plugins.quantizer": (
        "TensorSpec", "Progress", "FrozenTensor", "Params", "Quantizer", "WeightQuantizer", "ActivationQuantizer",
        "Coordinator", "LayerQuantizers", "conv_geometry", "module_geometry",
    ),
    "fat_plugins.registry": ("Algorithm", "algorithms", "get_algorithm", "make_quantizer", "refresh"),
    "fat_plugins.network": (
        "named_quantizers", "coordinators", "regularization", "set_progress", "broadcast_state", "param_groups",
    ),
    "fat_plugins.config": ("CompressionConfig",),
    "fat_plugins.forms": (
        "UniformGrid", "Codebook", "Staircase", "SumOfGrids", "form_kind", "form_to_dict", "form_from_dict", "grids",
    ),
    "fat_plugins.functional": (
        "uniform_codes", "wide", "fake_quantize", "level_index", "staircase", "level_quantize", "best_step",
        "grad_scale", "positive", "keep_zeros", "per_channel_view", "standardize", "dft_gate",
    ),
    "fat_plugins.frozen": ("FrozenWeight", "FrozenActivation", "frozen_modules"),
    "fat_plugins.clipping": ("best_clip", "ClipSearch"),
    "fat_plugins.placed": (),
    "fat_plugins.rewrites": (),
    "fat_plugins.penalties": (),
    "fat_plugins.switching": ("widths", "set_active_bits", "at_bits", "each_width"),
    "fat_plugins.deprecation": ("deprecated", "moved", "warn"),
    "fat_plugins.export.openvino": ("export", "description", "read_model", "Kernel", "kernels", "execute"),
    "fat_plugins.export.qonnx": ("export", "verify", "execute"),
    "fat_plugins.export.onnx": ("export", "verify", "execute"),
    "fat_plugins.export.verify": ("verify",),
    "fat_plugins.convert": (),
    "fat_plugins.recipes": (),
    "fat_plugins.recipes.hosts": ("Host", "get_host"),
    "fat_plugins.recipes.targets": ("Target",),
    "fat_plugins.recipes.nets_repvgg": ("RepVGG",),
    "fat_plugins.report": (),
}  # fmt: skip
HOSTS = {"nncf": "fat_nncf", "brevitas": "fat_brevitas"}
#: parts of them that are imported by themselves
PARTS = {"fat_brevitas": ("fat_brevitas.gpfq",)}
GROUPS = ("fat_plugins.algorithms", "fat_plugins.rewrites", "fat_plugins.penalties", "fat_plugins.hosts")
#: new names of these sections need no new list: they have pages of their own
OPEN = ("entry points",)
#: fat_brevitas makes such names for every algorithm; those of one stand for all
EXAMPLE = "FAT"


class _AsWritten:
    """An annotation without the quotes that come of ``from __future__ import annotations``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(thing: Any) -> str:
    """A signature as it is written, ``""`` for what has none."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""

    def written(annotation: Any) -> Any:
        return _AsWritten(annotation) if isinstance(annotation, str) else annotation

    parts = [p.replace(annotation=written(p.annotation)) for p in found.parameters.values()]
    parts = [p.replace(default=_AsWritten("...")) if " at 0x" in repr(p.default) else p for p in parts]
    return str(found.replace(parameters=parts, return_annotation=written(found.return_annotation)))


def describe(thing: Any) -> Any:
    """A public object in JSON types: ``"function (...)"``, or a class with its public members."""
    if inspect.isclass(thing):
        if not thing.__module__.startswith("fat_"):
            return f"class of {thing.__module__.split('.')[0]}"
        if issubclass(thing, BaseModel):  # keys of JSON and YAML, whose types the pages tell
            return {"class": {name: _key(field) for name, field in sorted(thing.model_fields.items())}}
        own = [c for c in thing.__mro__ if c.__module__.startswith("fat_")]
        names = sorted(
            {n for c in own for n in (*vars(c), *vars(c).get("__annotations__", {})) if not n.startswith("_")}
        )
        return {f"class {signature(thing)}".strip(): {name: _member(thing, name) for name in names}}
    if inspect.isroutine(thing):
        home = inspect.unwrap(thing).__module__ or ""
        return f"function {signature(thing)}" if home.startswith("fat_") else f"function of {home.split('.')[0]}"
    return f"value of type {type(thing).__name__}"


def _key(field: Any) -> str:
    if field.is_required():
        return "key, required"
    return f"key = {'...' if field.default_factory else repr(field.default)}"


def _member(kind: type, name: str) -> str:
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, property):
        return "property"
    if isinstance(found, (classmethod, staticmethod)):
        return f"{type(found).__name__} {signature(getattr(kind, name))}"
    return f"method {signature(found)}" if inspect.isfunction(found) else "attribute"


def describe_module(name: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Public names of a module with their descriptions."""
    module = import_module(name)
    names = names or getattr(module, "__all__", None) or tuple(_own(module))
    found = {n: getattr(module, n) for n in sorted(names) if not n.startswith("__")}
    return {n: _elsewhere(thing, n, name) or describe(thing) for n, thing in found.items()}


def _elsewhere(thing: Any, name: str, here: str) -> str:
    home = str(getattr(thing, "__module__", ""))
    return f"from {home}" if home != here and name in MODULES.get(home, ()) else ""


def _own(module: Any) -> Iterator[str]:
    for name, value in vars(module).items():
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(module.__name__):
            yield name


def commands() -> dict[str, Any]:
    """Commands of ``fat-plugins`` with their arguments and options."""
    from fat_plugins.cli import app

    found: dict[str, Any] = {}

    def walk(command: Any, path: str) -> None:
        found[path] = {_spelling(p): _kind(p) for p in command.params if p.name != "help"}
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, f"{path} {name}")

    walk(typer.main.get_command(app), "fat-plugins")
    return found


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return (parameter.name or "").upper()
    return ", ".join((*parameter.opts, *parameter.secondary_opts))


def _kind(parameter: Any) -> str:
    # typer's own classes differ from version to version: only what all of them say
    words = ["flag" if getattr(parameter, "is_flag", False) else "value"]
    words += ["required"] if parameter.required else []
    words += ["repeatable"] if parameter.multiple or parameter.nargs == -1 else []
    return ", ".join(words)


def hosts() -> Iterator[tuple[str, str]]:
    """Modules of the installed hosts with the section that describes them."""
    for package, module in HOSTS.items():
        try:
            text = version(package)
        except PackageNotFoundError:
            continue
        yield module, f"{module} on NNCF {text.split('.')[0]}" if package == "nncf" else module


def describe_host(module: str) -> dict[str, Any]:
    """Public names of an adapter, with those that it makes for one algorithm."""
    # not all supported versions of Brevitas have layers for three dimensions
    made = sorted(n for n in dir(import_module(module)) if EXAMPLE in n and not n.endswith("3d"))
    return {**describe_module(module), **{n: "made for every algorithm" for n in made}}


def current() -> dict[str, Any]:
    """The public API of what is installed, by section."""
    found = {name: describe_module(name, names) for name, names in MODULES.items()}
    for module, section in hosts():
        found[section] = describe_host(module)
        found |= {part: describe_module(part) for part in PARTS.get(module, ())}
    found["command line"] = commands()
    points = {g: {p.name: "entry point" for p in entry_points(group=g) if _ours(p)} for g in GROUPS}
    return {**found, "entry points": points}


def _ours(point: Any) -> bool:
    return point.value.startswith(("fat_plugins.", "fat_nncf.", "fat_brevitas."))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines that tell what a reader of the list would not find, or would find otherwise.

    :param new: sections of hosts that are not installed are missing in it.
    """
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    lines = [f"new:     {k} {flat_new[k]}" for k in flat_new if k not in flat_old and not k.startswith(OPEN)]
    present = tuple(f"{section}:" for section in new)
    gone = [k for k in flat_old if k not in flat_new and k.startswith(present)]
    lines += [f"gone:    {k}" for k in gone]
    for key in flat_new:
        if key in flat_old and flat_old[key] != flat_new[key]:
            lines += [f"changed: {key}", f"   was   {flat_old[key]}", f"   is    {flat_new[key]}"]
    return lines


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``section: name.member`` with its description."""
    for section, names in tree.items():
        for name, value in names.items():
            if not isinstance(value, dict):
                yield f"{section}: {name}", value
                continue
            for head, members in value.items():
                if not isinstance(members, dict):  # a command's option, or an entry point
                    yield f"{section}: {name} {head}", members
                    continue
                yield f"{section}: {name}", head
                for member, text in members.items():
                    yield f"{section}: {name}.{member}", text


def render(api: Mapping[str, Any]) -> str:
    """The lists of the page."""
    out = []
    for section, names in api.items():
        title = section if section in ("command line", "entry points") else f"`{section}`"
        out.append(f"### {title[0].upper() + title[1:]}\n")
        if section == "command line":
            for command, options in names.items():
                listed = ", ".join(f"`{o}`" for o in options) or "no options"
                out.append(f"* `{command}`: {listed}")
        elif section == "entry points":
            for group, points in names.items():
                out.append(f"* `{group}`: {', '.join(f'`{p}`' for p in points) or 'none of our own'}")
        else:
            out += ["```text", *(line for n, v in names.items() for line in _lines(n, v)), "```"]
        out.append("")
    return "\n".join(out)


def _lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        ((head, members),) = value.items()
        yield f"{name}{head.removeprefix('class').strip()}  # class"
        for member, text in members.items():
            kind, _, rest = text.partition(" ")
            yield f"    .{member}{rest}" if rest else f"    .{member}  # {kind}"
    elif value.startswith("function ("):
        yield f"{name}{value.removeprefix('function ')}"
    else:
        yield f"{name}  # {value}"


def page(text: str, api: Mapping[str, Any]) -> str:
    """The page with its lists written anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{render(api)}{END}{rest.partition(END)[2]}"


def main() -> None:
    old = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    new = current()
    merged = {k: new.get(k, old.get(k)) for k in dict.fromkeys((*MODULES, *sorted({*old, *new} - {*MODULES})))}
    print("\n".join(differences(old, new)) or "nothing has changed")
    SNAPSHOT.write_text(json.dumps(merged, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), merged))


if __name__ == "__main__":
    main()
