"""The front door: every command tells at once what it takes, with a line that works."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from itertools import takewhile
from pathlib import Path

import pytest
from command_lines import understand

from tempflow.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "scipy", "PIL", "matplotlib", "diffusers", "transformers", "peft", "aiohttp", "tensorboard")


def help_of(capsys, *arguments: str) -> str:
    try:
        code = main([*arguments, "--help"])
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 0
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """Command lines under `example:` or `examples:`, without the words beside them."""
    below = re.split(r"^examples?:\n", text, flags=re.MULTILINE)[1].splitlines()
    lines = takewhile(lambda line: line.startswith("  "), below)
    return [shlex.split(re.split(r" {3,}", line.strip())[0]) for line in lines]


def arguments_of(line: list[str]) -> list[str]:
    """What follows `tempflow` of a line that may begin with torchrun."""
    return line[line.index("tempflow") + 1 :]


def test_help_imports_nothing_heavy():
    """What makes it answer in a fraction of a second: asked in a process of its own, one command after the other."""
    code = f"""
import contextlib, io, sys
from tempflow.__main__ import COMMANDS, main
for command in ["", *COMMANDS]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([command, "--help"] if command else ["--help"])
    found = [name for name in {HEAVY} if name in sys.modules]
    assert not found, f"tempflow {{command}} --help imports {{found}}"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_whoever_reads_the_help_may_stop_reading(arguments):
    reading, writing = os.pipe()
    os.close(reading)  # gone before the first word, as `| true` is
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # then the interpreter itself may complain as it ends
    ended = subprocess.run([sys.executable, "-m", "tempflow", *arguments], stdout=writing, stderr=subprocess.PIPE,
                           text=True, cwd=ROOT, env=buffered, timeout=60)  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_help_is_printed_by_one_of_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not help_of(capsys, "train") and not help_of(capsys, "score")


def test_the_first_help_names_every_command(capsys):
    text = help_of(capsys)
    named = re.findall(r"^  (\w+)  ", text, re.MULTILINE)
    assert set(named) >= set(COMMANDS) and len(named) == len(COMMANDS)
    for line in examples(text):
        if line[-1] != "--help":
            understand(arguments_of(line))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_a_line_that_works(capsys, command):
    text = help_of(capsys, command)
    assert f"tempflow {command}" in text.splitlines()[0]
    found = [arguments_of(line) for line in examples(text)]
    assert found and all(line[0] == command for line in found)
    for line in found:
        understand(line)


def test_a_command_that_there_is_not(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("tempflow: command=trian: ")


def test_without_a_command_or_for_its_version_it_answers(capsys):
    assert main([]) == 0 and "tempflow train" in capsys.readouterr().out
    assert main(["--version"]) == 0 and re.match(r"tempflow \d+\.\d+", capsys.readouterr().out)


def test_installed_commands_lead_here():
    lines = re.findall(r'"([\w-]+)=([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    installed = {name: EntryPoint(name, value, "console_scripts") for name, value in lines}
    assert {"tempflow", "tempflow-train"} == set(installed)
    assert all(callable(entry.load()) for entry in installed.values())


def test_the_same_through_python():
    done = subprocess.run([sys.executable, "-m", "tempflow", "prompts", "--test"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("tempflow: --test=") and done.stderr.count("\n") == 1
