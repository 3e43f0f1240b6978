"""What an iteration sets out with: its prompts, and the identities by which their noise is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempflow.common.draws import PROMPTS, Draw, shuffled
from tempflow.prompts import Prompt


@dataclass(frozen=True)
class Feed:
    """Prompts for the iterations of a run, on one process.

    Example: 12 prompts an iteration on the second of two processes, 2 noises each: `slots` is 6 .. 11, and `at` gives
    the 6 prompts of those places and a draw of 12 trunks.
    """

    prompts: Sequence[Prompt]
    """all to train on"""
    count: int
    """P, prompts of an iteration over all processes"""
    noises: int
    """N, trunks per prompt"""
    slots: range
    """which of the P are this process's"""
    run_seed: int

    def at(self, iteration: int) -> tuple[list[Prompt], Draw]:
        """This process's prompts, and the draw of its trunks (prompt by prompt, noise by noise)."""
        everyone = iteration_prompts(self.prompts, self.count, self.run_seed, iteration)
        own = [everyone[slot] for slot in self.slots]
        return own, Draw.grid(self.run_seed, iteration, self.slots, self.noises)


def iteration_prompts(prompts: Sequence[Prompt], count: int, run_seed: int, iteration: int) -> list[Prompt]:
    """The `count` prompts of an iteration: the file is walked in a new order each time it is through."""
    places = [divmod(position, len(prompts)) for position in range(iteration * count, (iteration + 1) * count)]
    orders = {turn: shuffled(len(prompts), run_seed, PROMPTS, turn) for turn in {turn for turn, _ in places}}
    return [prompts[orders[turn][place]] for turn, place in places]
