"""Quantization configs in every form that NNCF 2 took, for a small network (``Net`` below)."""

from __future__ import annotations

import torch
from torch import nn

INPUT = {"sample_size": [2, 3, 8, 8]}


class Net(nn.Module):
    """Three convolutions and a linear layer; to NNCF 2 the first is ``Net/NNCFConv2d[conv1]/conv2d_0``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


def _whole(*sections: dict, **root) -> dict:
    return {"input_info": INPUT, "compression": list(sections) if len(sections) > 1 else sections[0], **root}


#: name -> config; none of them asks for what NNCF 2.14 to 2.19 refuse
CONFIGS = {
    "shortest": _whole({"algorithm": "quantization"}),
    "application keys": _whole(
        {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}},
        model="resnet50",
        batch_size=32,
        epochs=2,
        optimizer={"type": "Adam", "base_lr": 1e-5, "schedule_type": "multistep", "steps": [5]},
    ),
    "int4, asymmetric, per channel": _whole(
        {
            "algorithm": "quantization",
            "weights": {"mode": "asymmetric", "per_channel": True, "bits": 4},
            "activations": {"mode": "asymmetric", "bits": 4, "signed": False, "per_channel": False},
            "quantize_inputs": True,
            "initializer": {
                "range": {"num_init_samples": 8, "type": "mean_percentile", "params": {"min_percentile": 1.0}},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 8},
            },
        },
        target_device="TRIAL",
    ),
    "manual precision": _whole(
        {
            "algorithm": "quantization",
            "weights": {"bits": 4},
            "initializer": {
                "precision": {
                    "type": "manual",
                    "bitwidth_per_scope": [
                        [8, "Net/NNCFConv2d[conv1]/conv2d_0|WEIGHT"],
                        [4, "Net/NNCFConv2d[conv2]/conv2d_0|WEIGHT"],
                        [6, "Net/NNCFConv2d[conv3]/conv2d_0|INPUT0"],
                        [8, "Net/ReLU/relu_0|OUTPUT"],
                    ],
                }
            },
        },
        target_device="TRIAL",
    ),
    "overrides and scopes": _whole(
        {
            "algorithm": "quantization",
            "preset": "mixed",
            "weights": {"logarithm_scale": True, "ignored_scopes": ["{re}.*conv3.*"], "validate_scopes": True},
            "ignored_scopes": ["{re}.*fc.*"],
            "scope_overrides": {
                "weights": {"{re}.*conv2.*": {"bits": 4, "mode": "symmetric"}},
                "activations": {"{re}.*conv2.*": {"bits": 4, "signed": True}},
            },
            "overflow_fix": "disable",
            "export_to_onnx_standard_ops": True,
            "compression_lr_multiplier": 5,
            "validate_scopes": False,
            "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2, "base_lr": 0.01},
        }
    ),
    "sparsity": _whole(
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.2,
            "params": {"schedule": "multistep", "multistep_steps": [2], "multistep_sparsity_levels": [0.2, 0.5]},
        },
        {"algorithm": "quantization", "weights": {"bits": 4}, "activations": {"bits": 4}},
        compression_lr_multiplier=2.0,
    ),
    "rb sparsity": _whole(
        {"algorithm": "rb_sparsity", "sparsity_init": 0.01, "params": {"sparsity_target": 0.5}},
        {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8, "type": "min_max"}}},
    ),
}

#: what NNCF 3 has nothing for, besides
NNCF2_ONLY = {
    "distillation": _whole(
        {"algorithm": "knowledge_distillation", "type": "softmax"},
        {"algorithm": "quantization", "weights": {"bits": 4}, "activations": {"bits": 4}},
    ),
    "filter pruning": _whole(
        {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": {"schedule": "baseline", "pruning_target": 0.3}},
        {"algorithm": "quantization"},
    ),
    "ranges by scope": _whole(
        {
            "algorithm": "quantization",
            "initializer": {
                "range": [
                    {"num_init_samples": 8, "target_quantizer_group": "weights", "target_scopes": ["{re}.*"]},
                    {
                        "type": "threesigma",
                        "num_init_samples": 8,
                        "target_quantizer_group": "activations",
                        "target_scopes": ["{re}.*"],
                    },
                ]
            },
        }
    ),
}
