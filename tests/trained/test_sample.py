"""`sample`: pictures as evaluations make them, before and after from the same noises, files and a grid."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tempflow.__main__ import main
from tempflow.run.assembly import held_out_prompts
from tempflow.trained.opening import open_run
from tempflow.trained.pictures import resized, slug


def sampled(folder, *arguments):
    """(what pictures.json says, (prompt, noise, model) -> (H, W, 3) levels)."""
    assert main(["sample", *map(str, arguments), "--output", str(folder)]) == 0
    content = json.loads((folder / "pictures.json").read_text())
    found = {
        (entry["prompt"], entry["noise"], entry["model"]): np.asarray(Image.open(folder / entry["file"]))
        for entry in content["pictures"]
    }
    assert len(found) == len(content["pictures"]) == len(list(folder.glob("*.png"))) - 1
    return content, found


TEXTS = ("two threes", "a one above a two", "a cat")


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    return sampled(tmp_path_factory.mktemp("sampled") / "all", run, *TEXTS, "--noises", "2")


def test_pictures_are_those_of_the_runs_own_evaluations(run, tmp_path):
    """Of the held-out prompts: every one that the strips show, from the first noise."""
    prompts = held_out_prompts(open_run(run).config)
    (tmp_path / "held_out.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
    _, found = sampled(tmp_path / "all", run, "--prompts", tmp_path / "held_out.txt", "--noises", "2",
                       "--checkpoint", "2,4")  # fmt: skip
    for model, step in (("before", 0), ("iteration 2", 2), ("iteration 4", 4)):
        strip = np.asarray(Image.open(run / "pictures" / f"step_{step:06d}.png"))
        shown = [found[prompts[place].text, 0, model] for place in (0, 2, 4)]
        assert np.array_equal(strip, np.concatenate(shown, axis=1)), model


def test_before_and_after_of_the_same_noises(run, pictures, tmp_path):
    _, found = pictures
    assert {key[:2] for key in found} == {(text, noise) for text in TEXTS for noise in (0, 1)}
    for text in TEXTS:
        assert not np.array_equal(found[text, 0, "before"], found[text, 1, "before"]), "noises differ"
    changed = [key for key in found if not np.array_equal(found[key], found[*key[:2], "before"])]
    assert changed and len(changed) <= 6, "training changed some"
    far = [np.abs(found[text, noise, "before"].astype(int) - found[text, other, "iteration 4"]).mean()
           for text in TEXTS for noise, other in ((0, 0), (0, 1))]  # fmt: skip
    assert all(same < differing for same, differing in zip(far[::2], far[1::2], strict=True))


def test_the_same_prompts_and_seed_have_the_same_noises(run, pictures, tmp_path):
    """Whatever else is asked for; another seed, and another place among the prompts, give others."""
    _, found = pictures
    _, raw = sampled(tmp_path / "raw", run, *TEXTS, "--noises", "3", "--weights", "raw", "--seed", "42")
    _, alone = sampled(tmp_path / "alone", "digits", "eval.steps=4", *TEXTS, "--noises", "2")
    _, other = sampled(tmp_path / "other", run, *TEXTS, "--noises", "1", "--no-before", "--seed", "7")
    _, moved = sampled(tmp_path / "moved", "digits", "eval.steps=4", *TEXTS[::-1], "--noises", "2")
    assert {model for _, _, model in other} == {"iteration 4"}
    for text in TEXTS:
        for noise in (0, 1):
            assert np.array_equal(raw[text, noise, "before"], found[text, noise, "before"])
            assert np.array_equal(alone[text, noise, "digits"], found[text, noise, "before"])
        assert not np.array_equal(other[text, 0, "iteration 4"], found[text, 0, "iteration 4"])
    assert any(not np.array_equal(raw[text, 0, "iteration 4 (raw)"], found[text, 0, "iteration 4"]) for text in TEXTS)
    assert not np.array_equal(moved[TEXTS[0], 0, "digits"], alone[TEXTS[0], 0, "digits"])


def test_what_made_each_picture(run, pictures):
    content, _ = pictures
    assert content["run"] == str(run) and content["seed"] == 42 and content["steps"] == 4
    entry = next(item for item in content["pictures"] if item["file"] == "001-a_one_above_a_two-1-iteration_4.png")
    assert entry == {"file": entry["file"], "prompt": "a one above a two", "slot": 1, "noise": 1,
                     "model": "iteration 4", "checkpoint": "step_000004", "iteration": 4,
                     "weights": "averaged"}  # fmt: skip


def test_the_grid_holds_every_picture(run, tmp_path):
    """Side by side: before, after; then the next noise. Dots of 16 x 16 pictures are enlarged eightfold."""
    _, found = sampled(tmp_path / "grid", run, *TEXTS, "--noises", "2")
    grid = np.asarray(Image.open(tmp_path / "grid" / "grid.png"))
    lefts = [4, 136, 292, 424]
    for text in TEXTS:
        keys = [(text, noise, model) for noise in (0, 1) for model in ("before", "iteration 4")]
        tiles = [found[key].repeat(8, 0).repeat(8, 1) for key in keys]
        tops = [y for y in range(len(grid) - 127) if np.array_equal(grid[y : y + 128, 4:132], tiles[0])]
        assert len(tops) == 1, text
        for left, tile in zip(lefts, tiles, strict=True):
            assert np.array_equal(grid[tops[0] : tops[0] + 128, left : left + 128], tile)


def test_words_are_told_apart(tmp_path, monkeypatch):
    """Settings may stand among prompts; a prompt file is added; options may stand anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"prompt": "eval.steps=3", "kind": "odd"}\n')
    assert main(["sample", "digits,flow_grpo", "two threes", "--noises", "1", "eval.steps=2", "a.b c = d",
                 "--prompts", "more.jsonl"]) == 0  # fmt: skip
    content = json.loads((tmp_path / "samples" / "digits_flow_grpo" / "pictures.json").read_text())
    assert [entry["prompt"] for entry in content["pictures"]] == ["two threes", "a.b c = d", "eval.steps=3"]
    assert content["steps"] == 2 and content["stack"] == "digits_flow_grpo"


