"""Branch rollouts per GPU-hour against the released algorithm, every level of ours on its own:

    python benchmarks/rollouts.py --minutes 9                      SD3.5-M 512 px on a GPU, the digits pipeline without
    python benchmarks/rollouts.py --architecture flux-dev-512 --minutes 9
    python benchmarks/rollouts.py --variants official,ours --set branch.rows=48 --set branch.prompts=2

An iteration is a full one: trunk, tails, decode, score, learn. Variants are set up and warmed up first (compilation is
told apart), then run in turn, round after round, until the minutes are over; nothing is started that would not end in
time. Each timed iteration is written at once to `rollouts_NAME.jsonl` in the output folder, one JSON object with device,
versions, commit and date; table and plots are drawn from that file (`python benchmarks/rollout_report.py FILE`).
A variant that cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(path) for path in (ROOT / "benchmarks", ROOT / "kernels", ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
import yaml  # noqa: E402
from architectures import ARCHITECTURES  # noqa: E402
from flops import copy_bandwidth, matmul_peak  # noqa: E402
from kernel_bench import environment  # noqa: E402
from rollout_bench import Bench, Case, Iteration, iterate, warm_up  # noqa: E402
from rollout_figures import figures  # noqa: E402
from rollout_report import write_report  # noqa: E402
from rollout_variants import REFERENCE, VARIANTS, Variant  # noqa: E402

from tempflow.errors import BadInput  # noqa: E402

CLOSING_SECONDS = 8
"""kept for the report"""


class Comparison:
    """The variants on one bench: set-up, warm-up, rounds; rows go to a file as they come."""

    def __init__(self, bench: Bench, file: Path, minutes: float):
        self.bench, self.file, self.start = bench, file, time.perf_counter()
        self.deadline = self.start + 60 * minutes - CLOSING_SECONDS
        self.environment = environment(bench.device) | {"architecture": bench.name}
        self.cases: list[Case] = []
        self.seconds: dict[str, list[float]] = {}
        self.exact: dict[int, Iteration] = {}
        self.peak = 0.0
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
        self.write("limits", dtype=str(dtype), matmul_tflops=round(self.peak / 1e12, 3), copy_gbs=round(copied / 1e9, 1))
        say(f"{self.environment['device']}: {self.peak / 1e12:.2f} TFLOP/s matrix products, {copied / 1e9:.0f} GB/s copied")

    def prepare(self, variant: Variant) -> None:
        """Sets a variant up and warms it up, or writes down why not."""
        if variant.gpu_only and not self.bench.on_gpu:
            self.skip(variant, variant.gpu_only)
            return
        began = time.perf_counter()
        try:
            with self.bench.texts():
                case = self.bench.case(variant)
                made = time.perf_counter()
                first, second = warm_up(case), warm_up(case)
        except torch.OutOfMemoryError as error:
            self.skip(variant, f"out of memory: {error}")
            return
        except (BadInput, NotImplementedError, RuntimeError) as error:
            self.skip(variant, " ".join(f"{type(error).__name__}: {error}".split())[:500])
            return
        self.cases.append(case)
        self.write("warm-up", variant=variant.name, set_up_seconds=round(made - began, 2),
                   first_seconds=round(first, 2), again_seconds=round(second, 2))  # fmt: skip
        say(f"{variant.name}: set up {made - began:.1f} s, first call {first:.1f} s, again {second:.2f} s")

    def skip(self, variant: Variant, reason: str) -> None:
        torch.cuda.empty_cache()
        self.write("skipped", variant=variant.name, reason=reason)
        say(f"{variant.name}: not run ({reason})")

    def rounds(self, most: int) -> None:
        """Iterations in turn until time is up or there are `most` of each."""
        for number in range(most):
            done = [self.one(case, number) for case in self.cases]
            if not any(done):
                return
        return

    def one(self, case: Case, number: int) -> bool:
        """One timed iteration, if it fits."""
        name = case.variant.name
        expected = median(self.seconds[name]) if name in self.seconds else self.guess(case)
        if expected * 1.1 > self.left():
            if name not in self.seconds:
                self.skip(case.variant, f"no time left: about {expected:.0f} s needed, {self.left():.0f} s left")
                self.seconds[name] = [float("inf")]
            return False
        try:
            with self.bench.texts():
                measured = iterate(case, number)
        except torch.OutOfMemoryError as error:
            self.skip(case.variant, f"out of memory: {error}")
            self.seconds[name] = [float("inf")]
            return False
        if name == REFERENCE:
            self.exact[number] = measured
        row = figures(self.bench, case, measured, self.exact.get(number), self.peak)
        self.write("iteration", variant=name, round=number, **row)
        self.seconds.setdefault(name, []).append(measured.seconds)
        say(f"round {number}: {name} {measured.seconds:.2f} s, {row['rollouts_per_hour']:,.0f} rollouts/h")
        return True

    def guess(self, case: Case) -> float:
        """Seconds of an iteration never run: from the rows of the others."""
        known = [median(times) for times in self.seconds.values() if times[0] < float("inf")]
        return min(known) if known and not case.judge else (max(known) if known else 0.0)


def say(text: str) -> None:
    print(text, flush=True)


def override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: settings have the form section.field=value")
    return name, yaml.safe_load(value)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["digits", *ARCHITECTURES], help="default: sd35-medium-512 on a GPU, else digits")
    parser.add_argument("--minutes", type=float, default=9.0, help="all included")
    parser.add_argument("--rounds", type=int, default=100, help="at most so many iterations of each variant")
    parser.add_argument("--variants", default="", help="names, separated by commas; default: all")
    parser.add_argument("--set", type=override, action="append", default=[], metavar="section.field=value")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results/DEVICE")
    parser.add_argument("--smoke", action="store_true", help="one tiny iteration of each, to see that everything runs")
    return parser.parse_args(arguments)


SMOKE = {"branch.prompts": 1, "branch.seeds": 2, "branch.siblings": 3, "sample.steps": 4, "learn.rows": 2}


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns 1 if a variant that was asked for could not run on this device."""
    asked = options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = asked.architecture or ("sd35-medium-512" if device.type == "cuda" else "digits")
    chosen = [variant for variant in VARIANTS if not asked.variants or variant.name in asked.variants.split(",")]
    slug = torch.cuda.get_device_name().lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    folder = asked.out or ROOT / "benchmarks" / "results" / slug
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # the released recipe; ours too
    overrides = (SMOKE if asked.smoke else {}) | dict(asked.set)
    with tempfile.TemporaryDirectory(prefix="rollouts-") as workshop:
        bench = Bench(name, device, Path(workshop), overrides)
        comparison = Comparison(bench, folder / f"rollouts_{name}.jsonl", asked.minutes)
        comparison.limits()
        for variant in chosen:
            comparison.prepare(variant)
        comparison.rounds(1 if asked.smoke else asked.rounds)
    say(write_report(comparison.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
