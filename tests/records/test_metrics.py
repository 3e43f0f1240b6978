"""What a run writes down: lines that survive a crash, time by phase."""

import json
import time

import torch

from tempflow.common.clock import PhaseClock
from tempflow.records.page.gather import gather
from tempflow.records.rows import EvaluationRow, IterationRow, MetricsWriter, StartRow, read_metrics


def iteration(step: int, reward: float, **more) -> IterationRow:
    """The line of an iteration."""
    figures = {"reward_means": {"digits": reward}, "reward_std_per_step": [0.1, None], "rewards_missing": 0,
               "groups_masked": 1, "tail_waste": 0.0, "grad_norm": 0.5, "optimizer_bytes": 8}  # fmt: skip
    return IterationRow(step=step, reward_mean=reward, **figures | more)


def evaluation(step: int, gold: float | None, **more) -> EvaluationRow:
    return EvaluationRow(step=step, seconds=float(step), scores={"gold": gold}, scores_missing=0, **more)


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "reward_mean": step / 10}) + "\n" for step in range(6)))
    writer = MetricsWriter(tmp_path, last_step=3)
    writer.write(iteration(4, 9.0))
    assert [(row["step"], row["reward_mean"]) for row in read_metrics(path)] == [
        (0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0),
    ]  # fmt: skip


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    MetricsWriter(tmp_path, last_step=None)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_lines_of_a_step_become_one_row(tmp_path):
    """Start and evaluation 0; iteration 1 with its evaluation; iteration 2 alone."""
    writer = MetricsWriter(tmp_path, last_step=None)
    writer.write(StartRow(sigmas=[1.0, 0.0], loss_weights=[1.0], picture_prompts=["a seven"], tail_rows=4))
    writer.write(evaluation(0, 0.25, phase_seconds={"evaluate": 1.5}))
    writer.write(iteration(1, 0.5, phase_seconds={"tails": 2.5}, kl=None))
    writer.write(evaluation(1, None, gold_fall={"gold": 0.5}, phase_seconds={"evaluate": 3.5}))
    writer.write(iteration(2, 0.75))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 1, 1, 2]
    start, first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert start["gold"] == 0.25 and start["tail_rows"] == 4 and start["phase_seconds"] == {"evaluate": 1.5}
    assert "gold_fall" not in start and "scores" not in start
    assert first["reward_mean"] == 0.5 and first["gold"] is None and first["gold_fall"] == {"gold": 0.5}
    assert first["phase_seconds"] == {"tails": 2.5, "evaluate": 3.5} and "kl" not in first
    assert second["reward_mean"] == 0.75 and "gold" not in second


def test_what_is_not_finite_is_counted_of_an_iteration_and_of_its_evaluation(tmp_path):
    """The sums stand in the row, and report.html says them."""
    writer = MetricsWriter(tmp_path, last_step=None)
    writer.write(iteration(1, 0.5, nonfinite_latents=5, nonfinite_images=1))
    writer.write(evaluation(1, 0.25, nonfinite_latents=2, nonfinite_images=3))
    writer.write(iteration(2, 0.5, nonfinite_images=1))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["nonfinite_latents"], first["nonfinite_images"]) == (7, 4)
    assert (second["nonfinite_latents"], second["nonfinite_images"]) == (0, 1)
    assert [worry.words.split()[0] for worry in gather(tmp_path).worries] == ["7", "5"]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_clock_counts_the_making_of_items_and_not_their_use():
    clock = PhaseClock(torch.device("cpu"))

    def slow_items():
        for number in range(3):
            time.sleep(0.02)
            yield number

    seen = []
    for number in clock.over("making", slow_items()):
        with clock("using"):
            time.sleep(0.05)
        seen.append(number)
    seconds = clock.read()
    assert seen == [0, 1, 2]
    assert 0.06 <= seconds["making"] < seconds["using"] and seconds["using"] >= 0.15
    assert clock.read() == {}
