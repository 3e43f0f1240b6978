"""TempFlow-GRPO and its kin: explore, credit, learn.

    torchrun tempflow/train.py                                        the preset `digits_even`, on any machine
    torchrun tempflow/train.py digits flow_grpo learn.iterations=20   presets and YAML files stack, then overrides
    torchrun tempflow/train.py --help                                 every field

Deviations from the paper and its released code:
1. The K siblings of a fork share one network row in learning; their gradients add up on its one velocity. Exact.
2. Noise weights are std_k / mean(std) of the schedule in use, not a constant fitted to one schedule.
3. Groups are axes of the reward tensor, so they hold at any batch size and number of processes.
4. Siblings of a fork are never spread over several optimizer steps.
5. The log-ratio is formed from velocity differences per element, never as a difference of two log-probabilities.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # help and wrong settings are answered before anything heavy is imported
    from tempflow.common.stopping import leave
    from tempflow.run.entrance import enter

    leave(enter())

import time
from collections.abc import Sequence

import torch
from tempflow_kernels import BranchLossStats, branch_loss
from tqdm import tqdm

from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.common.stopping import DONE, HALTED, STOPPED, STOPPING, WRONG
from tempflow.common.tensors import to_device
from tempflow.credit.advantage import give_credit
from tempflow.credit.scoring import collect_rewards
from tempflow.credit.statistics import reward_figures
from tempflow.explore.rollout import explore, finish_branches
from tempflow.explore.tails.engine import read_waste
from tempflow.learn.batches import TransitionBatch, updates
from tempflow.learn.optimizers import set_learning_rate
from tempflow.learn.statistics import LossRecord, loss_figures
from tempflow.parallel import ranks as processes
from tempflow.records.rows import IterationRow
from tempflow.run.assembly import set_up, show_plan
from tempflow.run.failing import tell_failure
from tempflow.run.journal import Journal
from tempflow.run.numbered import choose_folder
from tempflow.run.snapshot import Progress
from tempflow.run.trainer import Trainer
from tempflow.settings.checks import longest_wait
from tempflow.settings.fields import Config
from tempflow.settings.help import read_command_line
from tempflow.studies.tails import check_tails

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
"""tqdm's own estimate knows no evaluations; the journal's, which does, stands in the postfix"""


def train_step(trainer: Trainer, iteration: int) -> IterationRow:
    """One iteration. Axes: V tails, M scorers, S forks, R trunks of this process, K siblings, D... one latent."""
    config, policy, schedule, method = trainer.config, trainer.policy, trainer.schedule, trainer.method
    ranks, clock, stepper, learn = trainer.ranks, trainer.clock, trainer.stepper, trainer.config.learn
    everyone = method.plan(config.run.seed, iteration, config.explore.prompts)
    plan, (prompts, draw) = everyone.of(trainer.feed.slots), trainer.feed.at(iteration)
    of_trunks = [prompt for prompt in prompts for _ in range(plan.noises)]

    # Explore: an ODE trunk per initial noise; at a fork K siblings take stochastic steps, then the ODE to an image.
    with clock("trunk"), trainer.numerics():
        conditioning = policy.encode([prompt.text for prompt in prompts]).repeat(plan.noises)
        rollout = explore(policy, schedule, plan, draw, conditioning, learn.rows)
    policy.refresh_merged()
    for branches in clock.over("tails", finish_branches(trainer.tails, rollout, schedule, may_halve=not ranks.in_step)):
        trainer.scores.submit(branches, of_trunks)  # decoded and scored meanwhile
    with clock("wait"):
        shape = (len(trainer.tails), *rollout.branches.shape[:3])
        rewards = collect_rewards(trainer.scores, trainer.rewards, ranks, shape)  # (V, M, S, R of all processes, K)

    # Credit: siblings share all but their decisions, so the difference of their rewards belongs to these.
    credit = give_credit(rewards, trainer.rewards.weights, method.comparison)

    # Learn: weighted clipped policy gradient; a decision's row carries its siblings as so many Gaussian terms.
    set_learning_rate(stepper.optimizer, learn, iteration)
    record, own = LossRecord(), ranks.share(credit.advantages.shape[1])
    with clock("learn"), trainer.numerics():
        for number, update in enumerate(updates(rollout, credit, method.objective, learn, own, ranks.in_step)):
            for batch in update.batches:
                decided = batch.advantages.numel() / (learn.rows * plan.siblings)  # less later in a window
                record.add(backward(trainer, batch), number, decided)
            stepper.update(ranks, update.idle)
        figures = loss_figures(ranks.gather(record.totals(), dim=0)) | stepper.read()
    figures |= trainer.scores.figures
    figures |= reward_figures(rewards, credit, trainer.rewards, everyone.trunk_steps(), schedule.num_steps)
    return IterationRow(step=iteration + 1, tail_waste=read_waste(trainer.tails), **figures)


def backward(trainer: Trainer, batch: TransitionBatch) -> BranchLossStats:
    """Adds the gradient of one batch and returns what its loss saw."""
    policy, objective, device = trainer.policy, trainer.method.objective, trainer.policy.device
    sigma = trainer.schedule.sigma_rows(batch.steps, device)
    velocity = policy.velocity(batch.latents, sigma, batch.conditioning)
    velocity_ref = None
    if objective.kl:
        with torch.no_grad(), policy.reference():
            velocity_ref = policy.velocity(batch.latents, sigma, batch.conditioning)
    loss, stats = branch_loss(
        velocity, batch.velocity_old, to_device(batch.advantages, device), to_device(batch.terms, device),
        **trainer.noise.of(batch), clip_range=(objective.clip, objective.clip), kl_coef=objective.kl,
        velocity_ref=velocity_ref,
    )  # fmt: skip
    trainer.stepper.backward(loss * batch.share)
    return stats


def train(trainer: Trainer, journal: Journal, progress: Progress) -> None:
    """The loop, from `progress` to the last iteration: step, record, evaluate, save.

    Raises:
        Halted: whatever failed, and what was saved of what was learnt before.
        Stopped: a signal asked for the end; the same is saved then.
    """
    journal.announce(progress)
    bar = tqdm(total=trainer.config.learn.iterations, initial=progress.iteration, unit="it", bar_format=BAR,
               disable=not trainer.ranks.first, dynamic_ncols=True)  # fmt: skip
    with STOPPING.finishing(trainer.config.run.grace, journal.settled):
        try:
            iterate(trainer, journal, journal.begin(progress), bar)
            journal.check_stop()
        except (Exception, KeyboardInterrupt) as error:
            bar.close()
            raise journal.halted(error) from error
        finally:
            bar.close()


def iterate(trainer: Trainer, journal: Journal, progress: Progress, bar: tqdm) -> None:
    """Iterations until the run is over."""
    first = progress.iteration + 1
    while not journal.is_over(progress):
        started = time.perf_counter()
        row = train_step(trainer, progress.iteration)
        progress = journal.record(row, progress, time.perf_counter() - started)
        progress = journal.evaluate(progress)
        if progress.iteration == first:
            journal.measured()
        bar.update()
        bar.set_postfix(journal.shown())


def run(config: Config) -> int:
    """A whole run; returns the exit code, one of those of `tempflow.common.stopping`."""
    journal = None
    try:
        ranks = processes.start(config.run.device, longest_wait(config.reward), config.parallel.offload)
        if config.run.plan_only:
            show_plan(config, ranks, memory=True)
            return DONE
        config = choose_folder(config, ranks)
        trainer, journal, progress = set_up(config)
        if config.tails.check:
            say(check_tails(trainer).describe())
        train(trainer, journal, progress)
        journal.finish()
        return DONE
    except KeyboardInterrupt as error:
        before = "stopped before the first iteration; begin again, with run.resume=auto if run.dir is there"
        say(str(error) if journal else f"{str(error) or 'SIGINT'}: {before}")
        return STOPPED
    except BadInput as error:  # before the loop every process meets the same mistake
        say(str(error))
        return WRONG
    except Exception as error:
        tell_failure(config, error)
        return HALTED
    finally:
        if journal is not None:
            journal.close()
        processes.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    config = read_command_line(sys.argv[1:] if arguments is None else arguments)
    return config if isinstance(config, int) else run(config)
