"""What `compare.py` times first, and that it times nothing where the device is out of order."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from half_hour.runner import EXITS, UNFINISHED
from rollouts import compare as rollouts
from rollouts.results_file import Results, read_rows
from rollouts.variants import REFERENCE, VARIANTS

from tempflow.common.capture import CaptureBroken
from tempflow.common.errors import BadInput

BY_NAME = {variant.name: variant for variant in VARIANTS}


class Fake:
    """A bench of no weight, one variant of which fails as told."""

    def __init__(self, bad: str, error: Exception):
        self.bad, self.error, self.on_gpu, self.overrides, self.device = bad, error, False, {}, torch.device("cpu")
        self.texts = contextlib.nullcontext

    def case(self, variant):
        if variant.name == self.bad:
            raise BadInput("tails.level", "compiled_graph", "it broke") from self.error
        return SimpleNamespace(variant=variant, copies=None, trainer=SimpleNamespace(policy=None))

    def has_room(self, policy) -> bool:
        return True


def compared(tmp_path, monkeypatch, error: Exception, rounds: int = 1):
    """A comparison whose second variant fails; the names of what was timed in this call, in turn."""
    timed = []
    monkeypatch.setattr(rollouts, "warm_up", lambda case: 0.0)
    monkeypatch.setattr(rollouts, "iterate", lambda case, number: timed.append(case.variant.name) or SimpleNamespace(
        rewards=torch.zeros(1), seconds=0.0))  # fmt: skip
    monkeypatch.setattr(rollouts, "figures", lambda *_: {"rollouts_per_hour": 1.0, "seconds": 0.0})
    results = Results(tmp_path / "rows.jsonl", {"commit": "one"})
    comparison = rollouts.Comparison(Fake("+multistep", error), results, 60.0)
    monkeypatch.setattr(comparison, "limits", lambda: {})
    names = ("official", REFERENCE, "+merged", "+multistep", "+light decoder")
    comparison.compare([BY_NAME[name] for name in names], rounds)
    return comparison, timed


def test_nothing_is_timed_after_a_broken_capture(tmp_path, monkeypatch):
    """Its row is written, the process is to end, and the next call goes on without that variant."""
    comparison, timed = compared(tmp_path, monkeypatch, CaptureBroken("capture invalidated"))
    assert comparison.broken == "+multistep" and timed == ["official", REFERENCE]
    assert [row["broken"] for row in read_rows(tmp_path / "rows.jsonl") if row["kind"] == "skipped"] == [True]
    comparison, timed = compared(tmp_path, monkeypatch, CaptureBroken("capture invalidated"))
    assert comparison.broken == "" and timed == ["+light decoder", "+merged"]


def test_a_device_out_of_order_ends_the_comparison(tmp_path, monkeypatch):
    """As far as another error shows it; one that leaves the device well costs its variant alone."""
    comparison, timed = compared(tmp_path / "well", monkeypatch, RuntimeError("no such kernel"))
    assert comparison.broken == "" and timed == ["official", REFERENCE, "+light decoder", "+merged"]
    monkeypatch.setattr(rollouts, "still_works", lambda device: False)
    comparison, timed = compared(tmp_path / "ill", monkeypatch, RuntimeError("illegal memory access"))
    assert comparison.broken == "+multistep" and timed == ["official", REFERENCE]


def test_what_the_goals_are_about_is_timed_once_before_all_else(tmp_path, monkeypatch):
    """The baseline, ours and the variants of the goals, then the others, then further rounds."""
    monkeypatch.setattr(Fake, "case", lambda self, variant: SimpleNamespace(
        variant=variant, copies=None, trainer=SimpleNamespace(policy=None)))  # fmt: skip
    _, timed = compared(tmp_path, monkeypatch, RuntimeError(), rounds=2)
    first = ["official", REFERENCE, "+multistep", "+light decoder", "+merged"]
    assert timed == first * 2


def test_the_part_of_a_broken_device_is_unfinished(tmp_path, monkeypatch):
    """Whatever would be tidied up at its end needs the device: the process is ended at once, with the right status."""
    from half_hour import measure, training

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(training.compare, "run", lambda *_: SimpleNamespace(broken="+graph", late=set()))
    monkeypatch.setattr(measure.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        measure.main(["rollouts", "--device", "cpu", "--tiny", "--folder", str(tmp_path)])
    assert EXITS[ended.value.code] == UNFINISHED
