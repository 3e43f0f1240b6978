"""Branch rollouts per GPU-hour against the released algorithm, every level of ours on its own:

    python benchmarks/rollouts/compare.py --minutes 9 --cache FOLDER    SD3.5-M 512 px on a GPU, digits without
    python benchmarks/rollouts/compare.py --architecture flux-dev-512 --minutes 9
    python benchmarks/rollouts/compare.py --variants official,ours --set tails.rows=48 --set explore.prompts=2

An iteration is a full one: trunk, tails, decode, score, learn. Each variant is set up, warmed up (compilation is
told apart) and run once; then all run in turn, round after round, until the minutes are over or each has `--rounds`.
Nothing is started that would not end in time. Each timed iteration is written at once to `rollouts_NAME.jsonl` in the
output folder, one JSON object with device, versions, commit, date, and what the device could copy and multiply right
before it; table and plots are drawn from that file (`python benchmarks/rollouts/report.py FILE`).

The same command again goes on: rounds that are in the file, of the same commit, device and settings, are not run again
(`--again` runs them), variants with the fewest come first. `--cache` keeps compiled code, so that a set-up of the
second call is short. A variant that cannot run here is listed with the reason. One that leaves the device out of order
ends the process, exit status 3: the same command goes on without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from importable import ROOT, keep_cache  # isort: skip

if __name__ == "__main__":
    keep_cache(sys.argv)

import torch
import yaml
from machine.environment import environment, still_works
from machine.flops import copy_bandwidth, matmul_peak
from rollouts.architectures import ARCHITECTURES
from rollouts.bench import Bench, Case, iterate, warm_up
from rollouts.figures import figures
from rollouts.report import write_report
from rollouts.results_file import Results
from rollouts.set_up_times import kind_of
from rollouts.variants import REFERENCE, VARIANTS, Variant, settings_of, worth

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput

FAILURES = (BadInput, NotImplementedError, RuntimeError, CaptureBroken)
"""What a variant that cannot run here raises; out of memory is a RuntimeError."""
BROKEN = 3
"""exit status where a variant has left the device out of order"""
CLOSING_SECONDS = 8
"""kept for the report"""


class DeviceBroken(Exception):
    """No variant could be timed after the one that is named."""


class Comparison:
    """The variants on one bench: set-up, warm-up, rounds; rows go to a file as they come."""

    def __init__(self, bench: Bench, results: Results, minutes: float):
        self.bench, self.results = bench, results
        self.deadline = time.perf_counter() + 60 * minutes - CLOSING_SECONDS
        self.late: set[str] = set()
        """variants that time ran out for"""
        self.broken = ""
        """the variant that has left the device out of order, if one did"""

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def compare(self, chosen: list[Variant], rounds: int) -> None:
        """Each variant once, right after its set-up, those of the goals first; then all in turn until time is up or
        each has its `rounds`. Ends early where one leaves the device out of order."""
        known, out = self.results.rounds, self.results.broken()
        short = [variant for variant in chosen if known(variant.name) < rounds and variant.name not in out]
        try:
            with self.bench.texts():
                self._in_turn(sorted(short, key=lambda variant: (known(variant.name), worth(variant))), rounds)
        except DeviceBroken as error:
            self.broken = str(error)

    def _in_turn(self, variants: list[Variant], rounds: int) -> None:
        cases = []
        for variant in variants:
            case = self.prepare(variant)
            if case is not None and self.one(case) and not self.dropped(case):
                cases.append(case)
            case = None  # nothing else holds on to one that was dropped
            gc.collect()
        while cases:
            cases = [case for case in cases if self.results.rounds(case.variant.name) < rounds and self.one(case)]

    def prepare(self, variant: Variant) -> Case | None:
        """Sets a variant up and warms it up, or writes down why not."""
        if variant.gpu_only and not self.bench.on_gpu:
            return self.skip(variant, variant.gpu_only)
        kind = kind_of(settings_of(variant, self.bench.on_gpu) | self.bench.overrides)
        needed = self.results.set_up_seconds(kind) + self.results.iteration_seconds(variant.name)
        if self.left() < needed:
            self.late.add(variant.name)
            return self.skip(variant, f"no time left: setting up and one iteration may take {needed:.0f} s, there are "
                             f"{self.left():.0f} s")  # fmt: skip
        began, problem, works = time.perf_counter(), "", True
        try:
            case = self.bench.case(variant)
            made = time.perf_counter()
            first, again = self.warmed(case)
        except FAILURES as error:
            problem, works = told(error), self.works_after(error)
        if problem:
            return self.skip(variant, problem, works)
        self.results.write("warm-up", variant=variant.name, set_up_kind=kind, set_up_seconds=round(made - began, 2),
                           first_seconds=round(first, 2), again_seconds=round(again, 2),
                           micro_batch=case.copies)  # fmt: skip
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

    def works_after(self, error: BaseException | None) -> bool:
        """Whether this process can go on: not after a capture that CUDA broke off, whatever it was raised as."""
        while error is not None:
            if isinstance(error, CaptureBroken):
                return False
            error = error.__cause__ or error.__context__
        return still_works(self.bench.device)

    def skip(self, variant: Variant, reason: str, works: bool = True) -> None:
        """
        Raises:
            DeviceBroken: it left a device that does not work.
        """
        self.results.write("skipped", variant=variant.name, reason=reason, broken=not works)
        say(f"{variant.name}: not run ({reason})")
        if not works:
            raise DeviceBroken(variant.name)
        if self.bench.on_gpu:
            torch.cuda.empty_cache()

    def dropped(self, case: Case) -> bool:
        """Gives up a large `official` after its first iteration, where its weights would leave no room for the rest."""
        if case.variant.name != "official" or self.bench.has_room(case.trainer.policy):
            return False
        self.bench.forget(case.trainer.policy)
        say("official: one iteration only, then out of memory's way")
        return True

    def one(self, case: Case) -> bool:
        """One timed iteration, if it fits; False is the variant's end."""
        name, results = case.variant.name, self.results
        number = results.rounds(name)
        if results.iteration_seconds(name) * 1.1 > self.left():
            if number == 0:
                self.late.add(name)
                self.skip(case.variant, f"no time left to run it: {self.left():.0f} s")
            return False
        problem, works = "", True
        try:
            limits = self.limits()
            measured = iterate(case, number)
        except FAILURES as error:
            problem, works = told(error), self.works_after(error)
        if problem:  # outside of the handler, where what the error holds on to is free
            self.skip(case.variant, f"round {number}: {problem}", works)
            return False
        own = {"rewards": measured.rewards.tolist()} if name == REFERENCE else {}
        exact = measured.rewards if own else results.rewards(number)
        row = figures(self.bench, case, measured, exact)
        results.write("iteration", variant=name, round=number, **limits, **row, **own)
        say(f"round {number}: {name} {measured.seconds:.2f} s, {row['rollouts_per_hour']:,.0f} rollouts/h")
        return True

    def limits(self) -> dict[str, Any]:
        """What the device can do right now, in the precision of the run: a clock that falls falls here as well."""
        dtype = torch.bfloat16 if self.bench.on_gpu else torch.float32
        peak, copied = matmul_peak(self.bench.device, dtype), copy_bandwidth(self.bench.device)
        return {"dtype": str(dtype), "matmul_tflops": round(peak / 1e12, 4), "copy_gbs": round(copied / 1e9, 1)}


