"""Signals that ask a process to end: the first lets it finish and save, the second ends it at once.

Before a run's loop there is nothing to finish: there the first signal raises `Stopped`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from tempflow.common.say import is_first

DONE, WRONG, HALTED, STOPPED = 0, 2, 75, 130
"""Exit codes: done; the user has to change something; stopped on its way, and may be gone on with; asked to stop by a
signal."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TWICE = 0.2
"""seconds within which a second signal is the first one, delivered by two"""
LAST = 10.0
"""seconds after the time of grace in which what is finished has to be saved"""
AGAIN = 0.2
"""seconds until the next try, where optimizer and parameters were being written to when grace was over"""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end, which finishes nothing more."""


class Stopping:
    """Whether this process was asked to end. There is one, as there is one set of signal handlers."""

    def __init__(self) -> None:
        self.asked_by: str | None = None
        """the signal's name"""
        self._when = 0.0
        self._grace: float | None = None
        self._may_leave: Callable[[], bool] = lambda: True
        self._over = False
        self._timers: list[threading.Timer] = []
        self._hint = ""
        self._last: Callable[[], None] | None = None

    @contextmanager
    def listening(self, hint: str = "go on from the last checkpoint with run.resume=true") -> Iterator[None]:
        """Within this context the signals are this object's; afterwards whose they were before. A SIGHUP that is
        ignored, as under `nohup`, stays so.

        Args:
            hint: how to go on with what a second signal ended at once.
        """
        self.asked_by, self._over, self._hint = None, False, hint
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in SIGNALS
                 if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]  # fmt: skip
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            self._cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
            self.asked_by = None  # a run that begins without listening is not asked by what came before

    @contextmanager
    def finishing(self, grace: float, may_leave: Callable[[], bool]) -> Iterator[None]:
        """Within this context the first signal is noted, for `asked_by` to be looked at.

        Args:
            grace: seconds after which `Stopped` is raised all the same.
            may_leave: whether it may be raised just now; it waits until it may.
        """
        self._grace, self._may_leave = grace, may_leave
        try:
            yield
        finally:
            self._grace = None

    @contextmanager
    def noting(self, last: Callable[[], None]) -> Iterator[None]:
        """Within this context the first signal is noted and nothing else, for `asked_by` to be looked at.

        Args:
            last: what is done before a second signal ends the process.
        """
        self._last = last
        try:
            yield
        finally:
            self._last = None

    def _receive(self, number: int, _: object) -> None:
        if self._over:
            self._leave()
            return
        name = signal.Signals(number).name
        if self.asked_by is None:
            self._first(name)
        elif time.monotonic() - self._when > TWICE:
            if self._last is not None:
                self._last()
            end_now(f"{name}: ended at once; {self._hint}")

    def _first(self, name: str) -> None:
        self.asked_by, self._when = name, time.monotonic()
        if self._last is not None:
            return
        if self._grace is None:
            raise Stopped(name)
        say_at_once(f"{name}: finishing the iteration, at most {self._grace:g} s (run.grace); again: ends at once")
        self._after(self._grace, self._wake)
        hint = "run.grace is over and nothing more could be saved; go on from the last checkpoint with run.resume=true"
        self._after(self._grace + LAST, lambda: end_now(f"{name}: {hint}"))

    def _after(self, seconds: float, work: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, work)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _wake(self) -> None:
        """In a timer's thread: interrupts whatever the main thread waits for."""
        self._over = True
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    def _leave(self) -> None:
        if not self._may_leave():
            self._after(AGAIN, self._wake)
            return
        self._over, self._may_leave = False, lambda: True
        if self._grace is not None:
            self._grace = None
            raise Stopped(self.asked_by)

    def _cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


STOPPING = Stopping()


def end_now(words: str) -> None:
    """Says so and ends the process, threads and all."""
    say_at_once(words)
    os._exit(STOPPED)


def say_at_once(words: str) -> None:
    """Says it past the stream's buffer, which may be in use where a signal came."""
    if is_first():
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\ntempflow: {words}\n".encode())


def leave_with_parent() -> None:
    """Has the kernel send SIGTERM when torchrun, which started this process, ends, however it does. Linux only."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Ends the program, whatever its threads wait for."""
    if code != DONE and _threads_wait():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _threads_wait() -> bool:
    """Whether threads may wait for a scorer's server yet, for which a plain exit would wait, too."""
    own = threading.current_thread()
    return any(not thread.daemon and thread is not own for thread in threading.enumerate())
