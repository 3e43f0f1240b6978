"""What an iteration costs."""

from __future__ import annotations

from dataclasses import dataclass

from tempflow.explore.plan import BranchPlan


@dataclass(frozen=True)
class BranchCost:
    """Network rows, decodes and memory of one iteration; a random plan is costed at its dearest draw."""

    rows: int
    """R, trunks"""
    trunk_rows: int
    tail_rows: int
    learn_rows: int
    """training rows, each of which carries K siblings: once per inner epoch, twice where KL needs the reference"""
    images: int
    latent_bytes: int
    """trunk states and velocities, living branches, decoded images, on the rank that holds `rows` trunks"""

    @staticmethod
    def of(plan: BranchPlan, rows: int, latent_elements: int, image_bytes: int, passes: int = 1) -> BranchCost:
        """The cost of `plan` over `rows` trunks with latents of `latent_elements` fp32 numbers.

        `passes` are the network calls per fork in learning: inner epochs, times 2 with a KL term.
        """
        last = plan.num_steps - 1
        dearest = plan.pool[: len(plan.steps)]
        forks, images = len(plan.steps), rows * len(plan.steps) * plan.siblings
        latents = 4 * latent_elements * (2 * rows * forks + images)
        return BranchCost(
            rows=rows,
            trunk_rows=rows * (plan.pool[-1] + 1),
            tail_rows=rows * plan.siblings * sum(last - step for step in dearest),
            learn_rows=rows * forks * passes,
            images=images,
            latent_bytes=latents + images * image_bytes,
        )

    def describe(self, plan: BranchPlan, halves: int) -> str:
        """The cost in words; `halves` is 2 where guidance needs a second network row for each."""
        guided = " (each twice, for guidance)" if halves == 2 else ""
        total = halves * (self.trunk_rows + self.tail_rows + self.learn_rows)
        return (
            f"{self.rows} trunks x {len(plan.steps)} forks x {plan.siblings} siblings = {self.images} images to decode "
            f"and score an iteration; network rows{guided}: trunk {self.trunk_rows}, tails {self.tail_rows}, "
            f"learning {self.learn_rows}, {total} in all; {self.latent_bytes / 2**20:.1f} MiB of latents and images"
        )
