"""`evaluate`: a run's own figures again, before and after in pairs, any scorer, any number of processes."""

import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from tempflow.__main__ import main
from tempflow.common.errors import BadInput
from tempflow.credit.decoding import Decoded
from tempflow.prompts import Prompt
from tempflow.records.rows import read_metrics
from tempflow.run.hacking import read_scores
from tempflow.trained.scoring import Patient, score
from tempflow.trained.source import Choice, Member, members, read_source
from tempflow.trained.summary import Scored, table, to_json

GOLD, REWARD = "digits_gold", "digits"


def evaluated(folder, *arguments):
    """The summary and the rows of scores.csv of an evaluation."""
    assert main(["evaluate", *map(str, arguments), "--output", str(folder)]) == 0
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((folder / "summary.json").read_text()), rows


def line(summary, scorer, model, kind="all"):
    return next(item for item in summary["lines"] if (item["scorer"], item["model"], item["kind"]) ==
                (scorer, model, kind))  # fmt: skip


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Before, and both checkpoints, of the run's own prompts and noises."""
    return evaluated(tmp_path_factory.mktemp("evaluated") / "whole", run, "--checkpoint", "2,last,4")


def test_figures_are_those_of_the_runs_own_evaluations(run, whole):
    """To the bit: means as in metrics.jsonl, and scores of each prompt."""
    summary, rows = whole
    told = {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if "gold" in row}
    kept = dict(zip((0, 2, 4), read_scores(run, 5), strict=True))
    assert [model["model"] for model in summary["models"]] == ["before", "iteration 2", "iteration 4"]
    assert summary["count"] == 6 and summary["noises"] == 2 and summary["seed"] == 42 and len(rows) == 3 * 6 * 2 * 2
    for model, step in (("before", 0), ("iteration 2", 2), ("iteration 4", 4)):
        for scorer, name in ((GOLD, "gold"), (REWARD, "reward_test")):
            assert line(summary, scorer, model)["score"]["mean"] == told[step][name], (model, scorer)
            own = [float(row["score"]) for row in rows if (row["model"], row["scorer"]) == (model, scorer)]
            assert torch.equal(torch.tensor(own).view(6, 2).mean(1), kept[step][name])
    assert told[0]["reward_test"] != told[2]["reward_test"] != told[4]["reward_test"]


def test_differences_are_of_pairs(whole):
    summary, rows = whole
    values = {model: torch.tensor([float(row["score"]) for row in rows if (row["model"], row["scorer"]) ==
                                   (model, REWARD)]).double().view(6, 2).mean(1)
              for model in ("before", "iteration 4")}  # fmt: skip
    found = line(summary, REWARD, "iteration 4")["difference"]
    expected = stats.ttest_rel(values["iteration 4"], values["before"])
    low, high = expected.confidence_interval(0.95)
    assert found["mean"] == pytest.approx((low + high) / 2, abs=1e-6)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    assert found["error"] == pytest.approx(found["mean"] / expected.statistic, rel=1e-3)
    assert line(summary, REWARD, "before")["difference"] is None


def test_kinds_of_prompts(whole):
    summary, rows = whole
    kinds = {row["kind"] for row in rows}
    assert kinds == {item["kind"] for item in summary["lines"]} - {"all"} and len(kinds) > 3
    for kind in kinds:
        own = [float(r["score"]) for r in rows if r["kind"] == kind and (r["model"], r["scorer"]) == ("before", GOLD)]
        score = line(summary, GOLD, "before", kind)["score"]
        assert score["mean"] == pytest.approx(sum(own) / len(own)) and score["prompts"] == len(own) / 2
    assert Prompt("a", {"tag": "counting"}).kind == "counting" and Prompt("a").kind == ""


