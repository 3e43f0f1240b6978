"""What `tempflow export` refuses: one line, exit code 2, and nothing written."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folders import run_folder
from safetensors.torch import load_file, save_file
from tiny_pipelines import model_config, sample_config

from tempflow.__main__ import main
from tempflow.models.formats.loras import FORMATS
from tempflow.models.load import load_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(name, settings of the model) -> folder of a run, made once; copy it before you change it."""
    folders: dict[tuple, Path] = {}

    def folder(name, **model):
        key = (name, *map(str, model.items()))
        if key not in folders:
            settings, sample = model_config(tiny(name), name, **model), sample_config(name)
            at = tmp_path_factory.mktemp("export") / "run"
            folders[key] = run_folder(at, load_policy(settings, sample, CPU), settings, sample)
        return folders[key]

    return folder


@pytest.fixture
def unwritten(refused, tmp_path, monkeypatch):
    """As `refused`, of `tempflow export`, in a folder where nothing may have changed afterwards."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, field):
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        hint = refused(main, ["export", *arguments], field, after_plan=True)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        return hint

    return run


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return shutil.copytree(made("sd3"), tmp_path / "run")


@pytest.mark.parametrize("content", [{}, {"notes.txt": ""}, {"config.yaml": "model: {train: lora}\n"}])
def test_folders_without_a_run_or_its_weights(unwritten, tmp_path, content):
    if content:
        (tmp_path / "run").mkdir()
    for name, text in content.items():
        (tmp_path / "run" / name).write_text(text)
    hint = unwritten(["run", "--to", "merged"], "run")
    assert "config.yaml" not in content or "no weights" in hint


@pytest.mark.parametrize(("options", "field"), [
    (["--to", "onnx"], "--to"), ([], "arguments"), (["--to", "merged", "--weights", "ema"], "--weights"),
    (["--to", "merged", "--dtype", "fp8"], "--dtype"), (["--to", "merged", "--checkpoint", "7"], "--checkpoint"),
    (["--to", "merged", "--checkpoint", "newest"], "--checkpoint"),
    (["--to", "kohya", "--weights", "raw", "--checkpoint", "final"], "--weights"),
    (["--to", "comfyui", "--push", "me/lora"], "--push"), (["--to", "merged", "--base-model", "a/b"], "--base-model"),
    (["--to", "hub", "--push", "lora"], "--push"), (["--to", "hub", "--push", "a/b/c"], "--push"),
    (["--to", "hub", "--push", "me/lo ra"], "--push"),
    (["--to", "diffusers", "--output", "run"], "--output"), (["--to", "kohya", "--output", "file/x"], "--output"),
    (["--to", "kohya", "--output", "a\0b"], "--output"), (["--to", "kohya", "--output", "old.safetensors"], "--output"),
    (["--to", "merged", "--output", "file", "--force"], "--output"),
    (["--to", "comfyui", "--output", "folder.safetensors", "--force"], "--output"),
])  # fmt: skip
def test_options(unwritten, copied, tmp_path, options, field):
    for name in ("file", "old.safetensors"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    hint = unwritten(["run", *options], field)
    formats = ("diffusers", "comfyui", "kohya", "merged", "hub")
    assert "onnx" not in options or all(name in hint for name in formats)


def test_a_checkpoint_of_another_model(unwritten, tiny, copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace(str(tiny("sd3")), str(tiny("z_image"))).replace(": 32", ": 96", 1))
    unwritten(["run", "--to", "comfyui"], "--checkpoint")


def test_a_model_that_is_gone(unwritten, tiny, copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace(str(tiny("sd3")), "nowhere"))
    unwritten(["run", "--to", "comfyui"], "model.path")


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_formats_that_do_not_fit_the_run(unwritten, made, monkeypatch, to):
    """The line names those that do."""
    hint = unwritten([made("sd3", train="full"), "--to", to], "--to")
    assert "diffusers, merged or hub" in hint
    monkeypatch.delitem(FORMATS[to], "StableDiffusion3Pipeline")
    assert "merged" in unwritten([made("sd3"), "--to", to], "--to")


def test_layers_that_a_format_has_no_name_for(unwritten, made):
    run = made("flux2_klein", lora_targets=["double_stream_modulation_img.linear", "attn.to_q"])
    hint = unwritten([run, "--to", "kohya"], "model.lora_targets")
    assert "--to diffusers" in hint


def test_a_base_that_lacks_what_was_trained(unwritten, tiny, copied, tmp_path):
    base = shutil.copytree(tiny("sd3"), tmp_path / "base")
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("transformer_blocks.0.attn.to_q.weight")
    save_file(weights, file)
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace(str(tiny("sd3")), str(base)))
    assert "attn.to_q" in unwritten(["run", "--to", "merged"], "model.path")


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "merged"])
def test_numbers_that_fp16_cannot_hold(unwritten, tiny, load_tiny, tmp_path, to):
    policy = load_tiny("z_image")
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.fill_(1e5 if "lora_B" in name else 1.0)
    settings = model_config(tiny("z_image"), "z_image")
    run = run_folder(tmp_path / "run", policy, settings, sample_config("z_image"))
    assert "bf16" in unwritten([run, "--to", to, "--dtype", "fp16"], "--dtype")


@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_a_disk_without_room(unwritten, copied, monkeypatch, to):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20, 2**20 - 2**10, 2**10))
    assert "GiB" in unwritten(["run", "--to", to], "--output")


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_disk_that_fails_on_the_way_leaves_what_was_there(unwritten, copied, tmp_path, monkeypatch, failing):
    """Whether in the midst of the weights, or when they are put in their place."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text("mine")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"before": ("tempflow.models.formats.whole.save_file", full),
                          "after": ("tempflow.export.place.os.umask", full)}[failing])  # fmt: skip
    hint = unwritten(["run", "--to", "merged", "--output", "out", "--force"], "--output")
    assert "No space left" in hint and (tmp_path / "out" / "model_index.json").read_text() == "mine"


