"""Draws the report of a run again, report.png and report.html: `tempflow report runs/digits`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tempflow.commands.ending import Parser, end
from tempflow.common.files import user_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""

    def work() -> int:
        example = "tempflow report runs/digits"
        parser = Parser(prog="tempflow report", description=__doc__.partition(":")[0], example=example)
        parser.add_argument("folder", nargs="?", default="runs/digits", help="of the run (default: %(default)s)")
        folder = user_path("folder", parser.parse_args(arguments).folder)
        from tempflow.records.figures import draw_report  # heavy, and not needed for help
        from tempflow.records.page import write_page

        print(draw_report(folder), write_page(folder), sep="\n")
        return 0

    return end(work)


if __name__ == "__main__":
    sys.exit(main())
