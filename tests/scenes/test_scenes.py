"""The harder embedded benchmark: its prompts, scenes and judges keep what they promise."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import tempflow.scenes
from tempflow.digits.canvas import load_splits
from tempflow.prompts import Prompt
from tempflow.rewards.geneval.prompts import TASKS, content
from tempflow.scenes.canvas import (
    BLANK,
    CELLS,
    COLOURS,
    Painter,
    box_of_cell,
    cells_of,
    compose,
    digit_and_colour,
)
from tempflow.scenes.judges import LOGITS, load_reader, read, reading_loss
from tempflow.scenes.making.generator import KIND_WEIGHTS, TaskSampler, random_classes
from tempflow.scenes.making.make import make_prompts
from tempflow.scenes.prompts import HELD_OUT, TRAINED, phrase, split_tasks
from tempflow.scenes.scenes import asked_for, class_of, missed, name_and_colour, shows, spoilt
from tempflow.scenes.scorers import ScenesGold, ScenesReward
from tempflow.train import main

ASSETS = Path(tempflow.scenes.__file__).parent
SCORERS = {"reward": ScenesReward, "gold": ScenesGold}


def shipped(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def asks(tag: str, *arguments) -> Prompt:
    task = TASKS[tag](*arguments, phrase=phrase)
    return Prompt(task["prompt"], task)


def scene(**things: str) -> list[int]:
    """`scene(c4="red seven")`: the middle cell."""
    cells = [BLANK] * CELLS
    for place, thing in things.items():
        colour, name = thing.split()
        cells[int(place[1:])] = class_of(name, colour)
    return cells


@pytest.fixture(scope="module")
def draw():
    pytest.importorskip("sklearn")
    split = load_splits()["pipeline"]
    painter = Painter(split.images, split.labels)  # digits that no reader has seen
    return lambda scenes, seed=0: painter(torch.tensor(scenes), torch.Generator().manual_seed(seed))


def test_prompts_are_made_as_shipped(tmp_path):
    make_prompts(tmp_path)
    for name in ("train", "test"):
        made = (tmp_path / "prompts" / f"{name}.jsonl").read_bytes()
        assert made == (ASSETS / "prompts" / f"{name}.jsonl").read_bytes()


def test_what_is_held_out_is_asked_for_in_no_words_of_the_training_file():
    train, test = shipped("train"), shipped("test")
    assert Counter(row["kind"] for row in test) == HELD_OUT and set(HELD_OUT) == set(TASKS)
    assert Counter(row["kind"] for row in train) == {kind: count for kind, count in TRAINED.items() if count}
    assert {content(row) for row in test}.isdisjoint(map(content, train))
    assert {content(row) for row in test}.isdisjoint(map(content, split_tasks()[0])), "nor is the base trained on it"
    assert len({row["prompt"] for row in test}) == len(test)
    words = {word for row in train for word in row["prompt"].split()}
    assert words >= {word for row in test for word in row["prompt"].split()}


def test_words():
    assert phrase("one") == "a one" and phrase("eight") == "an eight" and phrase("six", count=3) == "three sixes"
    assert asks("position", ("one", "eight"), "left of").text == "a photo of a one left of an eight"
    assert asks("color_attr", ("two", "one"), ("red", "white")).text == "a photo of a red two and a white one"


@pytest.mark.parametrize(("tag", "arguments", "right", "wrong"), [
    ("colors", ("seven", "red"), {"c0": "red seven"}, {"c0": "blue seven"}),
    ("counting", ("six", 3), {"c0": "red six", "c4": "blue six", "c5": "red six"},
     {"c0": "red six", "c4": "red six"}),
    ("two_object", ("two", "three"), {"c8": "red two", "c1": "red three"}, {"c8": "red two", "c1": "red four"}),
    ("position", (("two", "three"), "above"), {"c1": "red two", "c7": "red three"},
     {"c7": "red two", "c1": "red three"}),
    ("position", (("two", "three"), "left of"), {"c3": "red two", "c4": "red three"},
     {"c4": "red two", "c7": "red three"}),
    ("color_attr", (("two", "three"), ("red", "blue")), {"c0": "red two", "c1": "blue three"},
     {"c0": "blue two", "c1": "red three"}),
])  # fmt: skip
def test_judges_follow_genevals_rules(draw, tag, arguments, right, wrong):
    prompt = asks(tag, *arguments)
    assert shows(scene(**right), prompt.metadata) and not shows(scene(**wrong), prompt.metadata)
    images = torch.cat([draw([scene(**right)] * 20), draw([scene(**wrong)] * 20)])
    gold, reward = (torch.tensor(scorer()(images, [prompt] * 40)) for scorer in (ScenesGold, ScenesReward))
    assert gold[:20].mean() > 0.8 and gold[20:].mean() < 0.2
    assert reward[:20].mean() > 0.8 and reward[20:].mean() < 0.8 * reward[:20].mean()


def test_gold_passes_over_an_object_too_many_where_geneval_does(draw):
    """Not in counting, where `exclude` says how many are too many; the graded reward never does."""
    lenient, exact = asks("single_object", "six"), asks("counting", "six", 1)
    lone, pair = draw([scene(c0="red six")] * 20), draw([scene(c0="red six", c4="red six")] * 20)
    gold, reward = ScenesGold(), ScenesReward()
    assert sum(gold(pair, [lenient] * 20)) > 18 > 2 > sum(gold(pair, [exact] * 20))
    assert min(sum(gold(lone, [prompt] * 20)) for prompt in (lenient, exact)) > 16
    assert sum(reward(pair, [lenient] * 20)) < 2 < 16 < sum(reward(lone, [lenient] * 20))


def test_only_digits_that_a_reader_is_sure_of_are_counted(monkeypatch):
    """GenEval's .9 for counting, .3 else."""
    unsure = torch.full((1, 9), 0.95).index_fill(1, torch.tensor([3]), 0.6)
    digits = torch.full((1, 9), 10).index_fill(1, torch.tensor([1, 3]), 2)
    monkeypatch.setattr("tempflow.scenes.scorers.read", lambda *_: (digits, unsure, torch.zeros(1, 9, dtype=int)))
    image = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    assert ScenesGold()(image, [asks("counting", "two", 2)]) == [0.0]
    assert ScenesGold()(image, [asks("counting", "two", 1)]) == [1.0]
    assert ScenesGold()(image, [asks("colors", "two", "red")]) == [1.0]
    assert ScenesReward()(image, [asks("single_object", "two")]) == [0.0], "two of one asked for"


