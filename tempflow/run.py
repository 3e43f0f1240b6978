"""Setting up a run from its configuration, and what the loop asks of it besides the step itself."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempflow import checkpoint, distributed
from tempflow.checkpoint import Progress
from tempflow.compiled import CompiledBlocks
from tempflow.distributed import Ranks
from tempflow.draws import Draw
from tempflow.evaluation import Evaluator
from tempflow.explain import explain, explain_memory
from tempflow.metrics import MetricsWriter, PhaseClock, check_trackers, read_metrics
from tempflow.models import load_policy, load_skeleton
from tempflow.optim import MovingAverage, make_optimizer, state_bytes
from tempflow.plan import BranchPlan
from tempflow.policy import Policy
from tempflow.prompts import Prompt, iteration_prompts, read_prompts
from tempflow.report import draw_report, save_pictures
from tempflow.rewards import Scorer, load_scorer
from tempflow.run_folder import check_consistency, check_folder, write_settings
from tempflow.schedule import NoiseSchedule, build_schedule
from tempflow.scoring import ScoreQueue
from tempflow.settings import Config
from tempflow.stepping import LossScale, Stepper
from tempflow.tail_engine import Numerics, TailEngine
from tempflow.tail_levels import Engines
from tempflow.tail_setup import set_up_tails


@dataclass(frozen=True)
class Run:
    """Everything a run consists of, on one rank."""

    config: Config
    folder: Path
    ranks: Ranks
    policy: Policy
    schedule: NoiseSchedule
    plan: BranchPlan
    engine: TailEngine
    numerics: Numerics
    """the context of trunk and learning, alike: compiled blocks, or nothing"""
    prompts: list[Prompt]
    scores: ScoreQueue
    evaluator: Evaluator | None
    stepper: Stepper
    clock: PhaseClock
    writer: MetricsWriter | None

    @property
    def rollouts_per_iteration(self) -> int:
        """Branches explored by all ranks."""
        branch = self.config.branch
        return branch.prompts * branch.seeds * len(self.plan.steps) * self.plan.siblings

    def prompts_of(self, iteration: int) -> tuple[list[Prompt], Draw]:
        """This rank's R trunks of an iteration: their prompts, and the identities their noise is drawn by."""
        branch, seed = self.config.branch, self.config.run.seed
        everyone = iteration_prompts(self.prompts, branch.prompts, seed, iteration)
        slots = self.ranks.share(branch.prompts)
        draw = Draw.grid(seed, iteration, slots, branch.seeds)
        return [everyone[slot] for slot in slots for _ in range(branch.seeds)], draw

    def own_rows(self, values: Tensor) -> Tensor:
        """This rank's part of an (S, R of all ranks, ...) tensor."""
        rows = self.ranks.share(values.shape[1])
        return values[:, rows.start : rows.stop]

    def step_weights(self, plan: BranchPlan) -> Tensor:
        """(S,) fp32 weights of the policy loss at the forks of `plan`, with mean 1 over all steps that may fork."""
        if self.config.learn.weighting == "uniform":
            return torch.ones(len(plan.steps))
        return self.schedule.noise_weights(plan.steps, plan.pool).float()

    def kl_weights(self, step: int, rows: int) -> Tensor | None:
        """(rows,) factors that turn KL over 2 std^2 into KL over 2 g^2, where learn.kl_divisor asks for it."""
        if self.config.learn.kl_divisor == "std":
            return None
        return torch.full((rows,), self.schedule.step_size(step), device=self.policy.device)

    def idle_updates(self, weights: Tensor) -> list[bool]:
        """For each optimizer step of an inner epoch, whether no rank has anything to learn in it.

        Args:
            weights: (S, R of all ranks); every rank holds them all, so that this needs no word between ranks.
        """
        learn = self.config.learn
        by_update = weights.ne(0).view(len(weights), self.ranks.size, learn.updates, -1).transpose(1, 2)
        return [not learn.kl and not by_update[:, update].any() for update in range(learn.updates)]

    def optimizer_step(self, idle: bool) -> None:
        """Averages gradients over ranks, clips and steps, without waiting for the device (see `tempflow.stepping`).

        Args:
            idle: no rank had anything to learn; then no parameter moves.
        """
        if idle:
            return self.stepper.idle()
        self.ranks.average_gradients(self.stepper.parameters.values())
        self.stepper.step()

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out scores of the averaged parameters; saves the pictures."""
        if self.evaluator is None:
            return {}
        with self.clock("evaluate"), self.stepper.average.applied():
            result = self.evaluator.evaluate()
        if self.ranks.first:
            save_pictures(self.folder, step, result.pictures)
        return result.scores

    def constants(self) -> dict[str, Any]:
        """What the first line of metrics.jsonl holds besides the scores before training."""
        shown = [self.evaluator.prompts[index] for index in self.evaluator.pictured] if self.evaluator else []
        weights = torch.zeros(self.plan.num_steps - 1, dtype=torch.float64)
        weights[list(self.plan.pool)] = self.schedule.noise_weights(self.plan.pool)
        return {
            "sigmas": self.schedule.sigmas.tolist(),
            "noise_weights": weights.tolist(),
            "picture_prompts": [prompt.text for prompt in shown],
            "tail_rows": self.engine.rows,
        }

    def record(self, row: dict[str, Any]) -> None:
        """Writes one line of metrics, on the first rank."""
        if self.writer is not None:
            self.writer.write(row)

    @staticmethod
    def shown(row: dict[str, Any], rate: float) -> dict[str, str]:
        """What the progress bar says."""
        shown = {"reward": f"{row['reward_mean']:.3f}"}
        if "gold" in row:
            shown["gold"] = f"{row['gold']:.3f}"
        return shown | {"rollouts/h": f"{rate:,.0f}"}

    def save(self, progress: Progress) -> None:
        """A checkpoint, the trained weights (averaged) in the model library's own format, and the report so far."""
        if self.ranks.first:
            checkpoint.save(self.folder / "checkpoints", progress, self.stepper, self.config.run.keep_checkpoints)
            with self.stepper.average.applied():
                self.policy.save(self.folder)
            draw_report(self.folder)
        self.ranks.wait()

    def announce(self) -> None:
        """After the first iteration: what the plan could only estimate."""
        if not self.ranks.first:
            return
        words = f"measured: optimizer state {state_bytes(self.stepper.optimizer) / 2**20:,.1f} MiB"
        if self.policy.device.type == "cuda":
            words += f", most GPU memory {torch.cuda.max_memory_allocated(self.policy.device) / 2**30:.2f} GiB"
        print(words, file=sys.stderr)

    def finish(self) -> None:
        """The closing words."""
        if self.ranks.first:
            print(f"tempflow: done; figures and pictures in {self.folder / 'report.png'}", file=sys.stderr)


