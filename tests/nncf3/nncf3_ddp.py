"""One process of the DistributedDataParallel test: ``nncf3_ddp.py RANK FOLDER ALGORITHM``."""

from __future__ import annotations

import sys
from pathlib import Path

import fat_nncf
import torch
import torch.distributed as dist
from nncf3_nets import Small, compress, loader, quantizers, section
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel


def main(rank: int, folder: Path, algorithm: str) -> None:
    """Two training steps; writes the state that this rank ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    data = [(x.abs() * (1 + rank) if rank == 0 else x, y) for x, y in loader()]
    controller, model = compress(section(algorithm), net=Small(), data=data)
    assert quantizers(model)["activation", "input of conv1"].signed == (rank == 1)
    if algorithm == "direct" and rank == 1:
        for (role, _), quantizer in quantizers(model).items():
            if role == "activation" and hasattr(quantizer, "energy"):  # as where only rank 0 calibrates
                quantizer.energy = quantizer.energy.new_zeros(0)
    controller.distributed()
    assert not quantizers(model)["activation", "input of conv1"].signed  # all as rank 0
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(fat_nncf.param_groups(model, lr=0.05), lr=0.05)
    parallel.train()
    for x, y in loader():
        loss = torch.nn.functional.cross_entropy(parallel(x[rank::2]), y[rank::2]) + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
