"""Recipes in two processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import plain_net

from fat_plugins.recipes import load_checkpoint

HERE = Path(__file__).parent
TIMEOUT = 300
RECIPE = (
    "name: tiny\n"
    + plain_net.SECTIONS
    + """\
host: HOST
compression:
  algorithm: dropbits
  weights: {bits: 4}
  activations: {bits: 4}
pretrain:
  epochs: 1
  optimizer: {name: sgd, lr: 0.1}
training:
  epochs: 2
  optimizer: {name: sgd, lr: 0.02}
export: null
baselines: [lsq]
"""
)


def recipe(folder, host, batch):
    path = folder / f"{batch}.yaml"
    path.write_text(RECIPE.replace("HOST", host).replace("BATCH", str(batch)))
    return path


def start_two(folder, *args, words=""):
    """Two processes as ``torchrun`` starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OWN_CLI": words, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    program = [sys.executable, str(HERE / "own_cli.py"), "train", *map(str, args)]
    processes = [
        subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        found = [p.communicate(timeout=TIMEOUT) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, found, strict=True)]


def assert_close_runs(one, other, tolerance):
    for name in ("checkpoint/float", "checkpoint/last", "baselines/lsq/checkpoint/last"):
        a, b = (load_checkpoint(d / f"{name}.safetensors").state for d in (one, other))
        assert list(a) == list(b)
        moved = 0
        for key, tensor in a.items():
            apart = float((tensor.double() - b[key].double()).abs().max()) if tensor.numel() else 0.0
            assert apart <= tolerance, f"{name} {key}: {apart}"
            moved += tensor.numel()
        assert moved > 1000
