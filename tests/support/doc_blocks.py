"""The code blocks of the documents, and what each says it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"gpu", "weights", "docker", "slurm", "time", "network"}
"""What `<!-- needs: ... -->` on the line before a block may name: then it is read here, and not run."""
BLOCK = re.compile(r"(?:^<!-- needs: ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Lines between fences."""

    document: str
    line: int
    language: str
    text: str
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """The README and the documents, in the order in which the site shows them."""
    named = re.findall(r"([\w]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    return [ROOT / "README.md", *(ROOT / "docs" / name for name in named)]


def blocks(*languages: str) -> list[Block]:
    """Every block of these languages, from the first document to the last."""
    return [block for path in documents() for block in blocks_of(path) if block.language in languages]


def blocks_of(path: Path) -> list[Block]:
    """The blocks of one document."""
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    return [
        Block(name, text[: found.start(3)].count("\n") + 1, found[2], found[3], frozenset((found[1] or "").split()))
        for found in BLOCK.finditer(text)
    ]
