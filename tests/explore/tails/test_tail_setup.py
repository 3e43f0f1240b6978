"""Choosing how tails run: levels and what becomes of one that fails, chunk sizes, the check of fast tails."""

import json
import time
from dataclasses import replace

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.explore.plan import BranchPlan
from tempflow.explore.tails import choose as tail_setup
from tempflow.explore.tails import levels as tail_levels
from tempflow.explore.tails.choose import set_up_tails
from tempflow.explore.tails.chunks import Probe, choose_rows, measure, tail_lengths
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.levels import Level, make_engines
from tempflow.explore.tails.recorded import StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver
from tempflow.records.rows import read_metrics
from tempflow.run.assembly import set_up
from tempflow.settings.fields import Config, TailConfig
from tempflow.settings.reading import load
from tempflow.studies import tails as tails_check
from tempflow.studies.tails import rank_correlations
from tempflow.train import main, train_step

SMALL = ["digits", "explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]", "sample.steps=5",
         "learn.rows=2", "prompts.test=null", "learn.iterations=2", "run.trackers=[]"]  # fmt: skip


class Broken:
    def record(self, work):
        raise RuntimeError("operation not permitted when\nstream is capturing")


def test_levels_share_buffers_only_where_numerics_are_the_same(toy, schedule):
    for merged in (True, False):
        engines = make_engines(toy, TailConfig(level="compile", merged=merged), 4, schedule, "one", speak=True)
        assert engines.level == "compile" and isinstance(engines.explore, StaticEngine)
        assert (engines.explore.store is engines.evaluate.store) == (not merged)
        assert engines.explore.work.computed == 0  # the trial does not count


def test_evaluation_is_exact_whatever_tails_are(toy, schedule):
    tails = TailConfig(level="eager", solver="dpmpp_2m", stride=2, drop_below=0.3)
    engines = make_engines(toy, tails, 4, schedule, "one", speak=True)
    assert engines.evaluate.solver == EXACT and engines.explore.solver == TailSolver("dpmpp_2m", 2, 0.3)
    toy.merged().__enter__()  # makes the copy, which evaluation must not see once the weights have moved
    toy.own = (toy.scale, toy.bias)
    toy.scale.data += 1
    found, expected = torch.ones(2, 2, 3), torch.ones(2, 2, 3)
    engines.evaluate.finish(found, [0, 0], toy.encode(["a", "b"]), schedule)
    EagerEngine(toy, 4).finish(expected, [0, 0], toy.encode(["a", "b"]), schedule)
    assert torch.equal(found, expected)


def test_auto_goes_on_with_a_word_and_an_explicit_level_stops(toy, schedule, monkeypatch, capsys):
    monkeypatch.setitem(tail_levels.LEVELS, "graph", Level(False, lambda device: Broken()))
    monkeypatch.setattr(tail_levels, "AUTO", {"cpu": ("graph", "eager")})
    assert make_engines(toy, TailConfig(), 4, schedule, "one", speak=True).level == "eager"
    assert "tails.level=graph does not work here (operation not permitted" in capsys.readouterr().err
    monkeypatch.setitem(tail_levels.LEVELS, "compile", Level(False, lambda device: Broken()))
    with pytest.raises(BadInput, match=r"tails\.level=compile: does not work here \(operation not permitted when str"):
        make_engines(toy, TailConfig(level="compile"), 4, schedule, "one", speak=True)
    with pytest.raises(BadInput, match="need a GPU"):
        make_engines(toy, TailConfig(level="compiled_graph"), 4, schedule, "one", speak=True)


def linear(rows, each=1.0, fixed=0.0, memory=0):
    return tuple(Probe(size, fixed + each * size, memory * size) for size in rows)


def test_chunks_that_divide_the_branches_are_preferred():
    lengths = [4] * 96 + [3] * 96 + [2] * 96
    choice = choose_rows(lengths, linear((4, 16, 64), fixed=8), float("inf"), padded=True)
    assert 96 % choice.rows == 0 and choice.waste == 0
    uneven = choose_rows([3] * 50, linear((4, 16, 20), each=1.0, fixed=100), float("inf"), padded=True)
    assert uneven.rows == 25 and uneven.waste == 0  # two calls without padding
    assert "0.0 %" in choice.describe() and "4: 3000.00, 16: 1500.00" in choice.describe()


def test_costly_calls_ask_for_large_chunks_and_cheap_ones_for_small():
    lengths = [4] * 64
    assert choose_rows(lengths, linear((4, 16, 64), fixed=100), float("inf"), padded=True).rows == 64
    assert choose_rows(lengths, linear((4, 16, 64), fixed=0), float("inf"), padded=True).rows <= 4
    slower = (Probe(4, 4.0, 0), Probe(16, 16.0, 0), Probe(64, 128.0, 0))  # the cache overflows
    assert choose_rows(lengths, slower, float("inf"), padded=False).rows <= 16


def test_chunks_fit_into_memory():
    lengths, probes = [4] * 256, linear((4, 16, 64, 256), fixed=1000, memory=10)
    assert choose_rows(lengths, probes, 10 * 128, padded=True).rows == 128
    assert choose_rows(lengths, probes, 10 * 40, padded=True).rows == 37  # seven chunks of at most 40
    assert choose_rows(lengths, probes, 0, padded=True).rows == 1


