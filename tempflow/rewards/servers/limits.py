"""What a server takes at most. Imports nothing heavy, so that its command line can tell of it at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a server takes at most."""

    body: int = 256 * 2**20
    """bytes of a request"""
    images: int = 512
    """images of a request"""
    side: int = 8192
    """pixels of an image's side"""
    prompt: int = 20_000
    """characters of a prompt"""
