"""Which generation of NNCF is installed, and what has to be set before it is imported."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from fat_plugins.errors import HostError
from fat_plugins.versions import NNCF

LEGACY_VARIABLE = "NNCF_TORCH_LEGACY_TRACING"
_ON = ("1", "on", "true")
#: first version whose legacy path needs the variable, and first version without that path
_VARIABLE_SINCE, _LEGACY_UNTIL = (2, 17), (3, 0)


def nncf_version() -> tuple[int, ...]:
    """Version of the installed NNCF as ``(major, minor, patch)``, found without importing it. One that is newer
    than those tested gives a warning.

    :raises HostError: NNCF is absent or outside the supported range.
    """
    try:
        text = version("nncf")
    except PackageNotFoundError:
        raise HostError(f"fat_nncf needs NNCF: {NNCF.install}") from None
    return NNCF.check(text)


def generation() -> int:
    """2 (``create_compressed_model`` is NNCF's own) or 3 (function hooks); prepares the environment for it.

    NNCF 2.17 to 2.19 read ``NNCF_TORCH_LEGACY_TRACING`` when ``nncf.torch`` is imported. It is set here unless the user
    set it; an explicit 0 asks for function hooks, which we use from NNCF 3 on only.

    :raises HostError: NNCF is absent, unsupported, or runs in the mode that we do not use there.
    """
    found = nncf_version()
    if found >= _LEGACY_UNTIL:
        return 3
    if found < _VARIABLE_SINCE:
        return 2
    imported = "nncf.torch" in sys.modules
    if imported and LEGACY_VARIABLE not in os.environ:
        raise HostError(
            f"nncf.torch was imported before fat_nncf without legacy tracing: import fat_nncf first, or set "
            f"{LEGACY_VARIABLE}=1 in the environment"
        )
    value = os.environ.setdefault(LEGACY_VARIABLE, "1")
    if value.lower() not in _ON:
        raise HostError(
            f"{LEGACY_VARIABLE}={value} turns off the tracing that fat_nncf needs on NNCF 2: unset it, or use NNCF 3 "
            "(pip install 'fat-plugins[nncf]')"
        )
    if imported and not _operators_are_wrapped():
        raise HostError(
            f"nncf.torch was imported before {LEGACY_VARIABLE}=1 was set: import fat_nncf first, or set the variable "
            "in the environment"
        )
    return 2


def _operators_are_wrapped() -> bool:
    from nncf.torch.dynamic_graph.patch_pytorch_state import PATCHING_STATE

    return bool(PATCHING_STATE.operators_are_wrapped)
