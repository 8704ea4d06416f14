"""fat-plugins: low-bit quantization-aware training algorithms as plug-ins. The core knows no host framework."""

import torch

from fat_plugins.versions import TORCH

TORCH.check(torch.__version__)  # before the imports that an older one fails in

# before the functions of these names, which a later import would replace
import fat_plugins.algorithms
import fat_plugins.penalties
import fat_plugins.rewrites  # noqa: F401
from fat_plugins.config import CompressionConfig
from fat_plugins.errors import CheckpointError, ConfigError, ExportError, FatPluginsError, HostError, QuantizationError
from fat_plugins.figures import Figure
from fat_plugins.inspect import compare, summary
from fat_plugins.kernels import get_backend, set_backend
from fat_plugins.network import named_quantizers, param_groups, regularization, set_progress
from fat_plugins.norms import reestimate_batch_norms
from fat_plugins.penalties import Penalty, get_penalty, penalties
from fat_plugins.quantizer import (
    ActivationQuantizer,
    Coordinator,
    Progress,
    Quantizer,
    TensorSpec,
    WeightQuantizer,
)
from fat_plugins.registry import Algorithm, algorithms, get_algorithm
from fat_plugins.reuse import accumulate, get_weight_cache, set_weight_cache
from fat_plugins.rewrites import Rewrite, RewriteReport, get_rewrite, rebuild, rewrite, rewrites
from fat_plugins.switching import at_bits, each_width, set_active_bits, widths

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantizer",
    "Algorithm",
    "CheckpointError",
    "CompressionConfig",
    "ConfigError",
    "Coordinator",
    "ExportError",
    "FatPluginsError",
    "Figure",
    "HostError",
    "Penalty",
    "Progress",
    "QuantizationError",
    "Quantizer",
    "Rewrite",
    "RewriteReport",
    "TensorSpec",
    "WeightQuantizer",
    "__version__",
    "accumulate",
    "algorithms",
    "at_bits",
    "compare",
    "each_width",
    "get_algorithm",
    "get_backend",
    "get_penalty",
    "get_rewrite",
    "get_weight_cache",
    "named_quantizers",
    "param_groups",
    "penalties",
    "rebuild",
    "reestimate_batch_norms",
    "regularization",
    "rewrite",
    "rewrites",
    "set_active_bits",
    "set_backend",
    "set_progress",
    "set_weight_cache",
    "summary",
    "widths",
]
