"""Which backend serves which device, in words."""

from __future__ import annotations

from importlib import metadata, util

import torch

from .cpu import library as native
from .library import CHOSEN, NAMESPACE


def _triton_version() -> str:
    if util.find_spec("triton") is None:
        return "not installed"
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "installed, version unknown"


def backend_info() -> dict[str, str]:
    """Backends per device, versions, and why the C++ twin is absent if it is."""
    return {
        "cpu": CHOSEN["CPU"],
        "cuda": CHOSEN["CUDA"],
        "other devices": CHOSEN["CompositeExplicitAutograd"],
        "native": native.describe(),
        "triton": _triton_version(),
        "torch": torch.__version__,
        "namespace": NAMESPACE,
    }
