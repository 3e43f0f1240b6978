"""Warnings about a run's figures: when they come, and that they come once."""

import pytest

from tempflow.run.watch import IDLE_SHARE, REWARD_FALL, SPREAD_SHARE, WINDOW, Watch

CLIP = 1e-4


def row(reward=1.0, spread=0.5, idle=0.1, drift=0.0, **more):
    return {"reward_mean": reward, "reward_std_per_step": [spread, None, spread], "idle_share": idle,
            "first_log_ratio_max": drift, **more}  # fmt: skip


def seen(watch, rows):
    return [sorted(watch.look(each)) for each in rows]


CASES = {
    "reward_spread": ({"spread": 0.9 * SPREAD_SHARE * 0.5}, {"spread": 1.1 * SPREAD_SHARE * 0.5}),
    "reward_fall": ({"reward": 1 - 1.1 * REWARD_FALL * 0.5}, {"reward": 1 - 0.9 * REWARD_FALL * 0.5}),
    "idle_groups": ({"idle": IDLE_SHARE + 0.01}, {"idle": IDLE_SHARE}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_warning_comes_once_for_a_window_beyond_its_threshold(name):
    beyond, within = CASES[name]
    watch = Watch(CLIP)
    assert not any(seen(watch, [row()] * WINDOW + [row(**within)] * 2 * WINDOW))
    for _ in range(2):  # what went away and came back is told again
        assert not any(seen(watch, [row()] * WINDOW))
        told = seen(watch, [row(**beyond)] * 2 * WINDOW)
        assert [found for found in told if found] == [[name]] and not any(told[WINDOW:])


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_knows_its_start_and_what_was_told(name):
    beyond, _ = CASES[name]
    before = [row()] * WINDOW + [row(**beyond)] * (WINDOW - 1)
    assert seen(Watch(CLIP, before), [row(**beyond)]) == [[name]]
    assert seen(Watch(CLIP, [*before, row(**beyond, warnings=[name])]), [row(**beyond)]) == [[]]


def test_drift_between_sampling_and_learning_is_told_once_with_what_to_do():
    watch = Watch(CLIP)
    assert seen(watch, [row(drift=CLIP), row(drift=None)]) == [[], []]
    (words,) = watch.look(row(drift=2 * CLIP)).values()
    assert "learn.rows" in words and "model.attention" in words and f"objective.clip={CLIP:g}" in words
    assert seen(watch, [row(), row(drift=3 * CLIP)]) == [[], []]


def test_where_siblings_never_differed_a_fall_has_no_measure():
    assert not any(seen(Watch(CLIP), [row(spread=0.0)] * WINDOW + [row(reward=0.5, spread=0.0)] * 2 * WINDOW))


def test_rows_without_figures_are_passed_over():
    watch = Watch(CLIP, [{"step": 0, "sigmas": [1.0, 0.0]}])
    assert not any(seen(watch, [row(reward=None), {"step": 3}] * WINDOW)) and not watch.last
