"""The examples: shell that bash can read, with command lines that the present settings understand."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command_lines import understand
from doc_lines import command_lines
from torch.distributed.run import get_args_parser

from tempflow.common.stopping import LAST, SIGNALS
from tempflow.settings.checks import check_consistency
from tempflow.settings.reading import load
from tempflow.train import main

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))


def trained(path: Path):
    """(arguments, processes) of every training in a script."""
    lines = command_lines(path.read_text())
    assert lines, "no command line of the project"
    return [(list(line.arguments[1:]), line.processes) for line in lines if line.arguments[0] == "train"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_the_settings_understand_it(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
    for line in command_lines(path.read_text()):
        understand(line.arguments)
    for arguments, processes in trained(path):
        config = load(arguments)
        check_consistency(config, processes)
        assert config.run.dir != "runs/digits", "an example has a folder of its own"


def test_every_kind_of_machine_has_one():
    counts = {processes for path in SCRIPTS for _, processes in trained(path)}
    assert counts == {1, 8, 16}
    assert {path.suffix for path in SCRIPTS} == {".sh", ".sbatch"}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_the_signal_of_the_scheduler_is_handed_on_and_its_time_kept(path):
    """torchrun hands on what it is told to, and kills its processes after a time of its own."""
    text = path.read_text()
    number, seconds = re.search(r"^#SBATCH .*--signal=(\w+)@(\d+)", text, re.MULTILINE).groups()
    assert f"SIG{number}" in {each.name for each in SIGNALS}
    room = int(seconds)
    if "torchrun" in text:
        given = re.search(r"torchrun (.*?) -m tempflow", re.sub(r"\\\n\s*", " ", text))[1].split()
        launch = get_args_parser().parse_args([*given, "-m", "tempflow"])
        assert {f"SIG{number}", "SIGTERM"} <= set(launch.signals_to_handle.split(","))
        waits = int(re.search(r"^export .*TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text, re.MULTILINE)[1])
        assert waits < room
        room = waits
    assert all(load(arguments).run.grace + LAST < room for arguments, _ in trained(path))


@pytest.mark.parametrize("name", ["laptop.sh", "own_scorer.sh"])
def test_what_needs_no_weights_can_be_planned(name, tmp_path, monkeypatch, capsys):
    shutil.copy(FOLDER / "own_scorer.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments, _ in trained(FOLDER / name):
        assert main([*arguments, "run.plan_only=true"]) == 0
        assert "the run: " in capsys.readouterr().err


def test_the_scorer_of_the_example_scores(monkeypatch):
    import torch

    from tempflow.prompts import Prompt
    from tempflow.rewards.scorer import load_scorer

    monkeypatch.syspath_prepend(str(FOLDER))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 2] = 255
    scores = load_scorer("reward.name", "own_scorer:blueness", 2)(images, [Prompt("a"), Prompt("b")])
    assert scores.tolist() == [0.0, 1.0]


def test_the_image_is_made_of_what_is_there():
    """It cannot be built in a test: its sources, and the extras that it installs, are there."""
    text = (ROOT / "Dockerfile").read_text()
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert set(re.findall(r"'\.\[([\w,]+)\]'", text)) <= extras and "constraints.txt" in text
    assert (ROOT / "constraints.txt").is_file() and re.search(r'^ENTRYPOINT \["tempflow"\]$', text, re.MULTILINE)
    commented = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#   "))
    lines = command_lines(commented)
    assert len(lines) == commented.count("docker run")
    for line in lines:
        understand(line.arguments)


def test_what_git_ignores_stays_out_of_the_image_too():
    """Environments, runs and pictures of a clone are no part of an image, however large they are."""
    there = set((ROOT / ".dockerignore").read_text().split())
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    patterns = {each[1:] if each.startswith("/") else f"**/{each}" for each in ignored if "results/" not in each}
    assert patterns | {".git", "benchmarks/results"} <= there


@pytest.mark.parametrize("name", ["Dockerfile", "docs/first_run.md"])
def test_a_container_that_trains_keeps_what_it_downloads(name):
    text = re.sub(r"\\\n[# ]*", " ", (ROOT / name).read_text())
    lines = [line for line in text.splitlines() if re.search(r"docker run --rm .* tempflow train ", line)]
    assert lines and all(' -v "$HOME/.cache/huggingface:/root/.cache/huggingface" ' in line for line in lines)
