"""A study that is asked to end: what becomes of the runs that are under way."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tempflow.common.stopping import TWICE
from tempflow.studies.compare.jobs import Job, Machine
from tempflow.studies.compare.pool import run_jobs

LISTENER = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True)

def saves(number, frame):
    (folder / "saved").write_text(signal.Signals(number).name)
    sys.exit(130)

signal.signal(signal.SIGINT, saves)
(folder / "listens").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("asked_by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_study_that_is_asked_to_end_leaves_no_run_behind(tmp_path, monkeypatch, asked_by):
    """As by Ctrl-C, `timeout`, a scheduler, or a terminal that is closed."""
    monkeypatch.setattr(Job, "command", lambda job: [sys.executable, "-c", LISTENER, str(job.folder)])
    jobs = [Job("a", seed, tmp_path / f"seed_{seed}", ("digits",), 1, 10) for seed in (1, 2, 3)]

    def ask() -> None:
        until(lambda: all((job.folder / "listens").is_file() for job in jobs[:2]))
        os.kill(os.getpid(), asked_by)

    before = signal.getsignal(asked_by)
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, Machine(()), 2, pause=0.05)
    assert [(job.folder / "saved").read_text() for job in jobs[:2]] == ["SIGINT"] * 2
    assert not jobs[2].folder.exists() and not any(job.is_finished() for job in jobs)
    assert signal.getsignal(asked_by) is before


DEAF = """
import signal, sys, time
from pathlib import Path
from tempflow.studies.compare.jobs import Job, Machine
from tempflow.studies.compare.pool import run_jobs
folder = Path(sys.argv[1])
child = ("import os, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
         "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(200)")
Job.command = lambda job: [sys.executable, "-c", child, str(folder / "pid")]
run_jobs([Job("a", 1, folder / "seed_1", ("digits",), 1, 10)], Machine(()), 1, pause=0.05)
"""


def test_a_second_signal_ends_runs_that_do_not_listen(tmp_path):
    study = subprocess.Popen([sys.executable, "-c", DEAF, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    for _ in range(2):
        study.send_signal(signal.SIGTERM)
        time.sleep(2 * TWICE)
    assert study.wait(20) == 130 and "the same command goes on with it" in study.stderr.read()
    run = int((tmp_path / "pid").read_text())
    until(lambda: not is_running(run))


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Not gone, nor a zombie that whoever adopted it has not looked after yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
