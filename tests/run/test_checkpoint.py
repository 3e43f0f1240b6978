"""Checkpoints are complete or absent, and refuse what does not fit."""

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.learn.average import MovingAverage
from tempflow.learn.stepper import Stepper
from tempflow.run import checkpoint
from tempflow.run.checkpoint import Progress


def state(size=3, steps=2):
    """A parameter with an optimizer and a moving average that have seen some steps."""
    torch.manual_seed(0)
    parameters = {"w": torch.nn.Parameter(torch.randn(size))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    stepper = Stepper(parameters, optimizer, MovingAverage(parameters, 0.9, 1), max_norm=100.0)
    for _ in range(steps):
        parameters["w"].grad = torch.randn(size)
        stepper.step()
    return stepper


def test_everything_comes_back(tmp_path):
    saved, fresh = state(), state(steps=0)
    checkpoint.save(tmp_path, Progress(2, 1.5, 48), saved, keep=1)
    assert checkpoint.restore(tmp_path, fresh) == Progress(2, 1.5, 48)
    assert torch.equal(fresh.parameters["w"], saved.parameters["w"])
    assert torch.equal(fresh.average.average["w"], saved.average.average["w"])
    assert fresh.average.optimizer_steps == 2
    for stepper in (saved, fresh):
        stepper.parameters["w"].grad = torch.ones(3)
        stepper.step()
    assert torch.equal(fresh.parameters["w"], saved.parameters["w"])


def test_only_the_newest_are_kept_and_torn_ones_are_ignored(tmp_path):
    parts = state()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, Progress(step), parts, keep=2)
    (tmp_path / "step_000009").mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    assert checkpoint.restore(tmp_path, parts).iteration == 3


def test_nothing_to_restore_is_a_fresh_start(tmp_path):
    assert checkpoint.restore(tmp_path, state()) == Progress()


def test_another_model_is_refused_and_left_alone(tmp_path):
    checkpoint.save(tmp_path, Progress(1), state(size=3), keep=1)
    other = state(size=4)
    before = other.parameters["w"].detach().clone()
    with pytest.raises(BadInput) as caught:
        checkpoint.restore(tmp_path, other)
    assert torch.equal(other.parameters["w"], before)
    assert caught.value.field == "run.resume" and "step_000001" in str(caught.value)


def test_no_pickle_in_a_checkpoint(tmp_path):
    folder = checkpoint.save(tmp_path, Progress(1), state(), keep=1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
