"""Whole iterations with random weights: rollouts against the released algorithm, memory, the first log-ratio."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from half_hour.measure import Broken, Options, Unfinished
from machine.memory_peak import MemoryPeak
from rollouts import compare
from rollouts.bench import Bench, Case
from rollouts.variants import EXACT_END, REFERENCE, VARIANTS, Variant
from torch import Tensor

from tempflow.forecast.words import Forecast, plan_memory
from tempflow.models.load import load_skeleton
from tempflow.train import train_step

TINY = {"explore.prompts": 1, "explore.noises": 2, "explore.siblings": 2, "sample.steps": 3, "learn.rows": 2,
        "tails.rows": 4, "reward.rows": 4, "tails.level": "eager"}  # fmt: skip
FIRST_RATIO = {"explore.forks": [0, 4], "tails.level": "eager"}
BY_NAME = {variant.name: variant for variant in VARIANTS}


class Plain(Bench):
    """A bench whose scorer weighs nothing: the plan does not count scorers."""

    def scorers(self, variant: Variant) -> tuple[Callable, Callable]:
        def brightness(images: Tensor, prompts: Sequence) -> Tensor:
            return images.flatten(1).float().mean(1) / 255

        return brightness, brightness


def rollouts(options: Options) -> None:
    """`compare.py` for what is left of the time; its table and plot lie beside its rows.

    Raises:
        Unfinished: not every variant was timed.
        Broken: one left the device out of order; it is in the file, and left out from then on.
    """
    tiny = ["--smoke", "--set", "tails.level=eager", "--variants", "official,ours,+merged,+multistep"]
    command = ["--minutes", f"{options.left() / 60:.3f}", "--rounds", "3"]
    architecture = ["--architecture", "small-sd3" if options.tiny else "sd35-medium-512"]
    comparison = compare.run(compare.options([*command, *architecture, *(tiny if options.tiny else [])]), options.file)
    if comparison.broken:
        raise Broken(f"the device is out of order since {comparison.broken}, which the next call leaves out")
    if comparison.late:
        raise Unfinished(f"no time for {', '.join(sorted(comparison.late))}")


def _case(options: Options, workshop: str, variant: str, settings: dict[str, Any]) -> tuple[Bench, Case]:
    name = "small-sd3" if options.tiny else "sd35-medium-512"
    overrides = (TINY if options.tiny else {}) | settings
    bench = Plain(name, torch.device(options.device), Path(workshop), overrides)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with bench.texts():
        return bench, bench.case(BY_NAME[variant])


def memory(options: Options) -> None:
    """The peak of three iterations, and of the set-up, beside the plan of the same settings."""
    with tempfile.TemporaryDirectory(prefix="memory-") as workshop:
        peak = MemoryPeak(torch.device(options.device))
        bench, case = _case(options, workshop, EXACT_END, {})
        with bench.texts():
            for iteration in range(3):
                train_step(case.trainer, iteration)
            config = case.trainer.config
            skeleton = load_skeleton(config.model, config.sample)
        cost = Forecast(config, skeleton, case.trainer.method, case.trainer.schedule, 1).cost()
        plan = plan_memory(config, skeleton, cost)
    planned = plan.total - plan.stays["CUDA"]  # torch counts neither context nor libraries
    options.write(planned_bytes=planned, measured_bytes=_measured(options.device, peak), phase=plan.peak_phase,
                  parts=plan.stays | plan.phases[plan.peak_phase])  # fmt: skip


def _measured(device: str, peak: MemoryPeak) -> int | None:
    """Bytes at the peak; what graphs hold and no tensor lives in counts as well: a replay works there."""
    if device == "cpu":
        return None if peak.gib() is None else int(2**30 * peak.gib())
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    idle = sum(segment["total_size"] - segment["active_size"] for segment in pools)
    return torch.cuda.max_memory_allocated() + idle


def first_ratio(options: Options) -> None:
    """The first log-ratio of an iteration, plain and with compiled blocks in trunk and learning."""
    for compiled in (False,) if options.tiny else (False, True):
        with tempfile.TemporaryDirectory(prefix="ratio-") as workshop:
            settings = FIRST_RATIO | {"learn.compile": compiled}
            bench, case = _case(options, workshop, REFERENCE, {} if options.tiny else settings)
            with bench.texts():
                row = train_step(case.trainer, 0)
            largest, clip = row.first_log_ratio_max, case.trainer.config.objective.clip
        options.write(compiled=compiled, largest=largest, clip=clip)
        print(f"learn.compile={compiled}: {largest:.3g} (clip range {clip:g})", flush=True)
