"""From the rows of `rollouts.py` to a table and a picture: `python benchmarks/rollouts/report.py FILE.jsonl`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rollouts.variants import REFERENCE, VARIANTS

PHASES = {"trunk": "#4269d0", "tails": "#6cc5b0", "decode": "#efb118", "reward": "#ff725c", "wait": "#a463f2",
          "learn": "#9c6b4e", "other": "#c9c9c9"}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Medians over the iterations of one variant, per 1000 rollouts where it is seconds."""

    name: str
    exact: bool
    rate: float
    """branch rollouts per GPU-hour (of a CPU: per hour of this machine)"""
    spread: float
    """half of (largest - smallest) over the median, of seconds"""
    iterations: int
    seconds: float
    """of an iteration"""
    cpu_seconds: float
    """of all threads of the process in an iteration: on a CPU that others use too, the steadier measure"""
    phases: dict[str, float]
    """seconds per 1000 rollouts that the iteration spent in each phase, waiting included, what ran beside left out"""
    rows: dict[str, int]
    rollouts: int
    mfu: float
    mfu_tails: float
    floor: float
    """seconds per 1000 rollouts that its network rows take at the rate of large matrix products"""
    gib: float | None
    correlation: float | None

    @property
    def per_thousand(self) -> float:
        return 3.6e6 / self.rate


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Summary]:
    """One summary per variant that was timed, in the order of VARIANTS."""
    found = {}
    for variant in VARIANTS:
        own = [row for row in rows if row["kind"] == "iteration" and row["variant"] == variant.name]
        if own:
            found[variant.name] = _summary(variant.name, variant.exact, own)
    return found