def test_gold_is_all_or_nothing_and_the_reward_counts_what_is_there(draw):
    """One of two asked for: half the terms of Flow-GRPO's score, none of GenEval's."""
    prompt, images = asks("two_object", "two", "three"), draw([scene(c4="white two")] * 50)
    assert sum(ScenesGold()(images, [prompt] * 50)) == 0
    assert torch.tensor(ScenesReward()(images, [prompt] * 50)).median() == 0.5


@pytest.mark.parametrize("tag", TASKS)
def test_scenes_that_show_and_scenes_that_miss(tag):
    rng, tasks = random.Random(3), [task for task in split_tasks()[1] if task["tag"] == tag]
    for task in tasks * 3:
        right, wrong = asked_for(task, rng), missed(task, rng)
        assert shows(right, task) and not shows(wrong, task)
        names = Counter(name_and_colour(number)[0] for number in right if number != BLANK)
        assert names == Counter({clause["class"]: clause["count"] for clause in task["include"]})


def test_the_base_is_trained_on_harder_kinds_more_often_and_on_wrong_scenes_by_the_share_given():
    tasks = split_tasks()[0]
    by_text = {task["prompt"]: task for task in tasks}
    texts, classes = TaskSampler(tasks, 0.25, 1)(600)
    kinds, whole = Counter(by_text[text]["tag"] for text in texts), sum(KIND_WEIGHTS.values())
    for kind, weight in KIND_WEIGHTS.items():
        assert abs(kinds[kind] - 600 * weight / whole) < 5 * (600 * weight / whole) ** 0.5
    rows = zip([by_text[text] for text in texts for _ in range(4)], classes.tolist(), strict=True)
    wrong = sum(not shows(row, task) for task, row in rows) / len(classes)
    assert 0.2 < wrong < 0.3
    true = TaskSampler(tasks, 0.0, 1)(50)
    assert all(shows(row, by_text[text]) for text, row in zip(true[0], true[1][::4].tolist(), strict=True))


