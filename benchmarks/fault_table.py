"""Faults done to small runs for as long as asked: kills, signals, disks, checkpoints, scorers, servers, numbers, ranks.

    python benchmarks/fault_table.py --minutes 20 --folder FOLDER       faults.csv and faults.md there
    python benchmarks/fault_table.py --only "SIGKILL|Scorers"           kinds whose group or name contains a word
    python benchmarks/fault_table.py --list                             the kinds

Each trial is a real run of a few seconds on the CPU to which one thing happens; then it goes on as a user would
(`run.resume=auto`) and is compared bit for bit with an undisturbed run. Rounds of all chosen kinds are made until the
time is over, at least one; the table is written after every trial. SIGINT ends it with what was found.

Exit status: 0 if all held, 1 if something did not, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import report, table
from faults.bench import Bench
from faults.kinds import Fault
from faults.trials import Outcome, attempt
from importable import ROOT


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="rounds begin until then; one is made in any case")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "faults", help="of the table")
    parser.add_argument("--only", default="", help="words that group or name of a kind contains, separated by |")
    parser.add_argument("--once", action="store_true", help="each kind once, whatever its number of tries")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once; bounds on seconds are for one on a core")
    parser.add_argument("--keep", action="store_true", help="keep the folders of trials that did not hold")
    parser.add_argument("--list", action="store_true", help="print the kinds")
    return parser.parse_args(arguments)


def rounds(kinds: list[tuple[str, Fault]], once: bool, end: float) -> Iterator[tuple[int, int]]:
    """Place of the kind and number of each trial, round after round until `end` (time.monotonic), at least one.

    In a round, a kind comes as often as it has tries, but for `once`.
    """
    number = 0
    while not number or time.monotonic() < end:
        for place, (_, fault) in enumerate(kinds):
            for _ in range(1 if once else fault.tries):
                yield place, number
                number += 1


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    kinds = table.chosen(asked.only)
    if asked.list:
        print("\n".join(f"{room}: {fault.name} ({fault.way})" for room, fault in kinds))
        return 0
    if not kinds:
        print(f"--only: found {asked.only!r}, which no kind contains; see --list", file=sys.stderr)
        return 2
    began, outcomes = time.monotonic(), []
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    work.chmod(0o755)
    try:
        for outcome in _found(Bench(work, asked.seed), kinds, asked):
            outcomes.append(outcome)
            report.write(asked.folder, outcomes, (time.monotonic() - began) / 60)
            print(f"{'ok ' if not outcome.problems else 'BAD'} {outcome.room}: {outcome.fault} ({outcome.moment}, "
                  f"{outcome.seconds} s) {'; '.join(outcome.problems)}", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        if asked.keep:
            print(f"trials that did not hold: {work / 'trials'}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return int(not outcomes or any(outcome.problems for outcome in outcomes))


def _found(bench: Bench, kinds: list[tuple[str, Fault]], asked: argparse.Namespace) -> Iterator[Outcome]:
    """Outcomes in the order in which they are found; processes that make trials are forked from this one."""
    bench.prepare(fault for _, fault in kinds)
    end, waiting = time.monotonic() + 60 * asked.minutes, set()
    work = rounds(kinds, asked.once, end)
    with ProcessPoolExecutor(asked.jobs, get_context("fork"), _remember, (bench, kinds)) as pool:
        for place, number in work:
            waiting.add(pool.submit(_attempt, place, number))
            while len(waiting) > asked.jobs:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(waiting))


REMEMBERED: list = []


def _remember(*parts: object) -> None:
    REMEMBERED[:] = parts


def _attempt(place: int, number: int) -> Outcome:
    bench, kinds = REMEMBERED
    room, fault = kinds[place]
    return attempt(bench, room, fault, number)


if __name__ == "__main__":
    sys.exit(main())
