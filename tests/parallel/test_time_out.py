"""A process that still waits for its scorer is not given up by those that wait for it."""

import multiprocessing
import os
import socket
import time

import pytest
import torch

from tempflow.common.clock import PhaseClock
from tempflow.parallel import ranks
from tempflow.train import main


class Joined(BaseException):
    pass


def test_collectives_wait_longer_than_scorers_may_take(monkeypatch):
    """A first attempt of reward.timeout, then reward.patience: only after that does a process save and end."""
    seen = {}

    def join(backend, **options):
        seen.update(options)
        raise Joined

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.dist, "init_process_group", join)
    for arguments in (["run.plan_only=true"], ["run.plan_only=false"]):
        seen.clear()
        with pytest.raises(Joined):
            main(["digits", "run.device=cpu", "reward.patience=9000", "reward.timeout=700", *arguments])
        assert seen["timeout"].total_seconds() > 9700 + 600


def meet(rank, port, place, lost):
    """A process whose partner never comes to the second meeting, and one that goes away before it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks.MARGIN = 0.0
    own = ranks.start("cpu", patience=2.0)
    clock = PhaseClock(own.device)
    own.gather(torch.ones(1), 0)
    try:
        with clock("learn"):
            if rank == 1:
                time.sleep(0 if lost else 6)
                os._exit(0)
            own.gather(torch.ones(1), 0)
    except RuntimeError as error:
        place.write_text(ranks.describe_loss(error))


@pytest.mark.parametrize("lost", [True, False])
def test_a_meeting_that_fails_names_process_and_phase(tmp_path, lost):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    place, fork = tmp_path / "line", multiprocessing.get_context("fork").Process
    both = [fork(target=meet, args=(rank, port, place, lost)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert place.read_text().startswith("process 0 of 2, in learn: ") and "\n" not in place.read_text()


def test_other_errors_are_not_taken_for_a_lost_process():
    assert ranks.describe_loss(RuntimeError("gloo")) is None, "there are no others"
