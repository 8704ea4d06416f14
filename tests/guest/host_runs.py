"""Plain use of a host, without any of ours; prints a digest of what came out.

python host_runs.py [MODULE]      with MODULE (fat_nncf, fat_brevitas) imported before
"""

import contextlib
import hashlib
import importlib
import io
import sys
import warnings

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def trained(model, images):
    """Three steps, then the outputs in evaluation."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(images)


def nncf2(images):
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model, register_default_init_args

    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, 3, 12, 12]},
            "compression": [{"algorithm": "magnitude_sparsity"}, {"algorithm": "quantization"}],
        }
    )
    data = torch.utils.data.TensorDataset(images, torch.zeros(len(images)))
    config = register_default_init_args(config, torch.utils.data.DataLoader(data, batch_size=4))
    model = create_compressed_model(Net(), config)[1]
    return model, trained(model, images)


def nncf3(images):
    import nncf

    model = nncf.quantize(Net().eval(), nncf.Dataset(list(images.split(4))), subset_size=2)
    return model, trained(model, images)


def brevitas(images):
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = qnn.QuantConv2d(3, 8, 3, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=4)
            self.relu = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=4)
            self.head = qnn.QuantLinear(8, 5, bias=True, weight_quant=Int8WeightPerTensorFloat)

        def forward(self, x):
            return self.head(self.relu(self.conv(x)).mean((2, 3)))

    model = Quantized()
    return model, trained(model, images)


def main():
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        if len(sys.argv) > 2:
            importlib.import_module(sys.argv[2])
        torch.manual_seed(0)
        model, out = globals()[sys.argv[1]](torch.rand(8, 3, 12, 12))
    digest = hashlib.sha256(out.numpy().tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
