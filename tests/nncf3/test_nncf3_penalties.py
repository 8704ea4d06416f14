"""Penalties on models that NNCF 3 compressed."""

from nncf3_nets import compress
from penalised import check_penalties, section
from stepping import SHAPE, batch


def test_quantizers_show_what_they_quantize():
    info = {"sample_size": list(SHAPE)}
    check_penalties(lambda algorithm, net: compress(section(algorithm), net, data=[batch(5)], input_info=info)[1])
