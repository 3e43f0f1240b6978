"""Builds the documents as a site: `python docs/site.py` writes build/site; nothing in it needs a network.

Its pages can be opened from the disk, but for the search, which needs a server: `--serve`.

The documents link to code, tables and pictures elsewhere in the repository. What they link to is copied beside them,
pictures as they are and everything else as text; a link to a folder becomes its words alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTWARD = re.compile(r"(!?\[[^\]]*\])\(\.\./([^)#\s]+)(#[^)]*)?\)")
"""A link that leaves docs/: its words in brackets, its path from the root."""
COPIES = "repository"
PICTURES = (".png", ".svg", ".jpg", ".webp")


def stage(documents: Path, target: Path) -> None:
    """Copies the documents, and what they link to.

    Raises:
        FileNotFoundError: a document links to what is not there.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for page in sorted(documents.glob("*.md")):
        text = OUTWARD.sub(lambda found: taken_along(found, documents.parent, target), page.read_text(encoding="utf-8"))
        (target / page.name).write_text(text, encoding="utf-8")


def taken_along(found: re.Match[str], root: Path, target: Path) -> str:
    """The same link to a copy of the file."""
    words, path, anchor = found[1], Path(found[2]), found[3] or ""
    source = root / path
    if source.is_dir():
        return words.removeprefix("!")[1:-1]
    copy = Path(COPIES) / (path if path.suffix in PICTURES else path.with_name(f"{path.name}.txt"))
    (target / copy).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target / copy)
    return f"{words}({copy.as_posix()}{anchor if path.suffix in PICTURES else ''})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: that of the generator, or 2 where it is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "build", help="gets docs/ and site/ (default: build)")
    parser.add_argument("--serve", action="store_true", help="show it at localhost instead of writing it")
    given = parser.parse_args(arguments)
    if shutil.which("zensical") is None:
        print("docs/site.py: zensical is not installed: pip install 'tempflow[docs]'", file=sys.stderr)
        return 2
    stage(ROOT / "docs", given.into / "docs")
    shutil.copyfile(ROOT / "mkdocs.yml", given.into / "mkdocs.yml")
    deed = ["serve"] if given.serve else ["build", "--strict", "--clean"]
    return subprocess.run(["zensical", *deed], cwd=given.into).returncode


if __name__ == "__main__":
    sys.exit(main())
