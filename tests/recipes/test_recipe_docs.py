"""docs/recipes.md names every key that a recipe may have, and every dataset, model, optimizer and schedule."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from fat_plugins.recipes import schema
from fat_plugins.recipes.data import DATASETS
from fat_plugins.recipes.models import MODELS
from fat_plugins.recipes.optim import OPTIMIZERS

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
SECTIONS = [v for v in vars(schema).values() if isinstance(v, type) and issubclass(v, BaseModel)]
SECTIONS = [v for v in SECTIONS if v.__module__ == schema.__name__ and v is not schema.BaseModel]


def named(word):
    return f"`{word}`" in TEXT or f"{{{word}" in TEXT or f", {word}" in TEXT


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_key_is_documented(section):
    assert [key for key in section.model_fields if not named(key)] == []


def test_every_name_is_documented():
    schedules = get_args(schema.ScheduleSection.model_fields["name"].annotation)
    names = [*DATASETS, *MODELS, *OPTIMIZERS, *schedules]
    assert len(schedules) == 8
    assert [name for name in names if f"`{name}`" not in TEXT] == []
    options = {key for name in ("cifar10", "imagefolder", "callable") for key in DATASETS[name][0].model_fields}
    options |= {key for name in MODELS for key in MODELS[name][0].model_fields}
    assert [key for key in sorted(options) if f"`{key}`" not in TEXT] == []
