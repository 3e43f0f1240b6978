"""The table as CSV, a line for each trial, and as Markdown, a line for each kind."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path

import torch
from faults.trials import Outcome


def write(folder: Path, outcomes: list[Outcome], minutes: float) -> None:
    """faults.csv and faults.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "faults.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)])
        writer.writeheader()
        writer.writerows({**asdict(each), "problems": "; ".join(each.problems)} for each in outcomes)
    (folder / "faults.md").write_text("\n".join(_page(outcomes, minutes)) + "\n", encoding="utf-8")


def _page(outcomes: list[Outcome], minutes: float) -> list[str]:
    kinds: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in sorted(outcomes, key=lambda each: each.trial):
        kinds[outcome.room, outcome.fault].append(outcome)
    held = sum(not any(each.problems for each in tried) for tried in kinds.values())
    good = sum(not each.problems for each in outcomes)
    killed = [each for each in outcomes if each.fault.startswith("SIGKILL")]
    learning = [each for each in killed if each.begun]
    ranks = [each for each in learning if "rank" in each.way or "torchrun" in each.way]
    lines = [
        "# Faults", "",
        f"`python benchmarks/fault_table.py`, {datetime.date.today()}, {minutes:.0f} minutes, "
        f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, torch {torch.__version__}.", "",
        f"{len(kinds)} kinds, {held} of which held in all their trials; {len(outcomes)} trials, {good} held. SIGKILL: "
        f"{_share(killed)} went on to the same bits; of those that came after the loop had begun {_share(learning)}, "
        f"and of these with 2 ranks under torchrun {_share(ranks)}.", "",
        LEGEND,
    ]  # fmt: skip
    room = None
    for (name, fault), tried in kinds.items():
        if name != room:
            room = name
            lines += ["", f"## {name}", "", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        lines.append(_row(fault, tried))
    return lines + _problems(outcomes)


def _share(outcomes: list[Outcome]) -> str:
    return f"{sum(not each.problems for each in outcomes)} of {len(outcomes)}"


LEGEND = (
    "Each trial is a run of 6 iterations of the digits pipeline, on the CPU. Seconds: from the fault to the end of the "
    "last process (or of the whole run, where that outlives the fault), the most seen and the most allowed. Lost: "
    "iterations beyond the one in flight, likewise; 1 is allowed where a kill or a disk may hit the checkpoint that is "
    "written beside the next iteration, 9 where the fault itself removes checkpoints or leaves nothing worth keeping. "
    "After: what the run comes to that goes on with `run.resume=auto`; *equal* is weights, optimizer, average and "
    "metrics of an undisturbed run, bit for bit. A kind holds where exit code, line, seconds, lost iterations and what "
    "comes after are as stated, and no rank shows a traceback. Processes: ranks and single processes are forked from "
    "one that has imported everything, under torchrun's own launcher; `command` and `torchrun command` are typed."
)
HEAD = "| fault | processes | held | exit code | said | seconds (at most) | lost (at most) | after |"


def _row(fault: str, tried: list[Outcome]) -> str:
    good = sum(not each.problems for each in tried)
    codes = ", ".join(sorted({"-" if each.code is None else str(each.code) for each in tried}))
    said = next((each.line for each in tried if each.line), "").replace("|", "\\|")
    said = said if len(said) <= 160 else f"{said[:157]}..."
    lost = [each.lost for each in tried if each.lost is not None]
    after = ", ".join(sorted({each.after.replace("|", "\\|")[:80] for each in tried}))
    held = f"{good} of {len(tried)}" if good == len(tried) else f"**{good} of {len(tried)}**"
    seconds = f"{max(each.seconds for each in tried):.1f} ({tried[0].bound:g})"
    lost_of = f"{max(lost)} ({tried[0].allowed})" if lost else "-"
    return f"| {fault} | {tried[0].way} | {held} | {codes} | {said} | {seconds} | {lost_of} | {after} |"


def _problems(outcomes: list[Outcome]) -> list[str]:
    bad = [each for each in outcomes if each.problems]
    if not bad:
        return []
    lines = [f"* {each.fault} ({each.moment}): {'; '.join(each.problems)}" for each in bad]
    return ["", "## What did not hold", "", *lines]
