"""Choosing how tails run: levels and what becomes of one that fails, chunk sizes, the check of fast tails."""

import json
import time

import pytest
import torch
from rollout_cases import forked

from tempflow.commands import tails as tails_command
from tempflow.common.errors import BadInput
from tempflow.common.files import checksum
from tempflow.explore.tails import choose
from tempflow.explore.tails import levels as tail_levels
from tempflow.explore.tails.choose import choose_engines, measure_rows, prepare_weights
from tempflow.explore.tails.chunks import Probe, choose_rows, measure, tail_lengths
from tempflow.explore.tails.engine import EagerEngine
from tempflow.explore.tails.levels import Level, make_engines
from tempflow.explore.tails.recorded import StaticEngine
from tempflow.explore.tails.solver import EXACT, TailSolver
from tempflow.records.rows import read_metrics
from tempflow.run.assembly import set_up
from tempflow.run.checkpoint import INDEX
from tempflow.settings.fields import TailConfig
from tempflow.settings.reading import load
from tempflow.studies.tails import rank_correlations
from tempflow.train import main, train_step

SMALL = ["digits", "explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]",
         "sample.steps=5", "learn.rows=2", "prompts.test=null", "learn.iterations=2", "run.trackers=[]"]  # fmt: skip


class Broken:
    def record(self, work):
        raise RuntimeError("operation not permitted when\nstream is capturing")


def test_levels_share_buffers_only_where_numerics_are_the_same(toy, schedule):
    for merged in (True, False):
        engines = make_engines(toy, TailConfig(level="compile", merged=merged), 4, schedule, "one")
        (explore,) = engines.explore
        assert engines.level == "compile" and isinstance(explore, StaticEngine)
        assert (explore.store is engines.evaluate.engine.store) == (not merged)
        assert explore.work.computed == 0  # the trial does not count


def test_every_stride_of_a_list_is_a_tail_of_its_own(toy, schedule):
    for level in ("eager", "compile"):
        tails = TailConfig(level=level, stride=[1, 2], drop_below=0.3)
        engines = make_engines(toy, tails, 4, schedule, "one")
        fine, coarse = TailSolver(drop_below=0.3), TailSolver(stride=2, drop_below=0.3)
        assert [engine.solver for engine in engines.explore] == [fine, coarse]
        assert engines.evaluate.engine.solver == EXACT
        assert [engine.work.computed for engine in engines.explore] == [0, 0]
    assert engines.explore[0].store is engines.explore[1].store


def test_evaluation_is_exact_whatever_tails_are(toy, schedule):
    tails = TailConfig(level="eager", solver="dpmpp_2m", stride=2, drop_below=0.3)
    engines = make_engines(toy, tails, 4, schedule, "one")
    assert engines.evaluate.engine.solver == EXACT
    assert [engine.solver for engine in engines.explore] == [TailSolver("dpmpp_2m", 2, 0.3)]
    toy.merged().__enter__()  # makes the copy, which evaluation must not see once the weights have moved
    toy.own = (toy.scale, toy.bias)
    toy.scale.data += 1
    found, expected = torch.ones(2, 2, 3), torch.ones(2, 2, 3)
    engines.evaluate.finish(found, [0, 0], toy.encode(["a", "b"]), schedule)
    EagerEngine(toy, 4).finish(expected, [0, 0], toy.encode(["a", "b"]), schedule)
    assert torch.equal(found, expected)


def refused(toy, schedule, level):
    with pytest.raises(BadInput) as caught:
        make_engines(toy, TailConfig(level=level), 4, schedule, "one")
    assert (caught.value.field, caught.value.value) == ("tails.level", level)
    return caught.value


def test_auto_goes_on_with_a_word_and_an_explicit_level_stops(toy, schedule, monkeypatch, capsys):
    monkeypatch.setitem(tail_levels.LEVELS, "graph", Level(False, lambda device: Broken()))
    monkeypatch.setattr(tail_levels, "AUTO", {"cpu": ("graph", "eager")})
    assert make_engines(toy, TailConfig(), 4, schedule, "one").level == "eager"
    assert "tails.level=graph does not work here (operation not permitted" in capsys.readouterr().err
    monkeypatch.setitem(tail_levels.LEVELS, "compile", Level(False, lambda device: Broken()))
    assert "operation not permitted when stream" in refused(toy, schedule, "compile").hint
    assert "GPU" in refused(toy, schedule, "compiled_graph").hint


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


def test_of_sizes_that_are_nearly_as_fast_the_smallest_is_taken():
    """64 branches of one call each: four calls of 16 take 2.5 % longer than one of 64, and hold a quarter of it.

    Where they take 12 % longer, two calls of 32 are the smallest within 5 %."""
    probes = (Probe(16, 16.4, 0), Probe(64, 64.0, 0))
    assert choose_rows([1] * 64, probes, float("inf"), False).rows == 16
    assert choose_rows([1] * 64, (Probe(16, 18.0, 0), Probe(64, 64.0, 0)), float("inf"), False).rows == 32


