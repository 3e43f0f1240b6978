"""What an iteration costs, in network rows, decodes and bytes, before anything is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.explore.plan import ForkRule
from tempflow.explore.schedule import NoiseSchedule
from tempflow.explore.tails.solver import TailSolver, tail_solvers
from tempflow.method import Method
from tempflow.settings.fields import Config


@dataclass(frozen=True)
class Shape:
    """The sizes of one iteration on one process. Example: digits: R = 24, K = 6, one tail, latents of 256 numbers."""

    trunks: int
    """R"""
    siblings: int
    """K"""
    latent_elements: int
    image_bytes: int
    passes: int = 1
    """network calls per decision in learning: inner epochs, times 2 with a KL term"""


@dataclass(frozen=True)
class IterationCost:
    """Rows of the network, images and bytes. Forks that are drawn are costed at their worst: tails as if they lay early
    and trunks as if one lay late."""

    trunks: int
    forks: int
    siblings: int
    trunk_rows: int
    window_rows: int
    """rows of decisions after the first of a window, one per sibling"""
    tail_rows: int
    unguided_rows: int
    """of the tails' rows, those that take no guidance"""
    learn_rows: int
    images: int
    """decoded and scored: one per branch and tail"""
    state_bytes: int
    """latents and velocities of every decision, fp32, from exploring to learning"""
    branch_bytes: int
    """where branches leave their windows, and where they end, fp32"""
    image_bytes: int

    def describe(self, halves: int) -> str:
        """The cost in words; `halves` is 2 where guidance needs a second network row for each."""
        guided = " (each twice, for guidance)" if halves == 2 else ""
        total = halves * (self.trunk_rows + self.window_rows + self.tail_rows + self.learn_rows)
        total -= (halves - 1) * self.unguided_rows
        once = f" ({self.unguided_rows} of them once)" if self.unguided_rows else ""
        window = f"windows {self.window_rows}, " if self.window_rows else ""
        held = self.state_bytes + self.branch_bytes + self.image_bytes
        return (
            f"{self.trunks} trunks x {self.forks} forks x {self.siblings} siblings, {self.images} images to decode "
            f"and score an iteration; network rows{guided}: trunk {self.trunk_rows}, {window}tails "
            f"{self.tail_rows}{once}, learning {self.learn_rows}, {total} in all; "
            f"{held / 2**20:.1f} MiB of latents and images"
        )


def iteration_cost(
    rule: ForkRule, schedule: NoiseSchedule, tails: tuple[TailSolver, ...], shape: Shape
) -> IterationCost:
    """The cost of one iteration of one process."""
    earliest, forks = rule.forks.pool[: rule.forks.take], rule.forks.take
    branches, later = shape.trunks * forks * shape.siblings, (rule.window - 1) * forks * shape.trunks * shape.siblings
    decisions = forks * shape.trunks + later
    tables = [solver.table(schedule) for solver in tails]
    starts = [(table, rule.after(step)) for table in tables for step in earliest]
    of_each_step = shape.trunks * shape.siblings
    return IterationCost(
        trunks=shape.trunks,
        forks=forks,
        siblings=shape.siblings,
        trunk_rows=shape.trunks * (rule.forks.pool[-1] + 1),
        window_rows=later,
        tail_rows=sum(table.lengths[step] for table, step in starts) * of_each_step,
        unguided_rows=sum(table.unguided[step] for table, step in starts) * of_each_step,
        learn_rows=decisions * shape.passes,
        images=branches * len(tails),
        state_bytes=8 * shape.latent_elements * decisions,
        branch_bytes=4 * shape.latent_elements * branches * (1 + len(tails)),
        image_bytes=branches * len(tails) * shape.image_bytes,
    )


def learning_passes(config: Config) -> int:
    """Network calls per decision in learning."""
    return config.learn.inner_epochs * (2 if config.objective.kl else 1)


def network_rows(config: Config, method: Method, schedule: NoiseSchedule, iteration: int, per_velocity: int) -> int:
    """Network rows of one iteration of all processes, by its own forks: where these are drawn, not their worst case.

    Learning is counted in full: groups that tell nothing, which it leaves out, are in it.

    Args:
        per_velocity: rows that one velocity costs, 2 with classifier-free guidance.
    """
    plan, solvers = method.plan(config.run.seed, iteration, config.explore.prompts), tail_solvers(config.tails)
    steps, siblings = plan.trunk_steps(), plan.siblings
    trunks = sum((int(part.max()) + 1) * part.shape[1] for part in steps.split(config.learn.rows, 1))
    later = (plan.window - 1) * steps.numel() * siblings
    tables = [solver.table(schedule) for solver in solvers]
    starts = [(table, method.rule.after(step)) for step in steps.flatten().tolist() for table in tables]
    tails = sum(table.lengths[step] for table, step in starts) * siblings
    unguided = sum(table.unguided[step] for table, step in starts) * siblings
    learning = (steps.numel() + later) * learning_passes(config)
    return per_velocity * (trunks + later + tails + learning) - (per_velocity - 1) * unguided
