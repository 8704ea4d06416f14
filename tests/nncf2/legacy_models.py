"""Small networks and shortcuts for the tests of the NNCF 2 adapter."""

import fat_nncf
import torch
from crossgen import INPUT_SHAPE, Net, batch, build_net, loader
from torch import nn

BITS4 = {"weights": {"bits": 4}, "activations": {"bits": 4}}


def fat(**more):
    """A section ``"algorithm": "fat"`` at 4 bits."""
    return {"algorithm": "fat", **BITS4, **more}


def make_config(compression, data=True, shape=INPUT_SHAPE, **top):
    """NNCF config, with a calibration loader unless ``data`` is false."""
    config = fat_nncf.NNCFConfig.from_dict(
        {"input_info": {"sample_size": list(shape)}, "compression": compression, **top}
    )
    if data is True:
        data = loader() if shape == INPUT_SHAPE else random_loader(shape)
    return config if data is False else fat_nncf.register_default_init_args(config, data)


def random_loader(shape, batches=2):
    """Loader of normal noise."""
    x = torch.randn(batches * shape[0], *shape[1:], generator=torch.Generator().manual_seed(7))
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    return torch.utils.data.DataLoader(data, batch_size=shape[0])


def compress(compression, model=None, **kwargs):
    """``(compression_ctrl, model)`` of the network of :mod:`crossgen` or of ``model``."""
    state = kwargs.pop("compression_state", None)
    config = make_config(compression, **kwargs)
    return fat_nncf.create_compressed_model(model or build_net(), config, compression_state=state, dump_graphs=False)


def quantizers(model, role=None):
    """Quantizers of the core by the name of their tensor."""
    from fat_plugins import named_quantizers

    return {q.spec.name: q for _, q in named_quantizers(model) if role in (None, q.role)}


def bits(model, role):
    """Bit width by tensor name."""
    return {name: q.spec.bits for name, q in quantizers(model, role).items()}


def optimizer(model):
    """Plain SGD over the algorithm's parameter groups."""
    return torch.optim.SGD(fat_nncf.param_groups(model, 0.01), lr=0.01, momentum=0.9)


def train_step(model, ctrl, opt, x=None, y=None):
    """One training step as an NNCF script writes it; the loss."""
    ctrl.scheduler.step()
    opt.zero_grad()
    out = model(batch() if x is None else x)
    target = torch.arange(len(out)) % out.shape[1] if y is None else y
    loss = nn.functional.cross_entropy(out, target) + ctrl.loss()
    loss.backward()
    opt.step()
    return float(loss.detach())


def evaluate(model, x=None):
    """Output in evaluation mode, without gradient."""
    model.eval()
    with torch.no_grad():
        return model(batch() if x is None else x).detach().clone()


class Zoo(nn.Module):
    """Grouped, depthwise, 1x1, transposed and plain convolutions, 1-d and 3-d ones, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.mid = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        for layer in (self.first, self.grouped, self.depthwise, self.pointwise, self.up, self.up_grouped):
            x = torch.relu(layer(x))
        return self.last(torch.relu(self.mid(x.mean((2, 3)))))


class Branches(nn.Module):
    """Two branches that are concatenated (one scale for both), a layer that is called twice, a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.sigmoid(self.right(x))], dim=1)
        y = torch.relu(self.shared(x))
        y = torch.relu(self.shared(y)) + x
        return self.head(y.mean((2, 3)))


__all__ = ["INPUT_SHAPE", "Net", "batch", "build_net", "loader"]
