"""Checks of the kernels: whatever goes wrong is a row, and a step that draws other noise than the loss is found."""

import time

import pytest
from half_hour import runner
from importable import ROOT


@pytest.fixture
def checks(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))
    from half_hour import kernel_checks

    return kernel_checks


def check_options(folder, seconds=100.0):
    from half_hour.measure import Options

    return Options("cpu", True, folder, "numerics", time.monotonic() + seconds)


def fails(error):
    raise error


def test_a_check_that_raises_is_a_row_and_the_next_goes_on(checks, tmp_path, monkeypatch):
    """Whatever is raised; only where the device is out of order nothing more is believed of this process."""
    options = check_options(tmp_path)
    checks._check(options, "a", lambda: fails(RuntimeError("no kernel")))
    checks._check(options, "b", lambda: "good")
    checks._check(options, "a", lambda: "is not run again")
    monkeypatch.setattr(checks, "still_works", lambda device: False)
    with pytest.raises(checks.Broken):
        checks._check(options, "c", lambda: fails(RuntimeError("illegal memory access")))
    found = [(row["check"], row["passed"]) for row in runner.rows_of(options.file)]
    assert found == [("a", False), ("b", True), ("c", False)]
    assert "RuntimeError: no kernel" in runner.rows_of(options.file)[0]["problem"]
    with pytest.raises(SystemExit):
        checks._all_passed(options)
    with pytest.raises(checks.Unfinished):
        checks._check(check_options(tmp_path, -1.0), "d", lambda: "too late")


def test_the_step_is_held_against_the_loss(checks, monkeypatch):
    """A step that adds other noise than the loss draws does not go unnoticed."""
    from tempflow_kernels.plain import ops as plain

    monkeypatch.setattr(checks, "triton_ops", plain)
    case = checks.Case(shape=(2, 8, 8), siblings=6)
    checks._step_and_loss_agree(case, "exact")
    step = plain.transition_step
    monkeypatch.setattr(plain, "transition_step", lambda x, v, coef, key, *rest: step(x, v, coef, key + 1, *rest))
    with pytest.raises(AssertionError, match="log-ratio"):
        checks._step_and_loss_agree(case, "exact")
