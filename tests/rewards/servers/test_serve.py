"""A scorer's server, in this process: repeated requests, failing scorers, stalled senders, one call at a time."""

from __future__ import annotations

import asyncio
import threading
import time

import aiohttp
import pytest
from aiohttp import web
from scorer_faults import work

from tempflow.rewards.scorer import Scorer
from tempflow.rewards.servers import server as serve
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.server import ScorerServer
from tempflow.rewards.servers.wire import Request, pack_request

IMAGES, PROMPTS, _ = work(2)


class Counting:
    """Scores 0.25; keeps count of its calls, and of how many there were at once."""

    def __init__(self, failures: int = 0, seconds: float = 0.0) -> None:
        self.failures, self.seconds = failures, seconds
        self.calls = self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, images, prompts):
        with self.lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        if self.calls <= self.failures:
            raise RuntimeError("out of memory")
        return [0.25] * len(images)


def body(request_id: str, scorer: str = "counting") -> bytes:
    return b"".join(pack_request(Request(request_id, scorer, IMAGES, PROMPTS)))


def talk(conversation, *functions, requests: int = 16):
    """Runs `conversation(send, port)` with a server of scorers; send(id, scorer) posts a request, gives its status."""

    async def run():
        names = ("counting", "other")
        scorers = [Scorer("scorer", name, function, 64) for name, function in zip(names, functions, strict=False)]
        runner = web.AppRunner(ScorerServer(scorers, Limits(), requests, None).application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:

            async def send(request_id, scorer="counting"):
                url = f"http://127.0.0.1:{port}/score"
                async with session.post(url, data=body(request_id, scorer)) as answer:
                    return answer.status, await answer.read()

            try:
                return await asyncio.wait_for(conversation(send, port), 60)
            finally:
                await runner.cleanup()

    return asyncio.run(run())


def test_a_scorer_that_failed_once_is_asked_again_under_the_same_id():
    """A GPU out of memory must not make a request unanswerable for good."""

    async def conversation(send, port):
        return [(await send("id"))[0] for _ in range(3)]

    scorer = Counting(failures=1)
    assert talk(conversation, scorer) == [500, 200, 200] and scorer.calls == 2


@pytest.mark.parametrize("kept", [3, serve.REMEMBERED])
def test_answers_are_remembered_and_only_so_many(monkeypatch, kept):
    """The latest ones: a request sent again is scored once, however many came before it; the oldest is forgotten."""
    monkeypatch.setattr(serve, "REMEMBERED", kept)
    scorer = Counting()

    async def conversation(send, port):
        for number in range(kept + 2):
            await send(str(number))
        first = scorer.calls
        answers = {await send(str(number)) for number in range(kept + 1, 1, -1)}
        again = scorer.calls
        await send("0")
        return first, again, scorer.calls, len(answers)

    assert talk(conversation, scorer) == (kept + 2, kept + 2, kept + 3, kept)


def test_the_same_id_for_another_scorer_is_another_request():
    async def conversation(send, port):
        return [(await send("id", scorer))[0] for scorer in ("counting", "other", "counting")]

    scorers = Counting(), Counting()
    assert talk(conversation, *scorers) == [200] * 3 and [scorer.calls for scorer in scorers] == [1, 1]


def test_requests_sent_again_while_they_are_scored_are_scored_once():
    async def conversation(send, port):
        return await asyncio.gather(*(send("id") for _ in range(5)))

    scorer = Counting(seconds=0.2)
    answers = talk(conversation, scorer)
    assert {status for status, _ in answers} == {200} and len(set(answers)) == 1 and scorer.calls == 1


def test_a_scorer_is_called_by_one_request_at_a_time():
    """Most are not made for more. Different scorers do work beside one another."""
    both = threading.Barrier(2, timeout=20)

    def meets(images, prompts):
        both.wait()
        return [0.5] * len(images)

    async def overlap(send, port):
        return await asyncio.gather(*(send(str(number)) for number in range(6)))

    async def beside(send, port):
        return await asyncio.gather(send("id", "counting"), send("id", "other"))

    scorer = Counting(seconds=0.05)
    assert [status for status, _ in talk(overlap, scorer)] == [200] * 6
    assert scorer.calls == 6 and scorer.most == 1
    assert [status for status, _ in talk(beside, meets, meets)] == [200, 200]


@pytest.mark.parametrize("sent", [0, 40], ids=["head only", "half a body"])
def test_a_stalled_sender_gives_its_place_away(monkeypatch, sent):
    """One request at a time, and the first never arrives in full: it is refused, and the next one is served."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.3)
    whole = body("stalled")

    async def conversation(send, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole[:sent])
        await writer.drain()
        await asyncio.sleep(0.05)
        status, _ = await asyncio.wait_for(send("next"), 20)
        line = await asyncio.wait_for(reader.readline(), 20)
        writer.close()
        return status, line.split()[1]

    scorer = Counting()
    assert talk(conversation, scorer, requests=1) == (200, b"408") and scorer.calls == 1
