"""From a part's rows to verdicts: measured, predicted, goal. A goal of speed is one chip's, in bf16, and on no other
device is anything held against it; those of memory and attention hold on every GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from operators import predictions
from rollouts.report import best_of, summarise, with_rates
from rollouts.results_file import of_one_comparison
from rollouts.variants import GOALS, GOALS_CHIP

PASS, FAIL, NO_VERDICT, NOT_RUN = "pass", "fail", "no verdict", "not run"
LARGE = 64 << 20
"""bytes from which on the goals of operators hold"""
MEMORY_GOAL = 0.10
RATIO_GOAL = 0.1
"""of the clip range: what rounding may move a ratio by"""
ATTENTION_GOAL = 1.1
"""the default backend's time over the fastest's"""


@dataclass(frozen=True)
class Verdict:
    """One line of the page."""

    what: str
    measured: str
    predicted: str = ""
    goal: str = ""
    outcome: str = NO_VERDICT


def outcome(good: bool | None) -> str:
    return {True: PASS, False: FAIL, None: NO_VERDICT}[good]


def on_gpu(rows: list[dict[str, Any]]) -> bool:
    """Whether the rows are of a GPU."""
    return bool(rows) and rows[0]["threads"] is None


def held(rows: list[dict[str, Any]], chip: str, good: bool) -> str:
    """The outcome of a goal of that chip: none where the rows are of another device."""
    here = on_gpu(rows) and predictions.chip_of(rows[0]["device"]) == chip
    return outcome(good if here else None)


def checks(rows: list[dict[str, Any]]) -> list[Verdict]:
    """One verdict for all checks that passed, one for each that did not."""
    good, bad = ([row for row in rows if row["passed"] is passed] for passed in (True, False))
    told = "; ".join(f"{row['check']}: {row['figure']}" for row in good if row["figure"])
    lines = [Verdict(f"checks that passed: {len(good)}", told, goal="all", outcome=PASS)] if good else []
    return lines + [Verdict(row["check"], row["problem"], outcome=FAIL) for row in bad]


def tests(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Tests that passed, and each that failed; skipped ones say nothing."""
    count = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed", "skipped")}
    told = ", ".join(f"{number} {name}" for name, number in count.items())
    good = None if not count["passed"] + count["failed"] else not count["failed"]
    failed = [Verdict(row["test"], row["problem"], outcome=FAIL) for row in rows if row["outcome"] == "failed"]
    return [Verdict("tests of the GPU paths", told, goal="none fails", outcome=outcome(good)), *failed]


COPY_GOALS = (
    ("step", "forward", "fast", 0.85, "H100"), ("step", "forward", "exact", 0.55, "H100"),
    ("log_prob", "forward", None, 0.85, "H100"), ("log_prob", "backward", None, 0.85, "H100"),
    ("ode_step", "forward", None, 0.85, "H100"),
)  # fmt: skip
"""operator, mode, noise (None: it draws none) -> share of the copy bandwidth at 64 MiB and above, on that chip"""
RATIO_GOALS = (("compiled", 2.5, "H100"), ("stored", 1.4, "H100"), ("eager", 8.0, "H100"))
"""provider -> how many times as long as ours it should take for loss and gradient at K = 6, on that chip"""


