"""The folder of a run whose user chose none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import SMALL

from tempflow.common.errors import BadInput
from tempflow.parallel.ranks import Ranks
from tempflow.records.rows import read_metrics
from tempflow.run.numbered import choose_folder
from tempflow.settings.reading import load, to_yaml
from tempflow.train import main

ALONE = Ranks(0, 1, torch.device("cpu"))
QUICK = [*SMALL, "learn.iterations=1", "prompts.test=null", "run.trackers=[]"]

LATE = """
calls = []

def late(images, prompts):
    calls.append(1)
    if len(calls) > 1:
        raise RuntimeError("late")
    return [0.1 * place for place in range(len(images))]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(*names: str) -> None:
    """Folders with something of a run in them."""
    for name in names:
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(load(["digits"])))


def chosen(*arguments: str, ranks: Ranks = ALONE) -> str:
    return choose_folder(load(list(arguments)), ranks).run.dir


def test_the_first_command_can_be_given_twice(here, capsys):
    assert main(QUICK) == 0 and "writes to runs/digits:" in capsys.readouterr().err
    assert main(QUICK) == 0
    told = capsys.readouterr().err
    assert "run.dir=runs/digits run.resume=true" in told and "writes to runs/digits-2:" in told
    assert {path.name for path in (here / "runs").iterdir()} == {"digits", "digits-2"}
    assert load(["runs/digits-2/config.yaml"]).run.dir == "runs/digits-2"
    assert main([*QUICK, "run.resume=true", "learn.iterations=2"]) == 0
    steps = [read_metrics(here / "runs" / name / "metrics.jsonl")[-1]["step"] for name in ("digits", "digits-2")]
    assert steps == [1, 2], "the newest is gone on with"
    assert main([*QUICK, "run.dir=runs/digits"]) == 2, "a folder that was chosen is taken as it was meant"


def test_the_traceback_of_a_failure_is_in_the_folder_that_was_taken(here):
    (here / "breaks.py").write_text(LATE)
    begun("digits")
    code = main([*QUICK, "reward.name=breaks:late", "learn.iterations=2"])
    assert code == 75 and (here / "runs" / "digits-2" / "error.txt").is_file()
    assert not (here / "runs" / "digits" / "error.txt").exists()


@pytest.mark.parametrize(("taken", "fresh", "resumed"), [
    ([], "runs/digits", "runs/digits"),
    (["digits"], "runs/digits-2", "runs/digits"),
    (["digits", "digits-2"], "runs/digits-3", "runs/digits-2"),
    (["digits-4"], "runs/digits-5", "runs/digits-4"),
    (["digits", "digits-02", "digits-x", "digits-1x", "digits-old-3", "other-7"], "runs/digits-2", "runs/digits"),
    (["digits", "digits-9", "digits-10"], "runs/digits-11", "runs/digits-10"),
    (["digits", "digits-998"], "runs/digits-999", "runs/digits-998"),
    (["digits", "digits-20261124", "digits-2026", "digits-1124"], "runs/digits-2", "runs/digits"),
])  # fmt: skip
def test_numbers_go_up_and_resume_takes_the_highest(taken, fresh, resumed):
    begun(*taken)
    assert chosen() == fresh
    assert chosen("run.resume=true") == chosen("run.resume=auto") == resumed


def test_a_folder_that_a_run_never_began_in_is_free(here):
    begun("digits")
    (here / "runs" / "digits-2").mkdir()
    (here / "runs" / "digits-2" / ".lock").touch()
    assert chosen() == "runs/digits-2"


def test_a_preset_gives_a_name_and_a_file_of_the_user_a_choice(here):
    begun("geneval", "mine")
    assert chosen("sd35_medium", "geneval") == "runs/geneval-2"
    (here / "mine.yaml").write_text("extends: digits\nrun: {dir: runs/mine}\n")
    assert chosen("mine.yaml") == "runs/mine" and chosen("mine.yaml", "run.if_taken=number") == "runs/mine-2"
    (here / "over.yaml").write_text("extends: mine.yaml\n")
    assert load(["over.yaml"]).run.if_taken == "refuse" and load(["digits"]).run.if_taken == "number"


def test_every_process_takes_the_folder_that_the_first_one_chose():
    """Another process would see the folder that the first has made meanwhile."""

    class Second(Ranks):
        def gather(self, values, dim):
            return torch.cat([torch.tensor([2 if values.dtype == torch.int64 and ASKED else 0]), values])

        def agree(self, work, field="reward"):
            result = work()
            ASKED.append(result)
            return result

    ASKED: list[int] = []
    begun("digits", "digits-2", "digits-3")
    second = Second(1, 2, torch.device("cpu"))
    assert chosen(ranks=second) == "runs/digits-3" and ASKED == [0], "it does not look itself"


def test_a_folder_that_cannot_be_looked_at_is_one_line(here, monkeypatch):
    config = load(["digits"])
    config = replace(config, run=replace(config.run, dir="runs/" + "x" * 300))
    (here / "runs").mkdir()
    with pytest.raises(BadInput) as caught:
        choose_folder(config, ALONE)
    assert caught.value.field == "run.dir"
