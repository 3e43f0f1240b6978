"""The command that scores a folder."""

import ast
import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tempflow.rewards.scorer
from tempflow.commands.score import main

SCORERS = """
import torch

class Level:
    def __init__(self, times=1.0, device="cpu"):
        self.times, self.device = times, str(device)
        self.sizes = []

    def __call__(self, images, prompts):
        assert self.device == "cpu" and len(images) <= 3
        return [image.float().mean().item() * self.times + len(prompt.text) for image, prompt in zip(images, prompts)]

def tagged(images, prompts):
    for prompt in prompts:
        if "tag" not in prompt.metadata:
            raise ValueError(f'prompt "{prompt.text}" has no tag')
    return [float(prompt.metadata["tag"]) for prompt in prompts]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pictures, one of another size, and a file that is none; a module of scorers."""
    (tmp_path / "pictures").mkdir()
    for level, name in ((40, "d.png"), (10, "a.png"), (30, "c.webp"), (20, "B.png")):
        image = Image.new("RGB", (8, 6) if name == "c.webp" else (4, 4), (level,) * 3)
        image.save(tmp_path / "pictures" / name, lossless=True)
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    (tmp_path / "prompts.txt").write_text("x\nxx\n\nxxx\nxxxx\n")
    (tmp_path / "one.txt").write_text("yes, all\n")
    (tmp_path / "tags.jsonl").write_text("".join(f'{{"prompt": "p{n}", "tag": {n}}}\n' for n in range(4)))
    (tmp_path / "score_cases.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("score_cases", None)


def rows_of(text):
    return list(csv.reader(io.StringIO(text)))


def test_pictures_by_name_meet_prompts_by_line(folder, capsys):
    assert main(["--reward", "score_cases:Level", "--device", "cpu", "--rows", "3", "pictures", "prompts.txt"]) == 0
    assert rows_of(capsys.readouterr().out) == [
        ["file", "prompt", "score"],
        ["B.png", "x", "21.0"],
        ["a.png", "xx", "12.0"],
        ["c.webp", "xxx", "33.0"],
        ["d.png", "xxxx", "44.0"],
    ]


def test_one_prompt_for_all_options_and_file(folder, capsys):
    arguments = ["--reward", "score_cases:Level", "--option", "times=0.5", "--output", "scores.csv", "--device", "cpu"]
    assert main([*arguments, "pictures", "one.txt"]) == 0
    assert [row[1:] for row in rows_of((folder / "scores.csv").read_text())[1:]] == [
        ["yes, all", value] for value in ("18.0", "13.0", "23.0", "28.0")
    ]
    assert capsys.readouterr().out == "" and not list(folder.glob("*.part"))


def test_several_rewards(folder, capsys):
    rewards = ["--reward", "score_cases:Level", "--reward", "score_cases:tagged", "--device", "cpu"]
    assert main([*rewards, "--option", "score_cases:Level.times=0", "pictures", "tags.jsonl"]) == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert header == ["file", "prompt", "score_cases:Level", "score_cases:tagged"]
    assert [row[2:] for row in rows] == [["2.0", str(float(tag))] for tag in range(4)]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--reward", "pickscoer", "pictures", "one.txt"], "--reward=pickscoer: no such scorer; choose one of digits"),
    (["--reward", "jpeg_compressibility", "nowhere", "one.txt"], "images=nowhere: no such folder"),
    (["--reward", "jpeg_compressibility", ".", "one.txt"], "images=.: holds no picture; looked for .png"),
    (["--reward", "jpeg_compressibility", "pictures", "no.txt"], "prompts=no.txt: no such file"),
    (["--reward", "score_cases:tagged", "pictures", "one.txt"], 'prompt "yes, all" has no tag'),
    (["--reward", "score_cases:Level", "--option", "tims=1", "pictures", "one.txt"], "no such option"),
    (["--reward", "score_cases:Level", "--option", "times", "pictures", "one.txt"], "must have the form KEY=VALUE"),
    (["--reward", "score_cases:Level", "--device", "gpu", "pictures", "one.txt"], "--device=gpu: is no device"),
    (["--reward", "score_cases:Level", "--rows", "0", "pictures", "one.txt"], "--rows=0"),
    (["--reward", "score_cases:Level", "--output", "no/such/x.csv", "pictures", "one.txt"], "--output=no/such/x.csv"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(folder, capsys, arguments, words):
    assert main(["--device", "cpu", *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: ")]
    assert len(said) == 1 and words in said[0]


def test_too_few_prompts_and_broken_pictures(folder, capsys):
    (folder / "two.txt").write_text("a\nb\n")
    assert main(["--reward", "jpeg_compressibility", "pictures", "two.txt"]) == 2
    assert "prompts=two.txt: holds 2 prompts for 4 pictures; give as many, or one" in capsys.readouterr().err
    (folder / "pictures" / "broken.png").write_bytes(b"\x89PNG nothing")
    assert main(["--reward", "jpeg_compressibility", "pictures", "one.txt"]) == 2
    assert "broken.png: not readable as a picture" in capsys.readouterr().err


def test_as_a_command_it_loads_no_more_than_it_needs(folder):
    """Heavy packages are imported by the scorer that needs them, not by naming it."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'transformers', 'rapidocr', 'onnxruntime', 'httpx', 'diffusers'}\n"
        "atexit.register(lambda: print('loaded', heavy & set(sys.modules), file=sys.stderr))\n"
        "sys.argv[1:] = ['--reward', 'jpeg_compressibility', 'pictures', 'one.txt']\n"
        "runpy.run_module('tempflow.commands.score', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(done.stdout)) == 5 and "loaded set()" in done.stderr


def test_nothing_needs_packages_that_do_not_install_everywhere():
    names = set()
    for path in Path(tempflow.rewards.scorer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    assert "transformers" in names
    assert not names & {"torchvision", "open_clip", "clip", "mmdet", "mmcv", "hpsv2", "hpsv3", "ImageReward", "timm"}
