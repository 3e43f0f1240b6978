"""Models, run folders and their checkpoints, as a training command meets them."""

import json
import os
import shutil

import pytest
from long import mostly_long

from tempflow.commands.train import main
from tempflow.common.files import PACKAGE

INDEX = {"_class_name": "StableDiffusion3Pipeline"}
MODELS = {
    "nothing": None,
    "no JSON": "hello",
    "a list": "[]",
    "no class": "{}",
    "a class of another name": json.dumps({"_class_name": 7}),
    "an unknown class": json.dumps({"_class_name": "os.system"}),
    "a list for a class": json.dumps({"_class_name": ["x", "y"]}),
    "no parts": json.dumps(INDEX),
    "parts of another library": json.dumps(INDEX | {"vae": ["os", "system"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(refused, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    if MODELS[name] is not None:
        (folder / "model_index.json").write_text(MODELS[name])
    arguments = ["digits", f"model.path={folder}", f"run.dir={tmp_path / 'run'}"]
    refused(main, arguments, "model.path", after_plan=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", mostly_long(["transformer", "vae", "scheduler", "text_encoder"], 2))
@pytest.mark.parametrize("content", ["", "[]", "{"], ids=["empty", "list", "cut"])
def test_parts_of_models(refused, tmp_path, part, content):
    folder = tmp_path / "model"
    shutil.copytree(PACKAGE / "digits" / "pipeline", folder, copy_function=os.symlink)
    names = ("scheduler_config.json", "config.json")
    file = next(folder / part / name for name in names if (folder / part / name).exists())
    file.unlink()
    file.write_text(content)
    arguments = ["digits", f"model.path={folder}", f"run.dir={tmp_path / 'run'}", "run.plan_only=true"]
    refused(main, arguments, "model.path", after_plan=True)


@pytest.mark.parametrize("path", ["nowhere", "no/where/at/all", "a file", "pipe", "tempflow:nowhere"])
def test_paths_of_models(refused, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    os.mkfifo("pipe")
    refused(main, ["digits", "run.dir=run", f"model.path={path}"], "model.path", after_plan=True)


def begun(folder, settings: str | bytes) -> None:
    """A folder of a run that has learnt something."""
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "config.yaml").write_bytes(settings if isinstance(settings, bytes) else settings.encode())


SETTINGS = {
    "no YAML": ("{", "preset"),
    "bytes": (b"\xff\x00", "preset"),
    "a list": ("- a\n", "preset"),
    "a number for a section": ("learn: 3\n", "learn"),
    "a word for a number": ("learn: {lr: fast}\n", "learn.lr"),
    "an older version's names": ("branch: {siblings: 2}\n", "branch.siblings"),
    "a tag": ("learn: !!python/name:os.system ''\n", "preset"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_run_to_resume(refused, tmp_path, name):
    content, field = SETTINGS[name]
    begun(tmp_path / "run", content)
    refused(main, ["digits", f"run.dir={tmp_path / 'run'}", "run.resume=true"], field)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == (content if type(content) is bytes else content.encode())


def test_folders_of_runs(refused, tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nothing", tmp_path / "link")
    for path in ("file", "pipe", "file/run", "."):
        refused(main, ["digits", f"run.dir={tmp_path / path}"], "run.dir")
    for path in ("file", "pipe", "link", "nowhere"):
        hint = refused(main, ["digits", f"run.dir={tmp_path / path}", "run.resume=true"], "run.resume")
        assert "config.yaml" in hint
