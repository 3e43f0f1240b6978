"""Cutting many rows into network calls, and gradients into messages."""

from __future__ import annotations

from collections.abc import Iterator

BUCKET = 256 * 2**20
"""bytes of gradients that ranks average at a time"""


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` that cover range(total); the last may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
