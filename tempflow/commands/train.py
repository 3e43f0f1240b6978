"""Trains: the same as `torchrun tempflow/train.py`, as `python -m tempflow.commands.train` or `tempflow-train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tempflow.settings.help import read_command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; help and wrong settings are answered before anything heavy is imported."""
    config = read_command_line(sys.argv[1:] if arguments is None else arguments)
    if isinstance(config, int):
        return config
    from tempflow.train import INTERRUPTED, run

    code = run(config)
    if code == INTERRUPTED:  # threads may wait for a scorer's server yet, and a plain exit would wait for them
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
