"""Prompts of GenEval's six kinds about coloured digits, divided into those to train on and those held out.

`a photo of a red seven`, `a photo of three nines`, `a photo of a two left of an eight`: GenEval's words and metadata
(`tempflow.rewards.geneval.prompts`) with digits for COCO's objects. What two prompts ask for in other words ("left of",
"right of" the other way round) lies on one side. As in Flow-GRPO's training set, no single object is trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tempflow.digits.captions import NAMES
from tempflow.rewards.geneval.prompts import TASKS, choices, content
from tempflow.rewards.geneval.words import english
from tempflow.scenes.canvas import COLOURS

Task = dict[str, Any]
"""A prompt with GenEval's metadata: tag, include, perhaps exclude, prompt."""

MOST = 4
"""digits of one kind that counting asks for"""
HELD_OUT = {"single_object": 10, "two_object": 24, "counting": 24, "colors": 24, "position": 24, "color_attr": 24}
"""Prompts of the test file by kind: facts in two wordings, or the other way round."""
TRAINED = {"single_object": 0, "two_object": 120, "counting": 120, "colors": 120, "position": 120, "color_attr": 120}
"""Lines of the training file by kind; a kind with fewer prompts is gone through again."""
SPLIT_SEED = 11
WORDINGS = ("a photo of", "a picture of")


def phrase(name: str, colour: str = "", count: int = 1) -> str:
    """`an eight`, `a one`, `a red seven`, `three sixes`."""
    return english(name, colour, count).replace("an one", "a one")


def all_tasks() -> dict[str, list[list[Task]]]:
    """Kind -> facts, each all the prompts that ask for the same picture, in random order."""
    rng, found = random.Random(SPLIT_SEED), {}
    for tag, pool in choices(MOST, NAMES, list(COLOURS)).items():
        facts: dict[str, list[Task]] = {}
        for arguments in pool:
            task = TASKS[tag](*arguments, phrase=phrase)
            facts.setdefault(content(task), []).extend(_wordings(task))
        found[tag] = list(facts.values())
        rng.shuffle(found[tag])
    return found


def _wordings(task: Task) -> Iterable[Task]:
    """Kinds of few prompts are asked for in two ways."""
    few = task["tag"] in ("single_object", "counting", "colors")
    for words in WORDINGS if few else WORDINGS[:1]:
        yield task | {"prompt": task["prompt"].replace(WORDINGS[0], words, 1)}


def split_tasks() -> tuple[list[Task], list[Task]]:
    """(training, test), each fact on one side; what is beyond a kind's number of test prompts is for training."""
    train: list[Task] = []
    test: list[Task] = []
    for tag, facts in all_tasks().items():
        held_out: list[Task] = []
        while len(held_out) < HELD_OUT[tag]:
            held_out += facts.pop()
        test += held_out[: HELD_OUT[tag]]
        train += [task for fact in facts for task in fact]
    return train, test


def train_prompts() -> list[Task]:
    """The lines of the training file."""
    rng, train = random.Random(SPLIT_SEED + 1), split_tasks()[0]
    chosen = []
    for tag, count in TRAINED.items():
        pool = [task for task in train if task["tag"] == tag]
        rng.shuffle(pool)
        chosen += [pool[place % len(pool)] for place in range(count)]
    return chosen


def write_prompts(path: Path, tasks: Iterable[Task]) -> None:
    """JSON lines with GenEval's keys, and `kind` for tables by kind."""
    lines = (json.dumps({"prompt": task["prompt"], "kind": task["tag"]} | task) for task in tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
