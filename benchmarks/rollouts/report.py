"""From the rows of `compare.py` to a table and a picture: `python benchmarks/rollouts/report.py FILE.jsonl`.

A file may hold several comparisons (commits, devices, settings); the newest one is shown.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rollouts.results_file import of_one_comparison, read_rows
from rollouts.variants import APPROXIMATION, GOALS, GOALS_OF, REFERENCE, VARIANTS, Variant

PHASES = {"trunk": "#4269d0", "tails": "#6cc5b0", "decode": "#efb118", "reward": "#ff725c", "wait": "#a463f2",
          "learn": "#9c6b4e", "other": "#c9c9c9"}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Medians over the iterations of one variant, per 1000 rollouts where it is seconds."""

    name: str
    exactness: str
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
    """of the iterations' FLOPs, at the rate of matrix products in the same round; median"""
    mfu_tails: float
    floor: float
    """seconds per 1000 rollouts that its network rows take at the rate of large matrix products"""
    gib: float | None
    correlation: float | None

    @property
    def per_thousand(self) -> float:
        return 3.6e6 / self.rate


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of the newest comparison in the file, each with the device's rates of its round."""
    return with_rates(of_one_comparison(read_rows(file)))


def with_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Iterations with `peak` (FLOP/s): the best that was measured in their round, beside any of its iterations.

    Files of before that was so have one measurement of all rounds, in a row `limits`.
    """
    once = next((row for row in rows if row["kind"] == "limits"), {})
    best: dict[int, float] = {}
    for row in _iterations(rows):
        best[row["round"]] = max(best.get(row["round"], 0.0), row.get("matmul_tflops") or once["matmul_tflops"])
    rates = {"matmul_tflops": once.get("matmul_tflops"), "copy_gbs": once.get("copy_gbs"), "dtype": once.get("dtype")}
    return [rates | row | {"peak": 1e12 * best[row["round"]]} if row["kind"] == "iteration" else row for row in rows]


def _iterations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "iteration"]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Summary]:
    """One summary per variant that was timed, in the order of VARIANTS; `rows` as `read` gives them."""
    found = {}
    for variant in VARIANTS:
        own = [row for row in _iterations(rows) if row["variant"] == variant.name]
        if own:
            found[variant.name] = _summary(variant, own)
    return found


def _summary(variant: Variant, rows: list[dict[str, Any]]) -> Summary:
    def middle(key: str) -> float | None:
        values = [row[key] for row in rows if row.get(key) is not None]
        return median(values) if values else None

    seconds, rollouts = middle("seconds"), rows[0]["rollouts"]
    scale = 1000 / rollouts
    return Summary(
        name=variant.name,
        exactness=variant.exactness,
        rate=rollouts / seconds * 3600,
        spread=(max(row["seconds"] for row in rows) - min(row["seconds"] for row in rows)) / 2 / seconds,
        iterations=len(rows),
        seconds=seconds,
        cpu_seconds=middle("cpu_seconds"),
        phases={phase: scale * value for phase, value in _phases(rows, seconds).items()},
        rows=rows[0]["rows"],
        rollouts=rollouts,
        mfu=median(_utilisation(row, "network_tflop", row["seconds"]) for row in rows),
        mfu_tails=median(_utilisation(row, "tails_tflop", row["phase_seconds"]["tails"]) for row in rows),
        floor=scale * median(1e12 * row["network_tflop"] / row["peak"] for row in rows),
        gib=middle("working_gib"),
        correlation=middle("rank_correlation"),
    )


def _utilisation(row: dict[str, Any], work: str, seconds: float) -> float:
    """FLOPs over seconds and over the rate of matrix products in the row's round; of old files only some work."""
    return 1e12 * row.get(work, float("nan")) / seconds / row["peak"] if seconds else float("nan")


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
    found, first = summarise(rows), rows[0]
    bases = [found.get(name) for name in ("official", "official-tuned")]
    floor = found[REFERENCE].floor if REFERENCE in found else None
    on_cpu = first["threads"] is not None
    head = ["variant", "exactness", "rollouts/h", "x official", "x official, CPU time" if on_cpu else "x tuned",
            "s per iteration", "rows", "MFU tails", "MFU", "of the floor", "GiB", "rank correlation"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for item in found.values():
        ratios = [f"{item.rate / base.rate:.2f}" if base else "" for base in bases]
        if on_cpu and bases[0]:
            ratios[1] = f"{bases[0].cpu_seconds / item.cpu_seconds:.2f}"
        lines.append(_line([
            item.name, item.exactness, f"{item.rate:,.0f}", *ratios,
            f"{item.seconds:.2f} ±{100 * item.spread:.0f} % ({item.iterations})", f"{sum(item.rows.values()):,}",
            share_text(item.mfu_tails), share_text(item.mfu), f"{floor / item.per_thousand:.2f}" if floor else "",
            "" if item.gib is None else f"{item.gib:.2f}",
            "" if item.correlation is None else f"{item.correlation:.3f}",
        ]))  # fmt: skip
    parts = (_heading(rows), lines, _goal_lines(found, first["architecture"]), _legend(floor), _phase_lines(found),
             _adds(found), _others(rows))  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def share_text(share: float) -> str:
    """A utilisation. None can be above 1: there a mark says that the machine was busy while its rate was measured."""
    return "" if share != share else f"{share:.2f}{' (!)' if share > 1 else ''}"


def _heading(rows: list[dict[str, Any]]) -> list[str]:
    first, timed = rows[0], _iterations(rows)
    told = f"{first['architecture']} on {first['device']}; torch {first['torch']}, commit {first['commit']}, " \
           f"{first['date']}."  # fmt: skip
    if not timed:
        return [told]
    rates = [_range([row[name] for row in timed], unit)
             for name, unit in (("matmul_tflops", "TFLOP/s"), ("copy_gbs", "GB/s"))]  # fmt: skip
    precision = timed[0]["dtype"].removeprefix("torch.")
    return [f"{told} {timed[0]['rollouts']} branch rollouts an iteration. Measured beside the iterations: matrix "
            f"products {rates[0]} ({precision}), copies {rates[1]}."]  # fmt: skip


def _range(values: list[float], unit: str) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _goal_lines(found: dict[str, Summary], architecture: str) -> list[str]:
    """The goals beside the best variant of each, where they are about this architecture."""
    if architecture != GOALS_OF:
        times = ", ".join(f"{goal.times:g}x {goal.told}" for goal in GOALS)
        return [f"Goals are for {GOALS_OF} on an H100 ({times}); these figures say nothing about them."]
    lines = [f"Goals ({GOALS_OF}, H100), in rollouts per hour over those of `official`:"]
    for goal in GOALS:
        best = best_of(found, goal.variants)
        reached = f"{best[1]:.2f}x by `{best[0]}`" if best else "not measured"
        lines.append(f"* {goal.told}: goal {goal.times:g}x, here {reached}")
    return lines


def best_of(found: dict[str, Summary], names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of some variants and its speed over `official`'s, where both were timed."""
    base = found.get("official")
    ratios = {name: found[name].rate / base.rate for name in names if base and name in found}
    return max(ratios.items(), key=lambda item: item[1]) if ratios else None


def _legend(floor: float | None) -> list[str]:
    told = f" ({floor:.1f} s per 1000 rollouts)" if floor else ""
    return [
        "Exactness, against `ours`: exact: the same operations; rounding: the same mathematics, rounded elsewhere; "
        "approximation: changes rewards, never log-probabilities or gradients. Each level of ours includes those "
        "above it, unless it says otherwise. Rank correlation: Spearman's of the K siblings' rewards with those of "
        "`ours`, mean over forks. MFU: FLOPs of the network rows over seconds and the rate of large matrix products, "
        "measured in the same round; (!) above 1: something else slowed the machine while that rate was measured, the "
        "figure says nothing. "
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
    measured = {row["variant"] for row in _iterations(rows)}
    reasons = {row["variant"]: row["reason"] for row in rows if row["kind"] == "skipped"}
    lines = [f"Set-up and first call (compilation, capture), not in the figures: {', '.join(warm)}."] if warm else []
    return lines + [f"* not run: `{name}`: {reason}" for name, reason in reasons.items() if name not in measured]


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    """Stacked seconds per 1000 rollouts, with the ratio to `official` at the end of each bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, first = summarise(rows), rows[0]
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
        note = f"  (approximation: rank correlation {found[name].correlation or float('nan'):.3f})"
        note = note if found[name].exactness == APPROXIMATION else ""
        axis.text(lefts[place] + 0.01 * longest, place, ratio + note, va="center", fontsize=9)
    if REFERENCE in found:
        axis.axvline(found[REFERENCE].floor, color="0.25", linestyle=":", linewidth=1.2)
        axis.text(found[REFERENCE].floor, -0.75, " floor", fontsize=8, color="0.25")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * longest)
    axis.set_xlabel("seconds per 1000 branch rollouts")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=len(PHASES), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.16))
    title = ", ".join((first["architecture"], first["device"], f"torch {first['torch']}", first["date"]))
    axis.set_title(title, fontsize=9)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write_report(file: Path) -> str:
    """FILE.md and FILE.png beside FILE.jsonl; returns the table."""
    rows = read(file)
    text = table(rows)
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if _iterations(rows):
        picture(rows, file.with_suffix(".png"))
    return text


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
