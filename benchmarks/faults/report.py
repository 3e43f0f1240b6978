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
    for outcome in outcomes:
        kinds[outcome.room, outcome.fault].append(outcome)
    held = sum(not any(each.problems for each in tried) for tried in kinds.values())
    good = sum(not each.problems for each in outcomes)
    killed = [each for each in outcomes if each.fault.startswith("SIGKILL")]
    ranks = [each for each in killed if "rank" in each.way or "torchrun" in each.way]
    lines = [
        "# Faults", "",
        f"`python benchmarks/fault_table.py`, {datetime.date.today()}, {minutes:.0f} minutes, "
        f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, torch {torch.__version__}.", "",
        f"{len(kinds)} kinds, {held} of which held in all their trials; {len(outcomes)} trials, {good} held. SIGKILL: "
        f"{sum(not each.problems for each in killed)} of {len(killed)} went on to the same bits, "
        f"{sum(not each.problems for each in ranks)} of {len(ranks)} with 2 ranks under torchrun.", "",
        LEGEND,
    ]  # fmt: skip
    room = None
    for (name, fault), tried in kinds.items():
        if name != room:
            room = name
            lines += ["", f"## {name}", "", HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        lines.append(_row(fault, tried))
    return lines + _problems(outcomes)


LEGEND = (
    "Seconds: from the fault to the end of the last process (or of the whole run, where the run outlives the fault), "
    "at most. Lost: iterations beyond the one in flight, at most. After: what the run comes to that goes on with "
    "`run.resume=auto`; *equal* is weights, optimizer, average and metrics of an undisturbed run, bit for bit. A kind "
    "holds where exit code, line, seconds, lost iterations and what comes after are as stated, and no rank shows a "
    "traceback."
)
HEAD = "| fault | processes | held | exit code | said | seconds | lost | after |"


def _row(fault: str, tried: list[Outcome]) -> str:
    good = sum(not each.problems for each in tried)
    codes = ", ".join(sorted({"-" if each.code is None else str(each.code) for each in tried}))
    said = next((each.line for each in tried if each.line), "").replace("|", "\\|")
    said = said if len(said) <= 160 else f"{said[:157]}..."
    lost = [each.lost for each in tried if each.lost is not None]
    after = ", ".join(sorted({each.after.replace("|", "\\|")[:80] for each in tried}))
    held = f"{good} of {len(tried)}" if good == len(tried) else f"**{good} of {len(tried)}**"
    return (f"| {fault} | {tried[0].way} | {held} | {codes} | {said} | {max(each.seconds for each in tried):.1f} "
            f"| {max(lost) if lost else '-'} | {after} |")  # fmt: skip


def _problems(outcomes: list[Outcome]) -> list[str]:
    bad = [each for each in outcomes if each.problems]
    if not bad:
        return []
    lines = [f"* {each.fault} ({each.moment}): {'; '.join(each.problems)}" for each in bad]
    return ["", "## What did not hold", "", *lines]
