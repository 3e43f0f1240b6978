"""What the machine has."""

from __future__ import annotations

import os


def host_memory() -> int:
    """Bytes of main memory in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
