"""Penalties on models that Brevitas quantized."""

import fat_brevitas
from penalised import check_penalties, section
from stepping import batch


def test_quantizers_show_what_they_quantize():
    check_penalties(lambda algorithm, net: fat_brevitas.quantize(net, section(algorithm), [batch(5)]))
