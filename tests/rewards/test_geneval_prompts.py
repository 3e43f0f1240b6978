"""GenEval-style prompts: grammar, metadata, proportions, and nothing of the test set in the training set."""

import json
from collections import Counter
from itertools import starmap

import pytest

from tempflow.commands.prompts import main
from tempflow.common.errors import BadInput
from tempflow.prompts import read_prompts
from tempflow.rewards.geneval.mixes import MIXES
from tempflow.rewards.geneval.prompts import TASKS, choices, content
from tempflow.rewards.geneval.words import CLASSES, english, genevals


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
def test_english_articles_and_plurals(words, expected):
    assert english(*words) == expected


def test_texts_are_genevals(tmp_path):
    """Some of the benchmark's own; its generator adds s, or es after an s."""
    published = [
        "a skis", "an umbrella", "a scissors", "a broccoli", "two toothbrushs", "four knifes", "two sandwichs",
        "three persons", "two sheeps", "four broccolis", "three buses", "two wine glasses", "a yellow broccoli",
        "a person and a sink", "a red skis and a brown tie", "an orange cow and a purple sandwich",
        "a skateboard above a person",
    ]  # fmt: skip
    texts = {task["prompt"] for tag, make in TASKS.items() for task in starmap(make, choices(4)[tag])}
    assert {f"a photo of {text}" for text in published} <= texts
    assert main([str(tmp_path), "--count", "200", "--test", "0", "--mix", "even", "--wording", "english"]) == 0
    kept = {(p.text, content(p.metadata)) for p in read_prompts(str(tmp_path), "prompts.train")}
    assert any(text not in texts for text, _ in kept)  # "a pair of skis"
    assert {meant for _, meant in kept} <= {content(t) for tag, m in TASKS.items() for t in starmap(m, choices(4)[tag])}


def test_metadata_is_genevals():
    pools = choices(4)
    tasks = {task["prompt"]: task for tag, make in TASKS.items() for task in starmap(make, pools[tag][:30000])}
    assert len(CLASSES) == 80
    assert {tag: len(pool) for tag, pool in pools.items()} == {
        "single_object": 80, "two_object": 6320, "counting": 240, "colors": 790, "position": 25280,
        "color_attr": 79 * 78 * 90}  # fmt: skip
    assert len(tasks) == 80 + 6320 + 240 + 790 + 25280 + 30000
    assert tasks["a photo of three broccolis"] == {
        "tag": "counting", "include": [{"class": "broccoli", "count": 3}],
        "exclude": [{"class": "broccoli", "count": 4}], "prompt": "a photo of three broccolis"}  # fmt: skip
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
    assert f"a photo of {genevals(mirrored[1]['class'])} and {genevals(mirrored[0]['class'])}" not in said


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


def write_all(file, kinds):
    """Every prompt of some kinds."""
    tasks = [task for kind in kinds for task in starmap(TASKS[kind], choices(4)[kind])]
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))


def test_the_benchmark_can_be_kept_out(tmp_path, capsys):
    """It asks for all 80 single objects: none is left, and the other kinds have their share of the test set."""
    write_all(tmp_path / "evaluation_metadata.jsonl", ["single_object"])
    with (tmp_path / "evaluation_metadata.jsonl").open("a") as file:
        file.write(json.dumps(TASKS["counting"]("bus", 3)) + "\n")
    exclude = ["--test", "480", "--count", "500", "--exclude", str(tmp_path / "evaluation_metadata.jsonl")]
    assert main([str(tmp_path / "made"), *exclude]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "single_object: every prompt of this kind is kept out; its share goes to the others"
    ]
    test, train = (read_prompts(str(tmp_path / "made"), f"prompts.{split}") for split in ("test", "train"))
    kinds = Counter(prompt.metadata["tag"] for prompt in test)
    assert set(kinds.values()) == {96} and kinds.keys() == TASKS.keys() - {"single_object"}
    assert len(train) == 500 and "a photo of three buses" not in {prompt.text for prompt in (*train, *test)}


def test_excluding_everything_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MIXES, "even", {"single_object": 1, "counting": 1})
    write_all(tmp_path / "all.jsonl", ["single_object", "counting"])
    arguments = [str(tmp_path / "made"), "--test", "0", "--mix", "even", "--exclude", str(tmp_path / "all.jsonl")]
    assert main(arguments) == 2
    assert "--exclude=single_object, counting: leaves no prompt" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_no_file_of_no_prompts(tmp_path, capsys):
    assert main([str(tmp_path / "train"), "--count", "20", "--test", "0"]) == 0
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["train_metadata.jsonl"]
    assert main([str(tmp_path / "test"), "--count", "0", "--test", "20"]) == 0
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["test_metadata.jsonl"]
    assert main([str(tmp_path / "none"), "--count", "0", "--test", "0"]) == 2
    assert "--count=0" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_negative_counts_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "made"), "--count", "-3"]) == 2
    assert "--count=-3: must lie in 0" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_folders_in_flow_grpos_layout(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\n")
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "a dog", "tag": "x"}\n')
    assert [prompt.text for prompt in read_prompts(str(tmp_path), "prompts.train")] == ["a cat"]
    assert [prompt.metadata for prompt in read_prompts(str(tmp_path), "prompts.test")] == [{"tag": "x"}]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(BadInput, match=r"none of train_metadata.jsonl, train.jsonl, train.txt"):
        read_prompts(str(tmp_path), "prompts.train")
