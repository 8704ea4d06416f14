"""The key ``rewrites`` of a recipe: what changes the trained float network before quantizers are placed."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fat_plugins.recipes.naming import FROM_NAME, NAME_OR_OBJECT, NamedSection
from fat_plugins.rewrites import Rewrite, RewriteReport, rewrite, rewrites


class RewriteSection(NamedSection):
    """One change to the float network."""

    kind: ClassVar[str] = "rewrite"
    name: str = Field(description="Name of a registered rewrite.")
    params: dict[str, Any] = Field(default_factory=dict, description="Options of the rewrite.")

    @classmethod
    def registered(cls) -> dict[str, type[Rewrite]]:
        return rewrites()


RewriteSections = list[Annotated[RewriteSection, FROM_NAME, NAME_OR_OBJECT]]


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