def told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def say(text: str) -> None:
    print(text, flush=True)


def override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: settings have the form section.field=value")
    return name, yaml.safe_load(value)


def variants(text: str) -> list[Variant]:
    """Those of a list of names, in the order of VARIANTS."""
    names, known = text.split(","), [variant.name for variant in VARIANTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no variant; choose from {', '.join(known)}")
    return [variant for variant in VARIANTS if variant.name in names]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["digits", *ARCHITECTURES]
    parser.add_argument("--architecture", choices=names, help="default: sd35-medium-512 on a GPU, else digits")
    parser.add_argument("--minutes", type=float, default=9.0, help="all included")
    parser.add_argument("--rounds", type=int, default=5, help="so many iterations of each variant, earlier calls' too")
    parser.add_argument("--again", action="store_true", help="forget what the file has of this comparison")
    parser.add_argument("--cache", type=Path, help="folder that keeps compiled code from call to call")
    parser.add_argument("--variants", type=variants, default=list(VARIANTS), help="names, with commas; default: all")
    parser.add_argument("--set", type=override, action="append", default=[], metavar="section.field=value")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/DEVICE")
    parser.add_argument("--smoke", action="store_true", help="one tiny iteration of each, to see that everything runs")
    return parser.parse_args(arguments)


SMOKE = {"explore.prompts": 1, "explore.noises": 2, "explore.siblings": 3, "sample.steps": 4, "learn.rows": 2}


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison and draws its report."""
    return BROKEN if run(options(arguments)).broken else 0


def run(asked: argparse.Namespace, file: Path | None = None) -> Comparison:
    """The comparison, its rows in `file` or in the folder asked for, its report printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = asked.architecture or ("sd35-medium-512" if device.type == "cuda" else "digits")
    slug = torch.cuda.get_device_name().lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    folder = asked.out or ROOT / "benchmarks" / "results" / slug
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the released recipe; ours too
    overrides = (SMOKE if asked.smoke else {}) | dict(asked.set)
    identity = environment(device) | {"architecture": name, "overrides": json.dumps(overrides, sort_keys=True)}
    results = Results(file or folder / f"rollouts_{name}.jsonl", identity, asked.again)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as workshop:
        comparison = Comparison(Bench(name, device, Path(workshop), overrides), results, asked.minutes)
        comparison.compare(asked.variants, 1 if asked.smoke else asked.rounds)
    say(write_report(results.file))
    return comparison


if __name__ == "__main__":
    status = main()
    if status == BROKEN:
        sys.stdout.flush()
        os._exit(status)  # what would be tidied up at the end needs the device
    sys.exit(status)
