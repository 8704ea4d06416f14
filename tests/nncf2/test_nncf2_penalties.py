"""Penalties on models that NNCF 2 compressed."""

from legacy_models import compress
from penalised import check_penalties, section
from stepping import SHAPE


def test_quantizers_show_what_they_quantize():
    check_penalties(lambda algorithm, net: compress(section(algorithm), net, shape=SHAPE)[1])
