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
RECIPE_HOSTS = [h.rstrip("23") for h in HOSTS]
#: compresses and trains a small net with FAT, in a process of its own
USE = f"""
import sys; sys.path.insert(0, {str(HERE.parent)!r})
import crossgen
from fat_plugins.recipes.hosts import get_host
def use(name):
    config = crossgen.configs()["fat_uniform"]
    controller, model = get_host(name).compress(crossgen.build_net(), config, crossgen.loader(), crossgen.batch())
    (model.train()(crossgen.batch()).sum() + controller.loss()).backward()
    return get_host(name).freeze(model.eval())
"""
#: a model that has nothing to do with us, in everything that torch does with models
OTHERS = """
import copy, io, pickle, torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
x = torch.rand(2, 1, 5, 5)

def through_a_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    torch.save(net.state_dict(), io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)

def check():
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)
        assert torch.equal(copy.deepcopy(net)(x), wanted)
        assert torch.equal(through_a_file(net)(x), wanted)
        assert torch.allclose(torch.jit.script(net)(x), wanted, atol=1e-6)
        assert torch.equal(torch.jit.trace(net, x)(x), wanted)
        assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), wanted)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), wanted)
        assert torch.equal(torch.export.export(net, (x,)).module()(x), wanted)
        assert torch.equal(torch.func.functional_call(net, dict(net.named_parameters()), (x,)), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16
    net(x).sum().backward()
    assert net[0].weight.grad is not None
    net.zero_grad()

def loaders():
    data = torch.utils.data.TensorDataset(x)
    for context in ("spawn", "fork"):
        loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context=context)
        assert torch.equal(torch.cat([b for (b,) in loader]), x)
"""


@pytest.mark.parametrize("module", MODULES)
def test_models_of_others_are_compiled_scripted_pickled_and_shared(module):
    if module == "fat_nncf" and "nncf2" in HOSTS:
        pytest.skip("NNCF 2 replaces torch.jit and torch.compile itself")
    assert (
        run(None, code=f"import {module}\n{OTHERS}\nif __name__ == '__main__':\n    check(); loaders(); print('same')")
        == "same"
    )


@pytest.mark.parametrize("host", [h for h in RECIPE_HOSTS if not (h == "nncf" and "nncf2" in HOSTS)])
def test_models_of_others_stay_as_they_are_beside_one_that_is_quantized(host):
    code = f"{USE}\n{OTHERS}\nif __name__ == '__main__':\n    kept = use('{host}'); check(); loaders(); print('same')"
    assert run(None, code=code) == "same"


#: what is loaded on first use only
LATER = (
    "brevitas", "jinja2", "matplotlib", "nncf", "onnx", "onnxruntime", "openvino", "qonnx", "rich", "scipy", "sklearn",
    "tensorboard", "torchvision", "typer", "yaml",
)  # fmt: skip


@pytest.mark.parametrize(
    ("base", "ours", "most"),
    [("torch", "fat_plugins", 130), *((BEFORE.get(h, "nncf.torch"), HOST[h], 200) for h in HOSTS)],
)
def test_an_import_loads_few_modules(base, ours, most):
    """Counted, as seconds depend on the machine: with what they import, ours and pydantic's for the most part."""
    code = (
        f"import sys, json, {base}\nbefore = set(sys.modules)\nimport {ours}\n"
        "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))"
    )
    before, added = json.loads(run(None, code=code))
    if "torch._dynamo" in added and version("torch").startswith("2.4."):
        pytest.skip("torch 2.4 loads its compiler for torch.compiler.disable")
    assert len([m for m in added if m.startswith("fat_")]) > 10 and len(added) <= most
    there = {m.split(".")[0] for m in before}
    assert not ({m.split(".")[0] for m in added} - there) & set(LATER)


@pytest.mark.parametrize("host", RECIPE_HOSTS)
def test_nothing_is_sent_or_looked_up_while_a_model_is_quantized(host):
    watch = (
        "import sys\nseen = []\n"
        "events = 'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'urllib.Request'\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event in events else None)\n"
    )
    code = f"{watch}{USE}\nuse('{host}')\nprint(seen)"
    assert run(None, code=code) == "[]"
    assert run(None, code=f"{watch}import socket\nsocket.socket().connect_ex(('127.0.0.1', 9))\nprint(seen)") != "[]"
