"""The same JSON, weights and batch give the same codes and gradients on Brevitas as on NNCF, bit for bit."""

import crossgen
import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize("name", crossgen.configs())
def test_codes_and_gradients_equal_the_stored_ones(name):
    model = crossgen.compress(crossgen.configs()[name], "brevitas")
    weights, stored = crossgen.quantized_weights(model), load_file(str(crossgen.DATA))
    crossgen.check_weights(weights, stored, name)
    crossgen.check_training_step(crossgen.training_step(model), crossgen.stored_step(name))
