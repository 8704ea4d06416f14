"""The key ``rewrites`` of a recipe: what changes the trained float network before quantizers are placed."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from fat_plugins.config import Section
from fat_plugins.errors import unknown
from fat_plugins.explain import Expected
from fat_plugins.rewrites import RewriteReport, get_rewrite, rewrite, rewrites


class RewriteSection(Section):
    """One change to the float network."""

    name: str = Field(description="Name of a registered rewrite.")
    params: dict[str, Any] = Field(default_factory=dict, description="Options of the rewrite.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in rewrites():
            raise ValueError(unknown("rewrite", value, rewrites()))
        return value


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


RewriteSections = list[
    Annotated[RewriteSection, BeforeValidator(_named), Expected("a name, or an object with name and params")]
]


def check_rewrites(sections: list[RewriteSection], where: str) -> None:
    """Options of rewrites.

    :raises ConfigError: one line with the key's path.
    """
    for i, section in enumerate(sections):
        get_rewrite(section.name).parse_params(section.params, f"{where}.{i}.params")


def rewritten(
    model: nn.Module, sections: list[RewriteSection], example: Tensor
) -> tuple[nn.Module, list[RewriteReport]]:
    """The float model as quantizers meet it: itself, or a copy on which the rewrites were at work.

    They follow from weights and options alone, so a run that goes on comes to the same layers.

    :param example: an input of the model, on its device.
    """
    if not sections:
        return model, []
    model = deepcopy(model)
    return model, rewrite(model, [s.model_dump() for s in sections], example)
