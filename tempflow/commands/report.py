"""Draws the report of a run again: `python -m tempflow.commands.report runs/digits`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tempflow.common.errors import BadInput
from tempflow.records.figures import draw_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for wrong input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        print(draw_report(Path(arguments[0] if arguments else "runs/digits")))
        return 0
    except BadInput as error:
        print(f"tempflow: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
