"""CFWS: coarse and fine weight splitting for re-parameterised networks (Yang et al., 2023, arXiv 2312.10588).

Two parts that go together or alone: the rewrite ``cfws`` (``split.py``), which splits kernels whose centre tap dwarfs
its neighbours before a host places quantizers, and the algorithm ``cfws`` (``kl.py``), 8-bit weights by their largest
magnitude and activations by a modified KL threshold. ``reparameterize.py`` merges branches into the kernels that have
the problem. Sections quoted are those of the project's CFWS specification, which marks what was read in the authors'
code and what is reconstruction.
"""

from fat_plugins.algorithms.cfws.kl import CFWS, CFWSActivation, CFWSParams
from fat_plugins.algorithms.cfws.reparameterize import Reparameterize
from fat_plugins.algorithms.cfws.split import CFWSSplit, CoarseFine, SplitParams, split_kernel

__all__ = [
    "CFWS",
    "CFWSActivation",
    "CFWSParams",
    "CFWSSplit",
    "CoarseFine",
    "Reparameterize",
    "SplitParams",
    "split_kernel",
]
