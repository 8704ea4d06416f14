"""Which tests belong to this environment, and how all of them run.

``FAT_PLUGINS_TEST_HOST`` (``none``, ``nncf2``, ``nncf3``, ``brevitas``, or several with commas) says which hosts must
be installed: a missing one, or a package that comes with it, is an error then, not a pile of skipped tests. Without the
variable, whatever is installed is tested.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

os.environ.setdefault("NNCF_CI", "1")  # no telemetry; read when nncf is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def installed_hosts() -> tuple[str, ...]:
    """``nncf2`` or ``nncf3`` and ``brevitas``, by what is installed; nothing is imported."""
    found = []
    for package in ("nncf", "brevitas"):
        try:
            text = version(package)
        except PackageNotFoundError:
            continue
        found.append(f"nncf{text.split('.')[0]}" if package == "nncf" else package)
    return tuple(found)


HOSTS = installed_hosts()

#: folders and files of tests that need a host or packages
NEEDS_HOST = {"nncf2": ("nncf2",), "nncf3": ("nncf3",), "models": ("nncf2", "nncf3"), "brevitas": ("brevitas",)}
NEEDS_PACKAGE = {
    "models": ("torchvision",),
    "test_openvino.py": ("openvino",),
    "test_verify.py": ("openvino",),
    "test_nncf_export.py": ("openvino", "nncf"),
    "test_onnx.py": ("onnx", "onnxruntime"),
    "test_nncf_widths.py": ("openvino", "nncf"),
    "test_nncf_onnx.py": ("onnx", "onnxruntime", "nncf"),
    "test_qonnx.py": ("onnx", "onnxruntime", "qonnx"),
    "equality": ("onnx",),
}
#: what must be there with a host, so that a broken installation is an error as well
COMES_WITH = {
    "nncf2": ("openvino", "onnx"),
    "nncf3": ("openvino", "onnx"),
    "brevitas": ("onnx", "onnxruntime", "qonnx"),
}


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of ``packages`` that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("FAT_PLUGINS_TEST_HOST")
    if wanted and set(wanted.split(",")) != set(HOSTS or ("none",)):
        raise pytest.UsageError(f"FAT_PLUGINS_TEST_HOST={wanted}, but installed is {', '.join(HOSTS) or 'none'}")
    absent = missing(tuple(name for host in HOSTS for name in COMES_WITH[host]))
    if wanted and absent:
        raise pytest.UsageError(f"FAT_PLUGINS_TEST_HOST={wanted}, but not installed is {', '.join(absent)}")
    # the numbers of a test must not depend on how many cores the machine has
    import torch

    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path, config):
    parts = collection_path.relative_to(config.rootpath).parts if config.rootpath in collection_path.parents else ()
    for part in parts:
        if part in NEEDS_HOST and not set(HOSTS) & set(NEEDS_HOST[part]):
            return True
        if part in NEEDS_PACKAGE and missing(NEEDS_PACKAGE[part]):
            return True
    return None


def pytest_report_header(config: pytest.Config) -> str:
    left_out = [f"{part} (no {', '.join(missing(p))})" for part, p in NEEDS_PACKAGE.items() if missing(p)]
    return f"hosts: {', '.join(HOSTS) or 'none'}; left out: {'; '.join(left_out) or 'nothing'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def no_host_sync(monkeypatch):
    """A switch: ``with no_host_sync():`` makes every way that a tensor's value can reach Python raise."""
    from contextlib import contextmanager

    import torch

    names = (
        "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero",
        "__iter__", "is_nonzero", "unique",
    )  # fmt: skip

    def refuse(name):
        def raiser(*args, **kwargs):
            raise AssertionError(f"Tensor.{name} stalls the device")

        return raiser

    @contextmanager
    def switch():
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(torch.Tensor, name, refuse(name), raising=False)
            yield

    return switch
