"""Imported first by the scripts of this folder: makes them run from a checkout, installed or not, without network."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for package, folder in (("tempflow", ROOT), ("tempflow_kernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(folder))
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variable -> folder in the one that is kept."""


def cache_settings(folder: Path) -> dict[str, str]:
    """Environment in which compiled code is kept in that folder."""
    return {variable: str(folder.resolve() / name) for variable, name in CACHES.items()}


def keep_cache(arguments: Sequence[str]) -> None:
    """Obeys `--cache FOLDER` of a command line. To be called before torch is imported, which reads it then."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        folder = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
        if name == "--cache" and folder:
            os.environ.update(cache_settings(Path(folder)))