def test_what_lies_in_a_runs_folder_and_is_none_of_its_own(unwritten, copied):
    (copied / "metrics.jsonl").write_text('{"step": "one"}\n')
    unwritten(["run", "--to", "hub"], "metrics")
    rows = ['{"step": 0, "picture_prompts": ["a", "b"]}', '{"step": 3, "gold": 1.0, "seconds": 1}']
    (copied / "metrics.jsonl").write_text("\n".join(rows))
    (copied / "pictures").mkdir()
    for step in (0, 3):
        (copied / "pictures" / f"step_{step:06d}.png").write_bytes(b"garbage")
    unwritten(["run", "--to", "hub"], "pictures")
    for step in (0, 3):
        Image.new("RGB", (5, 2)).save(copied / "pictures" / f"step_{step:06d}.png")
    unwritten(["run", "--to", "hub"], "pictures")
    shutil.rmtree(copied / "pictures")
    (copied / "scores").mkdir()
    (copied / "scores" / "step_000000.json").write_text("[1]")
    unwritten(["run", "--to", "hub"], "scores")


def test_force_replaces_an_export_and_nothing_else(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "transformer").mkdir(parents=True)
    (tmp_path / "out" / "transformer" / "old.safetensors").write_text("old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    weights = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert main(["export", "run", "--to", "merged", "--output", "out", "--force"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / "model_index.json").is_file()
    assert sorted(os.listdir(tmp_path / "out" / "transformer")) == weights
    assert sorted(os.listdir(tmp_path)) == ["out", "run"], "nothing is left beside it"


def test_a_file_goes_into_the_folder_that_is_named(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    assert main(["export", "run", "--to", "comfyui", "--output", "loras"]) == 0
    assert capsys.readouterr().out.strip() == "loras/run_comfyui.safetensors"
    assert load_file("loras/run_comfyui.safetensors")
