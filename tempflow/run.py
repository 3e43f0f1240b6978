"""Setting up a run from its configuration, and what the loop asks of it besides the step itself."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tempflow_kernels import backend_info
from torch import Tensor

from tempflow import checkpoint, distributed
from tempflow.checkpoint import Progress
from tempflow.compiled import CompiledBlocks
from tempflow.distributed import Ranks
from tempflow.draws import Draw
from tempflow.errors import BadInput
from tempflow.evaluation import Evaluator
from tempflow.metrics import MetricsWriter, PhaseClock, check_trackers, read_metrics
from tempflow.models import load_policy
from tempflow.optim import MovingAverage, make_optimizer
from tempflow.plan import BranchCost, BranchPlan
from tempflow.policy import Policy
from tempflow.prompts import Prompt, iteration_prompts, read_prompts
from tempflow.report import draw_report, save_pictures
from tempflow.rewards import Scorer, load_scorer
from tempflow.run_folder import check_consistency, check_folder, group_size, write_settings
from tempflow.schedule import NoiseSchedule, build_schedule
from tempflow.scoring import ScoreQueue
from tempflow.settings import Config
from tempflow.tail_engine import EagerEngine, Numerics, TailEngine
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
    optimizer: torch.optim.Optimizer
    average: MovingAverage
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

    def optimizer_step(self, idle: bool) -> float:
        """Averages gradients over ranks, clips, steps; returns the norm before clipping.

        Args:
            idle: this rank had nothing to learn; where that is so on all ranks, no parameter moves.
        Raises:
            BadInput: the norm is not finite; no parameter has been changed then.
        """
        if self.ranks.gather(torch.tensor([int(idle)]), 0).all():
            return 0.0
        parameters = list(self.policy.trainable().values())
        self.ranks.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.learn.max_grad_norm)
        if not torch.isfinite(norm):
            mend = f"the gradient is {norm.item()} and nothing was changed; lower it and go on with run.resume=true"
            raise BadInput("learn.lr", self.config.learn.lr, mend)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        return norm.item()

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out scores of the averaged parameters; saves the pictures."""
        if self.evaluator is None:
            return {}
        with self.clock("evaluate"), self.average.applied():
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
            parameters, keep = self.policy.trainable(), self.config.run.keep_checkpoints
            checkpoint.save(self.folder / "checkpoints", progress, parameters, self.optimizer, self.average, keep)
            with self.average.applied():
                self.policy.save(self.folder)
            draw_report(self.folder)
        self.ranks.wait()

    def finish(self) -> None:
        """The closing words."""
        if self.ranks.first:
            print(f"tempflow: done; figures and pictures in {self.folder / 'report.png'}", file=sys.stderr)


def set_up(config: Config) -> tuple[Run, Progress]:
    """A run ready to go, and how far it has come already. Prints the plan.

    Raises:
        BadInput: anything in the configuration that cannot work; no file has been changed then.
    """
    ranks = distributed.start(config.run.device)
    check_consistency(config, ranks.size)
    check_trackers(config.run.trackers)
    if not config.run.plan_only:
        check_folder(config)
    torch.manual_seed(config.run.seed)
    prompts = read_prompts(config.prompts.train, "prompts.train")
    reward = load_scorer("reward.name", config.reward.name, config.branch.decode_rows)
    policy = load_policy(config.model, config.sample, ranks.device, keep_reference=config.learn.kl > 0)
    schedule = build_schedule(policy.sigmas(config.sample.steps), config.sample.transition, config.sample.noise_level)
    plan = BranchPlan.parse(config.branch.steps, schedule.num_steps, config.branch.siblings)
    engines = _engines(config, policy, schedule, plan, prompts, ranks)
    evaluator = _evaluator(config, policy, reward, ranks, engines.evaluate)
    parameters = policy.trainable()
    optimizer = make_optimizer(config.learn, list(parameters.values()))
    average = MovingAverage(parameters, config.learn.ema_decay, config.learn.ema_every)
    if ranks.first:
        print(_explain(config, policy, schedule, plan, ranks), file=sys.stderr)
    folder, progress, writer = Path(config.run.dir).expanduser(), Progress(), None
    if not config.run.plan_only:
        progress = checkpoint.restore(folder / "checkpoints", parameters, optimizer, average)
        write_settings(config, ranks)
        last = progress.iteration if progress.iteration else None
        writer = MetricsWriter(folder, config.run.trackers, folder.name, last) if ranks.first else None
    clock, numerics = PhaseClock(ranks.device), CompiledBlocks(policy.blocks()) if config.learn.compile else nullcontext
    scores = ScoreQueue(policy, reward, config.branch.decode_rows, clock, config.branch.overlap)
    run = Run(config, folder, ranks, policy, schedule, plan, engines.explore, numerics, prompts, scores, evaluator,
              optimizer, average, clock, writer)  # fmt: skip
    return run, progress


def _engines(
    config: Config, policy: Policy, schedule: NoiseSchedule, plan: BranchPlan, prompts: list[Prompt], ranks: Ranks
) -> Engines:
    """What carries the tails; not tried out where only the plan is asked for."""
    if config.run.plan_only:
        idle = EagerEngine(policy, 1)
        return Engines("eager", idle, idle)
    first_row = read_metrics(Path(config.run.dir).expanduser() / "metrics.jsonl")[:1] if config.run.resume else []
    known_rows = first_row[0].get("tail_rows") if first_row else None
    trunks = config.branch.prompts * config.branch.seeds // ranks.size

    def agree(rows: int) -> int:
        return int(ranks.gather(torch.tensor([rows]), 0).min())

    return set_up_tails(config, policy, schedule, plan, trunks, prompts[0].text, known_rows, agree, ranks.first)


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


def _explain(config: Config, policy: Policy, schedule: NoiseSchedule, plan: BranchPlan, ranks: Ranks) -> str:
    """The plan in words and numbers: groups, cost per rank, and the schedule's forks."""
    branch, learn = config.branch, config.learn
    rows = branch.prompts * branch.seeds // ranks.size
    elements = torch.Size(policy.latent_shape).numel()
    passes = learn.inner_epochs * (2 if learn.kl else 1)
    cost = BranchCost.of(plan, rows, elements, torch.Size(policy.image_shape).numel(), passes)
    parameters = sum(parameter.numel() for parameter in policy.trainable().values())
    weights = schedule.noise_weights(plan.pool).tolist()
    forks = ", ".join(f"{step}: {weight:.2f}" for step, weight in zip(plan.pool, weights, strict=True))
    drawn = f" ({len(plan.steps)} of them drawn each iteration)" if len(plan.steps) < len(plan.pool) else ""
    rows_per_update = rows * len(plan.steps) // learn.updates
    return "\n".join((
        f"tempflow: {config.model.path} on {ranks.size} x {policy.device.type}, {parameters:,} trained parameters "
        f"({config.model.train}), latents {tuple(policy.latent_shape)}; attention: {policy.attention}; operators: "
        f"{backend_info()['cuda' if policy.device.type == 'cuda' else 'cpu']}",
        f"groups: {branch.prompts} prompts x {branch.seeds} seeds, each trunk forks into {plan.siblings} siblings; "
        f"advantages among {group_size(config)} branches (group={learn.group}); {rows_per_update} network rows per "
        f"optimizer step and process, {learn.updates * learn.inner_epochs} optimizer steps an iteration",
        f"forks at steps (step: noise weight){drawn}: {forks}",
        f"cost per process: {cost.describe(plan, policy.network_rows)}",
    ))  # fmt: skip
