"""study.html: one file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tempflow.studies.compare.jobs import Job
from tempflow.studies.compare.results import Contrast, Summary
from tempflow.studies.compare.statistics import Interval
from tempflow.studies.compare.study import Study

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { padding: 0.35rem 0.7rem; text-align: left }
th { border-bottom: 2px solid #d1d5db; font-weight: 600 } td { border-bottom: 1px solid #e5e7eb }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap } img { max-width: 100% }
code { font-size: 0.85em; color: #374151 } .note { color: #6b7280; font-size: 0.9em } .bad { color: #b91c1c }
"""
METHOD = (
    "All runs start from the same base model and are judged on the same held-out prompts and noises. Intervals are "
    "those of Student's t over run seeds, 95 %; differences are taken seed by seed. The cost of a target is that of "
    "the first evaluation at or above it. Network rows count trunks, tails and learning (groups that tell nothing "
    "included), seconds are those of training; evaluations are in neither. The band of a curve is the interval; seeds "
    "are interpolated between their evaluations. Final values are those of finished runs."
)


@dataclass(frozen=True)
class Table:
    """A table in plain words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Heading and table; nothing where it has no row."""
        rows = [[escape(cell) for cell in row] for row in self.rows]
        return f"<h2>{escape(self.title)}</h2>{_table(self.head, rows)}" if rows else ""

    def lines(self) -> list[str]:
        """The same in columns of text, under its title; nothing where it has no row."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                 for row in (self.head, *self.rows))  # fmt: skip
        return [f"{self.title}:", *lines] if self.rows else []


def write_page(study: Study, tables: Sequence[Table], jobs: Sequence[Job], notes: Sequence[str],
               pictures: Sequence[bytes]) -> str:  # fmt: skip
    """The page.

    Args:
        notes: what is amiss, such as runs that failed. pictures: svg.
    """
    images = "".join(f'<p><img alt="" src="data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"/></p>'
                     for picture in pictures)  # fmt: skip
    wrong = "".join(f'<p class="bad">{escape(note)}</p>' for note in notes)
    finished = sum(job.is_finished() for job in jobs)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(study.name)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(study.name)}</h1><p>{escape(study.about)}</p>"
        f'<p class="note">{len(study.runs)} runs, {len(study.seeds)} seeds each ({finished} of {len(jobs)} finished), '
        f"{escape(study.budget.describe())} each.</p>{wrong}"
        f"{''.join(table.html() for table in tables)}{images}"
        f'<p class="note">{METHOD}</p><h2>Runs</h2>{_stacks(study)}</body></html>\n'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; all but the first of a row are numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    numbers = ["".join(f'<td class="number">{cell}</td>' for cell in rest) for _, *rest in rows]
    body = "".join(f"<tr><td>{row[0]}</td>{cells}</tr>" for row, cells in zip(rows, numbers, strict=True))
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def results_table(study: Study, summaries: Sequence[Summary]) -> Table:
    """A row per run."""
    head, rows = ["run", "seeds", f"final {study.metric}"], []
    if study.baseline:
        head.append(f"less {study.baseline}")
    if study.target is not None:
        head += [f"network rows to {study.target:g}", f"seconds to {study.target:g}"]
    for summary in summaries:
        row = [summary.run, str(len(summary.seeds)), summary.final.describe() if summary.final else "no finished run"]
        if study.baseline:
            row.append(summary.difference.describe(sign="+") if summary.difference else "")
        if study.target is not None:
            row += [summary.at_target(value, study.target) for value in (summary.rows, summary.seconds)]
        rows.append(row)
    return Table("Results", head, rows)


def kinds_table(study: Study, kinds: Mapping[str, Mapping[str, Interval]]) -> Table:
    """A row per run, a column per kind of prompt. Kinds: kind -> run -> final metric.

    It has its own count of seeds: of runs made before scores by kind were kept there are none.
    """
    rows = []
    for run in study.runs:
        own = [found.get(run) for found in kinds.values()]
        counts = sorted({found.count for found in own if found})
        seeds = " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
        rows.append([run, seeds, *(found.describe() if found else "" for found in own)])
    return Table(f"Final {study.metric} by kind of prompt", ["run", "seeds", *kinds], rows if kinds else [])


def contrasts_table(study: Study, contrasts: Sequence[Contrast]) -> Table:
    """A row per further difference."""
    rows = [[found.run, found.other, found.describe()] for found in contrasts]
    return Table("Differences", ["run", "less", f"difference of final {study.metric}"], rows)


def _stacks(study: Study) -> str:
    rows = [[escape(run), f"<code>{escape(' '.join(study.arguments(run)))}</code>"] for run in study.runs]
    table = _table(["run", "tempflow train ..."], rows).replace(' class="number"', "")
    return f'{table}<p class="note">Seeds: {", ".join(map(str, study.seeds))}.</p>'
