"""Sections that name a plug-in: ``gradient_l1``, or ``{name: gradient_l1, params: {...}}``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator

from fat_plugins.config import Section
from fat_plugins.errors import unknown
from fat_plugins.explain import Expected
from fat_plugins.plugins import Plugin


class NamedSection(Section):
    """A plug-in by name, and its options.

    :cvar kind: what one is called in messages.
    """

    kind: ClassVar[str]
    name: str
    params: dict[str, Any] = Field(default_factory=dict, description="Its options.")

    @classmethod
    @abstractmethod
    def registered(cls) -> Mapping[str, type[Plugin]]:
        """All that may be named."""

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in cls.registered():
            raise ValueError(unknown(cls.kind, value, cls.registered()))
        return value

    def check(self, where: str) -> None:
        """Its options.

        :raises ConfigError: one line with the key's path.
        """
        self.registered()[self.name].parse_params(self.params, f"{where}.params")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


#: for fields whose value may be the name alone: ``Annotated[SomeNamedSection, FROM_NAME, NAME_OR_OBJECT]``
FROM_NAME = BeforeValidator(_named)
NAME_OR_OBJECT = Expected("a name, or an object with name and params")
