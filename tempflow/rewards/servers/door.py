"""What a server does about callers that talk nonsense, or nothing: a few words to its owner, and no resources."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

IDLE_SECONDS = 60.0
"""How long a connection may be silent between requests."""

MOST = 1024
"""Connections at once; fewer where the system grants fewer descriptors."""

OWN = 32
"""Descriptors that the program needs itself."""


class Counted(logging.Handler):
    """One line for the first mishap of a kind, the second, the fourth, the eighth and so on; no traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Counts a record of aiohttp's."""
        error = record.exc_info[1] if record.exc_info else None
        self.tell("a request could not be answered", error)

    def tell(self, words: str, error: BaseException | None) -> None:
        """Counts a mishap; nothing that a caller sent is printed."""
        kind = type(error).__name__ if error is not None else "no reason"
        self.seen[kind] += 1
        count = self.seen[kind]
        if count & (count - 1) == 0:
            print(f"tempflow: {words} ({kind}, {count} so far)", file=sys.stderr, flush=True)

    def logger(self) -> logging.Logger:
        """A logger that ends here, and is known to nobody else."""
        own = logging.Logger("scorer server", logging.WARNING)
        own.addHandler(self)
        return own

    def of_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An event loop's handler of what it could not do, such as to accept a connection without a descriptor."""
        self.tell("a connection failed", context.get("exception"))


class Refused(asyncio.Protocol):
    """A connection beyond the last one that there is room for: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


def most_connections() -> int:
    """Connections that the system grants descriptors for, one at least."""
    granted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if granted == resource.RLIM_INFINITY else min(MOST, max(1, granted - OWN))


def admit(count: Callable[[], int], admitted: Callable[[], asyncio.Protocol], most: int) -> asyncio.Protocol:
    """The protocol of a new connection, while `count` of them are open."""
    return admitted() if count() < most else Refused()
