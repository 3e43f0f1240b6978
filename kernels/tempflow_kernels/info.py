"""Which backend serves which device, in words."""

from __future__ import annotations

from importlib import metadata, util

import torch

from .cpu import library as native
from .library import CHOSEN, NAMESPACE
from .noise_setting import noise_mode


def _triton_version() -> str:
    if util.find_spec("triton") is None:
        return "not installed"
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "installed, version unknown"


def _noise() -> str:
    """Which normals each device draws: only Triton has a choice."""
    served = {"cpu": CHOSEN["CPU"], "cuda": CHOSEN["CUDA"], "other devices": CHOSEN["CompositeExplicitAutograd"]}
    modes = {device: noise_mode() if backend == "triton" else "exact" for device, backend in served.items()}
    return ", ".join(f"{device}: {mode}" for device, mode in modes.items())


def backend_info() -> dict[str, str]:
    """Backends and normals (exact or fast) per device, versions, and why the C++ twin is absent if it is."""
    return {
        "cpu": CHOSEN["CPU"],
        "cuda": CHOSEN["CUDA"],
        "other devices": CHOSEN["CompositeExplicitAutograd"],
        "noise": _noise(),
        "native": native.describe(),
        "triton": _triton_version(),
        "torch": torch.__version__,
        "namespace": NAMESPACE,
    }
