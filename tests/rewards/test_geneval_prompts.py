"""GenEval-style prompts: grammar, metadata, proportions, and nothing of the test set in the training set."""

import json
from collections import Counter
from itertools import starmap

import pytest

from tempflow.common.errors import BadInput
from tempflow.prompts import read_prompts
from tempflow.rewards.geneval.prompts import CLASSES, TASKS, choices, content, main, phrase


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder written with a file of prompts to keep out."""
    folder = tmp_path_factory.mktemp("geneval")
    outside = [
        {"prompt": "a photo of two clocks", "include": [{"class": "clock", "count": 2}]},
        {"prompt": "a photo of a dog right of a cat", "include": [
            {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]},
    ]  # fmt: skip
    (folder / "outside.jsonl").write_text("".join(json.dumps(task) + "\n" for task in outside))
    arguments = [str(folder / "made"), "--count", "3400", "--test", "60", "--exclude", str(folder / "outside.jsonl")]
    assert main(arguments) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("umbrella",), "an umbrella"),
        (("apple", "orange"), "an orange apple"),
        (("apple", "red"), "a red apple"),
        (("bus", "", 3), "three buses"),
        (("bench", "", 2), "two benches"),
        (("toothbrush", "", 4), "four toothbrushes"),
        (("knife", "", 2), "two knives"),
        (("sheep", "", 2), "two sheep"),
        (("person", "", 4), "four people"),
        (("scissors", "black"), "a pair of black scissors"),
        (("skis", "", 2), "two pairs of skis"),
        (("wine glass", "", 2), "two wine glasses"),
    ],
)
def test_articles_and_plurals(words, expected):
    assert phrase(*words) == expected


def test_metadata_is_genevals():
    pools = choices(4)
    tasks = {task["prompt"]: task for tag, make in TASKS.items() for task in starmap(make, pools[tag][:30000])}
    assert len(CLASSES) == 80
    assert {tag: len(pool) for tag, pool in pools.items()} == {
        "single_object": 80, "two_object": 6320, "counting": 240, "colors": 790, "position": 25280,
        "color_attr": 79 * 78 * 90}  # fmt: skip
    assert len(tasks) == 80 + 6320 + 240 + 790 + 25280 + 30000
    assert tasks["a photo of three heads of broccoli"] == {
        "tag": "counting", "include": [{"class": "broccoli", "count": 3}],
        "exclude": [{"class": "broccoli", "count": 4}], "prompt": "a photo of three heads of broccoli"}  # fmt: skip
    assert tasks["a photo of a dog left of a tv"]["include"] == [
        {"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]  # fmt: skip
    assert not any(
        "person" in (entry["class"] for entry in task["include"])
        for task in tasks.values()
        if task["tag"] in ("colors", "color_attr")
    )


def test_proportions_are_flow_grpos(folder):
    count = Counter(prompt.metadata["tag"] for prompt in read_prompts(str(folder / "made"), "prompts.train"))
    parts = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert sum(count.values()) == 3400 and count.keys() == parts.keys()
    assert all(abs(count[tag] - 3400 * part / 17) < 1 for tag, part in parts.items())
    even = Counter(prompt.metadata["tag"] for prompt in read_prompts(str(folder / "made"), "prompts.test"))
    assert set(even.values()) == {10}


def test_nothing_held_out_is_trained_on(folder):
    train, test = (read_prompts(str(folder / "made"), f"prompts.{split}") for split in ("train", "test"))
    outside = read_prompts(str(folder / "outside.jsonl"), "prompts.test")
    for attribute in (lambda prompt: prompt.text, lambda prompt: content(prompt.metadata)):
        assert not {attribute(p) for p in train} & {attribute(p) for p in (*test, *outside)}
        assert not {attribute(p) for p in test} & {attribute(p) for p in outside}
    said = {prompt.text for prompt in train}
    assert {"a photo of three clocks", "a photo of two cats"} & said
    mirrored = next(iter(p for p in test if p.metadata["tag"] == "two_object")).metadata["include"]
    assert f"a photo of {phrase(mirrored[1]['class'])} and {phrase(mirrored[0]['class'])}" not in said


def test_same_content_in_other_words():
    tasks = {task["prompt"]: content(task) for task in starmap(TASKS["position"], choices(4)["position"])}
    assert tasks["a photo of a dog right of a cat"] == tasks["a photo of a cat left of a dog"]
    assert tasks["a photo of a dog below a cat"] == tasks["a photo of a cat above a dog"]
    assert tasks["a photo of a dog left of a cat"] != tasks["a photo of a cat left of a dog"]


def test_a_function_of_its_arguments(tmp_path, folder):
    again = [str(tmp_path / "again"), "--count", "3400", "--test", "60", "--exclude", str(folder / "outside.jsonl")]
    assert main(again) == 0
    for name in ("train_metadata.jsonl", "test_metadata.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "made" / name).read_bytes()
    assert main([*again[:4], str(60), "--seed", "1"]) == 2  # nothing is overwritten
    assert main([str(tmp_path / "other"), *again[1:], "--seed", "1"]) == 0
    assert (tmp_path / "other" / name).read_bytes() != (folder / "made" / name).read_bytes()


def test_excluding_everything_is_refused(tmp_path, capsys):
    tasks = "".join(json.dumps(task) + "\n" for task in starmap(TASKS["counting"], choices(4)["counting"]))
    (tmp_path / "all.jsonl").write_text(tasks)
    assert main([str(tmp_path / "made"), "--test", "0", "--exclude", str(tmp_path / "all.jsonl")]) == 2
    assert "--exclude=counting" in capsys.readouterr().err


def test_negative_counts_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "made"), "--count", "-3"]) == 2
    assert "--count=-3: must not be below 0" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_folders_in_flow_grpos_layout(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\n")
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "a dog", "tag": "x"}\n')
    assert [prompt.text for prompt in read_prompts(str(tmp_path), "prompts.train")] == ["a cat"]
    assert [prompt.metadata for prompt in read_prompts(str(tmp_path), "prompts.test")] == [{"tag": "x"}]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(BadInput, match=r"none of train_metadata.jsonl, train.jsonl, train.txt"):
        read_prompts(str(tmp_path), "prompts.train")