def test_measuring_is_quick_and_makes_growing_calls(toy, schedule):
    start = time.perf_counter()
    probes = measure(toy, toy.merged, 30, "one")
    assert [probe.rows for probe in probes] == [4, 16, 30] and time.perf_counter() - start < 2
    assert all(probe.seconds > 0 == probe.peak for probe in probes)
    assert tail_lengths(BranchPlan.parse([0, 7], 10, 2), 1, TailSolver(stride=2), schedule) == [5, 5, 1, 1]


def test_a_resumed_run_keeps_the_chunks_it_chose(toy, schedule, capsys):
    config = Config(branch=replace(Config().branch, rows="auto"))
    plan = BranchPlan.parse("all", 10, 4)
    engines = set_up_tails(config, toy, schedule, plan, 6, "one", 17, lambda rows: rows, True, 0)
    assert engines.explore.rows == engines.evaluate.rows == 17
    assert "tails.rows" not in capsys.readouterr().err
    engines = set_up_tails(config, toy, schedule, plan, 6, "one", None, lambda rows: 11, True, 0)
    assert engines.explore.rows == 11 and "branches travel together" in capsys.readouterr().err


def test_chunks_leave_room_for_what_learning_will_hold(toy, schedule, monkeypatch):
    """On a GPU: average, gradients and moments come later, 16 bytes a parameter."""
    trained = sum(parameter.numel() for parameter in toy.trainable().values())
    monkeypatch.setattr(tail_setup, "measure", lambda *_: linear((4, 16), fixed=1000, memory=10))
    config, plan = Config(branch=replace(Config().branch, rows="auto")), BranchPlan.parse("all", 10, 4)
    for free, rows in ((120 + 16 * trained, 12), (60 + 16 * trained, 6)):
        monkeypatch.setattr(tail_setup, "free_memory", lambda device, free=free: free)
        engines = set_up_tails(config, toy, schedule, plan, 1, "one", None, lambda size: size, False, 0)
        assert engines.explore.rows == rows


def test_fp8_needs_the_merged_copy(toy, schedule):
    config = Config(tails=TailConfig(fp8=True, merged=False))
    with pytest.raises(BadInput, match=r"tails\.merged=true"):
        set_up_tails(config, toy, schedule, BranchPlan.parse("all", 10, 4), 6, "one", None, int, True, 0)


def test_rank_correlation_within_groups():
    exact = torch.tensor([[1.0, 2, 3, 4], [1, 1, 2, 3], [0, 0, 0, 0]])
    assert rank_correlations(exact, exact)[:2].tolist() == pytest.approx([1, 1])
    assert rank_correlations(exact, -exact)[0].item() == pytest.approx(-1)
    assert rank_correlations(exact, exact).isnan().tolist() == [False, False, True]
    other = torch.tensor([[10.0, 30, 20, 40], [2, 2, 1, 3], [1, 2, 3, 4]])
    # ranks 1 2 3 4 with 1 3 2 4: 1 - 6 * 2 / 60; ranks 1.5 1.5 3 4 with 2.5 2.5 1 4, by hand
    assert rank_correlations(exact, other)[:2].tolist() == pytest.approx([0.8, 1.5 / 4.5], abs=1e-6)


def test_the_check_tells_what_fast_tails_change(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    for extra in ([], ["tails.stride=3"]):
        assert tails_check.main([*SMALL, "run.dir=here", *extra]) == 0
        told.append(capsys.readouterr().out)
    assert "over 24 branches: rank correlation of siblings' rewards 1.0000" in told[0]
    assert "1.0000" not in told[1] and not list(tmp_path.iterdir())
    assert tails_check.main([*SMALL, "tails.stride=0"]) == 2


@torch.no_grad()
def test_every_iteration_begins_with_fresh_merged_weights(tmp_path, disturb):
    """And evaluation in between, with averaged weights, does not touch them."""
    run, _ = set_up(load([*SMALL, f"run.dir={tmp_path / 'run'}"]))
    run.evaluate(0)
    disturb(run.policy.trainable(), 0.05)
    arguments = torch.randn(2, *run.policy.latent_shape), torch.full((2,), 0.5), run.policy.encode(["a one", "a two"])
    before = run.policy.velocity(*arguments)
    with torch.enable_grad():
        train_step(run, 0)
    with run.policy.merged():
        used = run.policy.velocity(*arguments)
    assert (used - before).abs().max() < 1e-4 < (used - run.policy.velocity(*arguments)).abs().max()


def test_a_run_records_chunks_and_waste_and_resumes(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*SMALL, f"run.dir={folder}", "tails.rows=auto", "tails.drop_below=0.5"]
    assert main([*arguments, "learn.iterations=1"]) == 0
    start, row = read_metrics(folder / "metrics.jsonl")
    assert 1 <= start["tail_rows"] <= 24 and row["tail_waste"] == 0.0
    rows = [start | {"tail_rows": 5}, row]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    assert main([*arguments, "run.resume=true", "tails.level=eager", "tails.check=true"]) == 0
    assert "rank correlation" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert load([str(folder / "config.yaml")]).branch.rows == "auto"
    assert main([*arguments, "run.resume=true", "tails.drop_below=0.1"]) == 2
