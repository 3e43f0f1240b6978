"""What to run first on a GPU: numbers right, then fast, then worth it; one command, one page at the end.

    python benchmarks/first_half_hour.py                       25 minutes on a CUDA machine, no network needed
    python benchmarks/first_half_hour.py --minutes 9           again with the same folder it goes on
    python benchmarks/first_half_hour.py --parts rollouts,memory --again memory
    python benchmarks/first_half_hour.py --device cpu --tiny   walks all of it without a GPU

Parts run in the order of their worth, each in a process of its own with a time limit, so that one that crashes or hangs
costs itself alone. Rows are written at once; parts that are done are not run again with the same folder and commit.
`page.md`, written after every part, and `page.png` say of all parts what was measured, predicted, and the verdict.
SIGTERM and SIGINT end the part under way, whose rows stay, and write the page.

Exit status: 0 if all parts chosen ran and passed, 1 if any failed or was not run, 2 for wrong use, 128 + the signal's
number where one ended it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

PATIENCE = {"cuda": 1.0, "cpu": 5.0}
"""on the limits of parts; kernels in the interpreter on a shared core are slow"""
STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parent))
from importable import ROOT  # noqa: E402, isort: skip

import torch  # noqa: E402
from half_hour import page, runner  # noqa: E402
from half_hour.parts import NAMES, PARTS  # noqa: E402


def names(text: str) -> list[str]:
    """Parts of a list with commas."""
    found = [name for name in text.split(",") if name]
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; choose from {', '.join(NAMES)}")
    return found


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="all included")
    parser.add_argument("--folder", type=Path, help="of rows and page; default: benchmarks/results/first_half_hour")
    parser.add_argument("--parts", type=names, default=NAMES, help="names, separated by commas; default: all")
    parser.add_argument("--again", type=names, default=[], help="parts to run again")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to walk the code without a GPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("--device: found cuda, but torch sees no GPU; `--device cpu --tiny` walks the code", file=sys.stderr)
        return 2
    if asked.device == "cpu" and not asked.tiny:
        print("--device: found cpu without --tiny; the full sizes are for GPUs", file=sys.stderr)
        return 2
    folder = (asked.folder or ROOT / "benchmarks" / "results" / "first_half_hour").resolve()
    session = runner.Session(folder, asked.device, asked.tiny, STARTED + 60 * asked.minutes, PATIENCE[asked.device])
    chosen = tuple(part for part in PARTS if part.name in asked.parts)
    with runner.stoppable():
        stopped = 0
        try:
            runner.run_parts(session, chosen, asked.again, lambda: page.write_text(session, PARTS))
        except runner.Stopped as signal:
            stopped = 128 + signal.args[0]
        found = page.write_page(session, PARTS)
    for section in found:
        print(f"{section.part.name:12} {section.ending:12} {section.outcome}")
    print(f"{folder / 'page.md'}, page.png")
    asked_for = [section for section in found if section.part in chosen]
    return stopped or page.exit_status(asked_for, asked.device == "cuda")


if __name__ == "__main__":
    sys.exit(main())
