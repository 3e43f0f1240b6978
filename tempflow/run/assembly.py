"""A run put together from its configuration: every part made, checked and explained before anything is changed."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from tempflow.common.clock import PhaseClock
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.plan import BranchPlan
from tempflow.explore.schedule import NoiseSchedule, build_schedule
from tempflow.explore.tails.choose import set_up_tails
from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.explore.tails.engine import TailEngine
from tempflow.explore.tails.levels import Engines
from tempflow.forecast.memory import learning_bytes
from tempflow.forecast.words import explain, explain_memory
from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import make_optimizer
from tempflow.learn.stepper import LossScale, Stepper
from tempflow.models.load import load_policy, load_skeleton
from tempflow.parallel import ranks as distributed
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Policy
from tempflow.prompts import Prompt, read_prompts
from tempflow.records.rows import MetricsWriter, read_metrics
from tempflow.records.trackers import check_trackers
from tempflow.rewards.panel import Panel, load_panels
from tempflow.run import checkpoint
from tempflow.run.checkpoint import Progress
from tempflow.run.evaluation import Evaluator
from tempflow.run.folder import check_folder, write_settings
from tempflow.run.trainer import Run
from tempflow.settings.checks import check_consistency
from tempflow.settings.fields import Config


def set_up(config: Config) -> tuple[Run, Progress]:
    """A run ready to go, and how far it has come already. Prints the plan.

    Raises:
        BadInput: anything in the configuration that cannot work; no file has been changed then.
    """
    ranks = distributed.start(config.run.device)
    check_trackers(config.run.trackers)
    check_folder(config)
    prompts = read_prompts(config.prompts.train, "prompts.train")
    held_out = _held_out(config)
    schedule, plan = show_plan(config, ranks)
    rewards, gold = load_panels(config.reward, config.reward.rows, ranks.device)
    if ranks.first:
        print(rewards.describe("rewards"), gold.describe("gold"), sep="\n", file=sys.stderr)
    rewards.check(prompts + held_out)
    gold.check(held_out)
    torch.manual_seed(config.run.seed)  # here: the adapters' first values must not depend on what scorers drew
    policy = load_policy(config.model, config.sample, ranks.device, keep_reference=config.objective.kl > 0)
    if ranks.first:
        print(f"attention: {policy.attention}", file=sys.stderr)
    engines = _engines(config, policy, schedule, plan, prompts, ranks)
    evaluator = _evaluator(config, policy, held_out, rewards, gold, ranks, engines.evaluate)
    stepper = _stepper(config, policy)
    folder = Path(config.run.dir).expanduser()
    progress = checkpoint.restore(folder / "checkpoints", stepper)
    write_settings(config, ranks)
    last = progress.iteration if progress.iteration else None
    writer = MetricsWriter(folder, config.run.trackers, folder.name, last) if ranks.first else None
    clock, numerics = PhaseClock(ranks.device), CompiledBlocks(policy.blocks()) if config.learn.compile else nullcontext
    scores = ScoreQueue(policy, rewards, config.reward.rows, clock, config.reward.overlap)
    run = Run(config, folder, ranks, policy, schedule, plan, engines.explore, numerics, prompts, rewards, scores,
              evaluator, stepper, clock, writer)  # fmt: skip
    return run, progress


def show_plan(config: Config, ranks: Ranks, memory: bool = False) -> tuple[NoiseSchedule, BranchPlan]:
    """Prints what the run will do, and with `memory` what it will hold, from the model's configuration alone.

    Raises:
        BadInput: settings that cannot work together, or with this model.
    """
    check_consistency(config, ranks.size)
    skeleton = load_skeleton(config.model, config.sample)
    sigmas = skeleton.sigmas(config.sample.steps)
    schedule = build_schedule(sigmas, config.sample.transition, config.sample.noise_level)
    plan = BranchPlan.parse(config.explore.forks, schedule.num_steps, config.explore.siblings)
    if ranks.first:
        print(explain(config, skeleton, schedule, plan, ranks.size, ranks.device.type), file=sys.stderr)
        if memory:
            print(explain_memory(config, skeleton, plan, ranks.size), file=sys.stderr)
    return schedule, plan


def _engines(
    config: Config, policy: Policy, schedule: NoiseSchedule, plan: BranchPlan, prompts: list[Prompt], ranks: Ranks
) -> Engines:
    """What carries the tails."""
    first_row = read_metrics(Path(config.run.dir).expanduser() / "metrics.jsonl")[:1] if config.run.resume else []
    known_rows = first_row[0].get("tail_rows") if first_row else None
    trunks = config.explore.prompts * config.explore.noises // ranks.size

    def agree(rows: int) -> int:
        return int(ranks.gather(torch.tensor([rows]), 0).min())

    return set_up_tails(config, policy, schedule, plan, trunks, prompts[0].text, known_rows, agree, ranks.first,
                        learning_bytes(config, policy))  # fmt: skip


def _stepper(config: Config, policy: Policy) -> Stepper:
    """The optimizer and what goes with it."""
    parameters, learn = policy.trainable(), config.learn
    optimizer = make_optimizer(learn, list(parameters.values()))
    average = MovingAverage(parameters, learn.ema_decay, learn.ema_every)
    scale = LossScale(policy.device) if config.model.dtype == "fp16" else None
    return Stepper(parameters, optimizer, average, learn.max_grad_norm, scale)


def _held_out(config: Config) -> list[Prompt]:
    """The prompts of evaluations, spread over their file; none where there is no file."""
    if config.prompts.test is None:
        return []
    prompts = read_prompts(config.prompts.test, "prompts.test")
    count = min(config.eval.prompts, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _evaluator(
    config: Config, policy: Policy, prompts: list[Prompt], rewards: Panel, gold: Panel, ranks: Ranks, engine: TailEngine
) -> Evaluator | None:
    """Held-out evaluation, or None where there are no held-out prompts."""
    if not prompts:
        return None
    schedule = build_schedule(policy.sigmas(config.eval.steps), config.sample.transition, config.sample.noise_level)
    return Evaluator(policy, engine, schedule, prompts, rewards, gold, ranks, config.run.seed,
                     config.reward.rows, config.eval.pictures)  # fmt: skip
