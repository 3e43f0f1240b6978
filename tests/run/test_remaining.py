"""How long a run goes on, by a clock that can be reckoned with: iterations of 10 s, evaluations of 100 s."""

import pytest

from tempflow.run.remaining import Remaining, Schedule


def remaining(iterations=5, every=2, max_seconds=None, first=50.0, after=2, evaluated=True):
    """After the evaluation before the first iteration, and `after` iterations, of which the first took longer."""
    it = Remaining(Schedule(iterations, every, max_seconds))
    for seconds in [first, *(10.0,) * (after - 1)]:
        it.iterated(seconds)
    if evaluated:
        it.evaluated(100.0)
    return it.seconds(after, first + 10 * (after - 1))


@pytest.mark.parametrize(("settings", "seconds"), [
    ({}, 3 * 10 + 2 * 100),  # evaluations after 4 and 5
    ({"iterations": 6}, 4 * 10 + 2 * 100),  # after 4 and 6
    ({"every": 0}, 3 * 10 + 100),  # after the last only
    ({"evaluated": False}, 3 * 10),  # no held-out prompts
    ({"after": 5}, 0),
    ({"after": 1}, 4 * 50 + 3 * 100),  # nothing better is known yet
    ({"iterations": 100, "max_seconds": 85}, 3 * 10 + 2 * 100),  # 60 s are over: evaluated after 4 and 5
    ({"iterations": 100, "max_seconds": 55}, 0),
    ({"iterations": 4, "max_seconds": 1e9}, 2 * 10 + 100),
])  # fmt: skip
def test_iterations_and_evaluations_that_come_yet(settings, seconds):
    assert remaining(**settings) == pytest.approx(seconds)


def test_nothing_is_said_before_there_is_a_time():
    assert Remaining(Schedule(5, 2, None)).seconds(0, 0.0) is None


def test_old_times_are_forgotten():
    it = Remaining(Schedule(1000, 0, None))
    for seconds in [*(10.0,) * 30, *(20.0,) * 20]:
        it.iterated(seconds)
    assert it.seconds(50, 0.0) == 950 * 20


def test_a_resumed_run_knows_what_evaluations_took():
    it = Remaining(Schedule(20, 5, None))
    it.resumed(12, 200.0)
    it.iterated(10.0)
    assert it.seconds(13, 0.0) == 7 * 10 + 2 * 100
