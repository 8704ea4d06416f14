"""The same JSON, weights and batch give the same codes and gradients on every host, bit for bit."""

import crossgen
import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize("name", crossgen.configs())
def test_codes_and_gradients_equal_the_stored_ones(name):
    stored = load_file(str(crossgen.DATA))
    model = crossgen.compress(crossgen.configs()[name])
    crossgen.check_weights(crossgen.quantized_weights(model), stored, name)
    crossgen.check_training_step(crossgen.training_step(model), crossgen.stored_step(name))