def test_raw_weights_differ_from_averaged_ones(run, whole, tmp_path):
    summary, _ = evaluated(tmp_path / "raw", run, "--weights", "raw", "--no-before", "--reward", REWARD)
    raw = line(summary, REWARD, "iteration 4 (raw)")
    assert raw["score"]["mean"] != line(whole[0], REWARD, "iteration 4")["score"]["mean"]
    assert [model["model"] for model in summary["models"]] == ["iteration 4 (raw)"]
    assert raw["difference"] is None and summary["scorers"] == {REWARD: "reward"}


def test_scorers_prompts_noises_and_seed_of_ones_own(run, tmp_path, monkeypatch):
    """A prompt file without metadata, with a scorer that needs none; the run's scorers refuse it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("two threes\na cat\n")
    (tmp_path / "my_scorers.py").write_text(
        "class Level:\n    def __init__(self, factor=1.0):\n        self.factor = factor\n\n"
        "    def __call__(self, images, prompts):\n        return self.factor * images.float().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [run, "--prompts", "my.txt", "--noises", "3", "--no-before", "--rows", "2"]
    more = ["--reward", "my_scorers:Level", "--reward", "jpeg_compressibility"]
    once, rows = evaluated(tmp_path / "once", *arguments, *more)
    assert [row["text"] for row in rows[::6]] == ["two threes", "a cat"] and len(rows) == 2 * 3 * 2
    assert once["scorers"] == {"Level": "reward", "jpeg_compressibility": "reward"}
    option = ["--option", "my_scorers:Level.factor=2"]
    twice, _ = evaluated(tmp_path / "twice", *arguments, *more, *option)
    assert line(twice, "Level", "iteration 4")["score"]["mean"] == pytest.approx(
        2 * line(once, "Level", "iteration 4")["score"]["mean"])  # fmt: skip
    other, _ = evaluated(tmp_path / "other", *arguments, *more, "--seed", "7")
    assert line(other, "Level", "iteration 4")["score"]["mean"] != line(once, "Level", "iteration 4")["score"]["mean"]


def test_a_stack_is_a_model_before_training(run, whole, tmp_path):
    settings = ["eval.prompts=6", "eval.noises=2", "eval.steps=4"]
    summary, _ = evaluated(tmp_path / "stack", "digits", "flow_grpo", *settings)
    found = line(summary, REWARD, "digits_flow_grpo")
    assert found["score"] == line(whole[0], REWARD, "before")["score"] and found["difference"] is None
    lora = f"model.lora={run / 'pytorch_lora_weights.safetensors'}"
    summary, _ = evaluated(tmp_path / "lora", "digits", *settings, lora)
    assert line(summary, REWARD, "digits")["score"] == line(whole[0], REWARD, "iteration 4")["score"]


def test_several_rewards_are_summed_as_in_training(run, tmp_path):
    names = "reward.name={digits: 0.75, jpeg_compressibility: 0.25}"
    summary, _ = evaluated(tmp_path / "sum", run, names, "--no-before")
    assert list(summary["scorers"]) == ["reward", REWARD, "jpeg_compressibility", GOLD]
    means = [line(summary, name, "iteration 4")["score"]["mean"] for name in summary["scorers"]]
    assert means[0] == pytest.approx(0.75 * means[1] + 0.25 * means[2], rel=1e-5)


def test_a_checkpoint_that_its_run_drops_meanwhile_is_compared_all_the_same(run, tmp_path):
    """Adapters are read before the first model is evaluated."""
    copied = shutil.copytree(run, tmp_path / "copied")
    compared = members(read_source([str(copied)], []), Choice(("2", "4")))
    assert next(compared).label == "before"
    shutil.rmtree(copied / "checkpoints")
    assert [member.label for member in compared] == ["iteration 2", "iteration 4"]


def test_pictures_that_are_made_to_keep_step_are_not_counted():
    """One call for two processes: the second makes it, too, and counts none of its pictures."""
    lost = torch.ones(2, dtype=torch.bool)
    decoded = Decoded(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), lost, ~lost)
    counted = []

    class Sampler:
        places, prompts_of = SimpleNamespace(calls=[slice(0, 2)]), staticmethod(lambda call: [])
        __call__ = staticmethod(lambda call: decoded)

    class Second:
        size, share, agree = 2, staticmethod(lambda count: range(1, 2)), staticmethod(lambda work: work())

        def gather(self, tensor, dimension):
            counted.append(tensor)
            return torch.tensor([[0, 0, 2]]) if tensor.dtype == torch.int64 else tensor

    jury = lambda images, prompts: torch.zeros(1, 2)  # noqa: E731
    assert score(Sampler(), jury, Second(), counted.append).isnan().all()
    assert counted[0] == 2 and counted[1].tolist() == [[0, 0, 0]]


def test_a_kind_may_be_called_all():
    prompts = [Prompt("a", {"kind": "all"}), Prompt("b", {"kind": "two"})]
    scored = Scored([Member("it")], ("level",), prompts, [torch.tensor([[1.0, 3.0]])], None)
    assert [(item.kind, item.score.prompts) for item in scored.lines()] == [("all", 2), ("all", 1), ("two", 1)]


def test_a_jury_that_breaks_is_told_when_all_network_calls_are_made():
    """Else the other processes of a network in shares would wait for this one's."""
    def breaks(images, prompts):
        raise BadInput("reward.name", "level", "broke")

    breaks.roles = {"level": "reward", "other": "reward"}
    jury = Patient(breaks)
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    assert all(jury(images, []).shape == (2, 3) and jury(images, []).isnan().all() for _ in range(2))
    with pytest.raises(BadInput, match="broke"):
        jury.settle()


