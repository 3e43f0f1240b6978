"""One page to attach to an issue: `page.md` and `page.png` from a folder of rows. Anyone can draw it again later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from half_hour import runner
from half_hour.parts import PARTS, Part
from half_hour.runner import Session
from half_hour.verdicts import FAIL, NO_VERDICT, NOT_RUN, PASS, Verdict
from machine.environment import environment

COLOURS = {PASS: "#2a9d5c", FAIL: "#d1495b", NO_VERDICT: "#8a8f98", NOT_RUN: "#d9a441"}
OUTCOMES = {runner.DONE: NO_VERDICT, runner.SKIPPED: NO_VERDICT, runner.UNFINISHED: NOT_RUN,
            runner.OUT_OF_TIME: NOT_RUN, runner.NOT_RUN: NOT_RUN}  # fmt: skip
"""Ending of a part -> what it is worth where its rows say nothing; any other is a failure."""


@dataclass(frozen=True)
class Section:
    """A part, how it ended, and its verdicts."""

    part: Part
    ending: str
    seconds: float
    last: str
    verdicts: list[Verdict]

    @property
    def outcome(self) -> str:
        """The worst of the ending and the verdicts; a part that ended well passes unless nothing could be judged."""
        ended = OUTCOMES.get(self.ending, FAIL)
        found = [verdict.outcome for verdict in self.verdicts]
        if FAIL in (ended, *found):
            return FAIL
        if NOT_RUN in (ended, *found):
            return NOT_RUN
        return PASS if PASS in found else NO_VERDICT


def sections(session: Session, parts: tuple[Part, ...] = PARTS) -> list[Section]:
    """All parts, those that were not run included."""
    ended, found = runner.endings(session), []
    for part in parts:
        row = ended.get(part.name, {"ending": runner.NOT_RUN, "seconds": 0.0, "last": ""})
        rows = runner.rows_of(session.folder / f"{part.name}.jsonl") if part.name in ended else []
        found.append(Section(part, row["ending"], row["seconds"], row["last"], judged(part, rows)))
    return found


def judged(part: Part, rows: list[dict[str, Any]]) -> list[Verdict]:
    """Its verdicts; rows that cannot be judged are a failure, and leave the page to the other parts."""
    try:
        return part.judge(rows) if rows else []
    except Exception as error:
        return [Verdict("its rows cannot be judged", f"{type(error).__name__}: {error}", outcome=FAIL)]


def exit_status(found: list[Section], on_gpu: bool) -> int:
    """0 if all parts ran and none failed; on a CPU goals that are about GPUs are nobody's fault."""
    ran = (runner.DONE, runner.SKIPPED)
    good = all(section.ending in ran and section.outcome != FAIL for section in found)
    return 0 if good and (not on_gpu or all(section.outcome != NOT_RUN for section in found)) else 1


def write_text(session: Session, parts: tuple[Part, ...] = PARTS) -> list[Section]:
    """page.md alone."""
    found = sections(session, parts)
    (session.folder / "page.md").write_text(markdown(found, session), encoding="utf-8")
    return found


def write_page(session: Session, parts: tuple[Part, ...] = PARTS) -> list[Section]:
    """page.md and page.png."""
    found = write_text(session, parts)
    draw(found, session, session.folder / "page.png")
    return found


def heading(session: Session) -> list[str]:
    """Device, driver, versions, commit, date; and what a page of a CPU is worth."""
    known: dict[str, Any] = environment(session.device)
    driver = f", driver {known['driver']}" if known["driver"] else ""
    lines = [f"{known['device']}{driver}",
             f"torch {known['torch']}, triton {known['triton']}, Python {known['python']}, commit {known['commit']}, "
             f"{known['date']}"]  # fmt: skip
    if session.device == "cpu":
        lines.append("A walk on a CPU, kernels in Triton's interpreter: no figure here says anything about a GPU.")
    return lines


def markdown(found: list[Section], session: Session) -> str:
    """The page as text."""
    lines = ["# First half hour", "", "  \n".join(heading(session)), ""]
    lines += _rows(("part", "ended", "seconds", "verdict"),
                   [(f"{section.part.name}: {section.part.told}", section.ending, f"{section.seconds:.0f}",
                     f"**{section.outcome}**") for section in found])  # fmt: skip
    for section in found:
        lines += ["", f"## {section.part.name}", ""]
        if section.verdicts:
            lines += _rows(("what", "measured", "predicted", "goal", "verdict"),
                           [(verdict.what, verdict.measured, verdict.predicted, verdict.goal, verdict.outcome)
                            for verdict in section.verdicts])  # fmt: skip
        else:
            lines.append("No rows.")
        if OUTCOMES.get(section.ending, FAIL) != NO_VERDICT or section.ending == runner.SKIPPED:
            lines += ["", f"It {_ended(section.ending)}: `{section.last or 'no word'}`"]
    return "\n".join(lines) + "\n"


def _ended(ending: str) -> str:
    return {runner.SKIPPED: "was skipped", runner.NOT_RUN: "was not run"}.get(ending, f"ended: {ending}")


def _rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [" | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) for row in (head, *rows)]
    return [f"| {cells[0]} |", "|" + " --- |" * len(head), *(f"| {line} |" for line in cells[1:])]


SHOWN = 12
"""lines of one part in the picture; the text has all"""


def draw(found: list[Section], session: Session, file: Path) -> None:
    """The same as a picture: a coloured mark per part, and its verdicts beside the goals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for section in found for line in _lines(section)]
    height = 1.7 + 0.24 * len(lines)
    figure = plt.figure(figsize=(12, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 1), ylim=(height, 0))
    axis.axis("off")
    axis.text(0.02, 0.35, "First half hour", fontsize=15, weight="bold", va="center")
    for place, text in enumerate(heading(session)):
        axis.text(0.02, 0.65 + 0.22 * place, text, fontsize=9, va="center", color="0.25")
    for place, title in ((0.50, "measured"), (0.76, "predicted"), (0.84, "goal"), (0.93, "verdict")):
        axis.text(place, 1.35, title, fontsize=9, weight="bold", va="center")
    for number, (cells, bold, result) in enumerate(lines):
        _line(axis, 1.62 + 0.24 * number, cells, bold, result)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _lines(section: Section) -> list[tuple[tuple[str, ...], bool, str]]:
    """The part's own line, then those of its verdicts."""
    told = f"{section.ending}, {section.seconds:.0f} s"
    own = [((f"{section.part.name}: {section.part.told}", told, "", "", section.outcome), True, section.outcome)]
    lines = [((verdict.what, verdict.measured, verdict.predicted, verdict.goal, verdict.outcome), False,
              verdict.outcome) for verdict in section.verdicts[:SHOWN]]  # fmt: skip
    more = len(section.verdicts) - SHOWN
    left = [((f"and {more} more", "", "", "", NO_VERDICT), False, NO_VERDICT)] if more > 0 else []
    return own + lines + left


def _line(axis: Any, height: float, cells: tuple[str, ...], bold: bool, result: str) -> None:
    weight = "bold" if bold else "normal"
    if bold:
        axis.axhspan(height - 0.115, height + 0.115, color="0.94", zorder=0)
    for place, cell, width in zip(
        (0.02 if bold else 0.035, 0.50, 0.76, 0.84), cells[:4], (72, 44, 12, 15), strict=True
    ):
        cell = cell.replace("`", "")
        short = cell if len(cell) <= width else cell[: width - 1] + "…"
        axis.text(place, height, short, fontsize=8.5, va="center", weight=weight)
    axis.text(0.93, height, cells[4], fontsize=8.5, va="center", weight="bold", color=COLOURS[result])
