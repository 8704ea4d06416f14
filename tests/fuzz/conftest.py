import pytest

from fat_plugins.recipes import imports


@pytest.fixture(autouse=True)
def permissions_end_with_the_test():
    """Inputs permit modules of their own; other tests of this process must not inherit that."""
    before = set(imports._allowed)
    yield
    imports._allowed.clear()
    imports._allowed.update(before)
