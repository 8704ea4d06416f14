"""The same JSON, weights and batch give the same codes and gradients on every host, bit for bit."""

import crossgen
import pytest


@pytest.mark.parametrize("name", crossgen.configs())
def test_a_training_step_equals_the_stored_one(name):
    model = crossgen.compress(crossgen.configs()[name])
    crossgen.check_training_step(crossgen.training_step(model), crossgen.stored_step(name))
