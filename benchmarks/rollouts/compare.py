"""Branch rollouts per GPU-hour against the released algorithm, every level of ours on its own:

    python benchmarks/rollouts/compare.py --minutes 9        SD3.5-M 512 px on a GPU, the digits pipeline without
    python benchmarks/rollouts/compare.py --architecture flux-dev-512 --minutes 9
    python benchmarks/rollouts/compare.py --variants official,ours --set tails.rows=48 --set explore.prompts=2

An iteration is a full one: trunk, tails, decode, score, learn. Each variant is set up, warmed up (compilation is
told apart) and run once; then all run in turn, round after round, until the minutes are over. Nothing is started that
would not end in time. Each timed iteration is written at once to `rollouts_NAME.jsonl` in the output folder, one JSON
object with device, versions, commit and date; table and plots are drawn from that file (`python
benchmarks/rollouts/report.py FILE`). A variant that cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from importable import ROOT  # isort: skip

import torch
import yaml
from machine.environment import environment
from machine.flops import copy_bandwidth, matmul_peak
from rollouts.architectures import ARCHITECTURES
from rollouts.bench import Bench, Case, Iteration, iterate, warm_up
from rollouts.figures import figures
from rollouts.report import write_report
from rollouts.variants import REFERENCE, VARIANTS, Variant

from tempflow.common.errors import BadInput

CLOSING_SECONDS = 8
"""kept for the report"""
CAUTION = 2
"""How many times the longest set-up so far the next one may take."""


class Comparison:
    """The variants on one bench: set-up, warm-up, rounds; rows go to a file as they come."""

    def __init__(self, bench: Bench, file: Path, minutes: float):
        self.bench, self.file, self.start = bench, file, time.perf_counter()
        self.deadline = self.start + 60 * minutes - CLOSING_SECONDS
        self.environment = environment(bench.device) | {"architecture": bench.name}
        self.seconds: dict[str, list[float]] = {}
        self.exact: dict[int, Iteration] = {}
        self.peak = self.longest_warm_up = 0.0
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")

    def write(self, kind: str, **values: Any) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"kind": kind, **values, **self.environment}) + "\n")

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def limits(self) -> None:
        """What the device can do, in the precision of the run."""
        dtype = torch.bfloat16 if self.bench.on_gpu else torch.float32
        self.peak, copied = matmul_peak(self.bench.device, dtype), copy_bandwidth(self.bench.device)
        tflops, gigabytes = round(self.peak / 1e12, 3), round(copied / 1e9, 1)
        self.write("limits", dtype=str(dtype), matmul_tflops=tflops, copy_gbs=gigabytes)
        say(f"{self.environment['device']}: {tflops} TFLOP/s of matrix products, {gigabytes} GB/s copied")

    def prepare(self, variant: Variant) -> Case | None:
        """Sets a variant up and warms it up, or writes down why not."""
        if variant.gpu_only and not self.bench.on_gpu:
            return self.skip(variant, variant.gpu_only)
        if self.left() < CAUTION * self.longest_warm_up + self.guess(variant):
            return self.skip(variant, f"no time left to set it up and run it: {self.left():.0f} s")
        began, problem = time.perf_counter(), ""
        try:
            case = self.bench.case(variant)
            made = time.perf_counter()
            first, again = self.warmed(case)
        except (BadInput, NotImplementedError, RuntimeError) as error:  # out of memory is a RuntimeError
            problem = told(error)
        if problem:
            return self.skip(variant, problem)
        self.longest_warm_up = max(self.longest_warm_up, time.perf_counter() - began)
        self.write("warm-up", variant=variant.name, set_up_seconds=round(made - began, 2),
                   first_seconds=round(first, 2), again_seconds=round(again, 2), micro_batch=case.copies)  # fmt: skip
        say(f"{variant.name}: set up {made - began:.1f} s, first call {first:.1f} s, again {again:.2f} s")
        return case

    def warmed(self, case: Case) -> tuple[float, float]:
        """Seconds of two warm-ups; the released algorithm gets smaller micro-batches where K copies do not fit."""
        while True:
            try:
                return warm_up(case), warm_up(case)
            except torch.OutOfMemoryError:
                if case.copies is None or case.copies % 2:
                    raise
            case.copies //= 2
            say(f"{case.variant.name}: out of memory; micro-batches of {case.copies} copies in training")

    def skip(self, variant: Variant, reason: str) -> None:
        if self.bench.on_gpu:
            torch.cuda.empty_cache()
        self.write("skipped", variant=variant.name, reason=reason)
        say(f"{variant.name}: not run ({reason})")

    def compare(self, chosen: list[Variant], most: int) -> None:
        """Each variant once, right after its set-up; then all in turn until time is up or each has `most`."""
        cases = []
        with self.bench.texts():
            for variant in chosen:
                case = self.prepare(variant)
                if case is not None and self.one(case, 0) and not self.dropped(case):
                    cases.append(case)
                case = None  # nothing else holds on to one that was dropped
                gc.collect()
            for number in range(1, most):
                cases = [case for case in cases if self.one(case, number)]

    def dropped(self, case: Case) -> bool:
        """Gives up a large `official` after its first iteration, where its weights would leave no room for the rest."""
        if case.variant.name != "official" or self.bench.has_room(case.trainer.policy):
            return False
        self.bench.forget(case.trainer.policy)
        say("official: one iteration only, then out of memory's way")
        return True

    def one(self, case: Case, number: int) -> bool:
        """One timed iteration, if it fits; False is the variant's end."""
        name = case.variant.name
        if self.guess(case.variant) * 1.1 > self.left():
            if number == 0:
                self.skip(case.variant, f"no time left to run it: {self.left():.0f} s")
            return False
        problem = ""
        try:
            measured = iterate(case, number)
        except torch.OutOfMemoryError as error:
            problem = told(error)
        if problem:  # outside of the handler, where what the error holds on to is free
            self.skip(case.variant, f"round {number}: {problem}")
            return False
        if name == REFERENCE:
            self.exact[number] = measured
        row = figures(self.bench, case, measured, self.exact.get(number), self.peak)
        self.write("iteration", variant=name, round=number, **row)
        self.seconds.setdefault(name, []).append(measured.seconds)
        say(f"round {number}: {name} {measured.seconds:.2f} s, {row['rollouts_per_hour']:,.0f} rollouts/h")
        return True

    def guess(self, variant: Variant) -> float:
        """Seconds of an iteration: its own median, or that of the variant before it, which is seldom faster."""
        if variant.name in self.seconds:
            return median(self.seconds[variant.name])
        return median(list(self.seconds.values())[-1]) if self.seconds else 0.0


