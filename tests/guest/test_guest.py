"""A good guest: importing this package changes nothing for whoever does not use it."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


def installed():
    """``nncf2`` or ``nncf3``, and ``brevitas``."""
    for package in ("nncf", "brevitas"):
        try:
            text = version(package)
        except PackageNotFoundError:
            continue
        yield f"nncf{text.split('.')[0]}" if package == "nncf" else package


HERE, HOSTS = Path(__file__).parent, tuple(installed())
HOST = {"nncf2": "fat_nncf", "nncf3": "fat_nncf", "brevitas": "fat_brevitas"}
# NNCF 2 wraps torch's functions when its part for torch is imported, which comes with ours: no import to compare with
BEFORE = {"nncf3": "nncf.torch", "brevitas": "brevitas.nn"}
PAIRS = [("torch", "fat_plugins"), *((BEFORE[h], HOST[h]) for h in HOSTS if h in BEFORE)]
OLD_BREVITAS = "brevitas" in HOSTS and tuple(map(int, version("brevitas").split(".")[:3])) < (0, 13, 1)


def run(program, *args, code=None):
    command = [sys.executable, "-W", "ignore", *(["-c", code] if code else [str(HERE / program)]), *args]
    # NNCF from 2.17 on wants to be told
    environment = {**os.environ, "NNCF_TORCH_LEGACY_TRACING": "1"}
    with TemporaryDirectory() as folder:  # NNCF 2 writes its graphs to the current one
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


#: what is meant to change: Brevitas up to 0.13.0 asks for a method that torch 2.13 has no more
EXPECTED = {"fat_brevitas": {"attributes of Tensor": ("rename",)}} if OLD_BREVITAS else {}


@pytest.mark.parametrize(("base", "ours"), PAIRS)
def test_an_import_changes_nothing(base, ours):
    found = json.loads(run("imported.py", base, ours))
    expected = EXPECTED.get(ours, {})
    left = {k: [n for n in names if n not in expected.get(k, ())] for k, names in found["changed"].items()}
    assert {k: v for k, v in left.items() if v} == {}
    assert found["events"] == []


# Brevitas up to 0.13.0 does not run by itself on torch 2.13
@pytest.mark.parametrize("host", [h for h in HOSTS if not (h == "brevitas" and OLD_BREVITAS)])
def test_the_host_computes_the_same_with_us_imported(host):
    """Quantizing and training by the host's own means: outputs and state, bit for bit."""
    assert run("host_runs.py", host) == run("host_runs.py", host, HOST[host])


MODULES = sorted({"fat_plugins", *(HOST[h] for h in HOSTS)})


@pytest.mark.parametrize("module", MODULES)
def test_models_of_others_are_compiled_scripted_pickled_and_shared(module):
    code = f"""
import {module}, copy, pickle, torch
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
x = torch.rand(2, 1, 5, 5)
with torch.no_grad():
    wanted = net(x)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
    assert torch.equal(copy.deepcopy(net)(x), wanted)
    assert torch.allclose(torch.jit.script(net)(x), wanted, atol=1e-6)
    assert torch.equal(torch.jit.trace(net, x)(x), wanted)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), wanted)
data = torch.utils.data.TensorDataset(x)
loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context="spawn")
if __name__ == "__main__":
    assert torch.equal(torch.cat([b for (b,) in loader]), x)
    print("same")
"""
    if module == "fat_nncf" and "nncf2" in HOSTS:
        pytest.skip("NNCF 2 replaces torch.jit and torch.compile itself")
    assert run(None, code=code) == "same"
