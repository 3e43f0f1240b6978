"""Runs stacks over several seeds and compares them: `tempflow study FILE.yaml`, or a shipped study's name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.common.files import check_makeable
from tempflow.studies.compare.study import SHIPPED, read_study


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tempflow study", description=__doc__, example="tempflow study fig3 --dry-run")
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    parser.add_argument("study", help=f"a file, or one of {names}")
    parser.add_argument("--folder", type=Path, default=Path("studies"), help="of all studies (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="runs at a time, whatever the file says")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be run, its cost and how long it takes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 where a run failed, 2 for wrong input, 130 for Ctrl-C or
    another signal that asks to end."""

    def work() -> int:
        given = _arguments(arguments)
        if given.processes is not None and given.processes < 1:
            raise BadInput("--processes", given.processes, "must be at least 1")
        study = read_study(given.study)  # wrong studies are answered before anything heavy is imported
        from tempflow.studies.compare.make import describe, make_study

        folder = given.folder / study.name
        check_makeable("--folder", folder)
        if given.dry_run:
            print(describe(study, folder, given.processes))
            return 0
        return make_study(study, folder, given.processes)

    return end(work, "interrupted; the same command goes on with it")


if __name__ == "__main__":
    sys.exit(main())