def told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def say(text: str) -> None:
    print(text, flush=True)


def override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: settings have the form section.field=value")
    return name, yaml.safe_load(value)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["digits", *ARCHITECTURES]
    parser.add_argument("--architecture", choices=names, help="default: sd35-medium-512 on a GPU, else digits")
    parser.add_argument("--minutes", type=float, default=9.0, help="all included")
    parser.add_argument("--rounds", type=int, default=100, help="at most so many iterations of each variant")
    parser.add_argument("--variants", default="", help="names, separated by commas; default: all")
    parser.add_argument("--set", type=override, action="append", default=[], metavar="section.field=value")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/DEVICE")
    parser.add_argument("--smoke", action="store_true", help="one tiny iteration of each, to see that everything runs")
    return parser.parse_args(arguments)


SMOKE = {"explore.prompts": 1, "explore.noises": 2, "explore.siblings": 3, "sample.steps": 4, "learn.rows": 2}


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison and draws its report."""
    asked = options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = asked.architecture or ("sd35-medium-512" if device.type == "cuda" else "digits")
    chosen = [variant for variant in VARIANTS if not asked.variants or variant.name in asked.variants.split(",")]
    slug = torch.cuda.get_device_name().lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    folder = asked.out or ROOT / "benchmarks" / "results" / slug
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the released recipe; ours too
    overrides = (SMOKE if asked.smoke else {}) | dict(asked.set)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as workshop:
        bench = Bench(name, device, Path(workshop), overrides)
        comparison = Comparison(bench, folder / f"rollouts_{name}.jsonl", asked.minutes)
        comparison.limits()
        comparison.compare(chosen, 1 if asked.smoke else asked.rounds)
    say(write_report(comparison.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
