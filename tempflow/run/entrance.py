"""How the training command begins and ends. Nothing heavy is imported before it has to be."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from tempflow.common.say import say
from tempflow.common.stopping import DONE, STOPPED, STOPPING, leave_with_parent
from tempflow.settings.help import read_command_line


def enter(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    Help and wrong settings are answered before anything heavy is imported, and signals from the first moment on.
    """
    with STOPPING.listening():
        leave_with_parent()
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        except KeyboardInterrupt:
            say("stopped before the first iteration; begin again, with run.resume=auto if run.dir is there")
            code = STOPPED
    return code


def leave(code: int) -> NoReturn:
    """Ends the program, whatever its threads wait for."""
    if code != DONE and _threads_wait():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    config = read_command_line(arguments)
    return config if isinstance(config, int) else import_module("tempflow.train").run(config)


def _threads_wait() -> bool:
    """Whether threads may wait for a scorer's server yet, for which a plain exit would wait, too."""
    own = threading.current_thread()
    return any(not thread.daemon and thread is not own for thread in threading.enumerate())
