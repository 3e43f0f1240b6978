"""Whole runs whose scorers are several, elsewhere, without opinion, failing or hacked."""

import sys
import threading
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scorer_faults import serving
from test_train import SMALL

from tempflow.metrics import read_metrics
from tempflow.train import main

SCORERS = """
import torch
from pathlib import Path
from tempflow.rewards.digits import DigitsReward

HERE = Path(__file__).parent
judge, calls = DigitsReward(), {"flaky": 0, "rising": 0, "falling": 0}

def flaky(images, prompts):
    "Says infinity at the call whose number stands in the file `fails`."
    calls["flaky"] += 1
    scores = judge(images, prompts)
    return scores / 0 if (HERE / "fails").read_text() == str(calls["flaky"]) else scores

def choosy(images, prompts):
    "No opinion of pictures whose first pixel is odd."
    return judge(images, prompts).where(images[:, 0, 0, 0] % 2 == 0, torch.nan)

def contrary(images, prompts):
    return judge(images, prompts).where(images[:, 0, 0, 0] % 2 == 1, torch.nan)

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


def test_one_override_moves_the_scorers_to_a_server(here, tmp_path, capsys):
    """Same rewards, same metrics, same weights, bit for bit; one of two servers is killed amid the run."""
    with serving("digits", "digits_gold") as (_, url), serving("digits", "digits_gold") as (other, second):
        killer = threading.Thread(target=kill_after, args=(tmp_path / "run" / "metrics.jsonl", other))
        killer.start()
        assert run(tmp_path / "run", f"reward.servers=[{url}, {second}]") == 0
        killer.join()
    assert "rewards: 1 x digits on servers\ngold: digits_gold on servers" in capsys.readouterr().err
    assert figures(tmp_path / "run") == figures(here) and same_weights(tmp_path / "run", here)
    assert figures(here)[1]["rewards_missing"] == 0


def kill_after(metrics, process, rows: int = 1) -> None:
    """Kills a server as soon as so many rows of metrics are there."""
    until = time.monotonic() + 60
    while len(read_metrics(metrics)) < rows and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()


def test_a_run_without_servers_is_saved_and_goes_on_elsewhere(here, tmp_path, capsys):
    """The only server dies amid the run: one clear line, exit code 2; then another server, and the same numbers."""
    folder, patience = tmp_path / "run", ("reward.patience=0.3", "reward.timeout=5")
    with serving("digits") as (process, url):
        killer = threading.Thread(target=kill_after, args=(folder / "metrics.jsonl", process, 2))
        killer.start()
        assert run(folder, f"reward.servers=[{url}]", *patience) == 2
        killer.join()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: reward.servers")]
    assert "no answer within reward.patience=0.3 s" in line and "is saved, go on with run.resume=true" in line
    assert run(folder, "run.resume=true") == 0  # on this machine, as the server is gone
    assert figures(folder) == figures(here) and same_weights(folder, here)


@pytest.mark.parametrize(("call", "iteration"), [(4, 1), (6, 2)], ids=["training", "evaluation"])
def test_a_failing_scorer_costs_nothing_that_was_learnt(scorers, here, capsys, call, iteration):
    """Calls: evaluation, iteration 1, 2, 3, ... of which evaluation follows 2: what is not finished is repeated."""
    folder, name = scorers / "run", "reward.name=run_scorers:flaky"
    (scorers / "fails").write_text(str({1: 3, 2: 4}[iteration]))
    assert run(folder, name) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tempflow: reward.name")]
    assert "infinite" in line and f"iteration {iteration} is saved" in line
    assert [path.name for path in folder.glob("checkpoints/*")] == [f"step_00000{iteration}"]
    assert [row["step"] for row in figures(folder)] == list(range(iteration + (iteration == 1)))
    assert run(folder, name, "run.resume=true") == 0
    expected = [row | {"reward_means": {"flaky": row["reward_mean"]}} if row["step"] else row for row in figures(here)]
    assert figures(folder) == expected and same_weights(folder, here)


def test_rewards_without_opinion_are_masked_and_counted(scorers):
    assert run(scorers / "run", "reward.name=run_scorers:choosy", "reward.gold=[run_scorers:choosy, digits]") == 0
    start, *rows = read_metrics(scorers / "run" / "metrics.jsonl")
    assert 0 < start["scores_missing"] <= 12 and 0 < start["reward_test"] < 1
    assert start["gold_choosy"] == start["reward_test"] and "gold_digits" in start and "gold" not in start
    assert all(0 < row["rewards_missing"] < 24 and 0 < row["reward_mean"] < 1 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows) and Image.open(scorers / "run" / "report.png").size[0] > 1000


def test_several_rewards_by_themselves_and_together(scorers):
    name = "reward.name={digits: 1.0, 'run_scorers:choosy': 0.5}"
    assert run(scorers / "run", name, "learn.iterations=1") == 0
    start, row = read_metrics(scorers / "run" / "metrics.jsonl")
    assert set(row["reward_means"]) == {"digits", "choosy"} and row["reward_mean"] > row["reward_means"]["digits"]
    assert {"reward_test", "reward_test_digits", "reward_test_choosy", "gold"} <= start.keys()


def test_rewards_that_never_meet_need_advantages(scorers, capsys):
    """Each scorer knows half of the pictures: no sum exists, advantages do."""
    name = "reward.name={'run_scorers:choosy': 1.0, 'run_scorers:contrary': 1.0}"
    assert run(scorers / "sum", name, "prompts.test=null", "learn.iterations=1") == 2
    assert "use reward.combine=advantages" in capsys.readouterr().err
    assert run(scorers / "run", name, "reward.combine=advantages", "learn.iterations=1") == 0
    start, row = read_metrics(scorers / "run" / "metrics.jsonl")
    assert row["reward_mean"] is None and start["reward_test"] is None and row["grad_norm"] > 0


def test_a_hacked_reward_is_told_and_ends_the_run_if_asked(scorers, capsys):
    hacked = ("reward.name=run_scorers:rising", "reward.gold=run_scorers:falling", "learn.iterations=4", "eval.every=1")
    assert run(scorers / "told", *hacked, "learn.iterations=2") == 0
    printed = capsys.readouterr().err
    assert "warning: iteration 1: gold is 1 below its best while the reward rose" in printed and "done" in printed
    assert [row.get("gold_fall") for row in read_metrics(scorers / "told" / "metrics.jsonl")] == [
        None, {"gold": 1.0}, {"gold": 2.0}
    ]  # fmt: skip
    sys.modules.pop("run_scorers")
    assert run(scorers / "stopped", *hacked, "reward.hacking_stop=true") == 0
    assert "stopped, as reward.hacking_stop asks" in capsys.readouterr().err
    assert [path.name for path in (scorers / "stopped").glob("checkpoints/*")] == ["step_000001"]
