"""versions.json: what a run was made with, the last time that it began or went on."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tempflow.common.files import write_atomically

FILE = "versions.json"
PACKAGES = ("tempflow", "tempflow-kernels", "torch", "diffusers", "transformers", "peft", "safetensors", "triton",
            "bitsandbytes", "numpy", "pillow")  # fmt: skip


def installed() -> dict[str, str]:
    """Package -> version, of those that are there; Python, system and GPU besides."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | _devices()


def _devices() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda or torch.version.hip)}


def write_versions(folder: Path) -> None:
    """Writes `folder/versions.json`."""
    write_atomically(folder / FILE, json.dumps(installed(), indent=1).encode())


def read_versions(folder: Path) -> dict[str, str]:
    """What stands there; nothing where there is no such file, or another one of that name."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(name): str(words) for name, words in found.items()} if isinstance(found, dict) else {}
