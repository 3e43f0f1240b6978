"""Whole runs whose scorers are several, elsewhere, without opinion, failing or hacked."""

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scorer_faults import serving
from small_runs import SMALL

from tempflow.common.stopping import HALTED
from tempflow.records.rows import read_metrics
from tempflow.train import main

SCORERS = """
import torch
from pathlib import Path
from tempflow.digits.scorers import DigitsReward

HERE = Path(__file__).parent
judge, calls = DigitsReward(), {"flaky": 0, "rising": 0, "falling": 0}

def flaky(images, prompts):
    "Says infinity at the call whose number stands in the file `fails`."
    calls["flaky"] += 1
    scores = judge(images, prompts)
    return scores / 0 if (HERE / "fails").read_text() == str(calls["flaky"]) else scores

def stopping(images, prompts):
    calls["flaky"] += 1
    if (HERE / "fails").read_text() == str(calls["flaky"]):
        raise KeyboardInterrupt
    return judge(images, prompts)

def choosy(images, prompts):
    "No opinion of every second picture."
    return judge(images, prompts).where(torch.arange(len(images)) % 2 == 0, torch.nan)

def contrary(images, prompts):
    return judge(images, prompts).where(torch.arange(len(images)) % 2 == 1, torch.nan)

def rising(images, prompts):
    calls["rising"] += 1
    return judge(images, prompts) + calls["rising"]

def falling(images, prompts):
    calls["falling"] += 1
    return [-float(calls["falling"])] * len(images)
"""
FIGURES = {"step", "rollouts", "reward_mean", "reward_means", "reward_std_per_step", "rewards_missing", "groups_masked",
           "log_ratio_max", "grad_norm", "gold", "reward_test", "scores_missing"}  # fmt: skip


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    (tmp_path / "run_scorers.py").write_text(SCORERS)
    (tmp_path / "fails").write_text("0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("run_scorers", None)


def run(folder, *overrides: str) -> int:
    return main([*SMALL, "run.trackers=[]", "learn.iterations=3", "run.save_every=0", f"run.dir={folder}", *overrides])


def figures(folder):
    """What does not depend on time."""
    return [{name: row[name] for name in row.keys() & FIGURES} for row in read_metrics(folder / "metrics.jsonl")]


def weights(folder):
    return load_file(sorted(folder.glob("checkpoints/step_*"))[-1] / "parameters.safetensors")


def same_weights(one, other) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Three iterations with the scorers in this process."""
    folder = tmp_path_factory.mktemp("runs") / "here"
    assert run(folder) == 0
    return folder


def test_one_override_moves_the_scorers_to_servers_that_may_die(here, tmp_path, capsys):
    """Same metrics and weights, bit for bit: with two servers, of which one dies; and with one that dies, then resumed.

    Where the only server is gone, the run ends with one clear line and exit code 2, saved as of its last iteration.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    with serving("digits", "digits_gold") as (process, url), serving("digits", "digits_gold") as (other, other_url):
        with killing(other, first / "metrics.jsonl", 1):
            assert run(first, f"reward.servers=[{url}, {other_url}]") == 0
        assert "rewards: 1 x digits on servers\ntempflow: gold: digits_gold on servers" in capsys.readouterr().err
        with killing(process, second / "metrics.jsonl", 2):
            assert run(second, f"reward.servers=[{url}]", "reward.patience=0.3", "reward.timeout=5") == HALTED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: reward.servers")]
    assert "no answer within reward.patience=0.3 s" in line and "is saved, go on with run.resume=true" in line
    assert run(second, "run.resume=true") == 0  # in this process, as the servers are gone
    for folder in (first, second):
        assert figures(folder) == figures(here) and same_weights(folder, here)
    assert figures(here)[1]["rewards_missing"] == 0


@contextmanager
def killing(process, metrics: Path, rows: int):
    """Kills a server as soon as so many rows of metrics are there."""

    def kill() -> None:
        until = time.monotonic() + 60
        while len(read_metrics(metrics)) < rows and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(("call", "iteration"), [(4, 1), (6, 2)], ids=["training", "evaluation"])
def test_a_failing_scorer_costs_nothing_that_was_learnt(scorers, here, capsys, call, iteration):
    """Calls: evaluation, iteration 1, 2, 3, ... of which evaluation follows 2: what is not finished is repeated."""
    folder, name = scorers / "run", "reward.name=run_scorers:flaky"
    (scorers / "fails").write_text(str({1: 3, 2: 4}[iteration]))
    assert run(folder, name) == HALTED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: reward.name")]
    assert "infinite" in line and f"iteration {iteration} is saved" in line
    assert [path.name for path in folder.glob("checkpoints/step_*")] == [f"step_00000{iteration}"]
    progress = json.loads((folder / "checkpoints" / f"step_00000{iteration}" / "state.json").read_text())["progress"]
    assert progress["unevaluated"] == (iteration == 2), "what was learnt is kept, what was not scored is owed"
    assert [row["step"] for row in figures(folder)] == list(range(iteration + 1))
    assert run(folder, name, "run.resume=true") == 0
    expected = [row | {"reward_means": {"flaky": row["reward_mean"]}} if row["step"] else row for row in figures(here)]
    assert figures(folder) == expected and same_weights(folder, here)


def test_several_rewards_and_golds_some_without_opinion(scorers):
    """Each by itself in the metrics; what is missing is masked and counted, never averaged in."""
    name = "reward.name={digits: 1.0, 'run_scorers:choosy': 0.5}"
    assert run(scorers / "run", name, "reward.gold=[run_scorers:choosy, digits_gold]", "learn.iterations=1") == 0
    start, row = read_metrics(scorers / "run" / "metrics.jsonl")
    assert 0 < start["scores_missing"] <= 12 and start["gold_choosy"] == start["reward_test_choosy"]
    assert {"reward_test", "reward_test_digits", "gold_digits_gold"} <= start.keys() and "gold" not in start
    assert 0 < row["rewards_missing"] < 24 and set(row["reward_means"]) == {"digits", "choosy"}
    assert all(0 < mean < 1 for mean in row["reward_means"].values()) and 0 < row["reward_mean"] < 1.5
    assert row["grad_norm"] > 0 and (scorers / "run" / "report.png").is_file()


def test_rewards_that_never_meet_need_advantages(scorers, capsys):
    """Each scorer knows half of the pictures: no sum exists, advantages do."""
    name = "reward.name={'run_scorers:choosy': 1.0, 'run_scorers:contrary': 1.0}"
    assert run(scorers / "sum", name, "prompts.test=null", "learn.iterations=1") == 2
    assert "use reward.combine=advantages" in capsys.readouterr().err
    assert run(scorers / "run", name, "reward.combine=advantages", "learn.iterations=1") == 0
    start, row = read_metrics(scorers / "run" / "metrics.jsonl")
    assert row["reward_mean"] is None and start["reward_test"] is None and row["grad_norm"] > 0


def test_a_hacked_reward_is_told_and_ends_the_run_if_asked(scorers, capsys):
    hacked = ("reward.name=run_scorers:rising", "reward.gold=run_scorers:falling", "learn.iterations=2", "eval.every=1")
    assert run(scorers / "run", *hacked, "reward.hacking_stop=true") == 0
    printed = capsys.readouterr().err
    assert "warning: iteration 1: gold is 1 below its best while the reward rose" in printed
    assert "stopped, as reward.hacking_stop asks" in printed
    assert [path.name for path in (scorers / "run").glob("checkpoints/*")] == ["best.json", "step_000001"]
    assert run(scorers / "run", *hacked, "run.resume=true") == 0  # goes on, and still remembers the best
    assert "tempflow: done" in capsys.readouterr().err
    fallen = [row.get("gold_fall") for row in read_metrics(scorers / "run" / "metrics.jsonl")]
    assert fallen == [None, {"gold": 1.0}, {"gold": 2.0}]


@pytest.mark.parametrize("scorer", ["ocr", "digits"])
def test_prompts_that_a_scorer_cannot_judge_are_refused_before_anything_is_written(tmp_path, capsys, scorer):
    """The last of the training prompts, and a held-out one for a scorer that is only watched."""
    asked = '{"prompt": "a sign", "text": "STOP", "grids": [[1, 2, 3, 4]]}\n'
    (tmp_path / "good.jsonl").write_text(asked)
    (tmp_path / "bad.jsonl").write_text(asked * 3 + '{"prompt": "a cat"}\n')
    for role, train, test in (("name", "bad", "good"), ("gold", "good", "bad")):
        scorers = {"name": "jpeg_compressibility", "gold": "null"} | {role: scorer}
        overrides = [f"reward.{key}={value}" for key, value in scorers.items()]
        prompts = [f"prompts.train={tmp_path / train}.jsonl", f"prompts.test={tmp_path / test}.jsonl"]
        assert run(tmp_path / "run", *overrides, *prompts) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: reward.")]
        assert f"reward.{role}={scorer}: the scorer refuses a prompt" in line and "a cat" in line
        assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_with_one_line_and_resumes(scorers, here, capsys):
    folder, name = scorers / "run", "reward.name=run_scorers:stopping"
    (scorers / "fails").write_text("3")
    assert run(folder, name, "run.save_every=1") == 130
    assert "tempflow: SIGINT: iteration 1 is saved, go on with run.resume=true" in capsys.readouterr().err
    (scorers / "fails").write_text("0")
    assert run(folder, name, "run.resume=true") == 0 and same_weights(folder, here)
