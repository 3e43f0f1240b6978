"""Where an export goes: what it was made of stays, and a folder is exchanged whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tempflow.__main__ import main
from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE
from tempflow.export.place import placed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("to", "output"), [
    ("hub", "kept/run"), ("merged", "kept/base"), ("diffusers", "kept/run/checkpoints"), ("diffusers", "kept/base/new"),
    ("kohya", "kept/run/pytorch_lora_weights.safetensors"), ("comfyui", "kept/run"), ("hub", "kept"), ("hub", "link"),
])  # fmt: skip
def test_run_and_base_stay_as_they_are_even_by_force(run, capsys, to, output):
    shutil.copytree(run, "kept/run")
    shutil.copytree(PACKAGE / "digits" / "pipeline", "kept/base")
    Path("link").symlink_to("kept/run")
    settings = Path("kept/run/config.yaml")
    settings.write_text(settings.read_text().replace("tempflow:digits/pipeline", "kept/base"))
    before = contents(Path())
    assert main(["export", "kept/run", "--to", to, "--output", output, "--force"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: ")]
    assert line.startswith(f"tempflow: --output={output}") and contents(Path()) == before


def export_over(output: Path) -> None:
    """Two files, a folder, and one that a link stood for."""
    with placed(output) as made:
        (made / "part").mkdir(parents=True)
        for name in ("a.json", "b.json", "part/weights", "shared"):
            (made / name).write_text("new")


@pytest.fixture
def earlier() -> Path:
    """A folder with an earlier export, one of its parts a link."""
    Path("elsewhere").write_text("old")
    (Path("out") / "part").mkdir(parents=True)
    for name in ("a.json", "part/weights", "notes.txt"):
        (Path("out") / name).write_text("old")
    (Path("out") / "shared").symlink_to("../elsewhere")
    return Path("out")


def test_an_export_takes_the_place_of_an_earlier_one(earlier):
    export_over(earlier)
    new = dict.fromkeys(("a.json", "b.json", "part/weights", "shared"), b"new")
    assert contents(earlier) == new | {"notes.txt": b"old"}
    assert Path("elsewhere").read_text() == "old" and sorted(os.listdir()) == ["elsewhere", "out"]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(7))
def test_a_move_that_fails_or_is_interrupted_leaves_all_of_the_earlier_one(earlier, monkeypatch, at, error, done):
    """Whichever of the moves it is, and whether or not the disk has made it."""
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if done or len(calls) != at + 1:
            rename(source, target)
        if len(calls) == at + 1:
            raise error

    before = contents(earlier)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((BadInput, KeyboardInterrupt)):
        export_over(earlier)
    assert contents(earlier) == before and (earlier / "shared").is_symlink()
    assert sorted(os.listdir()) == ["elsewhere", "out"]
