"""How a run ends before its time: by a signal, by a failure; what is saved then, what is said, and with which code."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempflow import train
from tempflow.__main__ import main as commands
from tempflow.commands.train import main
from tempflow.common import stopping
from tempflow.common.stopping import DONE, HALTED, STOPPED, STOPPING, Stopped, leave_with_parent
from tempflow.records.rows import read_metrics
from tempflow.run import checkpoint, keeping
from tempflow.run.checkpoint import checkpoints

SMALL = ["digits", "explore.prompts=2", "explore.noises=2", "explore.siblings=3", "explore.forks=[0,3]",
         "sample.steps=5", "learn.lr=3e-4", "learn.lr_schedule=constant", "learn.rows=2", "prompts.test=null",
         "learn.ema_every=1", "learn.iterations=4", "run.save_every=50", "run.trackers=[]", "tails.rows=8"]  # fmt: skip


def run(folder, *arguments):
    return main([*SMALL, f"run.dir={folder}", *arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder) == 0
    return folder


def goes_on_as_if_nothing_had_been(folder, undisturbed):
    assert run(folder, "run.resume=true") == 0
    one, other = (load_file(place / "pytorch_lora_weights.safetensors") for place in (folder, undisturbed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    rewards = [[row.get("reward_mean") for row in read_metrics(place / "metrics.jsonl")] for place in
               (folder, undisturbed)]  # fmt: skip
    assert rewards[0] == rewards[1]


def at(monkeypatch, iteration, work):
    """`work` is called as an iteration begins, once."""
    step, done = train.train_step, []

    def stepping(trainer, number):
        if number == iteration and not done:
            done.append(number)
            work(trainer)
        return step(trainer, number)

    monkeypatch.setattr(train, "train_step", stepping)


def saved(folder):
    return [int(path.name[5:]) for path in checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_lets_the_iteration_finish_and_saves_it(tmp_path, monkeypatch, capsys, undisturbed, number):
    before = signal.getsignal(number)
    at(monkeypatch, 1, lambda _: signal.raise_signal(number))
    assert run(tmp_path / "run") == STOPPED
    assert saved(tmp_path / "run") == [2] and "iteration 2 is saved" in capsys.readouterr().err
    assert signal.getsignal(number) == before and not list((tmp_path / "run").glob("error*"))


def test_a_run_under_nohup_does_not_hear_that_its_terminal_is_closed(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at(monkeypatch, 1, lambda _: signal.raise_signal(signal.SIGHUP))
        assert run(tmp_path / "run") == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_the_time_of_grace_the_iteration_before_is_saved(tmp_path, monkeypatch, capsys, undisturbed):
    def hang(_):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    at(monkeypatch, 2, hang)
    began = time.monotonic()
    assert run(tmp_path / "run", "run.grace=1") == STOPPED and time.monotonic() - began < 50
    assert saved(tmp_path / "run") == [2] and "iteration 2 is saved" in capsys.readouterr().err
    goes_on_as_if_nothing_had_been(tmp_path / "run", undisturbed)


def test_a_signal_before_the_loop_ends_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "set_up", lambda config: signal.raise_signal(signal.SIGTERM))
    assert run(tmp_path / "run") == STOPPED
    assert "SIGTERM" in capsys.readouterr().err and not (tmp_path / "run").exists()


FAILURES = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    "OSError": OSError(28, "No space left on device", "/somewhere/file"),
    "AssertionError": AssertionError(),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
def test_a_failure_of_any_kind_saves_what_was_learnt(tmp_path, monkeypatch, capsys, error):
    def fail(_):
        raise error

    at(monkeypatch, 2, fail)
    assert run(tmp_path / "run") == HALTED
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if "iteration 2 is saved" in line]
    assert line.startswith("tempflow: ") and "error.txt" in line and "Traceback" not in printed
    assert saved(tmp_path / "run") == [2] and "Traceback" in (tmp_path / "run" / "error.txt").read_text()


def test_a_failure_amid_updates_goes_back_to_the_last_checkpoint(tmp_path, monkeypatch, capsys, undisturbed):
    """Parameters of half an iteration are not saved as those of a whole one."""

    def fail(trainer):
        hook = trainer.stepper.optimizer.register_step_post_hook

        def failing(*_):
            raise RuntimeError("the device is gone")

        hook(failing)

    at(monkeypatch, 2, fail)
    assert run(tmp_path / "run", "run.save_every=1") == HALTED
    assert saved(tmp_path / "run") == [1, 2] and "iteration 2 is saved" in capsys.readouterr().err
    goes_on_as_if_nothing_had_been(tmp_path / "run", undisturbed)


def test_what_others_hold_shares_of_is_not_saved_by_one_alone(tmp_path, monkeypatch, capsys, undisturbed):
    """It would wait for them, who may be gone."""

    def fail(_):
        raise RuntimeError("the connection is gone")

    with monkeypatch.context() as patch:
        at(patch, 3, fail)
        patch.setattr(keeping, "take", lambda *_, **__: pytest.fail("all processes would have to gather this"))
        assert run(tmp_path / "run", "parallel.shard=full", "parallel.merged=whole") == HALTED
    printed = capsys.readouterr().err
    assert "iteration 3 could not be saved" in printed and "shares" in printed and not saved(tmp_path / "run")


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys, undisturbed):
    real = checkpoint._save_tensors

    def full(tensors, path):
        if "step_000002" in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save_tensors", full)
        assert run(tmp_path / "run", "run.save_every=1") == HALTED
    printed = capsys.readouterr().err
    assert "No space left on device" in printed and "Traceback" not in printed and 1 in saved(tmp_path / "run")
    goes_on_as_if_nothing_had_been(tmp_path / "run", undisturbed)


def blocked(place, aside):
    """A folder takes the place of a file."""

    def block(_):
        place.rename(aside)
        place.mkdir()

    return block


def test_metrics_that_cannot_be_written_lose_nothing(tmp_path, monkeypatch, capsys, undisturbed):
    place, aside = tmp_path / "run" / "metrics.jsonl", tmp_path / "aside"
    with monkeypatch.context() as patch:
        at(patch, 2, blocked(place, aside))
        assert run(tmp_path / "run", "run.save_every=1") == HALTED
    printed = capsys.readouterr().err
    assert place.name in printed and "Traceback" not in printed and 2 in saved(tmp_path / "run")
    place.rmdir()
    aside.rename(place)
    goes_on_as_if_nothing_had_been(tmp_path / "run", undisturbed)


def test_a_report_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, capsys):
    """A run is not given up for a picture, which can be drawn later."""
    place = tmp_path / "run" / "report.png"
    at(monkeypatch, 2, blocked(place, tmp_path / "aside"))
    assert run(tmp_path / "run", "run.save_every=1") == DONE and 4 in saved(tmp_path / "run")
    printed = capsys.readouterr().err
    assert "warning" in printed and "report.png cannot be written" in printed and "Traceback" not in printed
    place.rmdir()
    assert commands(["report", str(tmp_path / "run")]) == 0 and place.is_file()


def test_killed_amid_an_iteration_it_goes_on_bit_for_bit(tmp_path, undisturbed):
    folder = tmp_path / "run"
    root = Path(__file__).parents[2]
    began = subprocess.Popen([sys.executable, root / "tempflow" / "train.py", *SMALL, "run.save_every=1",
                              f"run.dir={folder}"], stderr=subprocess.DEVNULL)  # fmt: skip
    while began.poll() is None and not (folder / "saved.json").is_file():
        time.sleep(0.02)
    began.kill()
    began.wait()
    assert 1 <= json.loads((folder / "saved.json").read_text())["iteration"] <= 4
    goes_on_as_if_nothing_had_been(folder, undisturbed)


def test_a_rank_is_told_when_torchrun_is_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    (heard, said), (ready, told) = os.pipe(), os.pipe()
    torchrun = os.fork()
    if not torchrun:
        if os.fork():
            os.read(ready, 1)
            os._exit(0)
        signal.signal(signal.SIGTERM, lambda *_: (os.write(said, b"SIGTERM"), os._exit(0)))
        leave_with_parent()
        os.write(told, b"x")
        time.sleep(60)
        os._exit(1)
    os.waitpid(torchrun, 0)
    os.close(said)
    assert os.read(heard, 9) == b"SIGTERM"


@pytest.fixture
def ended(monkeypatch):
    """What the process would have said before it ended at once."""
    words = []
    monkeypatch.setattr(stopping, "end_now", words.append)
    return words


def test_the_second_signal_ends_at_once_and_one_delivered_twice_is_one(monkeypatch, ended):
    monkeypatch.setattr(stopping, "TWICE", 1.0)
    with STOPPING.listening(), STOPPING.finishing(60.0, lambda: True):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert STOPPING.asked_by == "SIGINT" and not ended
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
    assert len(ended) == 1 and "SIGTERM" in ended[0]


def test_after_the_time_of_grace_what_is_written_to_is_not_left(monkeypatch, ended):
    monkeypatch.setattr(stopping, "AGAIN", 0.05)
    written_to = [True, True, False]
    with pytest.raises(Stopped), STOPPING.listening(), STOPPING.finishing(0.05, lambda: not written_to.pop(0)):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
    assert not written_to


def test_nobody_is_asked_to_stop_by_what_came_before():
    with pytest.raises(Stopped), STOPPING.listening():
        signal.raise_signal(signal.SIGUSR1)
    assert STOPPING.asked_by is None
    with STOPPING.listening():
        assert STOPPING.asked_by is None
