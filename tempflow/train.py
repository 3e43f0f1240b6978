"""TempFlow-GRPO: explore, credit, learn.

    torchrun tempflow/train.py                                  the preset `digits`, on any machine
    torchrun tempflow/train.py PRESET section.field=value ...   another preset or YAML file, with overrides
    torchrun tempflow/train.py --help                           every field

Deviations from the paper and its released code:
1. The K siblings of a fork share one network row in learning; their gradients add up on its one velocity. Exact.
2. Noise weights are std_k / mean(std) of the schedule in use, not a constant fitted to one schedule.
3. Seed groups are an axis of the reward tensor, so they hold at any batch size and number of processes.
4. Siblings of a fork are never spread over several optimizer steps.
5. The log-ratio is formed from velocity differences per element, never as a difference of two log-probabilities.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from tempflow_kernels import BranchLossStats, branch_loss, gaussian_terms
from torch import Tensor
from tqdm import tqdm

from tempflow import distributed
from tempflow.advantage import Credit, combined_advantages, known_std
from tempflow.assembly import set_up, show_plan
from tempflow.branching import TransitionBatch, sample_branches, sample_trunk, updates
from tempflow.checkpoint import Progress
from tempflow.config import load
from tempflow.errors import BadInput, Unscored
from tempflow.metrics import LossRecord, known_mean, loss_figures
from tempflow.optim import set_learning_rate
from tempflow.run import Run
from tempflow.tails_check import check_tails
from tempflow.transfer import to_device
from tempflow.usage import help_text

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended: 128 + SIGINT."""


def train_step(run: Run, iteration: int) -> dict[str, Any]:
    """One iteration; returns its metrics. Axes: S fork steps, R trunks of this rank, K siblings."""
    learn, clock, plan = run.config.learn, run.clock, run.plan.drawn(run.config.run.seed, iteration)
    prompts, draw = run.prompts_of(iteration)

    # Explore: an ODE trunk per initial noise; at each fork K siblings take one SDE step, then the ODE to an image.
    with clock("trunk"), run.numerics():
        seeds = run.config.branch.seeds
        conditioning = run.policy.encode([prompt.text for prompt in prompts[::seeds]]).repeat(seeds)
        trunk = sample_trunk(run.policy, conditioning, run.schedule, plan, draw, learn.rows)
    run.policy.refresh_merged()
    for chunk in clock.over("tails", sample_branches(run.engine, trunk, run.schedule)):
        run.scores.submit(chunk.latents, [prompts[row] for row in chunk.trunks])  # decoded and scored meanwhile
    with clock("wait"):
        rewards = run.collect(len(plan.steps), plan.siblings)  # (M scorers, S, R of all ranks, K)

    # Credit: siblings share all but that one step, so the difference of their rewards belongs to it.
    credit = combined_advantages(rewards, run.rewards.weights, run.config.reward.combine, seeds, learn.group,
                                 learn.advantage_std, learn.advantage_clip)  # fmt: skip
    weights = run.step_weights(plan)[:, None] * credit.informative  # (S, R of all ranks)
    idle = run.idle_updates(weights)
    advantages, weights = run.own_rows(credit.advantages), run.own_rows(weights)

    # Learn: weighted clipped policy gradient; each fork is one network row, its K siblings are K Gaussian terms on it.
    set_learning_rate(run.stepper.optimizer, learn, iteration)
    record = LossRecord()
    with clock("learn"), run.numerics():
        for number, batches in enumerate(updates(trunk, advantages, weights, learn)):
            for batch in batches:
                record.add(backward(run, batch), number)
            run.optimizer_step(idle[number % learn.updates])
        figures = loss_figures(run.ranks.gather(record.totals(), dim=0)) | run.stepper.read()
    return {**describe(rewards, credit, run, plan.steps), **figures}


def backward(run: Run, batch: TransitionBatch) -> BranchLossStats:
    """Adds the gradient of one batch of forks and returns what its loss saw."""
    learn, device, rows = run.config.learn, run.policy.device, len(batch.latents)
    sigma = run.schedule.sigma_rows(batch.step, rows, device)
    velocity = run.policy.velocity(batch.latents, sigma, batch.conditioning)
    velocity_ref = None
    if learn.kl:
        with torch.no_grad(), run.policy.reference():
            velocity_ref = run.policy.velocity(batch.latents, sigma, batch.conditioning)
    coef = run.schedule.sde.coef(batch.step, rows, device)
    loss, stats = branch_loss(
        velocity,
        batch.velocity_old,
        to_device(batch.advantages, device),
        gaussian_terms(coef, to_device(batch.weights, device), run.kl_weights(batch.step, rows)),
        key=batch.keys,
        clip_range=(learn.clip_range, learn.clip_range),
        kl_coef=learn.kl,
        velocity_ref=velocity_ref,
    )
    run.stepper.backward(loss * batch.share)
    return stats


