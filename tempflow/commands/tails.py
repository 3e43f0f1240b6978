"""What fast tails do to the rewards: `python -m tempflow.commands.tails [PRESET or FILE.yaml] [section.field=...]`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from tempflow.commands.ending import end
from tempflow.parallel import ranks as processes
from tempflow.run.assembly import set_up
from tempflow.settings.reading import load
from tempflow.studies.tails import check_tails


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return end(lambda: _check(given))
    finally:
        processes.stop()


def _check(arguments: Sequence[str]) -> int:
    config = load(arguments)
    with tempfile.TemporaryDirectory() as folder:
        apart = replace(config.run, dir=folder, resume=False, plan_only=False, trackers=[])
        trainer, _, _ = set_up(replace(config, run=apart))
        print(check_tails(trainer).describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
