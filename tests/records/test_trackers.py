"""Trackers by use: what their own packages have stored of a resumed run, and what becomes of one that fails."""

import fcntl
import importlib.util
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import tracked_runs
from small_runs import train

from tempflow.common.errors import BadInput
from tempflow.records.gallery import Room, keep_small
from tempflow.records.rows import MetricsWriter
from tempflow.records.trackers import TRACKERS, Trackers, check_trackers
from tempflow.records.trackers.adapters import Opened, Tracker
from tempflow.records.trackers.told import flat_numbers, numbers_of
from tempflow.settings.fields import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def python_with(package: str) -> str:
    """An interpreter that has the package: this one, or that of TEMPFLOW_TRACKERS_PYTHON."""
    other = os.environ.get("TEMPFLOW_TRACKERS_PYTHON")
    if importlib.util.find_spec(package) is None and not other:
        pytest.skip(f"{package} is not installed (it and these constraints exclude each other): .ci/run tells how")
    return sys.executable if importlib.util.find_spec(package) is not None else str(other)


def environment(folder: Path) -> dict[str, str]:
    """No tracker finds a network, an account or a folder of the user's."""
    own = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "HOME": str(folder)}
    modes = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    return os.environ | own | modes | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_is_stored_once(name, tmp_path):
    """Four iterations, of which a checkpoint holds three; then from there to the sixth."""
    python, script = python_with(TRACKERS[name].package), str(ROOT / "tests" / "support" / "tracked_runs.py")
    folder = tmp_path / "Läufe (1)"
    for step in (0, 2, 4, 6):
        keep_small(folder, step, torch.full((2, 3, 20, 30), 9 * step, dtype=torch.uint8), Room(9, 1e6))
    for part in ([], ["3"], ["stored"]):
        done = subprocess.run([python, script, str(folder), name, *part], env=environment(tmp_path), cwd=tmp_path,
                              capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    stored = json.loads(done.stdout.splitlines()[-1])
    assert [point[:1] for point in stored["pictures"]] == [[0], [2], [4], [6]]
    assert {tuple(point[1:]) for point in stored.pop("pictures")} == {(60, 20)}, "two pictures side by side"
    assert len(set(stored.pop("ids", ["one"]))) == 1, "it is one run"
    expected: dict[str, list] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()[1:]):
        for key, value in numbers_of(line, "iteration" if "grad_norm" in line else "evaluation").items():
            expected.setdefault(key, []).append([line["step"], pytest.approx(value)])
    assert expected["reward_mean"] == [[step, step / 8] for step in range(1, 7)]
    assert expected["gold"] == [[step, step / 32] for step in (0, 2, 4, 6)]
    assert {key: sorted(points) for key, points in stored.items()} == expected


def test_every_word_of_the_setting_is_a_tracker():
    words = get_args(get_args(get_type_hints(RunConfig)["trackers"])[0])
    assert set(words) == set(TRACKERS)


def test_numbers_of_a_step_have_names_of_their_own():
    row = {"step": 3, "seconds": 1.0, "reward_mean": 0.5, "reward_std_per_step": [0.1, None, 0.3],
           "reward_means": {"one": 0.5, "two": None}, "phase_seconds": {"tails": 1.5}, "warnings": ["fall"],
           "picture_prompts": ["a seven"]}  # fmt: skip
    assert numbers_of(row, "iteration") == {
        "seconds": 1.0, "reward_mean": 0.5, "reward_std_per_step/0": 0.1, "reward_std_per_step/2": 0.3,
        "reward_means/one": 0.5, "phase_seconds/tails": 1.5,
    }  # fmt: skip
    row = {"step": 3, "seconds": 2.0, "gold": 0.5, "gold_fall": {"gold": 0.1}, "phase_seconds": {"evaluate": 1.5},
           "kinds": {"gold/counts": 0.25}}  # fmt: skip
    assert numbers_of(row, "evaluation") == {
        "evaluation/seconds": 2.0, "gold": 0.5, "gold_fall/gold": 0.1, "evaluation/phase_seconds/evaluate": 1.5,
        "gold/counts": 0.25,
    }  # fmt: skip
    assert flat_numbers({"a": "words", "b": None, "c": [None, 1]}) == {"c/1": 1}