TWO = """
import json, os, sys
from multiprocessing import get_context
import tempflow.trained.evaluating
from tempflow.__main__ import main

def work(rank, commands):
    for port, arguments in commands:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        if main(arguments):
            sys.exit(1)

started = [get_context("fork").Process(target=work, args=(rank, json.loads(sys.argv[1]))) for rank in range(2)]
for process in started:
    process.start()
for process in started:
    process.join()
sys.exit(max(process.exitcode for process in started))
"""
"""Runs command lines in two processes each, as torchrun would, but imports everything once."""
SPREAD = ["--noises", "4", "--rows", "5"]


@pytest.fixture(scope="module")
def in_two(run, full_run, tmp_path_factory):
    """(the folder of evaluations that two processes made, what they printed)."""
    folder = tmp_path_factory.mktemp("in_two")
    lines = [["evaluate", run, *SPREAD, "--output", folder / "spread"],
             ["evaluate", full_run, "parallel.shard=full", "--output", folder / "shared"]]  # fmt: skip
    with socket.create_server(("localhost", 0)) as one, socket.create_server(("localhost", 0)) as other:
        ports = [str(free.getsockname()[1]) for free in (one, other)]
    commands = [(port, [str(word) for word in line]) for port, line in zip(ports, lines, strict=True)]
    done = subprocess.run([sys.executable, "-c", TWO, json.dumps(commands)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_two_processes_make_the_table_of_one(run, in_two, tmp_path):
    """The same files, byte for byte: five calls of five pictures at most, of which one process makes one more."""
    folder, said = in_two
    evaluated(tmp_path / "one", run, *SPREAD)
    for name in ("scores.csv", "summary.json"):
        assert (folder / "spread" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert said.count("noises of each 4") == 1, "the first alone speaks"


def test_shares_of_a_network_make_nearly_the_table_of_a_whole_one(full_run, in_two, tmp_path):
    """A network that a run shared out over processes is shared out again; its sums are taken in another order."""
    summary = json.loads((in_two[0] / "shared" / "summary.json").read_text())
    whole, _ = evaluated(tmp_path / "whole", full_run, "parallel.shard=full")
    for model in ("before", "iteration 1"):
        expected = line(whole, REWARD, model)["score"]["mean"]
        assert line(summary, REWARD, model)["score"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert line(summary, REWARD, "iteration 1")["difference"]["mean"] != 0


def test_missing_opinions_and_single_prompts():
    """NaN is left out of means and pairs; of a single prompt there is no error; JSON has no NaN."""
    nan = math.nan
    tables = [torch.tensor([[0.0, nan, 1.0, 3.0, nan, nan]]), torch.tensor([[1.0, 5.0, 2.0, nan, 1.0, 1.0]])]
    members = [Member("before"), Member("after", SimpleNamespace(iteration=1, weights="raw", checkpoint="x"))]
    prompts = [Prompt("a", {"kind": "one"}), Prompt("b", {"kind": "two"}), Prompt("c", {"kind": "three"})]
    scored = Scored(members, ("level",), prompts, tables, 0)
    lines = {(item.model, item.kind): item for item in scored.lines()}
    assert lines["before", "all"].score.mean == 1.0 and lines["before", "all"].score.prompts == 2
    assert lines["after", "all"].difference.mean == 1.0 and lines["after", "all"].difference.prompts == 2
    assert lines["after", "one"].score.mean == 3.0 and math.isnan(lines["after", "one"].score.error)
    assert lines["before", "three"].score.prompts == 0 and scored.missing() == 4
    of_two = Scored(members, ("reward", "level"), prompts, [torch.cat((table, table)) for table in tables], 0)
    assert of_two.missing() == 4, "the sum of the rewards is nobody's opinion"
    content = json.loads(to_json(scored, {}), parse_constant=pytest.fail)
    assert content["missing"] == 4 and content["lines"][0]["score"]["mean"] == 1.0
    assert "no opinion" in table(scored.lines())
    assert ",,,2,c,three,0,level,\n" in scored.to_csv()


@pytest.mark.parametrize(("arguments", "field"), [
    (["nowhere/run"], "run"), (["{run}", "digits"], "run"), (["{run}/checkpoints"], "run"),
    (["{run}", "--checkpoint", "7"], "--checkpoint"), (["{run}", "--checkpoint", "2,,4"], "--checkpoint"),
    (["{run}", "--weights", "ema"], "--weights"), (["{run}", "--reward", "nosuch"], "--reward"),
    (["{run}", "--reward", "digits", "--option", "digits.colour=red"], "reward.options.digits.colour"),
    (["{run}", "--option", "digits.colour=red"], "--option"),
    (["{run}", "--prompts", "nowhere.txt"], "--prompts"), (["{run}", "--noises", "0"], "--noises"),
    (["{run}", "--seed", "-1"], "--seed"), (["{run}", "--rows", "many"], "--rows"),
    (["{run}", "--output", "{run}"], "--output"), (["{run}", "eval.stpes=4"], "eval.stpes"),
    (["{run}", "model.lora_rank=8"], "--checkpoint"), (["digits", "--checkpoint", "2"], "--checkpoint"),
    (["digits", "--weights", "raw"], "--weights"), (["digits", "prompts.test=null"], "--prompts"),
    (["digitz"], "preset"), ([], "arguments"),
])  # fmt: skip
def test_wrong_input_is_one_line(run, capfd, tmp_path, monkeypatch, arguments, field):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *(word.format(run=run) for word in arguments)]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("tempflow: ")]
    assert len(said) == 1 and said[0].startswith(f"tempflow: {field}="), said
    assert not list(tmp_path.iterdir())


def test_a_run_without_weights(run, capfd, tmp_path):
    shutil.copytree(run, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["evaluate", str(tmp_path / "copied")]) == 2
    assert "tempflow: run=" in capfd.readouterr().err
    summary, _ = evaluated(tmp_path / "final", tmp_path / "copied", "--checkpoint", "final", "--no-before")
    assert summary["models"] == [{"model": "iteration 4", "checkpoint": "pytorch_lora_weights.safetensors",
                                  "iteration": 4, "weights": "averaged"}]  # fmt: skip


def test_a_second_evaluation_gets_a_folder_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["evaluate", str(run), "--no-before", "--noises", "1", "--reward", REWARD]
    assert main(small) == 0 and main(small) == 0
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == ["run", "run-2"]
    assert main([*small, "--output", "evaluations/run", "--force"]) == 0
