"""What an import changes in a process; prints the differences as JSON.

python imported.py BASE OURS      BASE is imported first, then OURS
"""

import importlib
import json
import locale
import logging
import os
import pickle
import random
import signal
import sys
import types
import warnings

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
events: list[str] = []


def watch(event, args):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.system", "os.fork", "os.exec"):
        events.append(event)


def attributes(module):
    """By identity. Submodules become attributes when they are loaded, which changes nothing."""
    return {name: id(value) for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}


def snapshot(base):
    import numpy as np
    import torch

    modules = [torch, torch.nn, torch.nn.functional, torch.jit, torch.utils.data, torch.autograd, torch.optim, np]
    modules += [sys.modules[m] for m in (base, base.split(".")[0]) if m not in ("torch",)]
    found = {f"attributes of {m.__name__}": attributes(m) for m in modules}
    for kind in (torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, dict, object):
        found[f"attributes of {kind.__name__}"] = attributes(kind)
    module = sys.modules["torch.nn.modules.module"]
    found |= {
        "torch's state": [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled, torch.get_printoptions()
            if hasattr(torch, "get_printoptions") else None,
        ],
        "hooks of all modules": [len(getattr(module, n)) for n in vars(module) if n.startswith("_global_") and
                                 hasattr(getattr(module, n), "__len__")],
        "random numbers": [torch.random.get_rng_state().sum().item(), str(random.getstate())[-80:],
                           str(np.random.get_state()[1][:5])],
        "signals": [str(signal.getsignal(s)) for s in SIGNALS],
        "environment": dict(os.environ),
        "hooks of the interpreter": [id(sys.excepthook), id(sys.displayhook), len(sys.meta_path), id(sys.stdout)],
        "warnings": [str(f) for f in warnings.filters],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        "pickle": [len(pickle.dumps(object.__new__(Plain))), len(__import__("copyreg").dispatch_table)],
    }  # fmt: skip
    return found


class Plain:
    pass


def main():
    base, ours = sys.argv[1:]
    importlib.import_module(base)
    sys.addaudithook(watch)
    before = snapshot(base)
    events.clear()
    importlib.import_module(ours)
    happened = list(events)
    after = snapshot(base)
    changed = {}
    for key, value in before.items():
        if value != after[key]:
            keys = (
                {k for k in {*value, *after[key]} if value.get(k) != after[key].get(k)}
                if isinstance(value, dict)
                else {}
            )
            changed[key] = sorted(keys) or [str(value), str(after[key])]
    print(json.dumps({"changed": changed, "events": happened}))


if __name__ == "__main__":
    main()
