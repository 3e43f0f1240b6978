"""How the training command begins. Nothing heavy is imported before it has to be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from tempflow.common.say import say
from tempflow.common.stopping import STOPPED, STOPPING, leave_with_parent
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


def _run(arguments: Sequence[str]) -> int:
    config = read_command_line(arguments)
    return config if isinstance(config, int) else import_module("tempflow.train").run(config)
