"""The other commands: score, report, prompts, study, analyze, tails, serve."""

import json
import os
import struct
import zlib

import pytest
from PIL import Image

from tempflow.__main__ import main
from tempflow.commands.ending import Parser
from tempflow.common.errors import BadInput

SCORERS = """
import sys

def fine(images, prompts):
    return [1.0] * len(images)

def runtime(images, prompts):
    raise RuntimeError("a bug\\nof two lines")

def key(images, prompts):
    return {}["score"]

def memory(images, prompts):
    raise MemoryError

def leaves(images, prompts):
    sys.exit(0)

def wrong(images, prompts):
    return ["good"] * len(images)

def few(images, prompts):
    return []

class Made:
    def __init__(self):
        raise OSError("no weights")

class Looks:
    def check(self, prompts):
        raise AssertionError("looked")

    def __call__(self, images, prompts):
        return [1.0] * len(images)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two pictures, a prompt, scorers, and what is none of these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "pictures" / name)
    (tmp_path / "one.txt").write_text("a cat\n")
    (tmp_path / "wrong_scorers.py").write_text(SCORERS)
    (tmp_path / "breaks.py").write_text("raise RuntimeError('at import')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "old.csv").write_text("mine\n")
    return tmp_path


def score(*arguments: str, reward: str = "wrong_scorers:fine") -> list[str]:
    return ["score", "--device", "cpu", "--reward", reward, "pictures", "one.txt", *arguments]


@pytest.mark.parametrize("name", ["runtime", "key", "memory", "leaves", "wrong", "few", "Made", "Looks"])
def test_scorers_that_break(refused, folder, name):
    hint = refused(main, score(reward=f"wrong_scorers:{name}"), "--reward", after_plan=True)
    assert "wrong_scorers.py:" in hint or name in ("wrong", "few")


@pytest.mark.parametrize("name", ["breaks:x", "leaves:x", "nowhere:x", "wrong_scorers:none", "wrong_scorers", "os:sep",
                                  "a\nb:x", ":", "..:x"])  # fmt: skip
def test_scorers_that_cannot_be_imported(refused, folder, name):
    refused(main, score(reward=name), "--reward")
    config = ["train", "digits", f"run.dir={folder / 'run'}", f"reward.name={name}"]
    refused(main, config, "reward.name", after_plan=True)


OUTPUTS = {
    "a file": "old.csv",
    "a link to a file": "link.csv",
    "a link to nothing": "dangling.csv",
    "a pipe": "pipe",
    "a device": "/dev/null",
    "a folder": "pictures",
    "no folder": "nowhere/x.csv",
    "a name without end": "x" * 5000,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_there_is_left_alone(refused, folder, name):
    os.symlink("old.csv", "link.csv")
    os.symlink("new.csv", "dangling.csv")
    os.mkfifo("pipe")
    before = {path.name: path.lstat().st_ino for path in folder.iterdir()}
    refused(main, score("--output", OUTPUTS[name]), "--output")
    if name != "a file":
        refused(main, score("--force", "--output", OUTPUTS[name]), "--output")
    assert {path.name: path.lstat().st_ino for path in folder.iterdir() if path.name in before} == before
    assert (folder / "old.csv").read_text() == "mine\n" and not (folder / "new.csv").exists()
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_force_overwrites_a_file(folder, capsys):
    assert main(score("--output", "old.csv", "--force")) == 0
    assert (folder / "old.csv").read_text().startswith("file,prompt,score\na.png,a cat,1.0\n")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*before: bytes, size: tuple[int, int] = (1, 1)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b"")
    )


PICTURES = {
    "a text of 70 MB": png(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(70 * 2**20)))),
    "a thousand million pixels": png(size=(2**15, 2**15)),
    "cut off": png()[:40],
    "no picture": b"GIF89a",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(refused, folder, name):
    (folder / "pictures" / "c.png").write_bytes(PICTURES[name])
    refused(main, score(), "images", after_plan=True)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_what_only_has_a_pictures_name(refused, folder, kind):
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: os.symlink("nothing", path)}
    make[kind](folder / "pictures" / "c.png")
    refused(main, score(), "images")


@pytest.mark.parametrize(("arguments", "field"), [
    (["score", "pictures", "one.txt"], "arguments"),
    (score("--rows", "many"), "--rows"),
    (score("--rows", "9" * 5000), "--rows"),
    (score("--rows", "0"), "--rows"),
    (score("--option", "x=[1"), "--option"),
    (score("third"), "arguments"),
    (["report", "a", "b"], "arguments"),
    (["report", "~nosuchuser/run"], "folder"),
    (["report", "nowhere"], "run.dir"),
    *((["doctor", "--seconds", seconds], "--seconds") for seconds in ("0", "-1", "nan", "1e9", "soon")),
    (["prompts", "out", "--count", "1000000000"], "--count"),
    (["prompts", "out", "--seed", "9" * 60], "--seed"),
    (["prompts", "one.txt"], "folder"),
    (["prompts", "one.txt/out"], "folder"),
    (["prompts", "/proc/out", "--count", "5"], "folder"),
    (["prompts", "out", "--exclude", "nowhere.jsonl"], "--exclude"),
    (["prompts", "out", "--exclude", "foreign.jsonl"], "--exclude"),
    (["prompts", "x" * 5000], "folder"),
    (["study", "nowhere"], "study"),
    (["study", "~nosuchuser/x.yaml"], "study"),
    (["study", "fig3", "--processes", "0"], "--processes"),
    (["study", "fig3", "--processes", "many"], "--processes"),
    (["study", "fig3", "--folder", "one.txt"], "--folder"),
    (["analyze", "digits", "--iterations", "0"], "--iterations"),
    (["analyze", "digits", "--iterations", "1000000000"], "--iterations"),
    (["analyze", "digits", "--folder", "one.txt"], "--folder"),
    (["analyze", "digits", "learn.lr=fast"], "learn.lr"),
    (["tails", "digits", "learn.lr=fast"], "learn.lr"),
    (["serve"], "arguments"),
    (["serve", "digits", "--max-mib", "nan"], "--max-mib"),
    (["serve", "digits", "--max-mib", "1e300"], "--max-mib"),
    (["serve", "digits", "--max-images", "-1"], "--max-images"),
    (["serve", "digits", "--port", "70000"], "--port"),
    (["serve", "digits", "--port", "-1"], "--port"),
    (["serve", "digits", "digits"], "scorers"),
    (["serve", "breaks:x"], "scorer"),
    (["serve", "wrong_scorers:Made"], "scorer"),
    (["serve", "digits", "--token-file", "nowhere"], "--token-file"),
    (["serve", "digits", "--token-file", "pictures"], "--token-file"),
    (["frobnicate"], "command"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40])  # fmt: skip
def test_arguments(refused, folder, arguments, field):
    (folder / "foreign.jsonl").write_text('{"prompt": "x", "include": ["cube"]}\n')
    refused(main, arguments, field)
    assert not (folder / "out").exists()


def test_of_a_wrong_choice_the_value_alone_is_named():
    parser = Parser(prog="any")
    parser.add_argument("--to", choices=["one", "two"])
    with pytest.raises(BadInput) as told:
        parser.parse_args(["--to", "three"])
    assert (told.value.field, told.value.value) == ("--to", "three") and "'two'" in told.value.hint


@pytest.mark.parametrize("command", ["tails", "analyze"])
def test_a_scorer_that_breaks_ends_a_command_that_trains_nothing(refused, folder, command):
    small = ["explore.prompts=1", "explore.noises=1", "explore.siblings=2", "explore.forks=[0]", "learn.rows=1",
             "sample.steps=2", "eval.prompts=1", "reward.gold=null", "reward.name=wrong_scorers:runtime"]  # fmt: skip
    refused(main, [command, "digits", *small], "reward.name", after_plan=True)


START = {"step": 0, "seconds": 0.0, "loss_weights": [1.0], "picture_prompts": ["a"], "sigmas": [1, 0], "tail_rows": 1}
ROWS = {
    "no JSON": "hello\n",
    "a list": "[1, 2]\n",
    "another program's": '{"epoch": 1, "loss": 0.5}\n',
    "a step of words": '{"step": "one"}\n',
    "5000 digits": f'{{"step": {"9" * 5000}}}\n',
    "lists without end": "[" * 100_000,
    "a reward of words": json.dumps(START) + '\n{"step": 1, "seconds": 1.0, "reward_mean": "good"}\n',
    "a huge gold": json.dumps(START) + '\n{"step": 1, "seconds": 1.0, "gold": 1e300}\n',
    "no time": json.dumps(START) + '\n{"step": 1, "reward_mean": 0.5}\n',
    "forks that differ": json.dumps(START | {"reward_std_per_step": [1.0]})
    + '\n{"step": 1, "seconds": 1.0, "reward_std_per_step": [1.0, 2.0]}\n',
    "phases that are none": json.dumps(START | {"phase_seconds": [1]}) + "\n",
    "a million prompts": json.dumps(START | {"picture_prompts": ["a"] * 100_000}) + "\n",
}


@pytest.mark.parametrize("name", ROWS)
def test_reports_of_foreign_rows(refused, folder, name):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text(ROWS[name])
    refused(main, ["report", "run"], "run.dir" if name == "no JSON" else "metrics")


def test_reports_of_foreign_pictures(refused, folder, capsys):
    pictures = folder / "run" / "pictures"
    pictures.mkdir(parents=True)
    rows = START | {"picture_prompts": ["$x", "b"], "scores_missing": 0}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    (pictures / "step_000000.png").write_bytes(b"garbage")
    refused(main, ["report", "run"], "pictures")
    Image.new("RGB", (3, 2)).save(pictures / "step_000000.png")
    refused(main, ["report", "run"], "pictures")
    Image.new("L", (4, 2)).save(pictures / "step_000000.png")
    (pictures / "step_last.png").write_bytes(b"not a step's")
    (folder / "run" / "report.png").mkdir()
    refused(main, ["report", "run"], "run.dir")
    (folder / "run" / "report.png").rmdir()
    assert main(["report", "run"]) == 0 and (folder / "run" / "report.png").is_file()


STUDY = "name: one\nruns: {a: [digits]}\nseeds: [1]\nbudget: {iterations: 1}\n"
STUDIES = {
    "a seed twice": (STUDY + "seeds: [2]\n", "study"),
    "a truth value for a seed": (STUDY.replace("[1]", "[true]"), "seeds.0"),
    "a word for a seed": (STUDY.replace("[1]", "[1_0]"), "seeds.0"),
    "a truth value for a budget": (STUDY.replace("iterations: 1", "iterations: true"), "budget.iterations"),
    "a run that cannot be": (STUDY.replace("digits", "digits, learn.lr=fast"), "runs.a"),
    "a run's own seed": (STUDY.replace("digits", "digits, run.seed=1"), "runs.a"),
    "a path for a name": (STUDY.replace("one", "../one"), "name"),
    "a tag": ("!!python/name:os.system ''\n", "study"),
    "a list": ("- a\n", "study"),
    "an unknown field": (STUDY + "sedes: [1]\n", "sedes"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_studies(refused, folder, name):
    content, field = STUDIES[name]
    (folder / "own.yaml").write_text(content)
    refused(main, ["study", "own.yaml", "--dry-run"], field)
