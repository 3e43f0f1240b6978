"""Checkpoints are complete or absent, and refuse what does not fit."""

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch

from tempflow.common.errors import BadInput
from tempflow.learn.average import MovingAverage
from tempflow.learn.stepper import Stepper
from tempflow.run import checkpoint
from tempflow.run.saver import Saver
from tempflow.run.snapshot import Progress, Unfit, take


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
    checkpoint.save(tmp_path, take(Progress(2, 1.5, 48), saved, {}), keep=1)
    assert checkpoint.restore(tmp_path, fresh) == Progress(2, 1.5, 48)
    assert torch.equal(fresh.parameters["w"], saved.parameters["w"])
    assert torch.equal(fresh.average.average["w"], saved.average.average["w"])
    assert fresh.average.optimizer_steps == 2
    for stepper in (saved, fresh):
        stepper.parameters["w"].grad = torch.ones(3)
        stepper.step()
    assert torch.equal(fresh.parameters["w"], saved.parameters["w"])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def put(folder, *steps, keep=9, **more):
    """Checkpoints of these iterations, whose parameters are the iteration's number."""
    stepper = state()
    for step in steps:
        with torch.no_grad():
            stepper.parameters["w"].fill_(step)
        checkpoint.save(folder, take(Progress(step, **more), stepper, {}), keep=keep)
    return folder / f"step_{steps[-1]:06d}"


def rewritten(path, change):
    """Another content of a checkpoint's file, with a checksum that is right."""
    data = change(path.read_bytes())
    path.write_bytes(data)
    sums = json.loads((path.parent / "index.json").read_bytes())
    sums[path.name] = hashlib.sha256(data).hexdigest()
    (path.parent / "index.json").write_text(json.dumps(sums))


def with_iteration(iteration):
    def change(data):
        state = json.loads(data)
        state["progress"]["iteration"] = iteration
        return json.dumps(state).encode()

    return change


def tensors_like(values):
    return lambda data: safetensors.torch.save({name: values(t) for name, t in safetensors.torch.load(data).items()})


def flipped(data):
    return data[:-2] + bytes([data[-2] ^ 4]) + data[-1:]


