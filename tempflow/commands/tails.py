"""Tells what fast tails, or a light decoder, do to the rewards of one iteration: `tempflow tails [STACK]`.

Takes presets, files and settings as training does (`tempflow train --help` lists them) and trains nothing.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from tempflow.commands.ending import Parser, end
from tempflow.settings.fields import Config
from tempflow.settings.reading import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""
    return end(lambda: _check(sys.argv[1:] if arguments is None else arguments))


def _parser() -> Parser:
    example = "tempflow tails digits tails.stride=2 explore.prompts=4"
    parser = Parser(prog="tempflow tails", description=__doc__, example=example)
    parser.add_argument("stack", nargs="*", metavar="PRESET, FILE.yaml or section.field=value", help="as in training")
    return parser


def _check(arguments: Sequence[str]) -> int:
    config = load(_parser().parse_args(arguments).stack)
    from tempflow.parallel import ranks as processes  # heavy, and not needed for help

    try:
        return _measure(config)
    finally:
        processes.stop()


def _measure(config: Config) -> int:
    from tempflow.run.assembly import set_up
    from tempflow.studies.tails import check_tails

    with tempfile.TemporaryDirectory() as folder:
        apart = replace(config.run, dir=folder, resume=False, plan_only=False, trackers=[])
        trainer, _, _ = set_up(replace(config, run=apart))
        print(check_tails(trainer).describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