def test_a_run_from_the_preset(tmp_path):
    """Two iterations of what users run; gold is told by GenEval's six kinds."""
    arguments = ["scenes", "explore.prompts=2", "explore.siblings=3", "learn.rows=4", "learn.iterations=2",
                 "eval.every=2", "eval.steps=3", f"run.dir={tmp_path / 'run'}", "run.device=cpu"]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "gold" in row]
    assert [row["step"] for row in evaluated] == [0, 2] and 0 < evaluated[0]["reward_test"] < 1
    scores = json.loads((tmp_path / "run" / "scores" / "step_000002.json").read_text())
    kinds = [row["kind"] for row in shipped("test")]
    for kind in TASKS:
        own = [score for score, name in zip(scores["gold"], kinds, strict=True) if name == kind]
        assert evaluated[1]["kinds"][f"gold/{kind}"] == pytest.approx(sum(own) / len(own))
    assert len(evaluated[1]["kinds"]) == 12


def test_mistakes_are_of_all_sorts_and_small():
    rng, right = random.Random(1), scene(c0="red seven", c5="blue two")
    wrong = [spoilt(right, rng) for _ in range(300)]
    changed = Counter(sum(a != b for a, b in zip(right, other, strict=True)) for other in wrong)
    assert set(changed) == {1, 2} and changed[1] > 150 and changed[2] > 30
    assert {sum(number != BLANK for number in other) for other in wrong} == {1, 2, 3}


def test_cells_come_back_in_the_order_they_were_composed():
    cells = torch.randint(256, (5, 9, 3, 8, 8), dtype=torch.uint8)
    images = compose(cells)
    assert torch.equal(images[:, :, :8, 16:], cells[:, 2]) and torch.equal(images[:, :, 8:16, :8], cells[:, 3])
    torch.testing.assert_close(cells_of(images) * 255, cells.float(), rtol=0, atol=1e-3)
    left, top, right, bottom = map(int, box_of_cell(5))
    assert torch.equal(images[:, :, top:bottom, left:right], cells[:, 5])


def test_digits_are_drawn_in_their_colours(draw):
    for number, (name, levels) in enumerate(COLOURS.items()):
        cell = cells_of(draw([scene(c4=f"{name} eight")]))[0]
        assert cell[[0, 1, 2, 3, 5, 6, 7, 8]].max() == 0
        brightest = cell[4].amax((1, 2)) * 255
        torch.testing.assert_close(brightest, torch.tensor(levels).float(), rtol=0, atol=1.0)
        assert digit_and_colour(torch.tensor(class_of("eight", name))) == (8, number)


def test_the_loss_asks_for_no_colour_of_an_empty_cell():
    logits = torch.zeros(3, LOGITS, requires_grad=True)
    reading_loss(logits, torch.tensor([10, 3, 10]), torch.tensor([0, 2, 5])).backward()
    assert logits.grad[[0, 2], 11:].abs().max() == 0 < logits.grad[1, 11:].abs().min()
    assert logits.grad[:, :11].abs().min() > 0


def test_readers_read_unseen_digits(draw):
    classes = random_classes(300, torch.Generator().manual_seed(5))
    cells, (digits, colours) = cells_of(draw(classes.tolist())), digit_and_colour(classes)
    for name in SCORERS:
        found, _, seen = read(load_reader(name, ASSETS / f"{name}.safetensors"), cells)
        right, there = found == digits, classes != BLANK
        assert right[there].float().mean() > 0.95 and (seen == colours)[there].float().mean() > 0.99
        assert right[~there].float().mean() > 0.999


def test_judges_have_different_architectures():
    kinds = [{type(part).__name__ for part in load_reader(name, ASSETS / f"{name}.safetensors").modules()}
             for name in SCORERS]  # fmt: skip
    assert "Conv2d" in kinds[0] and "Conv2d" not in kinds[1]
    assert "MultiheadAttention" in kinds[1] and "MultiheadAttention" not in kinds[0]


@pytest.mark.parametrize(("metadata", "words"), [
    ({}, "include"), ({"include": [{"class": "cup", "count": 1}]}, "class must be one"),
    ({"include": [{"class": "two", "count": 1, "color": "pink"}]}, "color must be one"),
])  # fmt: skip
def test_prompts_of_something_else_are_refused_by_name(metadata, words):
    with pytest.raises(ValueError, match=f'"a lonely two".*{words}'):
        ScenesReward()(torch.zeros(1, 3, 24, 24, dtype=torch.uint8), [Prompt("a lonely two", metadata)])


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"found \(1, 3, 16, 16\), expected \(B, 3, 24, 24\)"):
        ScenesGold()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [asks("single_object", "two")])