def test_a_lora_file_and_all_parameters(run, full_run, tmp_path):
    """A file that a run left is that run's last checkpoint; full training has a before, too."""
    lora = f"model.lora={run / 'pytorch_lora_weights.safetensors'}"
    _, lent = sampled(tmp_path / "lora", "digits", lora, "eval.steps=4", "two threes", "--noises", "2")
    _, own = sampled(tmp_path / "own", run, "two threes", "--noises", "2")
    assert np.array_equal(lent["two threes", 1, "digits"], own["two threes", 1, "iteration 4"])
    _, full = sampled(tmp_path / "full", full_run, "two threes", "--noises", "1")
    assert np.array_equal(full["two threes", 0, "before"], own["two threes", 0, "before"])
    assert not np.array_equal(full["two threes", 0, "iteration 1"], full["two threes", 0, "before"])


@pytest.mark.parametrize(("size", "shown"), [((16, 16), (128, 128)), ((48, 64), (96, 128)), ((200, 100), (200, 100)),
                                             ((1024, 512), (384, 192))])  # fmt: skip
def test_sizes_in_the_grid(size, shown):
    assert resized(Image.new("RGB", size)).size == shown


def test_names_of_files():
    assert slug("Two  threes!") == "two_threes" and slug("?") == "prompt" and slug("../a/b") == "a_b"
    assert len(slug("a long prompt " * 20)) <= 40 and slug("\u6f22\u5b57") == "\u6f22\u5b57"


OPTIONS = {"--noises": "0", "--checkpoint": "3", "--weights": "x", "--output": "{run}", "--seed": "-1", "--rows": "0",
           "--prompts": "nowhere.txt"}  # fmt: skip


@pytest.mark.parametrize(("arguments", "field"), [
    ([], "arguments"), (["two threes"], "run"), (["digits"], "prompt"), (["digits", ""], "prompt"),
    (["digits", "  "], "prompt"), (["{run}", "two threes", "eval.stpes=3"], "eval.stpes"),
    (["digits", "flow_grpo"], "prompt"), (["digits", "my.yaml"], "prompt"), (["digits", "lr=3"], "prompt"),
    (["digits", "two threes", "eval.stpes=3"], "eval.stpes"), (["digitz", "two threes"], "preset"),
    (["nowhere/run", "two threes"], "run"), (["{run}/checkpoints", "two threes"], "run"),
    (["digits", "two threes", "--checkpoint", "last"], "--checkpoint"), (["digits", "two\x00threes"], "prompt"),
    (["{run}", "two threes", "--output", "/proc/x"], "--output"), (["digits", "a cat", "--frobnicate"], "arguments"),
    *((["{run}", "two threes", name, value], name) for name, value in OPTIONS.items()),
])  # fmt: skip
def test_wrong_input_is_one_line(run, capfd, tmp_path, monkeypatch, arguments, field):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *(word.format(run=run) for word in arguments)]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("tempflow: ")]
    assert len(said) == 1 and said[0].startswith(f"tempflow: {field}="), said
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert main(["sample", "digits", "two threes"]) == 2
    assert "tempflow: WORLD_SIZE=2" in capfd.readouterr().err


def test_a_run_that_holds_no_weights(run, capfd, tmp_path):
    names = shutil.ignore_patterns("checkpoints", "*.safetensors")
    shutil.copytree(run, tmp_path / "copied", ignore=names)
    assert main(["sample", str(tmp_path / "copied"), "two threes"]) == 2
    assert "no weights" in capfd.readouterr().err
