"""Files of prompts: whatever their name, their content says what they hold; a wrong line is told by its number."""

import os

import pytest

from tempflow.commands.train import main
from tempflow.prompts import read_prompts

BAD = {
    "objects called .txt, one without a prompt": ("a.txt", b'{"prompt": "x"}\n{"text": "y"}\n', ":2"),
    "objects called .ndjson, one empty": ("a.ndjson", b'{"prompt": "x"}\n\n{"prompt": " "}\n', ":3"),
    "an empty prompt": ("a.jsonl", b'{"prompt": ""}\n', ":1"),
    "no JSON in .JSONL": ("a.JSONL", b"a cat\n", ":1"),
    "an object amid text": ("a.txt", b'a cat\n{"prompt": "x"}\n', ":2"),
    "JSON over several lines": ("a.txt", b'{\n  "prompt": "x"\n}\n', ":1"),
    "a list of objects": ("a.txt", b'[\n  {"prompt": "x"}\n]\n', ":1"),
    "a table": ("a.csv", b"id,prompt\n1,a cat\n", ""),
    "a table called .txt": ("a.txt", b"id,prompt\n1,a cat\n", ":1"),
    "a table of tabulators": ("a.txt", b"caption\turl\na cat\tx\n", ":1"),
    "a column": ("a.txt", b'"prompt"\na cat\n', ":1"),
    "JSON": ("a.json", b'["a cat"]', ""),
    "parquet": ("a.parquet", b"PAR1", ""),
    "a NUL": ("a.txt", b"a cat\na \0dog\n", ":2"),
    "a NUL in an object": ("a.jsonl", b'{"prompt": "a\\u0000b"}\n', ":1"),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud800"}\n', ":1"),
    "a form feed": ("a.txt", b"a cat\x0ca dog\n", ":1"),
    "a key twice": ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', ":1"),
    "NaN": ("a.jsonl", b'{"prompt": "x", "weight": NaN}\n', ":1"),
    "lists without end": ("a.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"\n", ":1"),
    "5000 digits": ("a.jsonl", b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}\n", ":1"),
    "a number": ("a.jsonl", b'{"prompt": 7}\n', ":1"),
    "a prompt without end": ("a.txt", b"x" * 200_000, ":1"),
    "UTF-16": ("a.txt", "a cat\n".encode("utf-16"), ""),
    "a byte order mark alone": ("a.txt", b"\xef\xbb\xbf\n", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(refused, tmp_path, name):
    file, content, place = BAD[name]
    (tmp_path / file).write_bytes(content)
    path = str(tmp_path / file)
    arguments = ["digits", f"run.dir={tmp_path / 'run'}", f"prompts.train={path}"]
    refused(main, arguments, "prompts.train")
    with pytest.raises(ValueError, match=f"{file}{place}: "):
        read_prompts(path, "prompts.train")


@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "folder", "nowhere.txt", "nowhere/x.txt"])
def test_what_is_no_file(refused, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    refused(main, ["digits", "run.dir=run", f"prompts.test={path}"], "prompts.test")


def texts(tmp_path, name: str, content: str, encoding: str = "utf-8") -> list[str]:
    (tmp_path / name).write_bytes(content.encode(encoding))
    return [prompt.text for prompt in read_prompts(str(tmp_path / name), "prompts.train")]


def test_forms_are_told_by_content_and_name(tmp_path):
    objects = '{"prompt": "a cat", "n": 1}\n{"prompt": "a dog"}\n'
    for name in ("a.txt", "a.ndjson", "a.JSONL", "a.jsonl", "a"):
        assert texts(tmp_path, name, objects) == ["a cat", "a dog"]
        assert texts(tmp_path, name, objects, "utf-8-sig") == ["a cat", "a dog"]
    assert texts(tmp_path, "a.txt", "a cat\r\na dog\r\n", "utf-8-sig") == ["a cat", "a dog"]
    assert texts(tmp_path, "a.txt", "{curly} hair\n[brackets], text\n") == ["{curly} hair", "[brackets], text"]
    assert texts(tmp_path, "a.txt", "a sign, text\nid,prompt\n") == ["a sign, text", "id,prompt"]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(tmp_path, sign):
    assert texts(tmp_path, "a.txt", f"a{sign}cat\nb\n") == [f"a{sign}cat", "b"]
    assert texts(tmp_path, "a.jsonl", f'{{"prompt": "a{sign}cat"}}\n{{"prompt": "b"}}\n') == [f"a{sign}cat", "b"]
