"""Imported first by the scripts of this folder: makes them run from a checkout, installed or not, without network."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for package, folder in (("tempflow", ROOT), ("tempflow_kernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(folder))
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
