"""The prompts of an iteration, and the identities by which their noise is drawn."""

from __future__ import annotations

from tempflow.common.draws import PROMPTS, shuffled
from tempflow.prompts import Prompt


def iteration_prompts(prompts: list[Prompt], count: int, run_seed: int, iteration: int) -> list[Prompt]:
    """The `count` prompts of an iteration: the file is walked in a new order each time it is through."""
    places = [divmod(position, len(prompts)) for position in range(iteration * count, (iteration + 1) * count)]
    orders = {turn: shuffled(len(prompts), run_seed, PROMPTS, turn) for turn in {turn for turn, _ in places}}
    return [prompts[orders[turn][place]] for turn, place in places]
