"""Whole runs through the command line's own entry point: outputs, resume, wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import SMALL, train
from tempflow_kernels import normal_like

from tempflow.learn.batches import TransitionBatch
from tempflow.learn.noise import LossNoise
from tempflow.learn.objective import make_objective
from tempflow.learn.stepper import Stepper
from tempflow.records.rows import read_metrics
from tempflow.settings.fields import ObjectiveConfig
from tempflow.train import backward, main


def test_a_run_writes_everything(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "report.png", "report.html", "pytorch_lora_weights.safetensors",
                "tensorboard", "trackers.json", "versions.json"}  # fmt: skip
    assert expected <= names
    strip = Image.open(finished / "pictures" / "step_000004.png")
    assert strip.size == (3 * 16, 16)
    assert [path.name for path in sorted((finished / "pictures").iterdir())] == [
        f"step_{step:06d}.png" for step in (0, 2, 4)
    ]
    assert [path.name for path in sorted((finished / "checkpoints").glob("step_*"))] == ["step_000002", "step_000004"]
    files = {path.suffix for path in finished.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert files <= {".yaml", ".jsonl", ".json", ".png", ".webp", ".html", ".safetensors", ""}, "no pickle"
    assert not list(finished.rglob("*.partial")) and any((finished / "tensorboard").iterdir())


def test_metrics_have_their_fields(finished):
    start, *rows = read_metrics(finished / "metrics.jsonl")
    assert start["step"] == 0 and 0 <= start["gold"] <= 1 and len(start["loss_weights"]) == 4
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for before, row in zip([start, *rows], rows, strict=False):
        numbers = ("reward_mean", "log_ratio_mean", "log_ratio_max", "clip_fraction", "grad_norm", "kl")
        assert all(row[name] >= 0 for name in numbers) and row["reward_means"] == {"digits": row["reward_mean"]}
        assert 0 < row["reward_mean"] < 1 and 0 <= row["groups_masked"] <= 8 and row["grad_norm"] > 0
        took = 24 * 3600 / row["rollouts_per_hour"]
        assert 0 < took < row["seconds"] - before["seconds"] + 0.01
        assert took > sum(row["phase_seconds"][name] for name in ("trunk", "tails", "learn")) - 0.01
        assert row["first_log_ratio_max"] == 0.0 and row["rollouts"] == 24 * row["step"]
        assert [value is None for value in row["reward_std_per_step"]] == [False, True, True, False]
        assert {"trunk", "tails", "decode", "reward", "learn"} <= set(row["phase_seconds"])
        assert ("gold" in row) == (row["step"] % 2 == 0)
    assert rows[-1]["kl"] > 0 and rows[-1]["log_ratio_max"] > 0


def test_resume_continues_as_if_never_stopped(finished, tmp_path):
    arguments = ("learn.updates=2", "objective.kl=0.01")
    folder = tmp_path / "stopped"
    assert train(folder, "learn.iterations=2", *arguments) == 0
    assert train(folder, "run.resume=true", *arguments) == 0
    for name in ("parameters", "average", "optimizer"):
        file = Path("checkpoints", "step_000004", f"{name}.safetensors")
        whole, parts = load_file(finished / file), load_file(folder / file)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    timeless = [
        [{key: row[key] for key in ("step", "rollouts", "reward_mean", "grad_norm") if key in row} for row in
         read_metrics(run / "metrics.jsonl")] for run in (finished, folder)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
    seconds = [row["seconds"] for row in read_metrics(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds) and seconds[3] > seconds[2] > 0, "time goes on where the run was stopped"


def test_the_learning_rate_falls_to_zero_after_the_last_iteration(tmp_path, monkeypatch):
    rates, step = [], Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self: (rates.append(self.optimizer.param_groups[0]["lr"]), step(self)))
    changed = ("learn.lr=0.001", "learn.lr_schedule=linear", "learn.iterations=2", "prompts.test=null")
    assert train(tmp_path / "run", *changed, "run.trackers=[]") == 0
    assert rates == [0.001, 0.0005]


@pytest.mark.parametrize(("advantage", "learns"), [(1.0, False), (-1.0, True)])
@pytest.mark.parametrize("towards", [1, -1])
def test_ratios_are_clipped_on_both_sides(toy, schedule, advantage, learns, towards):
    """A policy that has moved beyond the clip range learns no more in that direction, and may return."""
    objective = make_objective(ObjectiveConfig(clip=1e-6), schedule, range(9))
    latents, texts, keys = torch.ones(1, 2, 3), toy.encode(["abc"]), torch.tensor([[5, 0]])
    steps = torch.tensor([3])
    noise = normal_like(latents, keys, 1)[:, 0]
    moved = toy.velocity(latents, schedule.sigma_rows(steps), texts).detach()
    decision = towards * 1e-3 * torch.sign(schedule.sde.v_coef[3]).float() * noise
    batch = TransitionBatch(steps, latents, moved - decision, keys, torch.tensor([[towards * advantage]]),
                            objective.rows(steps, torch.tensor([True])), texts, 1.0)  # fmt: skip
    stepper = SimpleNamespace(backward=lambda loss: loss.backward())
    parts = SimpleNamespace(policy=toy, schedule=schedule, method=SimpleNamespace(objective=objective), stepper=stepper,
                            noise=LossNoise(False))  # fmt: skip
    stats = backward(parts, batch)
    assert stats.clip_fraction == 1 and (stats.ratio_mean > 1) == (towards > 0)
    assert bool(toy.scale.grad.abs().sum() > 0) == learns


def test_resume_drops_lines_after_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "learn.iterations=2") == 0
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "reward_mean": 99.0}) + '\n{"step": 4, "rew')
    assert train(folder, "run.resume=true", "learn.iterations=3") == 0
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1]["reward_mean"] < 2


def test_full_training_and_other_settings_run(tmp_path):
    """Full fine-tuning, a random subset of forks, inner epochs, prompt groups, Dance-SDE, no held-out prompts."""
    folder = tmp_path / "full"
    overrides = ["model.train=full", "objective.kl=0.001", "objective.kl_divisor=diffusion", "explore.forks=random:2",
                 "learn.inner_epochs=2", "credit.group=prompt", "credit.std=global", "run.trackers=[]",
                 "prompts.test=null", "objective.weighting=uniform", "sample.transition=dance_sde",
                 "learn.lr=1e-5"]  # fmt: skip
    assert train(folder, *overrides) == 0
    rows = read_metrics(folder / "metrics.jsonl")
    assert "gold" not in rows[-1] and (folder / "transformer" / "config.json").is_file()
    spreads = [row["reward_std_per_step"] for row in rows[1:]]
    forked = [tuple(step for step, value in enumerate(spread) if value is not None) for spread in spreads]
    assert all(len(steps) == 2 for steps in forked) and len(set(forked)) > 1
    assert rows[-1]["log_ratio_max"] > 0 == rows[-1]["first_log_ratio_max"]


def test_plan_only_prints_and_writes_nothing(tmp_path, capsys):
    assert train(tmp_path / "none", "run.plan_only=true") == 0
    printed = capsys.readouterr().err
    assert "4 trunks x 2 forks x 3 siblings, 24 images to decode" in printed
    assert "advantages among 3 branches" in printed
    assert not (tmp_path / "none").exists()


def test_a_run_on_gpus_can_be_planned_on_a_laptop(tmp_path, capsys):
    """Memory is planned for a GPU; settings that only a GPU serves are refused where a run would begin."""
    settings = ("tails.level=compiled_graph", "tails.autotune=true", f"run.dir={tmp_path / 'none'}")
    assert main(["digits", *settings, "run.plan_only=true"]) == 0 and "captured tails" in capsys.readouterr().err
    assert main(["digits", *settings]) == 2 and "tails.level" in capsys.readouterr().err


def test_help_prints_every_field(capsys):
    assert main(["--help"]) == 0
    assert "explore.siblings=6" in capsys.readouterr().out


BAD_SCORERS = """
import torch
def short(images, prompts): return torch.zeros(len(images) - 1)
def nan(images, prompts): return torch.full((len(images),), float("nan"))
"""

WRONG_INPUT = [
    (["model.path=/nowhere"], "model.path", "no such folder"),
    (["prompts.train=/nowhere.txt"], "prompts.train", "no such file"),
    (["prompts.train={folder}/empty.txt"], "prompts.train", "no prompt"),
    (["explore.siblings=1"], "explore.siblings", "at least 2"),
    (["explore.forks=[0,4]"], "explore.forks", "0 .. 3"),
    (["model.path={folder}/other"], "model.path", "supported are StableDiffusion3Pipeline"),
    (["credit.group=prompt", "explore.noises=1", "explore.siblings=1", "learn.rows=1"], "explore.noises", "at least 2"),
    (["explore.siblings=1", "explore.noises=2"], "explore.siblings", "at least 2"),
    (["flow_grpo", "explore.siblings=1", "explore.noises=1"], "explore.noises", "at least 2"),
    (["explore.window=2"], "explore.window", "from the fork at step 3"),
    (["explore.forks=[3]", "explore.jump=2"], "explore.jump", "from the fork at step 3"),
    (["explore.forks=random:4", "explore.window=2"], "explore.forks", "only 3 steps may fork"),
    (["flux1_dev"], "preset", "two models"),
    (["mixgrpo", "g2rpo"], "preset", "two methods"),
    (["mixgrp"], "preset", "nearest: mixgrpo"),
    (["branch.seeds=4"], "branch.seeds", "explore.noises"),
    (["sample.transition=cps", "objective.ratio=guard", "sample.noise_level=2"], "sample.noise_level", "below 2"),
    (["credit.group=batch", "explore.draw=prompt"], "credit.group", "mix"),
    (["objective.weighting=[1.0]"], "objective.weighting", "give 4 numbers"),
    (["sample.transition=cps", "objective.kl_divisor=diffusion"], "objective.kl_divisor", "std"),
    (["run.dir={folder}/empty.txt"], "run.dir", "exists already"),
    (["run.dir={folder}/" + 300 * "x"], "run.dir", "cannot be looked at"),
    (["learn.rows=3"], "learn.rows", "divide the 4 trunks"),
    (["learn.updates=3"], "learn.updates", "divide the 2 batches"),
    (["reward.name=bad_scorers:nan"], "reward.name", "NaN"),
    (["reward.name=bad_scorers:short"], "reward.name", "one number per image"),
    (["reward.gold=bad_scorers:none"], "reward.gold", "cannot be imported"),
    (["learn.lrr=1"], "learn.lrr", "learn.lr"),
    (["run.resume=true"], "run.resume", "no run"),
    (["run.dir=/proc/tempflow"], "run.dir", "cannot be written"),
    (["run.device=cuda"], "run.device", "no GPU") if not torch.cuda.is_available() else (["lr=1"], "argument", "form"),
]


@pytest.mark.parametrize(("overrides", "field", "words"), WRONG_INPUT, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, capsys, overrides, field, words):
    (tmp_path / "bad_scorers.py").write_text(BAD_SCORERS)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train(tmp_path / "run", *(override.format(folder=tmp_path) for override in overrides)) == 2
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith(f"tempflow: {field}=")]
    assert words in line and "Traceback" not in printed
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) <= 1 and not any("gold" in row or "reward_mean" in row for row in rows)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_existing_run_is_never_overwritten(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train(finished, "learn.updates=2", "objective.kl=0.01") == 2
    assert "run.resume=true" in capsys.readouterr().err
    assert train(finished, "run.resume=true", "learn.updates=2", "objective.kl=0.02") == 2
    assert "objective.kl=0.02" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def torchrun(folder: Path, processes: int) -> list[dict]:
    """A run under torchrun, as users start it: by the script or through the front door."""
    door = {1: ["-m", "tempflow", "train"], 2: [str(Path(__file__).parents[2] / "tempflow" / "train.py")]}[processes]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               *door, *SMALL, f"run.dir={folder}",
               "credit.group=batch", "learn.lr=1e-3", "learn.iterations=3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return read_metrics(folder / "metrics.jsonl")


def test_two_processes_draw_and_learn_what_one_does(tmp_path):
    """Whole prompts per rank, averaged gradients, groups across ranks: the same run up to the order of sums."""
    one, two = torchrun(tmp_path / "one", 1), torchrun(tmp_path / "two", 2)
    assert two[1]["reward_mean"] == pytest.approx(one[1]["reward_mean"], abs=1e-6)
    assert two[1]["reward_std_per_step"] == pytest.approx(one[1]["reward_std_per_step"], abs=2e-6, nan_ok=True)
    assert [row["rollouts"] for row in two] == [row["rollouts"] for row in one]
    assert len(one[0]["kinds"]) > 2 and two[0]["kinds"] == pytest.approx(one[0]["kinds"], abs=1e-6)
    assert all(row["first_log_ratio_max"] == 0 for row in two[1:])
    assert two[3]["grad_norm"] == pytest.approx(one[3]["grad_norm"], rel=1e-3)
    file = Path("checkpoints", "step_000003", "parameters.safetensors")
    weights = [load_file(tmp_path / name / file) for name in ("one", "two")]
    apart = torch.cat([(tensor - weights[1][name]).abs().flatten() for name, tensor in weights[0].items()])
    assert apart.mean() < 3e-5 and apart.max() < 1e-3  # AdamW takes a full step where a gradient is all rounding
