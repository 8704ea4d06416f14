"""torchvision beside a CPU build of torch: its wheel is compiled for CUDA, so its operators cannot be loaded there."""

from __future__ import annotations

import sys

import torch


def import_torchvision():
    """torchvision, with the two operators that it describes at import declared (models, transforms and datasets need
    no more). On a matching installation this is a plain import."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declared_operators = library  # they live as long as this object
    return torchvision
