"""The same JSON, weights and batch give the same quantized weights on every NNCF, bit for bit."""

import crossgen
import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("name", crossgen.configs())
def test_quantized_weights_equal_the_stored_ones(name):
    stored = load_file(str(crossgen.DATA))
    found = crossgen.quantized_weights(crossgen.compress(crossgen.configs()[name]))
    assert set(found) == set(crossgen.LAYERS)
    for layer, weight in found.items():
        assert torch.equal(weight, stored[f"{name}/{layer}"]), layer
