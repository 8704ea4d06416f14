"""Rewrites: what some papers do to a float network before any quantizer is placed, by name.

A rewrite replaces layers of a float model by others, in place. Hosts place their quantizers afterwards, as in any other
network. What a rewrite did is a :class:`RewriteReport` in JSON types: with it, :func:`rebuild` gives a fresh model of
the same class the same layers, so that its state dict fits. Rewrites are found through the entry-point group
``fat_plugins.rewrites``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fat_plugins.errors import CheckpointError, ConfigError, FatPluginsError, nearest, shown
from fat_plugins.plugins import Plugin, load_group, named
from fat_plugins.quantizer import Params

GROUP = "fat_plugins.rewrites"


@dataclass
class RewriteReport:
    """What one rewrite did to a model, in JSON types.

    :ivar name: of the rewrite.
    :ivar params: all its options.
    :ivar changed: facts by layer: what :meth:`Rewrite.rebuild` needs, and what is worth knowing.
    :ivar left: for layers that it might have changed, why it did not.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "rewrite") -> RewriteReport:
        """Inverse of :meth:`to_dict`.

        :raises CheckpointError: it is no such dictionary.
        """
        keys = {"name": str, "params": dict, "changed": dict, "left": dict}
        if not isinstance(data, dict) or set(data) != set(keys):
            raise CheckpointError(f"{where}: expected the keys {', '.join(keys)}, got {shown(data)}")
        for key, kind in keys.items():
            if not isinstance(data[key], kind):
                raise CheckpointError(f"{where}.{key}: expected a {kind.__name__}, got {shown(data[key])}")
        for layer, facts in data["changed"].items():
            if not isinstance(facts, dict):
                raise CheckpointError(f"{where}.changed.{layer}: expected an object, got {shown(facts)}")
        return cls(**data)

    def __str__(self) -> str:
        count = f"{len(self.changed)} layer{'' if len(self.changed) == 1 else 's'} changed"
        return f"{self.name}: {count}, {len(self.left)} left as they were"


class Rewrite(Plugin):
    """A change to float networks. Subclass it in one file and name it in one entry point."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    #: arXiv number, or "" when there is none
    arxiv: ClassVar[str] = ""
    #: the grade and what it means for this rewrite, as the spec words it
    fidelity: ClassVar[str]
    Params: ClassVar[type[Params]] = Params

    @classmethod
    def apply(cls, model: nn.Module, params: Params, example_input: Tensor | None) -> RewriteReport:
        """Change ``model`` in place.

        :param params: of :meth:`parse_params`.
        :param example_input: an input of the model, for rewrites that run it; ``None`` where the caller has none.
        :raises FatPluginsError: the model does not suit the rewrite, in one line.
        """
        raise NotImplementedError

    @classmethod
    def rebuild(cls, model: nn.Module, params: Params, changed: dict[str, dict[str, Any]]) -> None:
        """Give a fresh model the layers that :meth:`apply` made, whatever their values.

        :param changed: of the report of :meth:`apply`; it may come from a file.
        :raises FatPluginsError: it does not fit the model.
        """
        raise NotImplementedError


def rewrites() -> dict[str, type[Rewrite]]:
    """All registered rewrites by name. One that cannot be loaded is left out with a warning."""
    return dict(load_group(GROUP, Rewrite, "rewrite")[0])


def get_rewrite(name: str) -> type[Rewrite]:
    """The rewrite called ``name``.

    :raises ConfigError: unknown name, with the nearest valid one, or a rewrite that cannot be loaded.
    """
    return named(load_group(GROUP, Rewrite, "rewrite"), "rewrite", name)


def rewrite(
    model: nn.Module,
    names: str | Sequence[str | dict[str, Any]],
    example_input: Tensor | None = None,
    params: dict[str, Any] | None = None,
) -> list[RewriteReport]:
    """Change a float model in place, before it is given to a host::

        fat_plugins.rewrite(model, ["reparameterize", "cfws"])

    :param names: one name, or several in their order, each a name or ``{"name": ..., "params": {...}}``.
    :param example_input: an input of the model, for rewrites that need one.
    :param params: options, where ``names`` is one name.
    :return: what each did; keep it (:meth:`RewriteReport.to_dict`) beside the state dict, for :func:`rebuild`.
    :raises FatPluginsError: unknown name or option; the model does not suit.
    """
    if isinstance(names, str):
        names = [{"name": names, "params": params or {}}]
    elif params:
        raise ConfigError("rewrite: params belong to one name; give {'name': ..., 'params': ...} in a list")
    parsed = []
    for i, entry in enumerate(names):
        entry = {"name": entry} if isinstance(entry, str) else dict(entry)
        unknown = next((k for k in entry if k not in ("name", "params")), None)
        if unknown is not None or not isinstance(entry.get("name"), str):
            raise ConfigError(f"rewrites.{i}: expected a name, or an object with name and params, got {shown(entry)}")
        kind = get_rewrite(entry["name"])
        parsed.append((kind, kind.parse_params(entry.get("params"), f"rewrites.{i}.params")))
    return [kind.apply(model, options, example_input) for kind, options in parsed]


def rebuild(model: nn.Module, reports: Iterable[Any], where: str = "rewrites") -> None:
    """Give a fresh model the layers of a rewritten one, so that its state dict can be loaded.

    :param model: of the class and with the options of the one that was rewritten, in place.
    :param reports: of :func:`rewrite`, as dictionaries.
    :param where: of the reports, for messages.
    :raises CheckpointError: they do not belong to the model, or name a rewrite that is not installed.
    """
    for i, data in enumerate(reports):
        place = f"{where}.{i}"
        report = RewriteReport.from_dict(data, place)
        try:
            kind = get_rewrite(report.name)
            kind.rebuild(model, kind.parse_params(report.params, f"{report.name}.params"), report.changed)
        except FatPluginsError as error:
            raise CheckpointError(f"{place}: {error}") from None


def layer_of(model: nn.Module, name: str, kind: type[nn.Module] = nn.Module) -> nn.Module:
    """The layer called ``name``, which must be a ``kind``.

    :raises ConfigError: there is none of that name, with the nearest one, or of that kind.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    if name not in layers:
        raise ConfigError(f"the model has no layer {shown(name)}{nearest(name, layers)}")
    if not isinstance(layers[name], kind):
        raise ConfigError(f"layer {shown(name)} is a {type(layers[name]).__name__}, expected a {kind.__name__}")
    return layers[name]


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new``, in the mode of training of the old one, wherever the layer called ``name`` stands in ``model``.

    :raises ConfigError: there is no such layer, or it is the model itself.
    """
    old = layer_of(model, name)
    if old is model:
        raise ConfigError("the model itself cannot be replaced; wrap it in a torch.nn.Sequential")
    new.train(old.training)
    for parent in list(model.modules()):  # the new layer may hold the old one
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


__all__ = [
    "Rewrite",
    "RewriteReport",
    "get_rewrite",
    "layer_of",
    "rebuild",
    "replace_layer",
    "rewrite",
    "rewrites",
]
