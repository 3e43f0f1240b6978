"""Cutting many rows into network calls."""

from __future__ import annotations

from collections.abc import Iterator


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `size` that cover range(total); the last may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
