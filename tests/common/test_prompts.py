"""Prompt files, and the order in which iterations use them."""

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.explore.feed import Feed, iteration_prompts
from tempflow.prompts import Prompt, read_prompts


def test_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(str(tmp_path / "a.txt"), "prompts.train") == [Prompt("a cat"), Prompt("a dog")]
    (tmp_path / "a.jsonl").write_text('{"prompt": "two cats", "include": [{"class": "cat", "count": 2}]}\n')
    (prompt,) = read_prompts(str(tmp_path / "a.jsonl"), "prompts.train")
    assert prompt.text == "two cats" and prompt.metadata == {"include": [{"class": "cat", "count": 2}]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"\n \n", "no prompt"),
        ("empty.jsonl", b"", "no prompt"),
        ("bad.jsonl", b'{"prompt": "x"}\n{"text": "y"}', ":2"),
        ("bad.jsonl", b'{"prompt": "x"}\n\n\n{"text": "y"}', ":4"),
        ("bad.jsonl", b"not json", ":1"),
        ("bad.jsonl", b'["prompt"]', ":1"),
        ("bad.txt", b"\xff\xfe\x00", "UTF-8"),
        ("bad.jsonl", b'{"prompt": null}', ":1"),
        ("list.json", b'["a cat"]', ".jsonl"),
    ],
)
def test_bad_files_name_the_field_and_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words) as caught:
        read_prompts(str(tmp_path / name), "prompts.test")
    assert caught.value.field == "prompts.test"


def test_missing_file():
    with pytest.raises(BadInput) as caught:
        read_prompts("nowhere.txt", "prompts.train")
    assert (caught.value.field, str(caught.value.value)) == ("prompts.train", "nowhere.txt")


def test_every_prompt_is_used_once_before_any_comes_again():
    prompts = [Prompt(str(number)) for number in range(12)]
    walked = [prompt for iteration in range(9) for prompt in iteration_prompts(prompts, 4, 5, iteration)]
    turns = [walked[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(turn, key=lambda p: int(p.text)) == prompts for turn in turns)
    assert turns[0] != turns[1]
    assert iteration_prompts(prompts, 4, 6, 0) != walked[:4]


def test_more_prompts_than_the_file_holds():
    prompts = [Prompt("a"), Prompt("b")]
    texts = [prompt.text for prompt in iteration_prompts(prompts, 5, 0, 0)]
    assert len(texts) == 5 and texts.count("a") in (2, 3)


def test_a_feed_gives_each_process_its_prompts_and_their_noises():
    """4 prompts, 3 noises, the second of two processes."""
    prompts = [Prompt(str(number)) for number in range(12)]
    everyone, draw = Feed(prompts, 4, 3, range(4), 5).at(7)
    own, part = Feed(prompts, 4, 3, range(2, 4), 5).at(7)
    assert everyone == iteration_prompts(prompts, 4, 5, 7) and own == everyone[2:]
    assert part.slots.tolist() == [2, 2, 2, 3, 3, 3] and part.noises.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(part.step_keys(1), draw.step_keys(1)[6:]) and (part.run_seed, part.iteration) == (5, 7)
