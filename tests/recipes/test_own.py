"""Data and models of the user's own, imported with permission only."""

import sys

import pytest
import torch

from fat_plugins.errors import ConfigError
from fat_plugins.recipes import imports
from fat_plugins.recipes.schema import DataSection, ModelSection

CODE = """
import pathlib
import torch
pathlib.Path(__file__).with_name("imported").touch()

def data(count=20, wrong=None):
    torch_images = torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return count
        def __getitem__(self, i):
            return torch_images[i] + torch.rand(()), i % 3
    plain = torch.utils.data.TensorDataset(torch_images, torch.arange(count) % 3)
    parts = {"train": Noisy(), "plain": plain, "test": plain, "classes": 3}
    if wrong == "bytes":
        parts["plain"] = torch.utils.data.TensorDataset((torch_images * 9).byte(), torch.arange(count))
    elif wrong == "list":
        return [1]
    elif wrong == "key":
        parts["tset"] = 1
    elif wrong == "none":
        del parts["test"]
    return parts

def net(sample_shape, classes, hidden=4):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, hidden), torch.nn.Linear(hidden, classes))

def number(**_):
    return 3

value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working directory, which nobody has permitted yet."""
    (tmp_path / "users_own_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imports, "_allowed", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("users_own_code", None)


def section(factory="users_own_code:data", **options):
    return DataSection(name="callable", params={"factory": factory, "options": options})


def test_nothing_is_imported_without_permission(module):
    with pytest.raises(ConfigError, match=r"data.params.factory: .* add --allow-import users_own_code$"):
        section().build()
    assert not (module / "imported").exists()
    imports.allow("users_own")  # a name that only begins alike
    with pytest.raises(ConfigError, match="--allow-import users_own_code"):
        section().build()
    assert not (module / "imported").exists()


def test_data_of_a_function(module):
    imports.allow("users_own_code")
    data = section(count=30).build()
    assert (data.classes, data.sample_shape, len(data.train), len(data.validation), len(data.test)) == (
        3, (2, 6, 6), 27, 3, 30,
    )  # fmt: skip
    first = [x.clone() for x, _ in data.training_loader(9, 1).begin(2)]
    again = [x.clone() for x, _ in data.training_loader(9, 1).begin(2, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again, strict=True))
    other = next(iter(data.training_loader(9, 1).begin(3)))[0]
    assert not torch.equal(first[0], other)
    plain = data.images("train", 27)[0]
    assert float(plain.max()) <= 1.0 < max(float(x.max()) for x in first)


def test_model_of_a_function(module):
    imports.allow("users_own_code")
    data = section().build()
    model = ModelSection(name="callable", params={"factory": "users_own_code:net", "options": {"hidden": 7}}).build(
        data
    )
    assert model(data.example).shape == (1, 3)
    assert model[1].out_features == 7
    with pytest.raises(ConfigError, match=r"users_own_code:number returned int, expected a torch.nn.Module"):
        ModelSection(name="callable", params={"factory": "users_own_code:number"}).build(data)


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        ("users_own_code", {}, "expected 'module:function', got 'users_own_code'"),
        ("users_own_code:data()", {}, "expected 'module:function'"),
        ("users_own_code:dta", {}, "has no function 'dta'; did you mean 'data'?"),
        ("users_own_code:value", {}, "has no function 'value'"),
        ("users_own_code.more:data", {}, "cannot import 'users_own_code.more'"),
        ("users_own_code:data", {"wrong": "list"}, "returned list, expected a dictionary"),
        ("users_own_code:data", {"wrong": "key"}, "unknown entry 'tset'"),
        ("users_own_code:data", {"wrong": "none"}, "returned no 'test'"),
        ("users_own_code:data", {"wrong": "bytes"}, "the images are torch.uint8 (2, 6, 6), expected float32"),
    ],
)
def test_mistakes_are_one_line(module, factory, options, expected):
    imports.allow("users_own_code")
    with pytest.raises(ConfigError) as caught:
        section(factory, **options).build()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_permission_is_for_names_of_modules():
    with pytest.raises(ConfigError, match=r"--allow-import: 'a-b' is not the name of a module"):
        imports.allow("a-b")