def test_calls_beyond_the_largest_that_was_tried_take_time_in_proportion():
    """Nothing is gained by going further where a row costs the same in every size that was measured."""
    probes = (Probe(16, 16.0, 0), Probe(64, 64.0, 0))
    assert choose_rows([1] * 128, probes, float("inf"), False).rows == 16


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
    assert [call for call in toy.calls if call != 4][:2] == [16, 16]


def test_lengths_of_tails_are_those_of_the_earliest_forks(schedule):
    """Windows and jumps shorten tails; forks that are drawn lie as early as they may."""

    def lengths(solver=EXACT, **explore):
        return tail_lengths(forked(**explore)[2], 2, solver, schedule)

    assert lengths(TailSolver(stride=2), forks=[0, 7]) == [5, 5, 1, 1]
    assert lengths(forks=[0, 4], window=3) == [7, 7, 3, 3]
    assert lengths(forks=[0, 4], jump=[1, 4]) == [9, 9, 2, 2]
    assert lengths(forks="random:2") == [9, 9, 8, 8] == lengths(forks="all", take=2, draw="prompt")


def test_chunks_are_chosen_with_a_word_and_engines_have_them(toy, schedule, capsys):
    assert choose_engines(TailConfig(), toy, schedule, 17, "one").evaluate.rows == 17
    assert "tails" not in capsys.readouterr().err
    choice = measure_rows(TailConfig(), toy, [3] * 24 + [1] * 24, "one", 0)
    assert 1 <= choice.rows <= 48 and "branches travel together" in capsys.readouterr().err
    engines = choose_engines(TailConfig(level="compile"), toy, schedule, choice.rows, "one")
    assert [engine.rows for engine in engines.explore] == [choice.rows]
    assert f"{choice.rows} rows" in capsys.readouterr().err


def test_chunks_leave_room_for_what_learning_will_hold(toy, monkeypatch):
    """On a GPU: average, gradients and moments come later, and so many bytes are left to them."""
    monkeypatch.setattr(choose, "measure", lambda *_: linear((4, 16), fixed=1000, memory=10))
    for free, held_back, rows in ((520, 400, 12), (460, 400, 6), (120, 0, 12)):
        monkeypatch.setattr(choose, "free_memory", lambda device, free=free: free)
        assert measure_rows(TailConfig(), toy, [4] * 24, "one", held_back).rows == rows


def test_fp8_needs_the_merged_copy(toy):
    with pytest.raises(BadInput) as caught:
        prepare_weights(TailConfig(fp8=True, merged=False), toy)
    assert caught.value.field == "tails.fp8"


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
    for extra in ([], ["tails.stride=3"], ["tails.stride=[1,3]"]):
        assert tails_command.main([*SMALL, "run.dir=here", *extra]) == 0
        told.append(capsys.readouterr().out)
    assert "over 24 branches: rank correlation of siblings' rewards 1.0000" in told[0]
    assert "1.0000" not in told[1] and not list(tmp_path.iterdir())
    assert told[1].partition(";")[0] == told[2].partition(";")[0]  # of several tails the last is looked at
    assert tails_command.main([*SMALL, "tails.stride=0"]) == 2


@torch.no_grad()
def test_every_iteration_begins_with_fresh_merged_weights(tmp_path, disturb):
    """And evaluation in between, with averaged weights, does not touch them."""
    trainer, journal, progress = set_up(load([*SMALL, f"run.dir={tmp_path / 'run'}"]))
    journal.begin(progress)
    policy = trainer.policy
    disturb(policy.trainable(), 0.05)
    arguments = torch.randn(2, *policy.latent_shape), torch.full((2,), 0.5), policy.encode(["a one", "a two"])
    before = policy.velocity(*arguments)
    with torch.enable_grad():
        train_step(trainer, 0)
    with policy.merged():
        used = policy.velocity(*arguments)
    assert (used - before).abs().max() < 1e-4 < (used - policy.velocity(*arguments)).abs().max()


def test_a_run_records_chunks_and_waste_and_resumes(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*SMALL, f"run.dir={folder}", "tails.rows=auto", "tails.drop_below=0.5"]
    assert main([*arguments, "learn.iterations=1"]) == 0
    start, row = read_metrics(folder / "metrics.jsonl")
    assert 1 <= start["tail_rows"] <= 24 and row["tail_waste"] == 0.0
    state = folder / "checkpoints" / "step_000001" / "state.json"
    saved = json.loads(state.read_text())
    saved["progress"]["tail_rows"] = 5
    state.write_text(json.dumps(saved))
    index = state.with_name(INDEX)
    index.write_text(json.dumps(json.loads(index.read_text()) | {state.name: checksum(state)}))
    capsys.readouterr()
    assert main([*arguments, "run.resume=true", "tails.level=eager", "tails.check=true"]) == 0
    told = capsys.readouterr().err
    assert "rank correlation" in told and "branches travel together" not in told
    later = folder / "checkpoints" / "step_000002" / "state.json"
    assert json.loads(later.read_text())["progress"]["tail_rows"] == 5
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    assert load([str(folder / "config.yaml")]).tails.rows == "auto"
    assert main([*arguments, "run.resume=true", "tails.drop_below=0.1"]) == 2
