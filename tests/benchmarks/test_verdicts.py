"""Verdicts of the first half hour: goals of one chip, figures that failed, memory, rollouts, checks and tests."""

import pytest
from half_hour import verdicts
from half_hour.verdicts import FAIL, NO_VERDICT, NOT_RUN, PASS

H100 = "NVIDIA H100 80GB HBM3"


def time_row(operator, mode, provider, milliseconds, noise=None, threads=None):
    """128 rows, K = 6, 100 MB moved."""
    return {"operator": operator, "mode": mode, "provider": provider, "noise": noise, "shape": "sd35_512", "rows": 128,
            "siblings": 6, "bytes": 10**8, "median_ms": 9.0, "graph_ms": milliseconds, "device": H100,
            "threads": threads}  # fmt: skip


@pytest.mark.parametrize(("share", "result"), [(0.86, PASS), (0.84, FAIL)])
def test_operators_are_held_against_the_copy_bandwidth(share, result):
    copy = {"operator": "copy", "provider": "bound", "bytes": 10**9, "graph_ms": 1.0, "median_ms": 1.0}
    rows = [copy | {"threads": None}, time_row("step", "forward", "fused", 0.1 / share, "fast")]
    found = {verdict.what: verdict for verdict in verdicts.operators(rows)}
    step = found["step forward, K = 6, fast noise"]
    assert (step.measured, step.goal, step.outcome) == (f"{100 * share:.0f} % of copy", "85 % (H100)", result)
    on_cpu = [row | {"threads": 1} for row in rows]
    assert {verdict.outcome for verdict in verdicts.operators(on_cpu)} == {NO_VERDICT}
    assert step.predicted == "93 %"


@pytest.mark.parametrize("device", ["NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100"])
def test_goals_of_one_chip_judge_no_other(device):
    """The figure is shown, without a verdict; only a chip that is meant by its very name has predictions."""
    copy = {"operator": "copy", "provider": "bound", "bytes": 10**9, "graph_ms": 1.0, "median_ms": 1.0, "threads": None}
    times = [time_row("loss", "full", "fused", 1.0, "fast"), time_row("loss", "full", "stored", 1.3)]
    rows = [row | {"device": device} for row in (copy, time_row("step", "forward", "fused", 0.2, "fast"), *times)]
    step, stored = verdicts.operators(rows)[1:]
    assert (step.measured, step.outcome, stored.outcome) == ("50 % of copy", NO_VERDICT, NO_VERDICT)
    known = device == "NVIDIA H200"
    assert (step.predicted, stored.predicted) == (("73 %", "0.91x") if known else ("", ""))
    rows = [rollout_row(name, seconds) | {"device": device} for name, seconds in (("official", 24), ("+overlap", 20))]
    goal = verdicts.rollouts(rows)[0]
    assert goal.measured == "1.20x by `+overlap`" and goal.outcome == NO_VERDICT


def test_a_figure_that_failed_is_a_failure_and_leaves_the_others():
    copy = {"operator": "copy", "provider": "bound", "bytes": 10**9, "graph_ms": 1.0, "median_ms": 1.0, "device": H100}
    bad = time_row("log_prob", "forward", "fused", None) | {"median_ms": None, "problem": "no capture"}
    good = time_row("step", "forward", "fused", 0.1, "fast")
    found = verdicts.operators([copy | {"threads": None}, bad, good])
    assert [verdict.outcome for verdict in found] == [FAIL, NO_VERDICT, PASS] and found[0].measured == "no capture"


def test_the_loss_is_held_against_three_others():
    copy = {"operator": "copy", "provider": "bound", "bytes": 10**9, "graph_ms": 1.0, "median_ms": 1.0, "threads": None}
    times = {"fused": 1.0, "compiled": 2.6, "stored": 1.3, "eager": 8.1}
    copy |= {"device": H100}
    rows = [
        copy,
        time_row("loss", "full", "fused", 0.1, "stored"),
        *(time_row("loss", "full", provider, value) for provider, value in times.items()),
    ]
    found = {verdict.what.split()[-1]: verdict.outcome for verdict in verdicts.operators(rows)[1:]}
    assert found == {"compiled": PASS, "stored": FAIL, "eager": PASS}, "held against the noise that ours draws"
    assert [verdict.predicted for verdict in verdicts.operators(rows)[1:]] == ["", "1.31x", ""]


@pytest.mark.parametrize(("measured", "result"), [(10.9, PASS), (11.1, FAIL), (8.9, FAIL)])
def test_memory_is_within_a_tenth_of_the_plan(measured, result):
    row = {"measured_bytes": measured * 2**30, "planned_bytes": 10 * 2**30, "phase": "learning", "threads": None}
    assert [verdict.outcome for verdict in verdicts.memory([row])] == [result]
    assert [verdict.outcome for verdict in verdicts.memory([row | {"threads": 1}])] == [NO_VERDICT]


@pytest.mark.parametrize(("largest", "result"), [(0.0, PASS), (2e-6, PASS), (2e-5, FAIL)])
def test_the_first_log_ratio_is_small_beside_the_clip_range(largest, result):
    row = {"compiled": False, "largest": largest, "clip": 1e-4, "threads": None}
    assert [verdict.outcome for verdict in verdicts.ratio([row])] == [result]


def rollout_row(variant, seconds):
    return {"kind": "iteration", "variant": variant, "round": 0, "seconds": seconds, "cpu_seconds": seconds,
            "rollouts": 216, "phase_seconds": {"tails": 1}, "beside": [], "rows": {}, "network_tflop": 1,
            "tails_tflop": 1, "matmul_tflops": 600, "copy_gbs": 3000, "threads": None,
            "device": H100}  # fmt: skip


def test_rollouts_are_held_against_the_released_algorithm():
    rows = [rollout_row("official", 24), rollout_row("+overlap", 10), rollout_row("+multistep", 8)]
    assert [verdict.outcome for verdict in verdicts.rollouts(rows)[:3]] == [PASS, FAIL, NOT_RUN]
    assert verdicts.rollouts(rows)[0].measured == "2.40x by `+overlap`"
    broken = {"kind": "skipped", "variant": "+graph", "reason": "it broke", "broken": True}
    assert verdicts.rollouts([*rows, broken])[-1] == verdicts.Verdict("`+graph`", "it broke", outcome=FAIL)


def test_failed_checks_tests_and_backends_show():
    checks = [{"check": name, "passed": name == "a", "problem": "off by one", "figure": None} for name in "ab"]
    assert [verdict.outcome for verdict in verdicts.checks(checks)] == [PASS, FAIL]
    tests = [{"test": "t", "outcome": outcome, "problem": ""} for outcome in ("passed", "failed", "skipped")]
    assert [verdict.outcome for verdict in verdicts.tests(tests)] == [FAIL, FAIL]
    assert verdicts.tests(tests[2:])[0].outcome == NO_VERDICT, "a test that was skipped passed nothing"
    times = {"default": 1.2, "flash": 1.0, "cudnn": None}
    rows = [{"attention": name, "milliseconds": value, "threads": None} for name, value in times.items()]
    assert verdicts.attention(rows)[0].outcome == FAIL
