"""A run on one rank: what its loop asks of it besides the step itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempflow.common.clock import PhaseClock
from tempflow.common.draws import Draw
from tempflow.common.errors import BadInput, Unscored
from tempflow.credit.scoring import ScoreQueue
from tempflow.explore.feed import iteration_prompts
from tempflow.explore.plan import BranchPlan
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.engine import Numerics, TailEngine
from tempflow.learn.optimizers import state_bytes
from tempflow.learn.stepper import Stepper
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Policy
from tempflow.prompts import Prompt
from tempflow.records.figures import draw_report, save_pictures
from tempflow.records.rows import MetricsWriter
from tempflow.rewards.panel import Panel
from tempflow.run import checkpoint
from tempflow.run.checkpoint import Progress
from tempflow.run.evaluation import Evaluator
from tempflow.run.hacking import falls, keep_scores, read_scores
from tempflow.settings.fields import Config


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
    rewards: Panel
    scores: ScoreQueue
    evaluator: Evaluator | None
    stepper: Stepper
    clock: PhaseClock
    writer: MetricsWriter | None

    @property
    def rollouts_per_iteration(self) -> int:
        """Branches explored by all ranks."""
        branch = self.config.branch
        return explore.prompts * explore.noises * len(self.plan.steps) * self.plan.siblings

    def prompts_of(self, iteration: int) -> tuple[list[Prompt], Draw]:
        """This rank's R trunks of an iteration: their prompts, and the identities their noise is drawn by."""
        branch, seed = self.config.branch, self.config.run.seed
        everyone = iteration_prompts(self.prompts, explore.prompts, seed, iteration)
        slots = self.ranks.share(explore.prompts)
        draw = Draw.grid(seed, iteration, slots, explore.noises)
        return [everyone[slot] for slot in slots for _ in range(explore.noises)], draw

    def collect(self, forks: int, siblings: int) -> Tensor:
        """(M, S, R of all ranks, K) fp32 rewards of the branches submitted since; NaN where a scorer has no opinion.

        Raises:
            Unscored: on all ranks, where a scorer failed on one of them, or has no opinion at all.
        """
        try:
            own = self.ranks.agree(self.scores.collect)
        except BadInput as error:
            raise Unscored(error.field, error.value, error.mend) from error
        rewards = self.ranks.gather(own.view(len(own), forks, -1, siblings), dim=2)
        self.rewards.check_opinions(rewards)
        if self.config.reward.combine == "sum" and self.rewards.total(rewards).isnan().all():
            mend = "no image has all of these rewards, so there is no sum of them; use reward.combine=advantages"
            raise Unscored("reward.name", self.config.reward.name, mend)
        return rewards

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
        """(rows,) factors that turn KL over 2 std^2 into KL over 2 g^2, where objective.kl_divisor asks for it."""
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
        return [not objective.kl and not by_update[:, update].any() for update in range(learn.updates)]

    def optimizer_step(self, idle: bool) -> None:
        """Averages gradients over ranks, clips and steps, without waiting for the device (see `learn/stepper.py`).

        Args:
            idle: no rank had anything to learn; then no parameter moves.
        """
        if idle:
            return self.stepper.idle()
        self.ranks.average_gradients(self.stepper.parameters.values())
        self.stepper.step()

    def evaluate(self, step: int) -> dict[str, Any]:
        """Mean held-out scores of the averaged parameters, and which gold fell; saves pictures and scores.

        Raises:
            Unscored: on all ranks, where a scorer failed on one of them, or has no opinion at all.
        """
        if self.evaluator is None:
            return {}
        try:
            with self.clock("evaluate"), self.stepper.average.applied():
                result = self.evaluator.evaluate()
        except BadInput as error:
            raise Unscored(error.field, error.value, error.mend) from error
        history, threshold = read_scores(self.folder, step), self.config.reward.hacking_drop
        fallen = falls(history, result.scores, self.evaluator.golds, threshold)
        if self.ranks.first:
            save_pictures(self.folder, step, result.pictures)
            keep_scores(self.folder, step, result.scores)
            for name, fall in fallen.items():
                print(f"tempflow: warning: iteration {step}: {name} is {fall:.4g} below its best while the reward "
                      "rose; the model may please the scorer only: look at the pictures", file=sys.stderr)  # fmt: skip
        return result.figures() | ({"gold_fall": fallen} if fallen else {})

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
        words = {"reward": row["reward_mean"], "gold": row.get("gold")}
        known = {name: f"{value:.3f}" for name, value in words.items() if value is not None}
        return known | {"rollouts/h": f"{rate:,.0f}"}

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

    def finish(self, stopped: bool) -> None:
        """The closing words."""
        word = "stopped, as reward.hacking_stop asks" if stopped else "done"
        if self.ranks.first:
            print(f"tempflow: {word}; figures and pictures in {self.folder / 'report.png'}", file=sys.stderr)
