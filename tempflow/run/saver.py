"""Writing beside the next iteration: one piece of work at a time, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """A thread that writes what no longer changes. What fails there is raised where it is waited for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: Future | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the work before, then has `work` done."""
        self.wait()
        self._pending = self._thread.submit(work)

    def start_if_idle(self, work: Callable[[], None]) -> None:
        """Has `work` done, unless it would have to wait for the work before, or that has failed and is to be told."""
        if self._pending is None or (self._pending.done() and self._pending.exception() is None):
            self.start(work)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            Whatever the work raised, once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread after its work; what was not waited for is lost no more, and not told either."""
        self._thread.shutdown()