def set_up(config: Config) -> tuple[Run, Progress]:
    """A run ready to go, and how far it has come already. Prints the plan before the model is loaded.

    Raises:
        BadInput: anything in the configuration that cannot work; no file has been changed then.
    """
    ranks = distributed.start(config.run.device)
    check_trackers(config.run.trackers)
    check_folder(config)
    torch.manual_seed(config.run.seed)
    prompts = read_prompts(config.prompts.train, "prompts.train")
    schedule, plan = show_plan(config, ranks)
    reward = load_scorer("reward.name", config.reward.name, config.branch.decode_rows)
    policy = load_policy(config.model, config.sample, ranks.device, keep_reference=config.learn.kl > 0)
    if ranks.first:
        print(f"attention: {policy.attention}", file=sys.stderr)
    engines = _engines(config, policy, schedule, plan, prompts, ranks)
    evaluator = _evaluator(config, policy, reward, ranks, engines.evaluate)
    stepper = _stepper(config, policy)
    folder = Path(config.run.dir).expanduser()
    progress = checkpoint.restore(folder / "checkpoints", stepper)
    write_settings(config, ranks)
    last = progress.iteration if progress.iteration else None
    writer = MetricsWriter(folder, config.run.trackers, folder.name, last) if ranks.first else None
    clock, numerics = PhaseClock(ranks.device), CompiledBlocks(policy.blocks()) if config.learn.compile else nullcontext
    scores = ScoreQueue(policy, reward, config.branch.decode_rows, clock, config.branch.overlap)
    run = Run(config, folder, ranks, policy, schedule, plan, engines.explore, numerics, prompts, scores, evaluator,
              stepper, clock, writer)  # fmt: skip
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
    plan = BranchPlan.parse(config.branch.steps, schedule.num_steps, config.branch.siblings)
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
    trunks = config.branch.prompts * config.branch.seeds // ranks.size

    def agree(rows: int) -> int:
        return int(ranks.gather(torch.tensor([rows]), 0).min())

    return set_up_tails(config, policy, schedule, plan, trunks, prompts[0].text, known_rows, agree, ranks.first)


def _stepper(config: Config, policy: Policy) -> Stepper:
    """The optimizer and what goes with it."""
    parameters, learn = policy.trainable(), config.learn
    optimizer = make_optimizer(learn, list(parameters.values()))
    average = MovingAverage(parameters, learn.ema_decay, learn.ema_every)
    scale = LossScale(policy.device) if config.model.dtype == "fp16" else None
    return Stepper(parameters, optimizer, average, learn.max_grad_norm, scale)


def _evaluator(
    config: Config, policy: Policy, reward: Scorer, ranks: Ranks, engine: TailEngine
) -> Evaluator | None:
    """Held-out evaluation, or None where there are no held-out prompts."""
    if config.prompts.test is None:
        return None
    prompts = read_prompts(config.prompts.test, "prompts.test")
    count = min(config.eval.prompts, len(prompts))
    prompts = [prompts[place * len(prompts) // count] for place in range(count)]
    scorers = {"reward_test": reward}
    if config.reward.gold is not None:
        scorers["gold"] = load_scorer("reward.gold", config.reward.gold, config.branch.decode_rows)
    schedule = build_schedule(policy.sigmas(config.eval.steps), config.sample.transition, config.sample.noise_level)
    return Evaluator(policy, engine, schedule, prompts, scorers, ranks, config.run.seed, config.branch.decode_rows,
                     config.eval.pictures)  # fmt: skip