NAN = torch.nan
DAMAGE = {
    "cut": lambda newest: (newest / "parameters.safetensors").write_bytes(b"torn"),
    "a bit of the average": lambda newest: (newest / "average.safetensors").write_bytes(
        flipped((newest / "average.safetensors").read_bytes())),
    "no optimizer": lambda newest: (newest / "optimizer.safetensors").unlink(),
    "no index": lambda newest: (newest / "index.json").unlink(),
    "an index of nothing": lambda newest: (newest / "index.json").write_text("[]"),
    "an empty state": lambda newest: rewritten(newest / "state.json", lambda data: b""),
    "a word for a number": lambda newest: rewritten(newest / "state.json", with_iteration("two")),
    "iteration -1": lambda newest: rewritten(newest / "state.json", with_iteration(-1)),
    "iteration 1": lambda newest: rewritten(newest / "state.json", with_iteration(1)),
    "iteration 10**9": lambda newest: rewritten(newest / "state.json", with_iteration(10**9)),
    "NaN parameters": lambda newest: rewritten(newest / "parameters.safetensors", tensors_like(lambda t: t * NAN)),
    "an infinite average": lambda newest: rewritten(newest / "average.safetensors", tensors_like(lambda t: t / 0)),
    "NaN moments": lambda newest: rewritten(newest / "optimizer.safetensors", tensors_like(lambda t: t * NAN)),
    "moments of another shape": lambda newest: rewritten(
        newest / "optimizer.safetensors", tensors_like(lambda t: t if t.dim() == 0 else t[:2].clone())),
    "half precision": lambda newest: rewritten(newest / "parameters.safetensors", tensors_like(lambda t: t.half())),
    "a file for a folder": lambda newest: (shutil.rmtree(newest), newest.write_text("")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys, damage):
    damage(put(tmp_path, 1, 2))
    fresh = state(steps=0)
    assert checkpoint.restore(tmp_path, fresh).iteration == 1
    assert fresh.parameters["w"].tolist() == [1, 1, 1] and "step_000002" in capsys.readouterr().err
    put(tmp_path, 3, keep=1)
    assert checkpoint.restore(tmp_path, fresh).iteration == 3


def test_where_no_checkpoint_is_good_each_is_named(tmp_path):
    newest = put(tmp_path, 1, 2)
    for path in (newest, tmp_path / "step_000001"):
        (path / "state.json").unlink()
    with pytest.raises(BadInput) as caught:
        checkpoint.restore(tmp_path, state())
    assert "step_000001" in str(caught.value) and "step_000002" in str(caught.value)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, gold in ((1, 0.2), (2, 0.7), (3, None), (4, 0.5), (5, 0.6)):
        put(tmp_path, step, keep=2, gold=gold)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert checkpoint.best(tmp_path) == ("step_000002", 0.7)
    put(tmp_path, 6, keep=2, gold=0.8)
    assert names(tmp_path) == ["step_000005", "step_000006"] and checkpoint.best(tmp_path)[0] == "step_000006"


def test_an_iteration_that_is_done_again_has_its_new_score(tmp_path):
    """As after a checkpoint that was damaged: what the one before it scored is gone with it."""
    put(tmp_path, 1, gold=0.2)
    put(tmp_path, 2, gold=0.7)
    put(tmp_path, 2, gold=0.5)
    assert checkpoint.best(tmp_path) == ("step_000002", 0.5)
    put(tmp_path, 3, 4, keep=1, gold=0.6)
    assert names(tmp_path) == ["step_000003", "step_000004"] and checkpoint.best(tmp_path)[0] == "step_000003"


def test_a_checkpoint_that_was_not_used_pushes_no_other_out(tmp_path):
    """Those of iterations to come, left by what could not be loaded, are not the newest of the run that goes on."""
    put(tmp_path, 8, 9)
    put(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000003", "unused_step_000008", "unused_step_000009"]


def test_what_a_kill_leaves_is_cleared_and_counts_for_nothing(tmp_path):
    put(tmp_path, 1)
    (tmp_path / ".step_000002.partial").mkdir()
    (tmp_path / ".step_000000.going").mkdir()
    (tmp_path / ".step_000001.old").mkdir()
    assert checkpoint.restore(tmp_path, state()).iteration == 1
    put(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_written_leaves_the_others(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000001"] and not list(tmp_path.glob(".*"))


def test_an_old_checkpoint_that_is_a_link_is_only_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    put(elsewhere, 1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step_000001").symlink_to(elsewhere / "step_000001")
    put(folder, 2, 3, keep=1)
    assert names(folder) == ["step_000003"] and (elsewhere / "step_000001" / "state.json").is_file()


def test_what_is_no_number_is_not_saved(tmp_path):
    put(tmp_path, 1)
    broken = state()
    with torch.no_grad():
        broken.parameters["w"][0] = torch.nan
    with pytest.raises(Unfit, match="w of its parameters"):
        checkpoint.save(tmp_path, take(Progress(2), broken, {}), keep=1)
    assert names(tmp_path) == ["step_000001"]


def test_a_snapshot_does_not_follow_training(tmp_path):
    stepper = state()
    before = stepper.parameters["w"].detach().clone()
    snapshot = take(Progress(1), stepper, {})
    stepper.parameters["w"].grad = torch.ones(3)
    stepper.step()
    checkpoint.save(tmp_path, snapshot, keep=1)
    fresh = state(steps=0)
    checkpoint.restore(tmp_path, fresh)
    assert torch.equal(fresh.parameters["w"], before) and fresh.average.optimizer_steps == 2


def test_what_the_saving_thread_meets_is_raised_where_it_is_waited_for():
    saver = Saver()

    def fail():
        raise OSError(28, "No space left on device")

    saver.start(fail)
    with pytest.raises(OSError, match="No space"):
        saver.wait()
    saver.wait()
    saver.start(fail)
    with pytest.raises(OSError, match="No space"):
        saver.start(lambda: None)
    saver.close()


def test_nothing_to_restore_is_a_fresh_start(tmp_path):
    assert checkpoint.restore(tmp_path, state()) == Progress()


def test_another_model_is_refused_and_left_alone(tmp_path):
    checkpoint.save(tmp_path, take(Progress(1), state(size=3), {}), keep=1)
    other = state(size=4)
    before = other.parameters["w"].detach().clone()
    with pytest.raises(BadInput) as caught:
        checkpoint.restore(tmp_path, other)
    assert torch.equal(other.parameters["w"], before)
    assert caught.value.field == "run.resume" and "step_000001" in str(caught.value)


def test_no_pickle_in_a_checkpoint(tmp_path):
    folder = checkpoint.save(tmp_path, take(Progress(1), state(), {}), keep=1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