def operators(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Shares of the copy bandwidth, and loss with gradient against what it replaces; figures that failed."""
    failed = [Verdict(_name(row), row["problem"], outcome=FAIL) for row in rows if row.get("problem")]
    rows = [row for row in rows if row["median_ms"]]
    copies = [row for row in rows if row["operator"] == "copy"]
    if not copies:
        return failed
    rate = copies[-1]["bytes"] / _milliseconds(copies[-1])
    verdicts = [Verdict("copy bandwidth", f"{rate / 1e6:,.0f} GB/s")]
    for operator, mode, noise, *goal in COPY_GOALS:
        point = (operator, mode, "fused")
        own = [row for row in _large(rows) if (row["operator"], row["mode"], row["provider"]) == point
               and noise in (None, row["noise"])]  # fmt: skip
        verdicts += _shares(own, rate, *goal)
    return failed + verdicts + _against_others(rows)


def _milliseconds(row: dict[str, Any]) -> float:
    return row["graph_ms"] or row["median_ms"]


def _name(row: dict[str, Any]) -> str:
    """Operator, mode, provider, size and noise, as far as the row has them."""
    words = [row[field] for field in ("operator", "mode", "provider", "shape") if row.get(field)]
    return " ".join(words) + "".join(
        f", {field} {row[field]}" for field in ("rows", "siblings", "noise") if row.get(field)
    )


def _large(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of calls that goals are about; on a CPU, where none are, all of them."""
    return [row for row in rows if row["provider"] != "bound" and (row["bytes"] >= LARGE or not on_gpu(rows))]


def _shares(rows: list[dict[str, Any]], rate: float, goal: float, chip: str) -> list[Verdict]:
    """One verdict per K: of several sizes the largest."""
    largest = {row["siblings"]: row for row in sorted(rows, key=lambda row: row["bytes"])}
    found = []
    for siblings, row in sorted(largest.items()):
        share = row["bytes"] / _milliseconds(row) / rate
        drawn = predictions.drawn(row["operator"], row["mode"])
        name = f"{row['operator']} {row['mode']}, K = {siblings}" + (f", {row['noise']} noise" if drawn else "")
        found.append(Verdict(name, f"{100 * share:.0f} % of copy", _predicted(row), f"{100 * goal:.0f} % ({chip})",
                             held([row], chip, share >= goal)))  # fmt: skip
    return found


def _predicted(row: dict[str, Any]) -> str:
    """The model's share of the copy bandwidth, where it knows the operator and the chip."""
    chip, name = predictions.chip_of(row["device"]), predictions.measured_as(row["operator"], row["mode"])
    if chip is None or name is None:
        return ""
    known = predictions.OPERATORS[name].noises
    noise = row["noise"] if row["noise"] in known else known[0]
    return f"{100 * predictions.predict(name, row['siblings'], chip, noise).copy_share:.0f} %"


PREDICTED_RATIOS = {"stored": predictions.against_stored}


def _against_others(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Loss with gradient at K = 6 against other ways of it, in the first noise that ours drew, at the same size."""
    loss = [row for row in _large(rows) if (row["operator"], row["mode"], row["siblings"]) == ("loss", "full", 6)]
    ours = {_size(row): row for row in reversed(loss) if row["provider"] == "fused" and row["noise"] != "stored"}
    return [_ratio(ours[_size(row)], row, *goal)
            for provider, *goal in RATIO_GOALS for row in loss
            if row["provider"] == provider and _size(row) in ours]  # fmt: skip


def _size(row: dict[str, Any]) -> tuple[str, int]:
    return row["shape"], row["rows"]


def _ratio(own: dict[str, Any], row: dict[str, Any], goal: float, chip: str) -> Verdict:
    times = "graph_ms" if row["graph_ms"] and own["graph_ms"] else "median_ms"
    ratio, known = row[times] / own[times], predictions.chip_of(row["device"])
    model = PREDICTED_RATIOS.get(row["provider"])
    predicted = f"{model(row['siblings'], known):.2f}x" if model and known else ""
    what = f"loss + gradient, K = 6, {row['shape']} R = {row['rows']}, against {row['provider']}"
    return Verdict(what, f"{ratio:.2f}x", predicted, f"{goal:g}x ({chip})", held([row], chip, ratio >= goal))


def rollouts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Rollouts per hour of every level over the released algorithm's, the goals, and what broke the device."""
    found = summarise(with_rates(of_one_comparison(rows)))
    base = found.get("official")
    levels = [Verdict(f"`{name}` ({item.exactness})",
                      f"{item.rate:,.0f} rollouts/h" + (f", {item.rate / base.rate:.2f}x official" if base else ""))
              for name, item in found.items()]  # fmt: skip
    goals = []
    for goal in GOALS:
        best = best_of(found, goal.variants)
        told = f"{best[1]:.2f}x by `{best[0]}`" if best else ""
        missing = on_gpu(rows) and not best
        ended = NOT_RUN if missing else held(rows, GOALS_CHIP, bool(best) and best[1] >= goal.times)
        goals.append(Verdict(f"rollouts {goal.told}", told, "", f"{goal.times:g}x ({GOALS_CHIP})", ended))
    broken = {row["variant"]: row["reason"] for row in of_one_comparison(rows) if row.get("broken")}
    return goals + levels + [Verdict(f"`{name}`", reason, outcome=FAIL) for name, reason in broken.items()]


def memory(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The peak against the plan; resident memory of a CPU's process says nothing about it."""
    found = []
    for row in rows[-1:]:
        measured, planned = row["measured_bytes"], row["planned_bytes"]
        if measured is None:
            continue
        error = measured / planned - 1
        good = abs(error) <= MEMORY_GOAL if on_gpu([row]) else None
        found.append(Verdict(f"peak memory ({row['phase']})", f"{measured / 2**30:.2f} GiB ({100 * error:+.0f} %)",
                             f"{planned / 2**30:.2f} GiB", f"within {100 * MEMORY_GOAL:.0f} %",
                             outcome(good)))  # fmt: skip
    return found


def ratio(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The first log-ratio against the clip range."""
    return [Verdict(f"first log-ratio, learn.compile={str(row['compiled']).lower()}", f"{row['largest']:.2g}", "0",
                    f"at most {RATIO_GOAL * row['clip']:.0e}", outcome(row["largest"] <= RATIO_GOAL * row["clip"]))
            for row in rows]  # fmt: skip


def attention(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The backend that torch takes by itself against the fastest."""
    times = {row["attention"]: row["milliseconds"] for row in rows if row["milliseconds"]}
    told = ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
    if "default" not in times or len(times) < 2:
        return [Verdict("attention backends", told or "none served")]
    best = min(value for name, value in times.items() if name != "default")
    good = times["default"] <= ATTENTION_GOAL * best if on_gpu(rows) else None
    return [Verdict("attention backends", told, goal=f"default within {ATTENTION_GOAL:g}x of the fastest",
                    outcome=outcome(good))]  # fmt: skip
