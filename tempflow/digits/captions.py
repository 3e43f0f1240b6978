"""Prompts of the digits benchmark: five kinds of sentences, each with every grid that satisfies it."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempflow.digits.canvas import CELLS, POSITIONS, Grid

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = tuple(name + ("es" if name == "six" else "s") for name in NAMES)
KINDS = ("single", "pair", "count", "relation", "blank")

TEST_SHARE = 0.2
SPLIT_SEED = 7
# The few kinds with thousands of sentences must not drown the others.
MOST_TRAIN_PROMPTS = 192
MOST_TEST_PROMPTS = 36


@dataclass(frozen=True)
class Caption:
    """A sentence, its kind (one of KINDS) and all grids that satisfy it."""

    kind: str
    text: str
    grids: tuple[Grid, ...]


# A fact is what a sentence says; all its wordings lie on the same side of the train/test split.
Fact = tuple[Caption, ...]


def grid_with(digits: dict[int, int]) -> Grid:
    """Grid with the given digit at each given cell, blank elsewhere."""
    return tuple(digits.get(cell) for cell in range(CELLS))


def _a(digit: int) -> str:
    return f"an {NAMES[digit]}" if digit == 8 else f"a {NAMES[digit]}"


def _fact(kind: str, texts: Iterable[str], grids: Sequence[Grid]) -> Fact:
    return tuple(Caption(kind, text, tuple(grids)) for text in texts)


def single_facts() -> list[Fact]:
    """One digit at a named place, the rest blank."""
    facts = []
    for digit, cell in itertools.product(range(10), range(CELLS)):
        text = f"{_a(digit)} at the {POSITIONS[cell]}"
        texts = (text, f"only {text}", f"{text} and nothing else")
        facts.append(_fact("single", texts, [grid_with({cell: digit})]))
    return facts


def pair_facts() -> list[Fact]:
    """Two digits at named places, the rest blank; the sentence may name either first."""
    facts = []
    for first, second in itertools.combinations(range(CELLS), 2):
        for one, other in itertools.product(range(10), repeat=2):
            parts = (f"{_a(one)} at the {POSITIONS[first]}", f"{_a(other)} at the {POSITIONS[second]}")
            texts = (" and ".join(parts), " and ".join(reversed(parts)))
            facts.append(_fact("pair", texts, [grid_with({first: one, second: other})]))
    return facts


def count_facts() -> list[Fact]:
    """A number of equal digits at any places, the rest blank."""
    facts = []
    for digit, number in itertools.product(range(10), range(1, CELLS + 1)):
        text = f"{NAMES[number]} {NAMES[digit] if number == 1 else PLURALS[digit]}"
        places = itertools.combinations(range(CELLS), number)
        grids = [grid_with(dict.fromkeys(cells, digit)) for cells in places]
        texts = (text, f"exactly {text}", f"{text} and nothing else")
        facts.append(_fact("count", texts, grids))
    return facts


def relation_facts() -> list[Fact]:
    """Two different digits side by side or one above the other, in either column or row."""
    layouts = (
        (((0, 2), (1, 3)), "above", "below"),
        (((0, 1), (2, 3)), "to the left of", "to the right of"),
    )
    facts = []
    for (places, forth, back), (one, other) in itertools.product(layouts, itertools.permutations(range(10), 2)):
        grids = [grid_with({first: one, second: other}) for first, second in places]
        texts = (f"{_a(one)} {forth} {_a(other)}", f"{_a(other)} {back} {_a(one)}")
        facts.append(_fact("relation", texts, grids))
    return facts


def blank_facts() -> list[Fact]:
    """The same digit in all cells but one."""
    facts = []
    for digit, cell in itertools.product(range(10), range(CELLS)):
        place = f"at the {POSITIONS[cell]}"
        texts = (
            f"{_a(digit)} everywhere except {place}",
            f"{PLURALS[digit]} everywhere but nothing {place}",
            f"nothing {place} and {PLURALS[digit]} everywhere else",
        )
        others = [other for other in range(CELLS) if other != cell]
        facts.append(_fact("blank", texts, [grid_with(dict.fromkeys(others, digit))]))
    return facts


def empty_fact() -> Fact:
    """The canvas without any digit."""
    return _fact("blank", ("an empty canvas", "a blank canvas", "nothing at all"), [grid_with({})])


def split_captions(seed: int = SPLIT_SEED) -> tuple[list[Caption], list[Caption]]:
    """All captions, divided by fact within each kind into (training, test); some 80 % train."""
    rng = random.Random(seed)
    train: list[Caption] = list(empty_fact())
    test: list[Caption] = []
    for facts in (single_facts(), pair_facts(), count_facts(), relation_facts(), blank_facts()):
        rng.shuffle(facts)
        heldout = round(TEST_SHARE * len(facts))
        test.extend(caption for fact in facts[:heldout] for caption in fact)
        train.extend(caption for fact in facts[heldout:] for caption in fact)
    return train, test


def balanced(captions: Sequence[Caption], most: int, seed: int = SPLIT_SEED) -> list[Caption]:
    """At most `most` captions of each kind, drawn at random; kinds in the order of KINDS."""
    rng = random.Random(seed)
    chosen = []
    for kind in KINDS:
        of_kind = [caption for caption in captions if caption.kind == kind]
        chosen.extend(rng.sample(of_kind, min(most, len(of_kind))))
    return chosen


def train_prompts() -> list[Caption]:
    """The balanced training prompts."""
    return balanced(split_captions()[0], MOST_TRAIN_PROMPTS)


def test_prompts() -> list[Caption]:
    """The balanced test prompts."""
    return balanced(split_captions()[1], MOST_TEST_PROMPTS)


test_prompts.__test__ = False  # type: ignore[attr-defined]  # the name looks like a test to pytest


def write_prompts(path: Path, captions: Sequence[Caption]) -> None:
    """Write captions as JSON lines with the keys prompt, kind and grids."""
    lines = (json.dumps({"prompt": item.text, "kind": item.kind, "grids": item.grids}) for item in captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
