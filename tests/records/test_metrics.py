"""What a run writes down: lines that survive a crash, time by phase, numbers for the trackers."""

import json
import time

import pytest
import torch

from tempflow.common.clock import PhaseClock
from tempflow.common.errors import BadInput
from tempflow.records.rows import MetricsWriter, read_metrics
from tempflow.records.trackers import check_trackers, flat_numbers


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "reward_mean": step / 10}) + "\n" for step in range(6)))
    writer = MetricsWriter(tmp_path, [], "run", last_step=3)
    writer.write({"step": 4, "reward_mean": 9.0})
    assert [(row["step"], row["reward_mean"]) for row in read_metrics(path)] == [
        (0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0),
    ]  # fmt: skip


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    MetricsWriter(tmp_path, [], "run", last_step=None)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_trackers_get_every_number_under_one_name():
    row = {"step": 3, "reward_mean": 0.5, "reward_std_per_step": [0.1, None, 0.3],
           "phase_seconds": {"tails": 1.5}, "picture_prompts": ["a seven"]}  # fmt: skip
    assert flat_numbers(row) == {
        "step": 3, "reward_mean": 0.5, "reward_std_per_step/0": 0.1, "reward_std_per_step/2": 0.3,
        "phase_seconds/tails": 1.5,
    }  # fmt: skip


def test_tensorboard_receives_the_curves(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, ["tensorboard"], "run", last_step=None)
    for step in range(3):
        writer.write({"step": step, "reward_mean": step / 4})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward_mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


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


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install"):
        check_trackers(["wandb"])
