"""The hub folder: its card as the hub reads it, its code run as it stands, its upload to a hub on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import serving
from huggingface_hub import ModelCard, constants
from PIL import Image
from run_folders import run_folder
from safetensors.torch import load_file
from tiny_pipelines import model_config, sample_config

from tempflow.__main__ import main
from tempflow.common.files import PACKAGE
from tempflow.export.public import without_home
from tempflow.records.rows import read_metrics
from tempflow.settings.reading import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def card_folder(run, tmp_path_factory) -> Path:
    """The folder of a run; copy it before you change it."""
    folder = tmp_path_factory.mktemp("hub") / "folder"
    assert main(["export", str(run), "--to", "hub", "--output", str(folder)]) == 0
    return folder

OPTIONS = {
    "vlm_judge": {"model": "m", "url": "http://alice:hunter2@10.1.2.3:8000/v1", "key": "OWN_KEY", "max_tokens": 64},
    "own:server": {
        "place": "HTTPS://alice:hunter2@judge", "base_url": "10.1.2.4", "judge_host": "10.1.2.5",
        "access_token": "hunter2", "more": ["redis://:hunter2@10.1.2.6", {"n": 2, "password": "hunter2"}],
    },
}  # fmt: skip
"""Of scorers, with addresses and passwords in it"""


def export(run, *options) -> Path:
    assert main(["export", str(run), "--to", "hub", "--output", "card", *map(str, options)]) == 0
    return Path("card")


def own_base(run, tmp_path, **files) -> Path:
    """A copy of a run whose base lies in a folder, which has these files besides."""
    base = shutil.copytree(PACKAGE / "digits" / "pipeline", tmp_path / "my base", copy_function=os.symlink)
    for name, text in files.items():
        (base / f"{name}.md").write_text(text)
    copy = shutil.copytree(run, tmp_path / "copy")
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(settings.replace("tempflow:digits/pipeline", str(base)))
    return copy


def blocks(folder) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_the_code_of_the_card_runs_as_it_stands(card_folder, tmp_path):
    """In the folder, by itself; the picture is of the size that the run's have."""
    copy = shutil.copytree(card_folder, tmp_path / "downloaded")
    (code,) = blocks(copy)
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(copy / "picture.png") as picture:
        assert picture.size == (16, 16)


def test_the_card_tells_what_the_run_measured(run, card_folder):
    text, rows = (card_folder / "README.md").read_text(), read_metrics(run / "metrics.jsonl")
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image" and "lora" in data["tags"]
    for name in ("gold", "reward_test"):
        assert f"| {rows[0][name]:.4g} | {rows[-1][name]:.4g} |" in text
    assert rows[0]["picture_prompts"][0] in text and "`digits`" in text and "`digits_gold`" in text
    named = set(re.findall(r"\]\(([\w./]+)\)", text))
    assert {"curves.png", "config.yaml", "metrics.jsonl", "pictures/before_1.png", "pictures/after_3.png"} <= named
    assert all((card_folder / name).is_file() for name in named)
    assert str(run) not in text and str(run.parent) not in (card_folder / "config.yaml").read_text()


def test_its_pictures_are_those_of_the_run(run, card_folder):
    for word, step in (("before", 0), ("after", 4)):
        with Image.open(run / "pictures" / f"step_{step:06d}.png") as strip:
            for place in range(3):
                piece = strip.crop((16 * place, 0, 16 * place + 16, 16))
                with Image.open(card_folder / "pictures" / f"{word}_{place + 1}.png") as larger:
                    assert larger.height >= 160 and larger.resize((16, 16), Image.Resampling.NEAREST) == piece


def test_a_run_like_it_starts_from_its_settings(card_folder):
    config = load([str(card_folder / "config.yaml")])
    assert config.learn.lr == 1e-2 and config.run.dir == "runs/own_run"


def test_what_concerns_one_machine_alone_stays_there(run, tmp_path, monkeypatch):
    copy = own_base(run, tmp_path)
    text = (copy / "config.yaml").read_text()
    text = text.replace("servers: []", "servers: ['http://10.0.0.1:9000']")
    text = text.replace("token_file: null", "token_file: /t")
    text = text.replace("  options: {}", f"  options: {OPTIONS}")
    (copy / "config.yaml").write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # or the hub is asked for its licence, for half a minute
    folder = export(copy, "--base-model", "someone/base")
    written = (folder / "README.md").read_text() + (folder / "config.yaml").read_text()
    assert "my base" not in written and "10.0.0.1" not in written and "/t\n" not in written
    assert not [secret for secret in ("10.1.2", "@judge", "alice", "hunter2") if secret in written]
    kept = load([str(folder / "config.yaml")]).reward.options
    assert kept == {"vlm_judge": {"model": "m", "key": "OWN_KEY", "max_tokens": 64}, "own:server": {"more": [{"n": 2}]}}
    assert ModelCard.load(folder / "README.md").data.base_model == "someone/base"
    assert "BASE = 'someone/base'" in blocks(folder)[0]


