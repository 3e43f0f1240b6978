"""What a resumed run may change, what several processes cannot share, and who stops when one process fails."""

import re
from dataclasses import replace

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.parallel.ranks import Ranks
from tempflow.run.folder import check_folder, open_folder, write_settings
from tempflow.run.lock import FolderLock
from tempflow.settings.checks import check_consistency
from tempflow.settings.reading import load, read_values

ALONE = Ranks(0, 1, torch.device("cpu"))
KEPT = ["run.seed=1", "model.lora_rank=4", "sample.noise_level=0.9", "explore.window=2", "tails.stride=[1,2]",
        "tails.merged=false", "credit.clip=4.0", "objective.clip=0.1", "learn.lr=0.1", "learn.rows=6",
        "learn.inner_epochs=2", "prompts.train=other.txt", "reward.combine=advantages", "eval.prompts=3"]  # fmt: skip
FREE = ["learn.iterations=7", "eval.every=3", "tails.rows=5", "tails.level=eager", "reward.rows=9",
        "reward.overlap=false", "reward.servers=[http://h:1]", "run.save_every=1", "run.trackers=[]"]  # fmt: skip


@pytest.fixture
def begun(tmp_path):
    """A folder in which something was learnt."""
    write_settings(load(["digits", f"run.dir={tmp_path / 'run'}", "run.resume=true"]), ALONE)
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize("change", KEPT)
def test_what_was_learnt_with_stays(begun, change):
    with pytest.raises(BadInput) as caught:
        check_folder(load(["digits", f"run.dir={begun}", "run.resume=true", change]))
    assert caught.value.field == change.partition("=")[0]


@pytest.mark.parametrize(("change", "before"), [("learn.lr=0.1", "0.003"), ("model.lora_targets=[attn.to_q]", "null"),
                                                ("explore.forks=first:2", "all")])  # fmt: skip
def test_who_cannot_go_on_is_told_how_the_run_began_and_a_command_that_does(begun, change, before):
    """As after a release whose preset says something else."""
    with pytest.raises(BadInput, match=f"started with {before};") as caught:
        check_folder(load(["digits", f"run.dir={begun}", "run.resume=true", change]))
    command = re.search(r"`tempflow train (.+)`", caught.value.hint)[1].split()
    assert check_folder(load(command)).run.dir == str(begun)


def test_what_changes_no_result_may_change(begun):
    check_folder(load(["digits", f"run.dir={begun}", "run.resume=true", *FREE]))


def test_a_resumed_run_writes_settings_of_a_new_one(begun):
    assert read_values(str(begun / "config.yaml"))["run"]["resume"] is False


@pytest.mark.parametrize(("overrides", "ranks", "field"), [
    (["explore.prompts=3"], 2, "explore.prompts"),
    (["explore.prompts=4", "explore.noises=2", "learn.rows=8"], 2, "learn.rows"),
    (["explore.prompts=4", "explore.noises=2", "learn.rows=2", "learn.updates=4"], 2, "learn.updates"),
])  # fmt: skip
def test_processes_share_whole_prompts_and_batches(overrides, ranks, field):
    config = load(["digits", "learn.rows=1", *overrides])
    check_consistency(replace(config, explore=replace(config.explore, prompts=4)), 1)
    with pytest.raises(BadInput) as caught:
        check_consistency(config, ranks)
    assert caught.value.field == field


def test_of_two_that_begin_a_run_there_one_is_refused(tmp_path):
    """While the other works, and after it was quick; both found the folder free."""
    config = load(["digits", f"run.dir={tmp_path / 'run'}"])
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    open_folder(config, ALONE, first)
    with pytest.raises(BadInput, match=r"run\.dir="):
        open_folder(config, ALONE, second)
    write_settings(config, ALONE)
    first.release()
    with pytest.raises(BadInput, match=r"run\.dir="):
        open_folder(config, ALONE, second)


class TwoRanks(Ranks):
    """The first of two processes, whose other one fails."""

    def gather(self, values, dim):
        return torch.cat([values, torch.ones_like(values)], dim)


def test_where_one_process_fails_the_others_stop():
    with pytest.raises(BadInput) as caught:
        TwoRanks(0, 2, torch.device("cpu")).agree(lambda: "scores")
    assert caught.value.field == "reward"

    def failing():
        raise BadInput("reward.name", "mine", "no score")

    with pytest.raises(BadInput) as caught:
        TwoRanks(0, 2, torch.device("cpu")).agree(failing)
    assert caught.value.field == "reward.name"
    assert ALONE.agree(lambda: "scores") == "scores"


def test_the_process_that_fails_alone_says_why(capsys):
    class Second(Ranks):
        def gather(self, values, dim):
            return torch.cat([torch.zeros_like(values), values], dim)

    def failing():
        raise BadInput("tails.level", "graph", "does not work here")

    with pytest.raises(BadInput):
        Second(1, 2, torch.device("cpu")).agree(failing, "tails.level")
    assert "process 1" in capsys.readouterr().err
    with pytest.raises(BadInput) as caught:
        TwoRanks(0, 2, torch.device("cpu")).agree(lambda: "engines", "tails.level")
    assert caught.value.field == "tails.level" and not capsys.readouterr().err