@pytest.fixture
def told(monkeypatch) -> dict[str, list]:
    """Two trackers that remember what they were told; `fails` does not take an evaluation."""
    heard: dict[str, list] = {"works": [], "fails": []}

    def begin(name):
        def log(step, numbers, grid):
            if name == "fails" and "gold" in numbers and heard.get("broken", True):
                raise RuntimeError("no\nnetwork")
            heard[name].append((step, "gold" if "gold" in numbers else "reward"))

        return lambda run: Opened(log, lambda: heard[name].append("closed"))

    for name in heard:
        monkeypatch.setitem(TRACKERS, name, Tracker("json", begin(name), ""))
    return heard


def test_a_tracker_that_fails_is_told_later_what_it_lacks(tmp_path, capsys, told):
    writer = MetricsWriter(tmp_path, None, trackers=Trackers(tmp_path, ["fails", "works"]))
    for row in (tracked_runs.start(), tracked_runs.iteration(1), tracked_runs.evaluation(1), tracked_runs.iteration(2)):
        writer.write(row)
    writer.close()
    assert told["works"] == [(1, "reward"), (1, "gold"), (2, "reward"), "closed"] and told["fails"] == [(1, "reward")]
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1 and "run.trackers=fails: no network;" in warning
    told["broken"] = False
    again = MetricsWriter(tmp_path, 2, trackers=Trackers(tmp_path, ["fails", "works"]))
    again.write(tracked_runs.iteration(3))
    assert told["fails"][1:] == [(1, "gold"), (2, "reward"), (3, "reward")] and told["works"][4:] == [(3, "reward")]


def test_a_run_outlives_a_tracker_that_cannot_begin(tmp_path, capsys, monkeypatch):
    def begin(run):
        raise SystemExit("it could ask" if sys.stdin is before else "no account")

    before = sys.stdin
    monkeypatch.setitem(TRACKERS, "wandb", Tracker("json", begin, "log in"))
    assert train(tmp_path / "run", "run.trackers=[wandb,tensorboard]", "learn.iterations=1", "eval.prompts=2") == 0
    told = capsys.readouterr().err
    assert "run.trackers=wandb: no account; log in" in told and sys.stdin is before
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_at_a_terminal_asks_nothing(name, tmp_path):
    """There these would ask for an account, and wait for the answer without an end."""
    python, script = python_with(name), str(ROOT / "tests" / "support" / "tracked_runs.py")
    (tmp_path / "run").mkdir()
    ours, theirs = pty.openpty()
    own = {key: value for key, value in environment(tmp_path).items() if not key.endswith(("_MODE", "_API_KEY"))}
    with open(ours, "rb", buffering=0) as screen, subprocess.Popen(
        [python, script, str(tmp_path / "run"), name], env=own, cwd=tmp_path, stdin=theirs, stdout=theirs,
        stderr=theirs, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as run:  # fmt: skip
        os.close(theirs)
        try:
            run.wait(timeout=60)
        finally:
            run.kill()
        said = screen.read(2**16).decode()
    assert run.returncode == 0, said
    assert said.count(f"run.trackers={name}: ") == 1 and TRACKERS[name].hint in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, capsys, monkeypatch):
    """Neither is one of which only a folder of its name is there, as wandb leaves one where it was used."""
    monkeypatch.setitem(TRACKERS, "swanlab", Tracker("nowhere_to_be_found", lambda run: None, ""))
    (tmp_path / "nowhere_to_be_found").mkdir()
    for path in ([], [str(tmp_path)]):
        monkeypatch.setattr(sys, "path", sys.path + path)
        assert train(tmp_path / "run", "run.trackers=[swanlab]") == 2
        assert "run.trackers=swanlab: is not installed: pip install 'tempflow[" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    check_trackers(["tensorboard"])


def test_a_record_of_trackers_that_is_none(tmp_path):
    (tmp_path / "trackers.json").write_text("[1]")
    with pytest.raises(BadInput, match=r"trackers\.json"):
        Trackers(tmp_path)