def describe(rewards: Tensor, credit: Credit, run: Run, steps: Sequence[int]) -> dict[str, Any]:
    """Figures of the (M, S, R, K) rewards of all ranks and of their sum; steps without a fork have no spread."""
    total = run.rewards.total(rewards)
    compared = (~total.isnan()).sum(2) > 1
    spread: list[float | None] = [None] * (run.plan.num_steps - 1)
    for step, stds in zip(steps, known_std(total, (2,))[1].squeeze(2).where(compared, nan), strict=True):
        spread[step] = known_mean(stds, 6)
    return {
        "reward_mean": known_mean(total),
        "reward_means": {name: known_mean(row) for name, row in zip(run.rewards.scorers, rewards, strict=True)},
        "reward_std_per_step": spread,
        "rewards_missing": int(rewards.isnan().sum()),
        "groups_masked": credit.masked,
        "tail_waste": round(run.engine.work.read(), 4),
    }


def train(run: Run, progress: Progress) -> dict[str, Any]:
    """The loop: evaluate, step, record, save; from `progress` to the last iteration. Returns that one's metrics.

    Raises:
        Unscored: images got no reward; the run is saved as it was before.
    """
    config, start = run.config, time.perf_counter() - progress.seconds
    if progress.iteration == 0:
        scores = run.evaluate(0)
        run.record({"step": 0, "seconds": 0.0, "rollouts": 0, **run.constants(), **scores,
                    "phase_seconds": run.clock.read()})  # fmt: skip
        start = time.perf_counter()
    bar = tqdm(total=config.learn.iterations, initial=progress.iteration, unit="it", disable=not run.ranks.first,
               dynamic_ncols=True)  # fmt: skip
    first = progress.iteration + 1
    try:
        progress, row = settle(run, progress)
        while progress.iteration < config.learn.iterations and not stops(run, row):
            began = time.perf_counter()
            row = train_step(run, progress.iteration)
            rate = run.rollouts_per_iteration / (time.perf_counter() - began) * 3600
            row = {"rollouts_per_hour": round(rate, 1), **row}
            progress = Progress(progress.iteration + 1, time.perf_counter() - start,
                                progress.rollouts + run.rollouts_per_iteration, row)  # fmt: skip
            progress, row = settle(run, progress)
            if progress.iteration == first:
                run.announce()
            bar.update()
            bar.set_postfix(run.shown(row, rate))
        return row
    except Unscored as error:
        if progress.iteration:
            run.save(progress)
            mend = f"{error.mend}; iteration {progress.iteration} is saved, go on with run.resume=true"
            raise Unscored(error.field, error.value, mend) from error
        raise
    finally:
        bar.close()


def settle(run: Run, progress: Progress) -> tuple[Progress, dict[str, Any]]:
    """Ends an iteration whose metrics row is still owed: evaluates, records and saves where that is due."""
    if not progress.owed:
        return progress, {}
    done, config = progress.iteration, run.config
    last = done == config.learn.iterations
    row, began = dict(progress.owed), time.perf_counter()
    if last or (config.eval.every and done % config.eval.every == 0):
        row |= run.evaluate(done)
    progress = replace(progress, owed={}, seconds=progress.seconds + time.perf_counter() - began)
    run.record({"step": done, "seconds": round(progress.seconds, 3), "rollouts": progress.rollouts, **row,
                "phase_seconds": run.clock.read()})  # fmt: skip
    if last or stops(run, row) or (config.run.save_every and done % config.run.save_every == 0):
        run.save(progress)
    return progress, row


def stops(run: Run, row: dict[str, Any]) -> bool:
    """Whether the run was asked to stop where its reward is being hacked, and it is."""
    return run.config.reward.hacking_stop and "gold_fall" in row


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for wrong input, or 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    speak = distributed.is_first()  # before the loop every rank meets the same mistake
    try:
        config = load(arguments)
        if config.run.plan_only:
            show_plan(config, distributed.start(config.run.device), memory=True)
            return 0
        run, progress = set_up(config)
        speak = True
        if config.tails.check and run.ranks.first:
            print(f"tempflow: {check_tails(run).describe()}", file=sys.stderr)
        run.finish(stopped=stops(run, train(run, progress)))
        return 0
    except BadInput as error:
        if speak:
            print(f"tempflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if distributed.is_first():
            print("tempflow: interrupted; go on from the last checkpoint with run.resume=true", file=sys.stderr)
        return INTERRUPTED
    finally:
        distributed.stop()


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:  # threads may wait for a scorer's server yet, and a plain exit would wait for them
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