def _summary(name: str, exact: bool, rows: list[dict[str, Any]]) -> Summary:
    def middle(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return median(values) if values else None

    seconds, rollouts = middle("seconds"), rows[0]["rollouts"]
    scale = 1000 / rollouts
    return Summary(
        name=name,
        exact=exact,
        rate=rollouts / seconds * 3600,
        spread=(max(row["seconds"] for row in rows) - min(row["seconds"] for row in rows)) / 2 / seconds,
        iterations=len(rows),
        seconds=seconds,
        cpu_seconds=middle("cpu_seconds"),
        phases={phase: scale * value for phase, value in _phases(rows, seconds).items()},
        rows=rows[0]["rows"],
        rollouts=rollouts,
        mfu=middle("mfu"),
        mfu_tails=middle("mfu_tails"),
        floor=scale * middle("floor_seconds"),
        gib=middle("working_gib"),
        correlation=middle("rank_correlation"),
    )


def _phases(rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Median seconds of the phases that add up to the iteration; `other` is what is left."""
    beside = rows[0]["beside"]
    phases = {
        phase: median(row["phase_seconds"].get(phase, 0.0) for row in rows)
        for phase in PHASES
        if phase not in beside and phase != "other"
    }
    return phases | {"other": max(0.0, seconds - sum(phases.values()))}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ratios and rates, then phases, then what was not run."""
    found, limits = summarise(rows), next(row for row in rows if row["kind"] == "limits")
    bases = [found.get(name) for name in ("official", "official-tuned")]
    floor = found[REFERENCE].floor if REFERENCE in found else None
    on_cpu = limits["threads"] is not None
    head = ["variant", "rollouts/h", "x official", "x official, CPU time" if on_cpu else "x tuned", "s per iteration",
            "rows", "MFU tails", "MFU", "of the floor", "GiB", "rank correlation"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for item in found.values():
        ratios = [f"{item.rate / base.rate:.2f}" if base else "" for base in bases]
        if on_cpu and bases[0]:
            ratios[1] = f"{bases[0].cpu_seconds / item.cpu_seconds:.2f}"
        lines.append(_line([
            f"{item.name}{'' if item.exact else ' *'}", f"{item.rate:,.0f}", *ratios,
            f"{item.seconds:.2f} ±{100 * item.spread:.0f} % ({item.iterations})", f"{sum(item.rows.values()):,}",
            f"{item.mfu_tails:.2f}", f"{item.mfu:.2f}", f"{floor / item.per_thousand:.2f}" if floor else "",
            "" if item.gib is None else f"{item.gib:.2f}",
            "" if item.correlation is None else f"{item.correlation:.3f}",
        ]))  # fmt: skip
    return "\n".join([*_heading(limits, rows), "", *lines, "", *_legend(floor), "", *_phase_lines(found), "",
                      *_adds(found), "", *_others(rows)])  # fmt: skip


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _heading(limits: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    first = next((row for row in rows if row["kind"] == "iteration"), {"rollouts": 0})
    return [
        f"{limits['architecture']} on {limits['device']}; torch {limits['torch']}, commit {limits['commit']}, "
        f"{limits['date']}. {first['rollouts']} branch rollouts an iteration; matrix products "
        f"{limits['matmul_tflops']} TFLOP/s ({limits['dtype'].removeprefix('torch.')}), copies "
        f"{limits['copy_gbs']} GB/s."
    ]


def _legend(floor: float | None) -> list[str]:
    told = f" ({floor:.1f} s per 1000 rollouts)" if floor else ""
    return [
        "\\* approximate: changes rewards, never log-probabilities or gradients. Each level of ours includes those "
        "above it, unless it says otherwise. Rank correlation: Spearman's of the K siblings' rewards with those of "
        "`ours`, mean over forks. MFU: FLOPs of the network rows over seconds and the rate of large matrix products. "
        f"Of the floor: the time in which this device could multiply the matrices of `ours`{told} over the time taken. "
        "±: half the range over the median, (number of iterations). GiB: memory above what lay there before. CPU time: "
        "of all threads of the process, which other work on the machine disturbs less."
    ]


def _phase_lines(found: dict[str, Summary]) -> list[str]:
    names = [phase for phase in PHASES if any(item.phases.get(phase) for item in found.values())]
    lines = [_line(["seconds per 1000 rollouts", *names, "all"]), _line(["---"] * (len(names) + 2))]
    for item in found.values():
        cells = [f"{item.phases[phase]:.2f}" if phase in item.phases else "beside" for phase in names]
        lines.append(_line([item.name, *cells, f"{item.per_thousand:.2f}"]))
    return lines


def _adds(found: dict[str, Summary]) -> list[str]:
    return [f"* `{variant.name}`: {variant.adds}" for variant in VARIANTS if variant.name in found]


def _others(rows: list[dict[str, Any]]) -> list[str]:
    """Warm-up times and what was not run."""
    warm = [f"{row['variant']} {row['set_up_seconds'] + row['first_seconds']:.0f} s" for row in rows
            if row["kind"] == "warm-up"]  # fmt: skip
    lines = [f"Set-up and first call (compilation, capture), not in the figures: {', '.join(warm)}."] if warm else []
    return lines + [f"* not run: `{row['variant']}`: {row['reason']}" for row in rows if row["kind"] == "skipped"]


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Stacked seconds per 1000 rollouts, with the ratio to `official` at the end of each bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, limits = summarise(rows), next(row for row in rows if row["kind"] == "limits")
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.42 * len(found)))
    names, longest = list(found), max(item.per_thousand for item in found.values())
    lefts = [0.0] * len(names)
    for phase, colour in PHASES.items():
        widths = [found[name].phases.get(phase, 0.0) for name in names]
        if any(width > 0.002 * longest for width in widths):
            axis.barh(names, widths, left=lefts, color=colour, label=phase, height=0.72)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    base = found.get("official")
    for place, name in enumerate(names):
        ratio = f"{found[name].rate / base.rate:.2f}x" if base else f"{found[name].rate:,.0f}/h"
        note = "" if found[name].exact else f"  (rank correlation {found[name].correlation or float('nan'):.3f})"
        axis.text(lefts[place] + 0.01 * longest, place, ratio + note, va="center", fontsize=9)
    if REFERENCE in found:
        axis.axvline(found[REFERENCE].floor, color="0.25", linestyle=":", linewidth=1.2)
        axis.text(found[REFERENCE].floor, -0.75, " floor", fontsize=8, color="0.25")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * longest)
    axis.set_xlabel("seconds per 1000 branch rollouts")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=len(PHASES), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.16))
    title = ", ".join((limits["architecture"], limits["device"], f"torch {limits['torch']}", limits["date"]))
    axis.set_title(title, fontsize=9)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write_report(file: Path) -> str:
    """FILE.md and FILE.png beside FILE.jsonl; returns the table."""
    rows = read(file)
    text = table(rows)
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if any(row["kind"] == "iteration" for row in rows):
        picture(rows, file.with_suffix(".png"))
    return text


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
