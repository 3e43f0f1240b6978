"""Every method preset runs on the shipped pipeline, and its plan says what the network really computes."""

import re

import pytest
import torch

from tempflow.models.network.network import TrainedNetwork
from tempflow.records.rows import read_metrics
from tempflow.train import main

SIX = ["sample.steps=6", "learn.iterations=2", "learn.updates=1", "eval.prompts=2", "eval.steps=2", "eval.pictures=1",
       "run.trackers=[]"]  # fmt: skip
ALONE = [*SIX, "explore.prompts=2", "learn.rows=2"]
CHAINS, SIBLINGS = ["explore.noises=3"], ["explore.siblings=3"]

METHODS = {
    "tempflow": ["explore.noises=1", *SIBLINGS], "flow_grpo": CHAINS, "flow_grpo_prompt": CHAINS,
    "flow_grpo_fast": CHAINS, "mixgrpo": SIBLINGS, "mixgrpo_flash": SIBLINGS, "dance_grpo": SIBLINGS,
    "g2rpo": SIBLINGS, "flash_grpo": CHAINS, "flow_cps": CHAINS, "egrpo": SIBLINGS, "flow_grpo guard": CHAINS,
}  # fmt: skip
IMAGES = {"tempflow": 30, "g2rpo": 36, "egrpo": 36, "flash_grpo": 6, "mixgrpo": 6, "mixgrpo_flash": 6, "dance_grpo": 6}
"""Pictures decoded and scored in an iteration: branches, once for each tail; 6 where it is not said."""


@pytest.fixture
def rows(monkeypatch) -> list[tuple[int, str]]:
    """Every network call: its rows, and whether it learns, is exploring with trained weights, or uses merged ones."""
    seen, forward = [], TrainedNetwork.forward

    def counting(self, inputs, device):
        kind = "learn" if torch.is_grad_enabled() else "plain"
        seen.append((len(inputs["hidden_states"]), kind))
        return forward(self, inputs, device)

    monkeypatch.setattr(TrainedNetwork, "forward", counting)
    return seen


def numbers(text: str, pattern: str) -> tuple[int, ...]:
    """The numbers in the plan's words."""
    return tuple(int(found.replace(",", "")) for found in re.search(pattern, text).groups())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_samples_and_learns_with_one_and_the_same_policy(tmp_path, capsys, rows, method):
    """The first update's ratio is exactly 1; the plan's figures are the network's rows and the pictures."""
    names, folder = method.split(), tmp_path / "run"
    assert main(["digits", *names, *ALONE, *METHODS[method], "prompts.test=null", f"run.dir={folder}"]) == 0
    start, *found = read_metrics(folder / "metrics.jsonl")
    assert [row["first_log_ratio_max"] for row in found] == [0.0, 0.0]
    assert found[0]["grad_norm"] > 0 and len(start["sigmas"]) == 7
    words = capsys.readouterr().err
    trunk, tails, learning = numbers(words, r"network rows: trunk ([\d,]+),.* tails ([\d,]+), learning ([\d,]+)")
    window = numbers(words, r"windows ([\d,]+),")[0] if "windows" in words else 0
    (images,) = numbers(words, r"siblings, ([\d,]+) images to decode")
    assert images == IMAGES.get(method, 6) and numbers(words, r"optimizer steps, ([\d,]+) images")[0] == 2 * images
    assert sum(count for count, kind in rows if kind == "learn") <= 2 * learning
    if method not in DRAWN:
        probes = 1 + len(set(names) & {"g2rpo", "egrpo"})  # an engine carries one branch over its last step first
        assert sum(count for count, kind in rows if kind == "plain") - probes == 2 * (trunk + window + tails)


DRAWN = ("flow_grpo_fast", "flash_grpo", "mixgrpo")
"""Forks that are drawn or slide are costed at their earliest."""


def test_windows_and_second_tails_are_counted(tmp_path, capsys, rows):
    """4 trunks fork at 0 and 2 of T = 6 for two steps each; tails of 4 and 2 steps, coarse ones of 2 and 1; with KL."""
    settings = ["explore.noises=2", *SIBLINGS, "explore.forks=[0,2]", "explore.window=2", "tails.stride=[1,2]",
                "objective.kl=0.01", "prompts.test=null", "learn.iterations=1", "learn.updates=2"]  # fmt: skip
    assert main(["digits", *ALONE, *settings, f"run.dir={tmp_path / 'run'}"]) == 0
    words = capsys.readouterr().err
    assert ("network rows: trunk 12, windows 24, tails 108, learning 64, 208 in all" in words
            and "4 trunks x 2 forks x 3 siblings, 48 images to decode" in words)  # fmt: skip
    assert sum(count for count, kind in rows if kind == "learn") == 8 + 24
    assert sum(count for count, kind in rows if kind == "plain") - 2 == 12 + 24 + 108 + 32
    assert ("into 3 siblings, 2 stochastic steps each = 24 branches, 2 images each; advantages among 3 branches "
            "(credit.group=seed: one prompt, one initial noise, one fork), 8 groups") in words  # fmt: skip
    assert "learning: 2 optimizer steps an iteration; each takes 16 network rows, with the 12 branches" in words
    assert "the run: 1 iterations, 2 optimizer steps, 48 images" in words
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    forked = [step for step, value in enumerate(row["reward_std_per_step"]) if value is not None]
    assert row["rollouts"] == 24 and forked == [0, 2]
