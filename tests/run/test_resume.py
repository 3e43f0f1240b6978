"""Going on with a run: from which checkpoint, alone in its folder, and not with other settings."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_runs import train

from tempflow.records.rows import read_metrics
from tempflow.run.lock import FolderLock


def same_weights(one: Path, other: Path, file: Path = Path("pytorch_lora_weights.safetensors")) -> bool:
    found = load_file(one / file), load_file(other / file)
    return found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_a_broken_checkpoint_is_named_and_the_one_before_used(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "pytorch_lora_weights.safetensors").unlink()
    (folder / "checkpoints" / "step_000004" / "parameters.safetensors").write_bytes(b"torn")
    assert train(folder, "run.resume=true", "learn.updates=2", "objective.kl=0.01") == 0
    assert "step_000004" in capsys.readouterr().err
    assert same_weights(folder, finished)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    for path in (folder / "checkpoints").glob("step_*"):
        (path / "index.json").write_text("{}")
    before = (folder / "config.yaml").read_bytes()
    assert train(folder, "run.resume=true", "learn.updates=2", "objective.kl=0.01", "learn.iterations=9") == 2
    assert "step_000004" in capsys.readouterr().err and (folder / "config.yaml").read_bytes() == before


def test_weights_that_a_kill_kept_from_being_written_are_written_on_resume(finished, tmp_path):
    """Between the last checkpoint and the weights; the run is over, and nothing would be learnt any more."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"of an earlier iteration")
    (folder / ".saving-abc").mkdir()
    assert train(folder, "run.resume=true", "learn.updates=2", "objective.kl=0.01") == 0
    assert same_weights(folder, finished) and not list(folder.glob(".saving-*"))


def test_resume_auto_begins_and_goes_on(tmp_path, capsys):
    folder = tmp_path / "run"
    auto = ("run.resume=auto", "prompts.test=null", "run.trackers=[]")
    assert train(folder, *auto, "learn.iterations=2") == 0
    assert train(folder, *auto, "learn.iterations=3") == 0
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert train(folder, *auto, "learn.iterations=3") == 0, "nothing is left to do"
    assert train(folder, *auto, "learn.iterations=2") == 2 and "learn.iterations=2" in capsys.readouterr().err
    assert train(folder, *auto, "learn.lr=1e-3") == 2 and "learn.lr=0.001" in capsys.readouterr().err
    shutil.rmtree(folder / "checkpoints")
    assert train(folder, *auto, "learn.iterations=4") == 2
    assert "run.resume=" in capsys.readouterr().err and len(read_metrics(folder / "metrics.jsonl")) == 4
    (folder / "checkpoints").write_text("")
    assert train(folder, *auto, "learn.iterations=4") == 2 and "checkpoints" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_yet_begins_again_alike(tmp_path, capsys):
    """The same chunks as before, though another size would be measured; and no other settings."""
    folder = tmp_path / "run"
    few = ("prompts.test=null", "run.trackers=[]", "learn.iterations=2", "tails.rows=auto")
    assert train(folder, *few) == 0
    first = read_metrics(folder / "metrics.jsonl")
    shutil.rmtree(folder / "checkpoints")
    (folder / "saved.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    start = json.loads(lines[0]) | {"tail_rows": 5}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(start), *lines[1:]]) + "\n")
    assert train(folder, "run.resume=true", *few, "learn.lr=1e-3") == 2 and "learn.lr" in capsys.readouterr().err
    assert train(folder, "run.resume=true", *few) == 0 and "no checkpoint yet" in capsys.readouterr().err
    again = read_metrics(folder / "metrics.jsonl")
    assert again[0]["tail_rows"] == 5 and [row["step"] for row in again] == [row["step"] for row in first]


def test_a_second_process_on_a_run_is_refused_and_changes_nothing(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    other = FolderLock(folder)
    other.take()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = ("learn.updates=2", "objective.kl=0.01", "learn.iterations=5")
    assert train(folder, "run.resume=true", *again) == 2
    assert "tempflow: run.dir=" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other.release()
    assert train(folder, "run.resume=true", *again) == 0


def test_a_child_that_outlives_its_run_keeps_nobody_out(tmp_path):
    lock, (born, told), (over, end) = FolderLock(tmp_path), os.pipe(), os.pipe()
    lock.take()
    child = os.fork()
    if not child:
        os.write(told, b"x")
        os.read(over, 1)
        os._exit(0)
    os.read(born, 1)
    lock.release()
    try:
        FolderLock(tmp_path).take()
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)
