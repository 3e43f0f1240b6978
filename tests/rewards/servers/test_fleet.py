"""How a trainer uses its servers: which of them, for how long, in what portions, and never another one."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from scorer_faults import ROOT, post, running, same, work
from test_remote import TERMS, answer_once

from tempflow.common.errors import BadInput
from tempflow.rewards.panel import load_panels
from tempflow.rewards.servers import fleet as remote
from tempflow.rewards.servers.fleet import Fault, Fleet, Terms
from tempflow.rewards.servers.wire import Request
from tempflow.settings.fields import RewardConfig


@pytest.fixture(scope="module")
def faulty():
    with running(str(ROOT / "tests" / "support" / "scorer_faults.py"), "serve") as (_, url):
        yield url


def test_patience_counts_from_the_first_failure(faulty, monkeypatch):
    """A server that is well whenever asked and fails whenever used ends the run, though it never rests for long.

    100 failures take at least 5 s; the patience is over after a tenth of them.
    """
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
    images, prompts, _ = work()
    post(f"{faulty}/fault?name=500&times=100")
    with pytest.raises(BadInput, match=r"reward\.patience=0\.6 s"):
        Fleet([faulty], Terms(requests=1, timeout=5, patience=0.6)).score("bright", images, prompts, 23)
    assert 2 <= post(f"{faulty}/calls")["seen"] < 60


@pytest.mark.parametrize("status", [302, 307])
def test_redirects_are_not_followed(status):
    """Images, prompts and the token go to the servers that were named, whatever these say."""
    images, prompts, _ = work(2)
    with socket.create_server(("127.0.0.1", 0)) as named, socket.create_server(("127.0.0.1", 0)) as other:
        fleet = Fleet([f"http://127.0.0.1:{named.getsockname()[1]}"], TERMS, "secret")
        place = f"http://127.0.0.1:{other.getsockname()[1]}/"
        answer = f"HTTP/1.1 {status} Look there\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
        for ask in (lambda: fleet._attempt(fleet.servers[0], Request("i", "bright", images, prompts), 3),
                    lambda: fleet._ask(fleet.servers[0])):  # fmt: skip
            thread = threading.Thread(target=answer_once, args=(named, answer))
            thread.start()
            try:
                fleet._run(ask())
            except Fault as fault:
                assert str(fault).startswith(str(status))
            thread.join(10)
        assert fleet.servers[0].fault.startswith(str(status)) and not fleet.servers[0].well
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.accept()


def test_requests_go_to_the_least_busy_server(faulty):
    """Of two servers one answers late: it gets the smaller part of the work."""
    images, prompts, expected = work(60)
    with running(str(ROOT / "tests" / "support" / "scorer_faults.py"), "serve") as (_, late):
        fleet = Fleet([late, faulty], Terms(requests=4, timeout=20, patience=20))
        post(f"{faulty}/fault?name=500&times=0")
        post(f"{late}/fault?name=slow&times=1000")
        assert fleet.survey() == {"bright"} and all(server.well for server in fleet.servers)
        assert same(fleet.score("bright", images, prompts, 2), expected)
        seen = [post(f"{address}/calls")["seen"] for address in (late, faulty)]
    assert sum(seen) == 30 and 2 <= seen[0] <= 8


@pytest.mark.parametrize(("batch", "requests"), [(3, 8), (None, 5), (100, 1)])
def test_a_request_carries_as_many_images_as_set(faulty, batch, requests):
    """23 images: reward.batch in each, or as many as a scorer here would get (5)."""
    config = RewardConfig(name="bright", gold=None, servers=[faulty], batch=batch)
    rewards, _ = load_panels(config, 5, torch.device("cpu"))
    images, prompts, expected = work()
    post(f"{faulty}/fault?name=500&times=0")
    assert same(rewards(images, prompts)[0], expected)
    assert post(f"{faulty}/calls") == {"seen": requests, "scored": 23, "elsewhere": 0}
