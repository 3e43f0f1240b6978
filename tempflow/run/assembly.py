"""A run put together from its settings: every part made, checked and explained before anything is changed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.common.say import say
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.feed import Feed
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.choose import check_tail_settings, choose_engines, prepare_weights
from tempflow.explore.tails.compiled import CompiledBlocks
from tempflow.explore.tails.engine import TailEngine
from tempflow.forecast.limits import check_fits
from tempflow.forecast.words import Forecast
from tempflow.learn.average import MovingAverage
from tempflow.learn.optimizers import make_optimizer
from tempflow.learn.stepper import LossScale, Stepper
from tempflow.method import Method, read_method
from tempflow.models.load import load_policy, load_skeleton
from tempflow.parallel import ranks as processes
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Policy
from tempflow.prompts import Prompt, read_prompts
from tempflow.records.trackers import check_trackers
from tempflow.rewards.panel import Panel, load_panels
from tempflow.run import checkpoint
from tempflow.run.evaluation import Evaluator, evaluation_schedule
from tempflow.run.folder import check_folder, first_rows, open_folder, write_settings
from tempflow.run.journal import Journal
from tempflow.run.lock import FolderLock
from tempflow.run.noise_mode import settle_mode
from tempflow.run.sizes import Decoders, choose_decoders, chunk_rows, loss_noise, memory_held_back
from tempflow.run.snapshot import Progress
from tempflow.run.spreading import gpu_bytes, settle_copy, spread_out
from tempflow.run.trainer import Trainer
from tempflow.settings.checks import check_consistency, longest_wait
from tempflow.settings.fields import Config


def set_up(
    config: Config, policy: Policy | None = None, panels: tuple[Panel, Panel] | None = None
) -> tuple[Trainer, Journal, Progress]:
    """The parts of a run, its record, and how far it has come already. Prints the plan.

    Args:
        policy: by default the one that `config.model` describes.
        panels: rewards and gold; by default those that `config.reward` names.
    Raises:
        BadInput: anything in the settings that cannot work; no file has been changed then.
    """
    lock = FolderLock(Path(config.run.dir).expanduser())
    try:
        return _set_up(config, policy, panels, lock)
    except BaseException:
        lock.release()
        raise


def _set_up(
    config: Config, policy: Policy | None, panels: tuple[Panel, Panel] | None, lock: FolderLock
) -> tuple[Trainer, Journal, Progress]:
    ranks = processes.start(config.run.device, longest_wait(config.reward), config.parallel.offload)
    check_trackers(config.run.trackers)
    config = check_folder(config)
    prompts, held_out = read_prompts(config.prompts.train, "prompts.train"), held_out_prompts(config)
    config, method, schedule = show_plan(config, ranks)
    spreading = spread_out(config, ranks)
    ranks = spreading.ranks
    rewards, gold = _accepted(panels or load_panels(config.reward, config.reward.rows, ranks.device), prompts, held_out)
    torch.manual_seed(config.run.seed)  # here: the adapters' first values must not depend on what scorers drew
    policy = policy or load_policy(config.model, config.sample, ranks.device, keep_reference=config.objective.kl > 0,
                                   rows=config.learn.rows, slowest=ranks.largest,
                                   spread=spreading.shards)  # fmt: skip
    say(f"attention: {policy.attention}")
    stepper, folder = _stepper(config, policy), Path(config.run.dir).expanduser()
    progress = _resumed(config, ranks, stepper, lock)
    progress, config = _with_noise_mode(progress, config, ranks)
    held_back, beside_loss = memory_held_back(config, policy, method, schedule, ranks)
    ranks.agree(lambda: prepare_weights(config.tails, policy), "tails.fp8")
    rows = config.tails.rows if config.tails.rows != "auto" else progress.tail_rows
    rows = rows or chunk_rows(config, policy, method, schedule, ranks, prompts[0].text, held_back)
    engines = ranks.agree(lambda: choose_engines(config.tails, policy, schedule, rows, prompts[0].text), "tails.level")
    engines = spreading.engines(engines, policy)
    decoders = choose_decoders(config, policy, engines.explore[0].rows)
    evaluator = _evaluator(config, policy, held_out, (rewards, gold), ranks, engines.evaluate, decoders)
    open_folder(config, ranks, lock)
    write_settings(config, ranks)
    clock = PhaseClock(ranks.device)
    trainer = Trainer(
        config=config,
        policy=policy,
        schedule=schedule,
        method=method,
        feed=Feed(prompts, config.explore.prompts, config.explore.noises, ranks.share(config.explore.prompts),
                  config.run.seed),
        numerics=CompiledBlocks(policy.blocks()) if config.learn.compile else nullcontext,
        tails=engines.explore,
        decoder=decoders.own,
        scores=ScoreQueue(decoders.light, rewards, decoders.rows, clock, config.reward.overlap),
        rewards=rewards,
        noise=loss_noise(config, policy, ranks, beside_loss),
        stepper=stepper,
        ranks=ranks,
        clock=clock,
    )  # fmt: skip
    journal = Journal(trainer, folder, evaluator, lock)
    journal.open(progress)
    return trainer, journal, progress


def _resumed(config: Config, ranks: Ranks, stepper: Stepper, lock: FolderLock) -> Progress:
    """How far the run in the folder has come, whose newest good checkpoint is loaded; a new run is at its start."""
    if not config.run.resume:
        return Progress()
    open_folder(config, ranks, lock)
    progress = checkpoint.restore(lock.folder / "checkpoints", stepper, ranks)
    if progress.iteration > config.learn.iterations:
        hint = f"{progress.iteration} iterations are done already; give more, or choose another run.dir"
        raise BadInput("learn.iterations", config.learn.iterations, hint)
    if progress.iteration:
        return progress
    say("no checkpoint yet: the run begins again at its first iteration")
    return replace(progress, tail_rows=first_rows(lock.folder))


def show_plan(config: Config, ranks: Ranks, memory: bool = False) -> tuple[Config, Method, NoiseSchedule]:
    """Prints what the run will do, and with `memory` what it will hold, from the model's configuration alone; returns
    the settings with what was left to the plan.

    Raises:
        BadInput: settings that cannot work together, or with this model.
    """
    size = (memory and config.parallel.ranks) or ranks.size
    check_consistency(config, size)
    skeleton = load_skeleton(config.model, config.sample)
    device = torch.device("cuda") if memory else ranks.device  # memory is planned for a GPU, wherever that is done
    check_tail_settings(config.tails, skeleton.network_rows, device)
    method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
    forecast = Forecast(config, skeleton, method, schedule, size)
    check_fits(forecast, ranks.device)
    config = settle_copy(forecast, gpu_bytes(config, ranks, planned=memory))
    forecast = replace(forecast, config=config)
    say(forecast.describe(ranks.device.type))
    if memory:
        say(forecast.describe_memory())
    return config, method, schedule


def _accepted(panels: tuple[Panel, Panel], prompts: list[Prompt], held_out: list[Prompt]) -> tuple[Panel, Panel]:
    """Rewards and gold, told of, which have accepted the prompts."""
    rewards, gold = panels
    say(rewards.describe("rewards"))
    say(gold.describe("gold"))
    rewards.check(prompts + held_out)
    gold.check(held_out)
    return panels


def _with_noise_mode(progress: Progress, config: Config, ranks: Ranks) -> tuple[Progress, Config]:
    """Both with the mode in which noise is drawn from now on, so that it is written to the folder."""
    saved = progress.noise or ("exact" if progress.iteration else None)  # older checkpoints knew no other
    mode = settle_mode(config.run.noise, saved, ranks)
    return replace(progress, noise=mode), replace(config, run=replace(config.run, noise=mode))


def _stepper(config: Config, policy: Policy) -> Stepper:
    """The optimizer and what goes with it."""
    parameters, learn = policy.trainable(), config.learn
    optimizer = make_optimizer(learn, list(parameters.values()))
    average = MovingAverage(parameters, learn.ema_decay, learn.ema_every)
    scale = LossScale(policy.device) if config.model.dtype == "fp16" else None
    return Stepper(parameters, optimizer, average, learn.max_grad_norm, scale, learn.skip_limit)


def held_out_prompts(config: Config) -> list[Prompt]:
    """The prompts of evaluations, spread over their file; none where there is no file."""
    if config.prompts.test is None:
        return []
    prompts = read_prompts(config.prompts.test, "prompts.test")
    count = min(config.eval.prompts, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _evaluator(
    config: Config, policy: Policy, prompts: list[Prompt], panels: tuple[Panel, Panel], ranks: Ranks,
    engine: TailEngine, decoders: Decoders,
) -> Evaluator | None:  # fmt: skip
    """Held-out evaluation, or None where there are no held-out prompts."""
    if not prompts:
        return None
    schedule = evaluation_schedule(config, policy)
    return Evaluator(policy, engine, schedule, prompts, *panels, ranks, config.eval.seed, config.eval.noises,
                     decoders.own, decoders.rows, config.eval.pictures)  # fmt: skip
