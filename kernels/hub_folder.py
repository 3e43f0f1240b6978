"""Lay out the kernel-hub project in a folder of its own: `python hub_folder.py FOLDER`.

The builder wants the sources as plain files in torch-ext/<name> (its filter drops links), and writes `_ops.py`,
`setup.py` and `pyproject.toml` itself, so those of this folder must not be there. Files of an earlier call are
replaced; `.git`, `flake.lock` and `build/` of FOLDER are left alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "tempflow_kernels"
SOURCES = f"torch-ext/{PACKAGE}"
PROJECT_FILES = ("build.toml", "flake.nix", "CARD.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("csrc", "*.so", "__pycache__", "_ops.py")
FOLDERS = {PACKAGE: SOURCES, "tests": "tests", "benchmarks": "benchmarks"}


def lay_out(folder: Path) -> None:
    """Write the project into `folder`.

    Raises:
        ValueError: `folder` holds files, but no hub project.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / SOURCES).is_dir():
        raise ValueError(f"FOLDER: found {folder} with other files, expected an empty one or an earlier hub project")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROJECT_FILES:
        shutil.copyfile(HERE / name, folder / name)
    for source, target in FOLDERS.items():
        shutil.rmtree(folder / target, ignore_errors=True)
        shutil.copytree(HERE / source, folder / target, ignore=LEFT_OUT)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub_folder.py FOLDER")
    try:
        lay_out(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
