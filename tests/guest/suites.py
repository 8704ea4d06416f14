"""Runs a host's own tests twice, without us and with us imported first, and compares what every single test did.

    python tests/guest/suites.py nncf PATH [tests/torch/quantization ...] [--json FILE]
    python tests/guest/suites.py brevitas PATH

PATH is a checkout of the host at the version that is installed: neither host ships its tests in packages or source
distributions, and none of them is copied here. Without a selection, :data:`SELECTION` is run. Exit code 1 if a test did
not do the same both times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
OURS = {"nncf": "fat_nncf", "brevitas": "fat_brevitas"}
#: of each host and generation, what is near to what we touch and needs no model zoo and no network
SELECTION = {
    "nncf 2": (
        "tests/torch/quantization/test_algo_quantization.py", "tests/torch/quantization/test_range_init.py",
        "tests/torch/quantization/test_onnx_export.py", "tests/torch/quantization/test_scheduler.py",
        "tests/torch/sparsity", "tests/torch/test_nncf_utils.py", "tests/torch/test_compression_lr_multiplier.py",
        "tests/torch/test_frozen_layers.py", "tests/torch/test_load_model_state.py",
        "tests/torch/test_serialization.py", "tests/torch/test_pytorch_patch.py", "tests/torch/test_custom_modules.py",
        "tests/torch/test_api_behavior.py",
    ),
    "nncf 3": (
        "tests/torch/function_hook", "tests/torch/quantization/test_strip.py",
        "tests/torch/quantization/test_layers.py", "tests/torch/quantization/test_tracing.py",
        "tests/torch/tensor_statistics", "tests/torch/test_dataset_generators.py",
        "tests/torch/test_model_graph_manager.py", "tests/torch/test_node_utils.py", "tests/torch/test_utils.py",
    ),
    "brevitas 0": (
        "tests/brevitas/core/test_int_quant.py", "tests/brevitas/core/test_scaling_quant.py",
        "tests/brevitas/core/test_binary_quant.py", "tests/brevitas/core/test_ternary_quant.py",
        "tests/brevitas/core/test_stats.py", "tests/brevitas/core/test_runtime_scaling.py",
        "tests/brevitas/function", "tests/brevitas/proxy", "tests/brevitas/quant_tensor", "tests/brevitas/optim",
        "tests/brevitas/nn/test_act.py", "tests/brevitas/nn/test_conv2d.py", "tests/brevitas/nn/test_linear.py",
        "tests/brevitas/nn/test_convtranspose.py", "tests/brevitas/nn/test_wbiol.py",
        "tests/brevitas/nn/test_merge_bn.py", "tests/brevitas/export/test_qonnx_export.py",
        "tests/brevitas/export/test_inference_mode.py", "tests/brevitas/graph", "tests/brevitas/utils",
        "tests/brevitas/test_brevitas_import.py",
    ),
}  # fmt: skip
#: addresses and times in names of tests
CHANGING = re.compile(r"0x[0-9a-f]+|\d{4}-\d\d-\d\d[T ][\d:.]+")


def run(checkout: Path, selection: list[str], more: list[str], module: str | None) -> dict[str, str]:
    """What every test did: ``passed``, ``failed``, ``error`` or ``skipped``.

    :param module: imported before anything of the host's tests, ``None`` for nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        path = os.pathsep.join([str(checkout), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "NNCF_TORCH_LEGACY_TRACING": "1"}
        environment.pop("IMPORT_FIRST", None)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more]
        command += [f"--junitxml={results}", "--continue-on-collection-errors"]
        if module is not None:
            environment["IMPORT_FIRST"] = module
            command += ["-p", "import_first"]
        done = subprocess.run([*command, *selection], cwd=checkout, env=environment, capture_output=True, text=True)
        if not results.exists():
            sys.exit(f"pytest ended with {done.returncode}: {done.stderr.strip()[-2000:] or done.stdout[-2000:]}")
        found: dict[str, str] = {}
        for case in ElementTree.parse(results).iter("testcase"):
            name = CHANGING.sub("...", f"{case.get('classname')}::{case.get('name')}")
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = next((k for k in ("error", "failure", "skipped") if k in kinds), "passed")
            found[name] = outcome if found.get(name, "passed") in ("passed", "skipped") else found[name]
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=OURS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="*", help="paths in the checkout; default: a selection")
    parser.add_argument("-k", dest="keyword", help="as of pytest")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    key = f"{args.host} {version(args.host).split('.')[0]}"
    selection = args.tests or [t for t in SELECTION[key] if (args.checkout / t).exists()]
    if not selection or not all((args.checkout / t.split("::")[0]).exists() for t in selection):
        parser.error(f"no such tests in {args.checkout}: {', '.join(selection or SELECTION[key])}")
    more = ["-k", args.keyword] if args.keyword else []
    without = run(args.checkout.resolve(), selection, more, None)
    ours = run(args.checkout.resolve(), selection, more, OURS[args.host])
    differ = {n: (without.get(n), ours.get(n)) for n in sorted({*without, *ours}) if without.get(n) != ours.get(n)}
    counts = {"without us": dict(Counter(without.values())), "with us": dict(Counter(ours.values()))}
    for name, count in counts.items():
        print(f"{args.host} {version(args.host)}, {name}: {sum(count.values())} tests, {count}")
    for name, (before, after) in differ.items():
        print(f"differs: {name}: {before} without us, {after} with us")
    print(f"{len(differ)} differ")
    if args.json is not None:
        data = {"host": args.host, "version": version(args.host), "tests": selection, **counts, "differ": differ}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
