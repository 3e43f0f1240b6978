"""The documents: blocks that need nothing are run, in order; of the others every command line is read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_lines import understand
from doc_blocks import NEEDS, ROOT, blocks, documents
from doc_lines import Line, command_lines

from tempflow.__main__ import COMMANDS
from tempflow.settings.checks import check_consistency
from tempflow.settings.names import field_names
from tempflow.settings.reading import load, presets
from tempflow.studies.compare.study import read_study

SHIMS = {"tempflow": "-m tempflow", "torchrun": "-m torch.distributed.run", "python": ""}
"""Commands as an installation would have them, of the Python that runs the tests."""


def inline() -> list[str]:
    """Everything between backticks in the documents' text, each once."""
    found = []
    for path in documents():
        found += [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", outside(path))]
    return list(dict.fromkeys(found))


def outside(path: Path) -> str:
    """The text of a document without its blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """An empty folder, and commands to use in it."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / ".bin").mkdir()
    for name, arguments in SHIMS.items():
        shim = folder / ".bin" / name
        shim.write_text(f'#!/bin/bash\nexec "{sys.executable}" {arguments} "$@"\n')
        shim.chmod(0o755)
    return folder


@pytest.mark.timeout(1500)
def test_every_block_that_needs_nothing_runs(workshop, monkeypatch):
    """As one session: later blocks use what earlier ones left."""
    monkeypatch.chdir(workshop)
    path, done = f"{workshop / '.bin'}:{os.environ['PATH']}", []
    for block in blocks("bash", "python"):
        if block.needs:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "document"})
        else:
            ran = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", block.text], capture_output=True, text=True,
                                 env={**os.environ, "PATH": path})  # fmt: skip
            assert ran.returncode == 0, f"{block}: exit code {ran.returncode}\n{ran.stderr[-3000:]}"
        done.append(block)
    assert len({block.document for block in done}) >= 4
    left = {str(path.relative_to(workshop)) for path in workshop.rglob("*")}
    assert {"runs/short/report.png", "runs/short/report.html", "samples/short/grid.png", "two_threes.png",
            "evaluations/short/scores.csv", "exports/short_comfyui.safetensors"} <= left  # fmt: skip


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_shell_and_its_command_lines_are_understood(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=30)
    for name, text in re.findall(r"cat > (\S+) <<'END'\n(.*?)^END$", block.text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    shell = re.sub(r"<<'END'\n.*?^END$", "", block.text, flags=re.MULTILINE | re.DOTALL)
    mentioned = re.findall(rf"\btempflow (?:{'|'.join(COMMANDS)})\b", re.sub(r"(?m)(^|\s)#.*$", "", shell))
    assert len(command_lines(shell)) >= len(mentioned), "a command line is not read"
    for line in command_lines(shell):
        understand(line.arguments)
        if line.arguments[0] == "train":
            check_consistency(load(line.arguments[1:]), line.processes)


@pytest.mark.parametrize("shell", [
    "tempflow train digits", "tempflow-train digits", "python tempflow/train.py digits",
    ".venv/bin/tempflow train digits", "docker run --entrypoint torchrun tempflow --nnodes=1 -m tempflow train digits",
    "A=1 B='2 3' tempflow train digits", "cd /x/tempflow && time tempflow train digits > a.log 2>&1",
    "if test -d a; then tempflow train digits; fi", "for a in 1 2; do\n tempflow train \\\n  digits\ndone",
    "docker run --rm -v \"$PWD:/data\" tempflow train digits | tee b", "(exec srun -n 1 tempflow train digits) &",
    "torchrun --nproc-per-node=1 -m tempflow train digits  # tempflow train",
])  # fmt: skip
def test_a_command_line_is_found_wherever_it_stands(shell):
    assert command_lines(shell) == [Line(("train", "digits"))]


def test_what_only_names_the_project_is_no_command_line():
    shell = "docker build -t tempflow .\ncd tempflow\n# tempflow train\nls > tempflow; ls ./tempflow 2> tempflow"
    assert command_lines(shell) == []


def test_what_a_block_needs_is_one_of_few_words():
    assert all(block.needs <= NEEDS for block in blocks("bash", "python", "yaml", ""))
    assert not [str(block) for block in blocks("sh", "shell", "console", "py")], "say bash or python"
    bare = [block for block in blocks("") if "$ " in block.text or "pip install" in block.text]
    assert not [str(block) for block in bare], "a block of commands says that it is bash"
    for path in documents():
        indented = re.findall(r"^(?: {4,}|\t)(?:python|tempflow|pip|uv|docker|torchrun) .*", outside(path), re.M)
        assert not indented, f"{path.name}: commands stand between fences"
        assert "```" not in outside(path), f"{path.name}: fences stand at the beginning of lines"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_and_studies_are_read(block, tmp_path):
    (tmp_path / "shown.yaml").write_text(block.text)
    if "runs" in yaml.safe_load(block.text):
        assert read_study(str(tmp_path / "shown.yaml")).runs
    else:
        load([str(tmp_path / "shown.yaml")])


def test_fields_in_the_text_are_those_of_today():
    known, ends = field_names(), (".py", ".md", ".yaml", ".sh")
    sections = {name.partition(".")[0] for name in known}
    named = {found[1] for words in inline() if (found := re.fullmatch(r"(\w+\.\w+)(=.*)?", words))}
    named = {name for name in named if name.partition(".")[0] in sections and not name.endswith(ends)}
    assert len(named) > 60 and sorted(named - set(known)) == []


def test_every_preset_is_named():
    text = " ".join(path.read_text(encoding="utf-8") for path in documents())
    assert [name for name in presets() if name not in ("tiny_sd3", "tiny_scenes") and f"`{name}`" not in text] == []


def test_commands_in_the_text_are_understood():
    lines = [words for words in inline() if words.startswith("tempflow ") and "..." not in words]
    lines = [line for line in lines if not re.search(r"\b[A-Z]{4,}\b|\[", line)]  # placeholders
    assert len(lines) > 10
    for line in lines:
        command, *rest = shlex.split(line)[1:]
        assert command in (*COMMANDS, "--help"), line
        if rest and "--help" not in rest:  # else it is only spoken of
            understand([command, *rest])


def test_every_method_is_described_as_its_preset_describes_itself():
    text = " ".join((ROOT / "docs" / "methods.md").read_text().split())
    for name, path in presets().items():
        if path.parent.name == "methods":
            head = re.match(r"(#.*\n)*", path.read_text())[0].splitlines()
            words = " ".join(" ".join(line.lstrip("#") for line in head).split())
            assert f"### {name} {words}" in text, name