def test_settings_are_whole_where_home_is_the_root_of_all(run, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert load([str(export(run) / "config.yaml")]).model.path == "tempflow:digits/pipeline"
    assert without_home("train: //shared/p.txt\n") == "train: //shared/p.txt\n"


def test_paths_at_home_do_not_tell_whose_it_is(monkeypatch):
    text = "train: {}/p.txt\ntest: '{}/a b'\ndir: [{}/x]\nfiles: /rootfs /data/root/x ../root/x /root\n"
    monkeypatch.setenv("HOME", "/root")
    assert without_home(text.format(*["/root"] * 3)) == text.format(*"~~~")


def test_a_user_without_a_folder_has_settings_all_the_same(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert without_home("train: ~/p.txt /root/x\n") == "train: ~/p.txt /root/x\n"


@pytest.mark.parametrize(("files", "licence"), [
    ({"README": "---\nlicense: other\nlicense_name: kind\nlicense_link: LICENSE.md\n---\n", "LICENSE": "Be kind."},
     {"license": "other", "license_name": "kind", "license_link": "LICENSE.md"}),
    ({"README": "---\nlicense: apache-2.0\n---\n"}, {"license": "apache-2.0"}),
    ({"LICENSE": "Be kind."},
     {"license": "other", "license_name": "licence-of-the-base", "license_link": "LICENSE.md"}),
    ({"README": "no head"}, {}),
    ({"README": "---\n[: no YAML\n---\n"}, {}),
])  # fmt: skip
def test_the_licence_is_that_of_the_bases_files(run, tmp_path, files, licence):
    folder = export(own_base(run, tmp_path, **files))
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert {name: data[name] for name in licence} == licence and ("license" in data) == bool(licence)
    assert (folder / "LICENSE.md").exists() == ("LICENSE" in files)
    told = licence.get("license_name") or licence.get("license", "tell no licence")
    assert told in (folder / "README.md").read_text().partition("## Licence")[2]


def test_a_run_without_metrics_and_pictures_has_a_card_all_the_same(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "bare")
    for name in ("metrics.jsonl", "report.png"):
        (copy / name).unlink()
    folder = export(copy)
    text = (folder / "README.md").read_text()
    assert "## How to load it" in text and "## Scores" not in text and "pictures/" not in text


def test_full_training_and_qwen_are_called_in_their_own_way(tiny, load_tiny, tmp_path):
    policy = load_tiny("qwen_image", train="full", guidance=4.0)
    settings = model_config(tiny("qwen_image"), "qwen_image", train="full")
    folder = export(run_folder(tmp_path / "q", policy, settings, sample_config("qwen_image", 4.0)))
    (code,) = blocks(folder)
    assert 'true_cfg_scale=4, negative_prompt=" "' in code
    names = {}
    os.chdir(folder)
    code = code.replace("num_inference_steps=10", "num_inference_steps=2")
    exec(compile(code, "card", "exec"), names)
    assert names["image"].size == (24, 16)
    trained = policy.network.module.state_dict()
    loaded = names["pipeline"].transformer.state_dict()
    assert all((loaded[name] == tensor).all() for name, tensor in trained.items())


# Upload


@pytest.fixture
def logged_in(monkeypatch, tmp_path):
    """On a hub of this machine: `with logged_in() as hub`."""
    monkeypatch.setenv("HF_TOKEN", "hf_known")

    @contextmanager
    def hub(breaks=False):
        with serving(breaks) as found:
            monkeypatch.setattr(constants, "ENDPOINT", found.address)
            yield found

    return hub


def test_push_uploads_the_folder_in_one_commit(run, logged_in, capsys):
    with logged_in() as hub:
        folder = export(run, "--push", "me/lora", "--private")
    assert capsys.readouterr().out.split() == ["card", f"{hub.address}/me/lora"]
    (files,) = hub.commits
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == files.keys()
    assert hub.made[0]["name"] == "lora" and hub.made[0]["visibility"] == "private"
    assert "HERE = 'me/lora'" in blocks(folder)[0]


def test_files_of_another_origin_are_not_uploaded(run, logged_in):
    Path("card").mkdir()
    Path("card/secret.txt").write_text("mine")
    with logged_in() as hub:
        folder = export(run, "--push", "me/lora", "--force")
    assert "secret.txt" not in hub.commits[0] and (folder / "secret.txt").read_text() == "mine"


def test_without_push_nobody_is_asked(run, logged_in):
    with logged_in() as hub:
        export(run)
    assert not hub.made and not hub.commits


def refused(capsys, code, field="--push"):
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("tempflow: ")]
    assert line.startswith(f"tempflow: {field}="), line
    return line


def test_an_upload_that_fails_leaves_a_whole_folder(run, logged_in, capsys):
    with logged_in(breaks=True) as hub:
        line = refused(capsys, main(["export", str(run), "--to", "hub", "--push", "me/lora", "--output", "card"]))
    assert "card is whole" in line and "--force" in line and not hub.commits
    assert load_file("card/pytorch_lora_weights.safetensors") and blocks(Path("card"))


def push_elsewhere(run, **environment):
    """In a process of its own, since the hub's library reads its environment once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HOME": "nobody"}
    command = [sys.executable, "-m", "tempflow", "export", str(run), "--to", "hub", "--push", "me/lora"]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


@pytest.mark.parametrize(("environment", "word"), [
    ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_x"}, "HF_HUB_OFFLINE"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x"}, "refused"),
    ({}, "HF_TOKEN"),
])  # fmt: skip
def test_no_network_or_login_is_one_line_before_anything_is_made(run, environment, word):
    done = push_elsewhere(run, **environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tempflow: --push=me/lora: ") and word in line and "nothing was made" in line
    assert not [path for path in Path().iterdir() if path.name != "nobody"]


def test_a_login_that_the_hub_does_not_know(run, logged_in, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with logged_in() as hub:
        refused(capsys, main(["export", str(run), "--to", "hub", "--push", "me/lora"]))
    assert not hub.made and not Path("exports").exists()


def test_a_base_in_a_folder_is_not_published_without_its_name(run, tmp_path, logged_in, capsys):
    with logged_in() as hub:
        code = main(["export", str(own_base(run, tmp_path)), "--to", "hub", "--push", "me/lora"])
        refused(capsys, code, "--base-model")
    assert not hub.made and not Path("exports/copy_hub").exists()
