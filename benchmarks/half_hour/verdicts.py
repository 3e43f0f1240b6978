"""From a part's rows to verdicts: measured, predicted, goal. Goals of speed and memory are those of an H100 in bf16."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from rollouts.report import best_of, summarise, with_rates
from rollouts.results_file import of_one_comparison
from rollouts.variants import GOALS

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
    """Whether the rows are of a device that goals of speed and memory are about."""
    return bool(rows) and rows[0]["threads"] is None


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
    ("step", "forward", "fast", 0.85), ("step", "forward", "exact", 0.55), ("log_prob", "forward", None, 0.85),
    ("log_prob", "backward", None, 0.85), ("ode_step", "forward", None, 0.85),
)  # fmt: skip
"""operator, mode, noise (None: it draws none) -> share of the copy bandwidth at 64 MiB and above"""
RATIO_GOALS = (("compiled", 2.5), ("stored", 1.4), ("eager", 8.0))
"""provider -> how many times as long as ours it should take for loss and gradient at K = 6"""


def operators(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Shares of the copy bandwidth, and loss with gradient against what it replaces."""
    copies = [row for row in rows if row["operator"] == "copy"]
    if not copies:
        return []
    rate = copies[-1]["bytes"] / (copies[-1]["graph_ms"] or copies[-1]["median_ms"])
    verdicts = [Verdict("copy bandwidth", f"{rate / 1e6:,.0f} GB/s")]
    for operator, mode, noise, goal in COPY_GOALS:
        point = (operator, mode, "fused")
        own = [row for row in _large(rows) if (row["operator"], row["mode"], row["provider"]) == point
               and noise in (None, row["noise"])]  # fmt: skip
        verdicts += _shares(own, rate, goal, noise)
    return verdicts + _against_others(rows)


def _large(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of calls that goals are about; on a CPU, where none are, all of them."""
    return [row for row in rows if row["provider"] != "bound" and (row["bytes"] >= LARGE or not on_gpu(rows))]


def _shares(rows: list[dict[str, Any]], rate: float, goal: float, noise: str | None) -> list[Verdict]:
    """One verdict per K: of several sizes the largest."""
    largest = {row["siblings"]: row for row in sorted(rows, key=lambda row: row["bytes"])}
    found = []
    for siblings, row in sorted(largest.items()):
        share = row["bytes"] / (row["graph_ms"] or row["median_ms"]) / rate
        good = share >= goal if on_gpu([row]) else None
        name = f"{row['operator']} {row['mode']}, K = {siblings}" + (f", {noise} noise" if noise else "")
        found.append(
            Verdict(name, f"{100 * share:.0f} % of copy", _predicted(row), f"{100 * goal:.0f} %", outcome(good))
        )
    return found


UNMATCHED = {("ode_step", "forward"): "ODE step"}
"""Points whose name among the predictions does not say where it is measured."""


def _predicted(row: dict[str, Any]) -> str:
    """The model's share of the copy bandwidth, where it knows the operator and the chip."""
    if importlib.util.find_spec("operators.predictions") is None:  # goes with the merge of the predictions
        return ""
    model = importlib.import_module("operators.predictions")
    chips = [chip for chip in model.CHIPS if chip in row["device"]]
    point = (row["operator"], row["mode"])
    names = [name for name, known in model.OPERATORS.items() if known.measured == point]
    names += [name for name in [UNMATCHED.get(point)] if name in model.OPERATORS]
    if not chips or not names:
        return ""
    known = model.OPERATORS[names[0]].noises
    noise = row["noise"] if row["noise"] in known else known[0]
    return f"{100 * model.predict(names[0], row['siblings'], chips[0], noise).copy_share:.0f} %"


def _against_others(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Loss with gradient at K = 6 against other ways of it, in the first noise that was measured, at the same size."""
    loss = [row for row in _large(rows) if (row["operator"], row["mode"], row["siblings"]) == ("loss", "full", 6)]
    ours = {(row["shape"], row["rows"]): row for row in reversed(loss) if row["provider"] == "fused"}
    found = []
    for provider, goal in RATIO_GOALS:
        for row in (row for row in loss if row["provider"] == provider):
            own, times = ours.get((row["shape"], row["rows"])), "graph_ms"
            if own is None:
                continue
            times = "graph_ms" if row["graph_ms"] and own["graph_ms"] else "median_ms"
            ratio = row[times] / own[times]
            found.append(Verdict(f"loss + gradient, K = 6, {row['shape']} R = {row['rows']}, against {provider}",
                                 f"{ratio:.2f}x", "", f"{goal:g}x",
                                 outcome(ratio >= goal if on_gpu([row]) else None)))  # fmt: skip
    return found


def rollouts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Rollouts per hour of every level over the released algorithm's, and the goals."""
    found = summarise(with_rates(of_one_comparison(rows)))
    base = found.get("official")
    levels = [Verdict(f"`{name}` ({item.exactness})",
                      f"{item.rate:,.0f} rollouts/h" + (f", {item.rate / base.rate:.2f}x official" if base else ""))
              for name, item in found.items()]  # fmt: skip
    goals = []
    for goal in GOALS:
        best = best_of(found, goal.variants)
        told = f"{best[1]:.2f}x by `{best[0]}`" if best else ""
        good = best[1] >= goal.times if best and on_gpu(rows) else None
        goals.append(Verdict(f"rollouts {goal.told}", told, "", f"{goal.times:g}x",
                             outcome(good) if best or not on_gpu(rows) else NOT_RUN))  # fmt: skip
    return goals + levels


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
