"""The same JSON, weights and batch give the same codes and gradients on every host, bit for bit."""

import crossgen
import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("name", crossgen.configs())
def test_codes_and_gradients_equal_the_stored_ones(name):
    stored = load_file(str(crossgen.DATA))
    model = crossgen.compress(crossgen.configs()[name])
    found = crossgen.quantized_weights(model)
    assert set(found) == set(crossgen.LAYERS)
    for layer, weight in found.items():
        assert torch.equal(weight, stored[f"{name}/{layer}"]), layer
    crossgen.check_training_step(crossgen.training_step(model), crossgen.stored_step(name))
